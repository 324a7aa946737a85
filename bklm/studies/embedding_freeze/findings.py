"""What the embedding-freeze study found, in sentences made of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from bklm.harness.comparison import Trial
from bklm.harness.statistics import FEWEST_SEEDS, Perplexity, interval95
from bklm.studies.embedding_freeze.config import FACTORS, ORIGINAL_ARMS, PHASE1_ARMS
from bklm.studies.embedding_freeze.tables import (
    ACTIONS,
    ARMS,
    arm_table,
    effect,
    in_cells,
    paired,
    phase1_effects,
    verdict,
)
from bklm.training.context_gain import BIGRAM_GAIN

# Training tokens per trained parameter; Hoffmann et al. 2022, for models trained once over their data.
RULE = 20
NOUNS = {"initialisation": "pretraining", "freezing": "freezing", "head": "tying"}


def state_finding(trials: Sequence[Trial]) -> str:
    """Whether freezing, pretraining or tying made the difference, from the paired effects; then what diverged."""
    ratios = {factor: ratio for factor in FACTORS if (ratio := effect(trials, factor)) is not None}
    diverged = ARMS.diverged(in_cells(trials))
    if not ratios:
        why = (
            "No two arms that differ in one factor finished the same seed"
            if diverged
            else "No factor was varied"
        )
        return f"{why}, so nothing can be said of freezing, pretraining or tying.{diverged}"
    seeds = max(len(paired(trials, factor)[0]) for factor in ratios)
    if seeds < FEWEST_SEEDS:
        listed = ", ".join(f"{ACTIONS[f]} x{r}" for f, r in ratios.items())
        few = "one seed, so no interval" if seeds == 1 else "two seeds, so ranges, no interval"
        return f"Validation PPL changes by: {listed}; {few} and no verdict.{diverged}"
    made = [f for f in ratios if verdict(ratios[f]) in ("lower", "higher")]
    made.sort(key=lambda f: -abs(math.log(ratios[f].mean)))
    none = [f for f in ratios if verdict(ratios[f]) == "no difference"]
    parts = []
    if made:
        listed = "; ".join(f"{ACTIONS[f]} gives a {verdict(ratios[f])} PPL, x{ratios[f]}" for f in made)
        nouns = _and([NOUNS[f] for f in made]).capitalize()
        parts.append(f"{nouns} made a difference over {seeds} paired seeds: {listed}")
    if none:
        listed = "; ".join(f"{ACTIONS[f]}, x{ratios[f]}" for f in none)
        parts.append(f"not told apart by the 95% interval: {listed}")
    if unjudged := [ACTIONS[f] for f in ratios if f not in (*made, *none)]:
        parts.append(f"no verdict, because a perplexity is too large to be recorded: {', '.join(unjudged)}")
    sentence = "; ".join(parts)
    own = effect(trials, "freezing", {"initialisation": "pretrained", "head": "tied"})
    if own is not None:
        judged = {"lower": "freezing is better", "higher": "freezing is worse"}.get(verdict(own), verdict(own))
        sentence += (
            f". A pretrained tied embedding, the original's, frozen instead of trained: x{own}, {judged}"
        )
    sentence += _state_interactions(trials)
    return f"{sentence[0].upper()}{sentence[1:]}.{diverged}"


def _state_interactions(trials: Sequence[Trial]) -> str:
    """Effects that differ, beyond their intervals, with the value of another factor: where they do, a mean says little."""
    parts = []
    for factor, by in (("freezing", "head"), ("freezing", "initialisation"), ("head", "initialisation")):
        ratios = {value: effect(trials, factor, {by: value}) for value in FACTORS[by]}
        if any(ratio is None or not ratio.is_judged for ratio in ratios.values()):
            continue
        low, high = sorted(ratios.values(), key=lambda ratio: ratio.mean)
        if low.high < high.low and high.mean > 1.01 * low.mean:
            noun = "head" if by == "head" else "embedding"
            articles = {value: "an" if value[0] in "aeiou" else "a" for value in ratios}
            listed = " and ".join(f"x{r} with {articles[v]} {v} {noun}" for v, r in ratios.items())
            why = " (frozen and tied, the output matrix is frozen too)" if by == "head" else ""
            parts.append(f"{ACTIONS[factor]} gives {listed}{why}")
    return f". These means hide that it depends: {'; '.join(parts)}" if parts else ""


def _and(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def headline(trials: Sequence[Trial]) -> str:
    """The finding in a figure's title."""
    ratios = {factor: ratio for factor in FACTORS if (ratio := effect(trials, factor)) is not None}
    listed = ", ".join(
        f"{NOUNS[f]} x{Perplexity(r.mean, None, None)} ({verdict(r)})" for f, r in ratios.items()
    )
    said = f"Effect on validation PPL: {listed}" if listed else "Validation PPL by arm"
    return said + ARMS.diverged_in_short(in_cells(trials))


