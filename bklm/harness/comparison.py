"""A comparison over paired seeds: how trials are grouped, averaged, judged and told. Every study's table is one of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from bklm.harness.statistics import FEWEST_SEEDS, Perplexity, interval95


class Trial(TypedDict, total=False):
    """The record of one trained model, as ``bklm.harness.session`` leaves it: these keys mean the same in every study.

    The factors of the study's grid stand beside them, and what else it measures. Of a trial that diverged ``val_ppl`` is
    None, ``reason`` says how, and what was to be measured is missing.
    """

    seed: int
    val_ppl: float | None
    val_ppl_without_unk: float
    val_accuracy: float
    seconds: float
    epochs: list[dict[str, Any]]
    learning_rate: float
    parameters: int
    reason: str


@dataclass(frozen=True)
class Column:
    """One column of a comparison's table, for files and for people.

    Attributes:
        name: in CSV and JSON; "" for one that people alone see.
        of: the group's value: a key of its trials (their mean), or a function of the group.
        title: for people; "" for one that only files have.
        form: how people read it: a format, or a function of the row.
        spread: whether NAME_95 (half-width of the 95% interval) stands beside it.
    """

    name: str
    of: str | Callable[[Sequence[Trial]], Any]
    title: str = ""
    form: str | Callable[[dict[str, Any]], str] = "g"
    spread: bool = False

    def values(self, group: Sequence[Trial]) -> dict[str, Any]:
        """The column's cells for the finished trials of one arm; None where there are none, or one has no such number."""
        if callable(self.of):
            return {self.name: self.of(group) if group else None}
        values = [t.get(self.of) for t in group]  # an earlier version's runs may lack it
        mean, half = interval95(values) if values and None not in values else (None, None)
        return {self.name: mean} | ({f"{self.name}_95": half} if self.spread else {})

    def words(self, row: dict[str, Any]) -> str:
        """The cell as people read it, "-" for None."""
        if callable(self.form):
            return self.form(row)
        return "-" if row[self.name] is None else format(row[self.name], self.form)


def geometric_mean(key: str) -> Callable[[Sequence[Trial]], float | None]:
    """A perplexity's mean over seeds; None where a trial has none (a text without a test split, a window too long)."""

    def mean(group: Sequence[Trial]) -> float | None:
        values = [trial[key] for trial in group]
        return None if None in values else Perplexity.over_seeds(values).mean

    return mean


def same(key: str) -> Callable[[Sequence[Trial]], Any]:
    """A value that all seeds of an arm share, such as the number of parameters."""
    return lambda group: group[0][key]


