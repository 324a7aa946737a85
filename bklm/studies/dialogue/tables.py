"""The dialogue study's tables: arms, verdicts, contexts, facts, what was written, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bklm.harness.arms import claim, helps, nats_in_words
from bklm.harness.comparison import Column, Comparison, Trial, geometric_mean
from bklm.harness.statistics import Perplexity, interval95, with_interval

WAYS = ("scratch", "longer", "pretrained", "tuned", "replay")
FORGETS_LESS = "forgets less of the text with replay than tuned alone"
OTHERS = "all", "other", "1 after other"
WRITING = ("distinct_1", "distinct_2", "repeats_prompt", "ended", "words")
Rows = list[dict[str, Any]]


def _recalled(group: Sequence[Trial]) -> float | None:
    right, asked = (sum(v[n] for t in group for v in t["facts"].values()) for n in (0, 1))
    return right / asked if asked else None


ARMS = Comparison(
    by="arm", title=str, other="other arm", lowest="Lowest PPL of replies: {}, {}",
    columns=(
        Column("bits_per_byte", "bits_per_byte", "bits per byte", ".3f", spread=True),
        Column("all_tokens_ppl", geometric_mean("all_tokens_ppl"), "PPL of all tokens", ".2f"),
        Column("text_ppl", geometric_mean("text_ppl"), "PPL of the text", ".1f"),
        Column(
            "other_context_loss", "other_context_loss", "gain from its own turns, nats",
            lambda row: "-" if row["other_context_loss"] is None else _nats(row["other_context_loss"], None), spread=True,
        ),
        Column("recalled", _recalled, "facts recalled", ".1%"),
        Column("learning_rate", "learning_rate", "rate"),
        Column("parameters", "parameters", "parameters", ",.0f"),
        Column("seconds", "seconds", "seconds", ".1f"),
    ),
)  # fmt: skip


def context_rows(trials: Sequence[Trial]) -> Rows:
    """One row per arm: perplexity of the same replies behind each context, and the paired differences that decide."""
    rows = []
    for arm, group in ARMS.groups(trials).items():
        row: dict[str, Any] = {"arm": arm}
        for name in group[0]["contexts"]:
            row[f"turns_{name.replace(' ', '_')}"] = Perplexity.over_seeds(
                [math.exp(t["contexts"][name]) for t in group]
            ).mean
        for key, less in (("own_turns_gain", "other"), ("earlier_turns_gain", "1 after other")):
            mean, half = interval95([t["contexts"][less] - t["contexts"]["all"] for t in group])
            row |= {key: mean, f"{key}_95": half}
        rows.append(row)
    return rows


def readable_contexts(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """The same for people."""
    return [
        {"arm": r["arm"]}
        | {_context_in_words(k): f"{v:.2f}" for k, v in r.items() if k.startswith("turns_")}
        | {
            "own turns less another's, nats (95%)": _nats(-r["own_turns_gain"], r["own_turns_gain_95"]),
            "of those before the last": _nats(-r["earlier_turns_gain"], r["earlier_turns_gain_95"]),
        }
        for r in rows
    ]


def _nats(mean: float, half: float | None) -> str:
    # Without the sign of a rounded zero.
    return with_interval(round(mean, 3) + 0.0, half, 3)


def _context_in_words(key: str) -> str:
    name = key.removeprefix("turns_").replace("_", " ")
    known = {"all": "all turns", "other": "another dialogue's", "1 after other": "its last after another's"}
    return known.get(name, f"{name} turn{'s' * (name != '1')}")


def fact_rows(trials: Sequence[Trial]) -> Rows:
    """One row per arm: share of right facts by turns back, over seeds; [] without facts."""
    rows = []
    for arm, group in ARMS.groups(trials).items():
        row: dict[str, Any] = {"arm": arm}
        for back in group[0]["facts"]:
            mean, half = interval95([t["facts"][back][0] / t["facts"][back][1] for t in group])
            row |= {f"recalled_{back}": mean, f"recalled_{back}_95": half}
        rows += [row] if len(row) > 1 else []
    return rows


def readable_facts(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """The same for people, in percent."""
    return [
        {"arm": r["arm"]}
        | {
            f"{key[9:]} back": with_interval(
                100 * r[key], half if (half := r[f"{key}_95"]) is None else 100 * half, 0
            )
            + "%"
            for key in distances(r)
        }
        for r in rows
    ]


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
    """What the first seed's models wrote to the same prompts; prompt n with the seed n."""
    rows = []
    for arm, group in ARMS.groups(trials).items():
        rows += [
            {
                "seed": n,
                "arm": arm,
                "asked": r["prompt"][:160],
                "replied": r["target"][:160],
                "written": " ".join(r["written"].split()),
            }
            for n, r in enumerate(group[0]["replies"])
        ]
    return sorted(rows, key=lambda r: r["seed"])