def state_original(trials: Sequence[Trial]) -> str:
    """What the original's unequal comparison gives here, beside what it reported; "" where it was not run."""
    found = ARMS.groups(in_cells(trials))
    parts = []
    for samples in sorted({t["samples"] for t in trials}):
        groups = [found.get((arm.name, samples)) for arm in ORIGINAL_ARMS]
        if all(groups):
            frozen, trained = (ARMS.perplexity(group).mean for group in groups)
            change = frozen / trained - 1
            parts.append(f"{abs(change):.0%} {'lower' if change < 0 else 'higher'} with {samples} samples")
    if not parts:
        return ""
    return (
        f"The original's unequal comparison, repeated here: PPL of its frozen arm {_and(parts)} than of the other; "
        "reported by the original: 72% lower with 500, 67% lower with 1000."
    )


def state_phase1_arms(trials: Sequence[Trial]) -> str:
    """Whether phase 1 helps: what other or no phase 1 does to the same arm; "" where that was not run."""
    rows = phase1_effects(trials)
    if not rows:
        return ""
    ratios = [Perplexity(r["ratio"], r["ratio_low"], r["ratio_high"]) for r in rows]
    told = [f"{r['change']} x{ratio}, {r['verdict']}" for r, ratio in zip(rows, ratios, strict=True)]
    stand_ins = (("untrained", "phase 1"), ("diversity", "its fixed point"))
    said = ", ".join(_of_stand_in(rows, *one) for one in stand_ins)
    # Another model, trained by the whole of phase 1.
    first = [t for t in told if t.startswith(PHASE1_ARMS["first"])]
    others = [t for t in told if t not in first]
    return (
        f"PPL with something else in place of phase 1, over the same arm's: {'; '.join(others)}: {said}; with phase 1 and "
        f"another wiring: {'; '.join(first)}."
    )


def _of_stand_in(rows: Sequence[Mapping[str, Any]], arm: str, name: str) -> str:
    """What the name does by the verdicts on that stand-in, where all arms and sample sizes agree."""
    judged = {r["verdict"] for r in rows if r["change"].startswith(PHASE1_ARMS[arm])}
    known = {"higher": f"{name} helps", "no difference": f"{name} does not help", "lower": f"{name} harms"}
    return known.get(judged.pop(), f"no verdict on {name}") if len(judged) == 1 else f"no verdict on {name}"


