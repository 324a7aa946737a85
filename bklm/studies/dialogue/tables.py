"""The dialogue study's tables: arms, verdicts, contexts, facts, what was written, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import Holds, claim, helps, is_below, nats_in_words
from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean
from bklm.harness.statistics import Perplexity, interval95, with_interval

WAYS = ("scratch", "longer", "pretrained", "tuned", "replay")
FORGETS_LESS = "forgets less of the text with replay than tuned alone"
LEARNT = 3  # distances of those that are asked, from which on a model has learnt to look facts up
# With turns before the one they answer, for a verdict on what these are worth.
FEWEST_REPLIES = 30
CONTROL = "The positive control"
NOTHING_TO_TEACH = "; the grammar's words are drawn at random, and prose has nothing to teach about them"
WRITING = ("distinct_1", "distinct_2", "repeats_prompt", "ended", "words")
Rows = list[dict[str, Any]]


def _recalled(group: Sequence[Trial]) -> float | None:
    right, asked = (sum(v[n] for t in group for v in t["facts"].values()) for n in (0, 1))
    return right / asked if asked else None


ARMS = Comparison(
    by="arm", title=str, other="other arm", lowest="Lowest PPL of replies: {}, {}",
    columns=(
        Column("bits_per_byte", "bits_per_byte", "bits per byte", ".3f", spread=True),
        Column("test_ppl", geometric_mean("test_ppl"), "test PPL", lambda row: _ppl(row["test_ppl"])),
        Column("all_tokens_loss", "all_tokens_loss", "nats a token, users' turns too", ".2f"),
        Column("text_loss", "text_loss", "nats a token of the text", ".2f"),
        Column(
            "other_context_loss", "other_context_loss", "gain from its own turns, nats",
            lambda row: "-" if row["other_context_loss"] is None else _nats(row["other_context_loss"], None), spread=True,
        ),
        Column("recalled", _recalled, "facts recalled", ".1%"),
        Column("learning_rate", "learning_rate", "rate"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("word_share", "word_share", "of them embedding and head", ".0%"),
    ),
)  # fmt: skip


def context_rows(trials: Sequence[Trial]) -> Rows:
    """One row per arm: perplexity of the same replies behind each context, and the paired differences that decide."""
    rows = []
    for arm, group in ARMS.groups(trials).items():
        row: dict[str, Any] = {"arm": arm}
        for name in group[0]["contexts"]:
            found = Perplexity.over_seeds([math.exp(t["contexts"][name]) for t in group])
            key = name.replace(" ", "_")
            row |= {f"turns_{key}": found.mean, f"ppl_{key}_low": found.low, f"ppl_{key}_high": found.high}
        for key, less in (("own_turns_gain", "other"), ("earlier_turns_gain", "1 after other")):
            mean, half = interval95([t["contexts"][less] - t["contexts"]["all"] for t in group])
            row |= {key: mean, f"{key}_95": half}
        rows.append(row)
    return rows


def readable_contexts(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """The same for people."""
    return [
        {"arm": r["arm"]}
        | {_context_in_words(k): _ppl(v) for k, v in r.items() if k.startswith("turns_")}
        | {
            "own turns less another's, nats (95%)": _nats(-r["own_turns_gain"], r["own_turns_gain_95"]),
            "of those before the last": _nats(-r["earlier_turns_gain"], r["earlier_turns_gain_95"]),
        }
        for r in rows
    ]


def _ppl(value: float | None) -> str:
    return "-" if value is None else str(Perplexity(value, None, None))


def _nats(mean: float, half: float | None) -> str:
    # Without the sign of a rounded zero.
    return with_interval(round(mean, 3) + 0.0, half, 3)


def _context_in_words(key: str) -> str:
    name = key.removeprefix("turns_").replace("_", " ")
    known = {"all": "all turns", "other": "another dialogue's", "1 after other": "its last after another's"}
    return known.get(name, f"{name} turn{'s' * (name != '1')}")


def fact_rows(trials: Sequence[Trial]) -> Rows:
    """One row per arm: share of right facts by turns back, over seeds; [] without facts.

    The interval holds the chance of the seeds and that of the facts, which are the same for every seed: the half-width of the
    t-interval and that of the facts' binomial share (Agresti and Coull 1998), added as squares.
    """
    rows = []
    for arm, group in ARMS.groups(trials).items():
        row: dict[str, Any] = {"arm": arm}
        for back in group[0]["facts"]:
            mean, half = interval95([t["facts"][back][0] / t["facts"][back][1] for t in group])
            count = min(t["facts"][back][1] for t in group) + 4
            share = (mean * (count - 4) + 2) / count
            of_facts = 1.96 * math.sqrt(share * (1 - share) / count)
            half = None if half is None else math.hypot(half, of_facts)
            row |= {f"recalled_{back}": mean, f"recalled_{back}_95": half}
        rows += [row] if len(row) > 1 else []
    return rows


def readable_facts(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """The same for people, in percent."""

    def percent(row: Mapping[str, Any], key: str) -> str:
        half = row[f"{key}_95"]
        return with_interval(100 * row[key], None if half is None else 100 * half, 0) + "%"

    return [{"arm": r["arm"]} | {f"{k[9:]} back": percent(r, k) for k in distances(r)} for r in rows]


def distances(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row of ``fact_rows`` that hold a share."""
    return [k for k in row if k.startswith("recalled_") and not k.endswith("_95")]