def claims_table(
    trials: Sequence[Trial], verdicts: Sequence[Mapping[str, Any]], contexts: Rows, facts: Rows, mixture: Mapping[str, Any],
    guessed: Mapping[str, float],
) -> list[dict[str, str]]:  # fmt: skip
    """Rows announced, measured, verdict: what pretraining brings, who uses earlier turns, who beats counting, what stays.

    ``guessed`` holds by turns back the share of right facts of who guesses among the names told.
    """
    rows = []
    for name in dict.fromkeys(r["arm"].split()[0] for r in contexts):
        own = [r for r in verdicts if r["arm"] == f"{name} tuned"]
        told = "; ".join(f"{r['arm']} - {r['against']}: {nats_in_words(r, 3)} nats" for r in own)
        rows.append(claim(f"{name}: pretraining helps dialogue", told, helps(verdicts, f"{name} tuned")))
    for row in (r for r in contexts if r["arm"].endswith(" tuned")):
        mean, half = row["own_turns_gain"], row["own_turns_gain_95"]
        told = (
            f"PPL {row['turns_all']:.2f} with its own turns, {row['turns_other']:.2f} with another dialogue's, "
        )
        told += f"{row['turns_0']:.2f} with none: {_nats(mean, half)} nats"
        holds = None if half is None else mean - half > 0
        name = row["arm"].split()[0]
        rows.append(claim(f"{name} uses its context, the turn that it answers included", told, holds))
        mean, half = row["earlier_turns_gain"], row["earlier_turns_gain_95"]
        told = f"{_nats(mean, half)} nats over the turn that it answers behind another dialogue's"
        rows.append(
            claim(f"{name} uses the turns before that", told, None if half is None else mean - half > 0)
        )
    for row in (r for r in facts if r["arm"].endswith(" tuned")):
        above = [
            k[9:]
            for k in distances(row)
            if row[f"{k}_95"] is not None and row[k] - row[f"{k}_95"] > guessed[k[9:]]
        ]
        judged = all(row[f"{k}_95"] is not None for k in distances(row))
        told = f"above guessing among the names told beyond the interval at {', '.join(above) or 'none'} of "
        told += f"{len(distances(row))} distances in turns: "
        told += ", ".join(f"{row[k]:.0%} ({guessed[k[9:]]:.0%})" for k in distances(row))
        holds = len(above) == len(distances(row)) if judged else None
        rows.append(
            claim(
                f"{row['arm'].split()[0]} recalls facts from 1 to {distances(row)[-1][9:]} turns back",
                told,
                holds,
            )
        )
    best = ARMS.best(trials)
    reached = ARMS.perplexity(ARMS.groups(trials)[best])
    told = f"{best} {reached}; {mixture['name']} {mixture['val_ppl']:.2f}"
    beats = reached.high < mixture["val_ppl"] if reached.is_judged else None
    return [*rows, claim("the best model beats counting", told, beats), *_forgotten(trials)]


def _forgotten(trials: Sequence[Trial]) -> list[dict[str, str]]:
    """Per model: whether replay costs less of the text than tuning alone does. That nothing is lost is no claim."""
    rows, groups = [], ARMS.groups(trials)
    for name in dict.fromkeys(arm.split()[0] for arm in groups):
        scores = [groups.get(f"{name} {way}") for way in ("pretrained", "tuned", "replay")]
        if None in scores or len({len(group) for group in scores}) > 1:
            continue
        before, tuned, replay = ([t["text_ppl"] for t in group] for group in scores)
        ratio = Perplexity.ratio_over_seeds(tuned, replay)
        told = ", ".join(
            f"{way} {Perplexity.over_seeds(v)}"
            for way, v in (("pretrained", before), ("tuned", tuned), ("replay", replay))
        )
        told = f"PPL of the text: {told}; tuned alone {ratio} times that with replay"
        holds = ratio.low > 1 if ratio.is_judged else None
        rows.append(claim(f"{name} {FORGETS_LESS}", told, holds))
    return rows


def contexts_in_words(contexts: Rows) -> str:
    """What another dialogue's turns in place of its own cost each tuned model."""
    told = [f"{r['arm'].split()[0]} {_nats(r['own_turns_gain'], r['own_turns_gain_95'])}"
            for r in contexts if r["arm"].endswith(" tuned")]  # fmt: skip
    return f"Another dialogue's turns in place of its own cost, in nats a token: {', '.join(told)}"


def facts_in_words(facts: Rows, guessed: Mapping[str, float]) -> str:
    """Up to how many turns back each tuned model recalls facts better than guessing among the names told: beyond the
    interval, at every distance before."""
    told = []
    for row in (r for r in facts if r["arm"].endswith(" tuned")):
        ends = [
            None if row[f"{k}_95"] is None else row[k] - row[f"{k}_95"] - guessed[k[9:]] for k in distances(row)
        ]
        far = next((n for n, end in enumerate(ends) if end is None or end <= 0), len(ends))
        said = f"up to {far} turn{'s' * (far > 1)} back" if far else "nowhere"
        told.append(f"{row['arm'].split()[0]} {'no verdict' if None in ends else said}")
    return f"Facts recalled better than by guessing among the names told: {', '.join(told)}"