def _controlled(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The rows of the arms that differ in the three factors alone, those without a finished seed left out."""
    return [row for row in arm_table([t for t in trials if not t["original"]]) if row["seeds"]]


def state_rule(trials: Sequence[Trial]) -> str:
    """What the rule of 20 tokens per trained parameter says of these arms, and what they show."""
    rows = _controlled(trials)
    if not rows:
        return ""
    ratios = [row["tokens_per_parameter"] for row in rows]
    met = sum(ratio >= RULE for ratio in ratios)
    meeting = f"{met} of {len(ratios)} arms meet it" if met else "no arm meets it"
    text = f"Tokens per trained parameter: {min(ratios):.2g} to {max(ratios):.2g}; the rule asks for {RULE}, so {meeting}"
    largest = [row for row in rows if row["samples"] == max(r["samples"] for r in rows)]
    tokens = [row["tokens_per_parameter"] for row in largest]
    if len(set(tokens)) > 2:
        with_ppl, with_gap = (
            float(stats.spearmanr(tokens, [row[key] for row in largest]).statistic)
            for key in ("val_ppl", "gap")
        )
        text += (
            f". With {largest[0]['samples']} samples the rank correlation over {len(largest)} arms of tokens per trained "
            f"parameter is {with_ppl:+.2f} with validation PPL and {with_gap:+.2f} with the train-validation gap "
            "(the rule would have both negative)"
        )
    return f"{text}."


def state_baselines(trials: Sequence[Trial], baselines: Sequence[dict[str, Any]]) -> str:
    """How many of the controlled arms are better than count models of the same tokens."""
    rows = _controlled(trials)
    if not rows:
        return ""

    def best(row: dict[str, Any], name: str) -> float:
        own = [b for b in baselines if b["samples"] == row["samples"] and b["name"].startswith(name)]
        return min(b["val_ppl"] for b in own)

    beat = sum(row["val_ppl"] < best(row, "Kneser-Ney") for row in rows)
    worse = sum(row["val_ppl"] > best(row, "unigram") for row in rows)
    return (
        f"{beat} of {len(rows)} arms (each sample size counted) beat Kneser-Ney on the same tokens, {worse} are worse than "
        "the unigram."
    )


def state_context_gain(trials: Sequence[Trial]) -> str:
    """How far context lowers the perplexity of the controlled arms; "" where an earlier version's run did not measure it."""
    gains = [row["context_gain"] for row in _controlled(trials)]
    if not gains or None in gains:
        return ""
    told = f"Context lowers the perplexity by {_range(gains, '.1%')} (arms and sample sizes)"
    small = sum(gain < BIGRAM_GAIN for gain in gains)
    return f"{told}; {small} of {len(gains)} are bigram models." if small else f"{told}."


def state_limits(trials: Sequence[Trial], epochs: int, rates: Sequence[float]) -> str:
    """How often the limits of training and of the search may have decided."""
    finished = ARMS.finished(trials)
    ended = sum(len(t["epochs"]) >= epochs for t in finished)
    text = f"{ended} of {len(finished)} trials ended at the limit of {epochs} epochs"
    if len(rates) > 1:
        chosen = {t["arm"]: t["learning_rate"] for t in finished}
        at_edge = sum(rate in (min(rates), max(rates)) for rate in chosen.values())
        text += f"; the chosen learning rate lay at the edge of the search in {at_edge} of {len(chosen)} arms"
        text += " (a search over two has no inside)" if len(rates) == 2 else ""
    return (
        f"{text}. Epoch and learning rate are chosen on the documents that are scored, so every perplexity is a little too "
        "low."
    )


def state_advantages(source: str, pretraining_tokens: int | None, most_tokens: int) -> str:
    """What pretrained arms saw that the others did not."""
    start = "Arms with a pretrained embedding profit from"
    if pretraining_tokens is None:
        return f"{start} text that the others never saw: that behind {source}."
    seen = f"{pretraining_tokens:,} tokens that the others never saw"
    return f"{start} {seen}, beside at most {most_tokens:,} that all train on."


def state_drift(trials: Sequence[Trial]) -> str:
    """How far the contexts move in phase 2, when the embedding under them is trained."""
    moved = [t for t in ARMS.finished(trials) if t["freezing"] == "trained" and t["context_drift"] is not None]
    if not moved:
        return ""
    drift, rank = (interval95([t[key] for t in moved])[0] for key in ("context_drift", "context_rank"))
    return (
        f"A trained embedding moves the contexts: at the end of phase 2 they differ from phase 1's by {drift:.0%} of their "
        f"norm (effective rank then {rank:.1%}); a frozen one leaves them as they are."
    )


def state_phase1(phase1: Sequence[dict[str, Any]]) -> str:
    """Convergence and rank of phase 1, and why freezing cannot change them."""
    parts = []
    for name in dict.fromkeys(run["initialisation"] for run in phase1):
        runs = [run for run in phase1 if run["initialisation"] == name]
        last = [run["rows"][-1] for run in runs]
        met = [row["iteration"] for run, row in zip(runs, last, strict=True) if run["converged"]]
        others = [row["converged"] for run, row in zip(runs, last, strict=True) if not run["converged"]]
        rank, centred = (
            interval95([row[key] for row in last])[0] for key in ("effective_rank", "effective_rank_centred")
        )
        words = f"{name} embedding, {len(met)} of {len(runs)} runs met the rule"
        words += f" at iteration {_range(met)}" if met else ""
        words += f", the rest ended with {_range(others, '.1%')} of tokens converged" if others else ""
        parts.append(f"{words}, effective rank {rank:.1%} (centred {centred:.1%})")
    compared = [run["unaffected"] for run in phase1 if run["unaffected"] is not None]
    unaffected = "it trains the context block alone, so freezing the embedding cannot change it"
    if compared:
        unaffected = (
            f"run again with the embedding left trainable it gave the same weights bit for bit in {sum(compared)} of "
            f"{len(compared)} cases, because it trains the context block alone"
        )
    return f"Phase 1: {'; '.join(parts)}; {unaffected}."


def _range(values: Sequence[float], form: str = "d") -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
