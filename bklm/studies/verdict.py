"""The verdict of a comparison over paired seeds, in words: one sentence for the report, a shorter one for a figure's title."""

from __future__ import annotations

from collections.abc import Mapping

from bklm.reporting import Perplexity


def state_finding(best: str, ratios: Mapping[str, Perplexity], seeds: int) -> str:
    """Which others differ from the best beyond the paired 95% interval over seeds.

    Args:
        best: the beginning of the sentence, which names the best and its perplexity.
        ratios: by name, another's perplexity over the best one's on the same seeds; with several seeds it lacks an
            interval where a perplexity is off the scale.
        seeds: how many seeds are paired; below two there is no verdict.
    """
    if not ratios:
        return f"{best}."
    if seeds < 2:
        return f"{best}; one seed, so no interval and no verdict on the differences."
    words = {name: f"{name} x{ratio}" for name, ratio in ratios.items() if ratio.low is not None}
    worse = [word for name, word in words.items() if ratios[name].low > 1]
    same = [word for word in words.values() if word not in worse]
    unjudged = [name for name in ratios if name not in words]
    if worse:
        best += f"; worse over {seeds} paired seeds: {', '.join(worse)}"
    if same:
        best += f"; no difference beyond the 95% interval: {', '.join(same)}"
    if unjudged:
        best += f"; no verdict, because a perplexity is too large to be recorded: {', '.join(unjudged)}"
    return f"{best}."


def headline(best: str, ratios: Mapping[str, Perplexity], other: str) -> str:
    """As `state_finding`, but only how many others are worse; ``other`` names one of them, such as "other alpha"."""
    if not ratios:
        return best
    judged = [ratio for ratio in ratios.values() if ratio.low is not None]
    if not judged:
        return f"{best}; no interval, no verdict"
    worse = sum(ratio.low > 1 for ratio in judged)
    count = f"{worse} of {len(judged)} {other}s" if worse else f"no {other}"
    found = f"{best}; {count} {'are' if worse > 1 else 'is'} worse beyond the 95% interval"
    return found + (f"; {len(ratios) - len(judged)} without a verdict" if len(judged) < len(ratios) else "")