def writing_rows(trials: Sequence[Trial]) -> Rows:
    """One row per arm: measures of the replies that were written."""
    return [
        {"arm": arm} | {key: interval95([t["writing"][key] for t in group])[0] for key in WRITING}
        for arm, group in ARMS.groups(trials).items()
    ]


def readable_writing(rows: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        {
            "arm": r["arm"], "distinct words": f"{r['distinct_1']:.1%}", "distinct pairs": f"{r['distinct_2']:.1%}",
            "repeat the prompt": f"{r['repeats_prompt']:.1%}", "end by themselves": f"{r['ended']:.1%}",
            "words a reply": f"{r['words']:.1f}",
        }
        for r in rows
    ]  # fmt: skip


def reply_table(trials: Sequence[Trial]) -> Rows:
    """What the first seed's tuned models wrote to the same prompts; prompt n with the seed n."""
    groups = {arm: group for arm, group in ARMS.groups(trials).items() if arm.endswith(" tuned")}
    rows = [
        {"seed": n, "arm": arm, "asked": r["prompt"][:160], "replied": r["target"][:160],
         "written": " ".join(r["written"].split())}
        for arm, group in groups.items() for n, r in enumerate(group[0]["replies"])
    ]  # fmt: skip
    return sorted(rows, key=lambda r: r["seed"])


def rivals(trials: Sequence[Trial], way: str = "") -> list[Trial]:
    """Those that were trained to reply, in this way or in any: a pretrained model was not."""
    return [t for t in trials if t["arm"].endswith(way) and not t["arm"].endswith(" pretrained")]