@dataclass(frozen=True)
class Comparison:
    """Trials that differ in one factor, ``by``, each with several seeds. Every study judges by these rules and no others.

    Best is the arm of the lowest mean among those that finished the most seeds: one that lost a seed is no candidate, unless
    all did. Another arm is judged on the seeds of the best one; where it lacks one of them it gets no verdict.

    Attributes:
        by: the key of the factor.
        title: a value of the factor in words, such as "alpha 0.5".
        columns: what the table holds besides factor, seeds and perplexity.
        score: the key of a trial's perplexity, None where it diverged.
        short: the value as a table's first cell.
        other: what a headline calls one of the others.
        lowest: what a finding and a headline begin with, of the best value's title and perplexity.
        order: a key to sort by; None keeps the order of the trials.
        reported: per value of the factor, what the original reported: columns "original_..." of the row.
    """

    by: str
    title: Callable[[Any], str]
    columns: tuple[Column, ...] = ()
    score: str = "val_ppl"
    short: Callable[[Any], str] = str
    other: str = "other"
    lowest: str = "Lowest validation PPL at {}: {}"
    order: Callable[[Trial], Any] | None = None
    reported: Mapping[Any, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    reported_columns: tuple[str, ...] = ()

    def finished(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that did not diverge."""
        return [t for t in trials if t[self.score] is not None]

    def require_any(self, trials: Sequence[Trial]) -> None:
        """Refuse trials none of which finished.

        Raises:
            RuntimeError: with the reason of the first.
        """
        if not self.finished(trials):
            raise RuntimeError(
                f"every trial diverged, the first so: {trials[0]['reason']} Take other settings, such as a lower "
                "learning_rate, and another output_dir."
            )

    def groups(self, trials: Sequence[Trial]) -> dict[Any, list[Trial]]:
        """Finished trials by factor; a value whose seeds all diverged has no group."""
        return self._grouped(self.finished(trials))

    def lost(self, trials: Sequence[Trial]) -> dict[Any, list[Trial]]:
        """Diverged trials by factor."""
        return self._grouped([t for t in trials if t[self.score] is None])

    def _grouped(self, trials: Sequence[Trial]) -> dict[Any, list[Trial]]:
        found: dict[Any, list[Trial]] = {}
        for trial in sorted(trials, key=self.order) if self.order else trials:
            found.setdefault(trial[self.by], []).append(trial)
        return {value: sorted(group, key=lambda t: t["seed"]) for value, group in found.items()}

    def perplexity(self, group: Sequence[Trial]) -> Perplexity:
        """Over the seeds of one arm."""
        return Perplexity.over_seeds([t[self.score] for t in group])

    def best(self, trials: Sequence[Trial]) -> Any:
        """The value of the lowest mean; of equal ones the first.

        Raises:
            ValueError: every trial diverged.
        """
        groups = self.groups(trials)
        most = max(map(len, groups.values()))
        means = {value: self.perplexity(group).mean for value, group in groups.items() if len(group) == most}
        return min(means, key=means.__getitem__)

    def ratios(self, trials: Sequence[Trial]) -> dict[Any, Perplexity]:
        """Every other value's perplexity over the best one's on its seeds; none for a value that lost one of them."""
        best = self.best(trials)
        return {
            value: ratio
            for value in self.groups(trials)
            if value != best and (ratio := self.ratio(trials, value, best))
        }

    def ratio(self, trials: Sequence[Trial], value: Any, to: Any, any_of: int = 1) -> Perplexity | None:
        """One value's perplexity over another's on the seeds of that other; None where it lost one of them."""
        scores = {
            name: {t["seed"]: t[self.score] for t in group}
            for name, group in self.groups(trials).items()
            if name in (value, to)
        }
        if scores.keys() != {value, to} or not scores[to].keys() <= scores[value].keys():
            return None
        return Perplexity.ratio_over_seeds(
            [scores[value][seed] for seed in scores[to]], list(scores[to].values()), any_of
        )

    def rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """One row per value, plain numbers; what was to be measured is None where every seed diverged."""
        groups, lost = self.groups(trials), self.lost(trials)
        ordered = self._grouped(trials)
        rows = []
        for value in ordered:
            group = groups.get(value, [])
            found = self.perplexity(group) if group else Perplexity(None, None, None)
            row = {self.by: value, "seeds": len(group), "diverged": len(lost.get(value, []))}
            row |= {"val_ppl": found.mean, "val_ppl_low": found.low, "val_ppl_high": found.high}
            for column in self.columns:
                row |= column.values(group) if column.name else {}
            told = self.reported.get(value, {})
            rows.append(row | {f"original_{name}": told.get(name) for name in self.reported_columns})
        return rows

    def readable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """``rows`` with words and rounded numbers; a column that an earlier version's rows know nothing of is left out."""
        return [
            {self.by: self.short(row[self.by]), "val PPL (95%)": score_in_words(row)}
            | {c.title: c.words(row) for c in self.columns if c.title and {c.name} - {""} <= row.keys()}
            for row in rows
        ]

    def finding(self, trials: Sequence[Trial]) -> str:
        """One sentence: the best value, which others differ from it beyond the paired interval; a second: what diverged."""
        seeds = len(self.groups(trials)[self.best(trials)])
        return state_finding(*self._judged(trials), seeds) + self.diverged(trials)

    def headline(self, trials: Sequence[Trial]) -> str:
        """The finding in a figure's title."""
        return headline(*self._judged(trials), self.other) + self.diverged_in_short(trials)

    def _judged(self, trials: Sequence[Trial]) -> tuple[str, dict[str, Perplexity]]:
        best = self.best(trials)
        words = self.lowest.format(self.title(best), self.perplexity(self.groups(trials)[best]))
        return words, {self.title(value): ratio for value, ratio in self.ratios(trials).items()}

    def diverged(self, trials: Sequence[Trial]) -> str:
        """ " Diverged, and in none of these numbers: alpha 0.7, seed 1.", or "" where none did."""
        lost, groups = self.lost(trials), self.groups(trials)
        if not lost:
            return ""
        words = [f"{self.title(t[self.by])}, seed {t['seed']}" for group in lost.values() for t in group]
        said = f" Diverged, and in none of these numbers: {'; '.join(words)}."
        if self.best(trials) in lost:
            return (
                f"{said} No {self.by} finished all its seeds; the best is among those that finished the most."
            )
        if partly := [self.title(value).removeprefix(f"{self.by} ") for value in groups if value in lost]:
            article = "An" if self.by[0] in "aeiou" else "A"
            said += (
                f" {article} {self.by} that lost a seed is given no verdict ({self.by} {', '.join(partly)})."
            )
        return said

    def diverged_in_short(self, trials: Sequence[Trial]) -> str:
        """ "; diverged: alpha 0.7 (1 seed)", or "" where none did."""
        words = [f"{self.title(v)} ({len(g)} seed{'s' * (len(g) > 1)})" for v, g in self.lost(trials).items()]
        return f"; diverged: {', '.join(words)}" if words else ""


def not_beaten(perplexity: float, baselines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The baselines that a perplexity is not below: rows with name and val_ppl, the true law of a text left out."""
    return [
        dict(row)
        for row in baselines
        if row["val_ppl"] is not None
        and perplexity >= row["val_ppl"]
        and not row["name"].startswith("true law")
    ]


def state_not_beaten(best: str, perplexity: float, baselines: Sequence[Mapping[str, Any]]) -> str:
    """ " The best, alpha 0, does not beat unigram (109.3)." or "" where it beats every baseline."""
    words = ", ".join(f"{row['name']} ({row['val_ppl']:.1f})" for row in not_beaten(perplexity, baselines))
    return f" The best, {best}, does not beat {words}." if words else ""


def not_beaten_in_short(perplexity: float, baselines: Sequence[Mapping[str, Any]]) -> str:
    """ "; not below Kneser-Ney 3-gram (81)": for a figure's title; "" where every baseline is beaten."""
    found = not_beaten(perplexity, baselines)
    if not found:
        return ""
    lowest = min(found, key=lambda row: row["val_ppl"])
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"; not below {lowest['name']} ({lowest['val_ppl']:.1f}){more}"


def score_in_words(row: dict[str, Any]) -> str:
    """ "268.4 (267.1 to 269.8); diverged: 1 of 3 seeds", or "diverged" where all did; no interval begins below 1."""
    # A summary that an earlier version wrote counts none: it could not hold a diverged trial.
    lost = row.get("diverged", 0)
    if not row["seeds"]:
        return "diverged"
    low = row["val_ppl_low"] and max(1.0, row["val_ppl_low"])
    words = str(Perplexity(row["val_ppl"], low, row["val_ppl_high"], row["seeds"] == 2))
    return words + (f"; diverged: {lost} of {lost + row['seeds']} seeds" if lost else "")


def state_finding(best: str, ratios: Mapping[str, Perplexity], seeds: int) -> str:
    """Which others differ from the best beyond the paired 95% interval over seeds.

    Args:
        best: the beginning of the sentence, which names the best and its perplexity.
        ratios: by name, another's perplexity over the best one's on the same seeds; with several seeds it lacks an
            interval where a perplexity is off the scale.
        seeds: how many seeds are paired; below three there is no verdict.
    """
    if not ratios:
        return f"{best}."
    if seeds < FEWEST_SEEDS:
        few = "one seed, so no interval" if seeds == 1 else "two seeds, so ranges, no interval"
        listed = ", ".join(f"{name} x{ratio}" for name, ratio in ratios.items())
        return f"{best}; {few} and no verdict on the differences: {listed}."
    words = {name: f"{name} x{ratio}" for name, ratio in ratios.items() if ratio.is_judged}
    worse = [word for name, word in words.items() if ratios[name].low > 1]
    same = [word for word in words.values() if word not in worse]
    unjudged = [name for name in ratios if name not in words]
    if worse:
        best += f"; worse over {seeds} paired seeds: {', '.join(worse)}"
    if same:
        best += f"; not told apart by the 95% interval: {', '.join(same)}"
    if unjudged:
        best += f"; no verdict, because a perplexity is too large to be recorded: {', '.join(unjudged)}"
    return f"{best}."


def headline(best: str, ratios: Mapping[str, Perplexity], other: str) -> str:
    """As ``state_finding``, but only how many others are worse; ``other`` names one of them, such as "other alpha"."""
    if not ratios:
        return best
    judged = [ratio for ratio in ratios.values() if ratio.is_judged]
    if not judged:
        return f"{best}; no interval, no verdict"
    worse = sum(ratio.low > 1 for ratio in judged)
    count = f"{worse} of {len(judged)} {other}s" if worse else f"no {other}"
    found = f"{best}; {count} {'are' if worse > 1 else 'is'} worse beyond the 95% interval"
    return found + (f"; {len(ratios) - len(judged)} without a verdict" if len(judged) < len(ratios) else "")