def claims_table(
    trials: Sequence[Trial], verdicts: Sequence[Mapping[str, Any]], contexts: Rows, facts: Rows, mixture: Mapping[str, Any],
    chance: float | None, replies: tuple[int, int],
) -> list[dict[str, str]]:  # fmt: skip
    """Rows announced, measured, verdict: what pretraining brings, who uses earlier turns, who beats counting, what stays.

    ``verdicts`` of a tuned model are those against its own controls, and against the other tuned models. ``chance`` is the
    share of right facts of who remembers nothing, None but for the grammar: there a text has nothing to teach, so that
    pretraining and forgetting get no verdict. ``replies``: how many stand behind other contexts, and how many of them have
    turns before the one they answer; where these are few, what they are worth has no verdict.
    """
    rows, aside = [], "" if chance is None else NOTHING_TO_TEACH
    for name in dict.fromkeys(r["arm"].split()[0] for r in contexts):
        own = [r for r in verdicts if r["arm"] == f"{name} tuned" and r["against"].split()[0] == name]
        told = "; ".join(f"{r['arm']} - {r['against']}: {nats_in_words(r, 3)} nats" for r in own) + aside
        rows.append(
            claim(f"{name}: pretraining helps dialogue", told, None if aside else helps(own, f"{name} tuned"))
        )
    for row in (r for r in contexts if r["arm"].endswith(" tuned")):
        rows += _uses_turns(row, *replies)
    if facts:
        rows += _recalls(facts, chance)
    if tuned := rivals(trials, " tuned"):
        best = ARMS.best(tuned)
        others = [r for r in verdicts if r["arm"] == best and r["against"].split()[0] != best.split()[0]]
        told = "; ".join(f"{best} - {r['against']}: {nats_in_words(r, 3)} nats" for r in others)
        announced = f"{best.split()[0]} is the best of the tuned models"
        rows += [claim(announced, told, helps(others, best))] if others else []
    best = ARMS.best(rivals(trials))
    reached = Perplexity.over_seeds([t["test_ppl"] for t in ARMS.groups(trials)[best]])
    told = f"on the test split, {best}, chosen on validation: {reached}; {mixture['name']}: {mixture['test_ppl']:.2f}"
    beats = is_below(*reached.interval, mixture["test_ppl"])
    return [*rows, claim("the best model beats counting", told, beats), *_forgotten(trials, aside)]


def _uses_turns(row: Mapping[str, Any], replies: int, deep: int) -> list[dict[str, str]]:
    name, (mean, half) = row["arm"].split()[0], (row["own_turns_gain"], row["own_turns_gain_95"])
    told = f"PPL {row['turns_all']:.2f} with its own turns, {row['turns_other']:.2f} with another dialogue's, "
    told += f"{row['turns_0']:.2f} with none: {_nats(mean, half)} nats"
    first = _gain_claim(f"{name} uses its context, the turn that it answers included", told, mean, half)
    mean, half = row["earlier_turns_gain"], row["earlier_turns_gain_95"]
    told = f"{_nats(mean, half)} nats over the turn that it answers behind another dialogue's"
    if deep < FEWEST_REPLIES:
        told, half = f"{told}; {deep} of {replies} replies have any", None
    return [first, _gain_claim(f"{name} uses the turns before that", told, mean, half)]


def _gain_claim(announced: str, measured: str, mean: float, half: float | None) -> dict[str, str]:
    """A gain that may be none: an interval that holds 0 shows neither."""
    return claim(announced, measured, _above_zero(mean, half))


def _above_zero(mean: float, half: float | None) -> Holds:
    return None if half is None else is_below(-mean - half, half - mean)


def _above(row: Mapping[str, Any], chance: float) -> list[str] | None:
    """At which distances a share lies above chance beyond its interval; None where there is no interval."""
    if any(row[f"{k}_95"] is None for k in distances(row)):
        return None
    return [k[9:] for k in distances(row) if row[k] - row[f"{k}_95"] > chance]


def _recalls(facts: Rows, chance: float) -> list[dict[str, str]]:
    """The positive control, of all arms, and each tuned model's claim."""
    found = {r["arm"]: (r, _above(r, chance)) for r in facts}
    last = distances(facts[0])[-1][9:]

    def told(arm: str) -> str:
        row, above = found[arm]
        shares = ", ".join(f"{row[k]:.0%}" for k in distances(row))
        judged = "" if above is None else f"; above it beyond the interval at {', '.join(above) or 'none'}"
        return f"{arm}: {shares} of the facts 1 to {last} turns back; chance {chance:.0%}{judged}"

    def judged(announced: str, arm: str, least: int) -> dict[str, str]:
        above = found[arm][1]
        farther = _farther(facts, arm, chance)
        also = f"; {farther} turns back" if farther else ""
        return claim(announced, told(arm) + also, None if above is None else len(above) >= least)

    most = max(found, key=lambda arm: sum(found[arm][0][k] for k in distances(found[arm][0])))
    control = f"{CONTROL}: a model learns here to look facts up, at {LEARNT} distances or more"
    tuned = {
        f"{a.split()[0]} recalls facts from 1 to {last} turns back": a for a in found if a.endswith(" tuned")
    }
    return [
        judged(control, most, LEARNT),
        *(judged(words, a, len(distances(facts[0]))) for words, a in tuned.items()),
    ]


def _forgotten(trials: Sequence[Trial], aside: str) -> list[dict[str, str]]:
    """Per model: whether replay costs less of the text than tuning alone does. That nothing is lost is no claim."""
    rows, groups = [], ARMS.groups(trials)
    for name in dict.fromkeys(arm.split()[0] for arm in groups):
        scores = {way: groups.get(f"{name} {way}") for way in ("pretrained", "tuned", "replay")}
        if None in scores.values() or len({len(group) for group in scores.values()}) > 1:
            continue
        nats = {way: [t["text_loss"] for t in group] for way, group in scores.items()}
        mean, half = interval95([a - b for a, b in zip(nats["tuned"], nats["replay"], strict=True)])
        told = ", ".join(f"{way} {with_interval(*interval95(found), 2)}" for way, found in nats.items())
        told = f"nats a token of the text: {told}; tuned alone {_nats(mean, half)} more than with replay{aside}"
        rows.append(claim(f"{name} {FORGETS_LESS}", told, None if aside else _above_zero(mean, half)))
    return rows


def contexts_in_words(contexts: Rows) -> str:
    """What the turns before the one that is answered are worth to each tuned model."""
    told = [f"{r['arm'].split()[0]} {_nats(r['earlier_turns_gain'], r['earlier_turns_gain_95'])}"
            for r in contexts if r["arm"].endswith(" tuned")]  # fmt: skip
    return f"Turns before the one that is answered are worth, in nats a token: {', '.join(told)}"


def facts_in_words(facts: Rows, chance: float) -> str:
    """Up to how many turns back each tuned model recalls facts above chance: beyond the interval, at every distance before.

    Where no arm of any kind learnt to look facts up, that the grammar then says nothing of who could.
    """
    told, found = [], {row["arm"]: _above(row, chance) for row in facts}
    for arm, above in found.items():
        far = _reach(facts, above)
        reached = f"up to {far} turn{'s' * (far > 1)} back" if far else "nowhere"
        farther = _farther(facts, arm, chance)
        said = "no verdict" if above is None else f"{reached} ({farther})" if farther else reached
        told += [f"{arm.split()[0]} {said}"] if arm.endswith(" tuned") else []
    failed = all(above is not None and len(above) < LEARNT for above in found.values())
    nothing = f". {CONTROL} failed: no model learnt to look facts up, and who could is not known"
    return f"Facts recalled above chance ({chance:.0%}): {', '.join(told)}{nothing * failed}"


def _reach(facts: Rows, above: Sequence[str] | None) -> int:
    """How many of the distances are above chance, from the first without a gap."""
    asked = [k[9:] for k in distances(facts[0])]
    return next((n for n, k in enumerate(asked) if k not in (above or ())), len(asked))


def _farther(facts: Rows, arm: str, chance: float) -> str:
    """ "ResNetBK longer up to 8": the arm of the same model that reaches farthest, where farther than this one, or ""."""
    own = {r["arm"]: _reach(facts, _above(r, chance)) for r in facts if r["arm"].split()[0] == arm.split()[0]}
    best = max(own, key=own.get)
    return f"{best} up to {own[best]}" if own[best] > own[arm] else ""
