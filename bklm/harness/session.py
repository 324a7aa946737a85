"""An open study: its trials trained or read back, its grids shared with whoever helps.

A trial's record is plain JSON with the same keys in every study: its factors, ``seed``, ``val_ppl`` (None: it diverged, then
``reason`` says how), ``val_ppl_without_unk``, ``val_accuracy``, ``learning_rate``, ``parameters``, ``epochs`` (rows of
``bklm.training.EpochRecord``), ``seconds``.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bklm.files.atomic import read_result, write_json
from bklm.harness import workers
from bklm.harness.comparison import Trial
from bklm.harness.folder import INTERNALS, experiment_name, fingerprint
from bklm.harness.progress import Progress
from bklm.harness.tracker import stop_tracker, track
from bklm.training.checkpoints import CheckpointFolder, read_weights
from bklm.training.non_finite import NonFiniteError, repeated_once
from bklm.training.processes import broadcast

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder of a trial's own, below its folder, until it is recorded
SECONDS_BETWEEN_FIGURES = 10.0  # drawing one takes longer than a small trial
# What a record must hold to be taken for finished, whatever the study; one that diverged holds these and a reason.
DIVERGED_KEYS = {"val_ppl": float | None, "seconds": float, "reason": str}

Point = dict[str, Any]


class Session:
    """An open study: ``config`` (resolved), ``text``, ``folder``, ``accelerator``, ``is_main``, ``progress``."""

    def __init__(
        self,
        config: Any,
        text: Any,
        accelerator: Accelerator,
        folder: Path,
        on_figure: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.text, self.accelerator, self.folder = config, text, accelerator, folder
        self.is_main = accelerator.is_main_process
        link = workers.link
        self.progress = Progress(0, shown=self.is_main and link is None, tell=link and link.step)
        self._on_figure, self._drawn = on_figure, -math.inf
        # Trials that the progress bar knows of, and the steps it was told of others by their workers.
        self._counted: set[str] = set()
        self._helped: dict[str, int] = {}
        # Trials that this process trained, of which it tells.
        self._trained: set[str] = set()
        self._grids = 0
        self._pool: workers.Pool | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.dismiss_helpers()
        stop_tracker(self.accelerator)
        self.progress.close()

    def dismiss_helpers(self) -> None:
        """End the workers beside this process: there is no grid to come."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def expect(self, steps: int, unit: str = "step") -> None:
        """The optimiser steps of all trials together, or other units of work, for the progress bar."""
        self.progress.expect(steps, unit)

    def trial(
        self,
        place: str,
        point: Mapping[str, Any],
        steps: int,
        train: Callable[[Path], dict[str, Any]],
        needed: Mapping[str, Any],
        *,
        weights: str = "",
    ) -> dict[str, Any]:
        """The record of one trial: read back where an earlier run left it whole, else trained and written.

        A training that meets NaN is repeated once from its last checkpoint; a second time it is recorded as diverged.

        Args:
            place: folder below the study's, such as "internals/trials/alpha_0.5_seed_1".
            point: the factors and the seed, which begin the record.
            steps: optimiser steps of a whole training; what an early stop leaves over is told to the progress bar here.
            train: trains in the folder it is given, checkpoints below its ``checkpoints``, and returns what was measured.
            needed: keys and types of a finished record, besides those of every record.
            weights: a file of the folder without which a finished trial is no use.
        """
        folder = self.folder / place
        recorded = self._recorded(folder, needed, weights)
        if recorded is not None:
            if place not in self._counted:
                self.progress.skip(steps - self._helped.pop(place, 0))
            self._counted.add(place)
            return recorded
        self._counted.add(place)
        self._trained.add(place)
        self.progress.describe(_name_point(point))
        before, started = self.progress.own, time.perf_counter()

        def attempt() -> dict[str, Any]:
            self.progress.skip(before - self.progress.own)
            return train(folder)

        try:
            record = {**point, **repeated_once(attempt)}
        except NonFiniteError as error:
            # An answer, too: the others are worth reporting without it.
            log.warning("%s; it is recorded as diverged; delete %s to train it again.", error.what, folder)
            seconds = time.perf_counter() - started
            record = {**point, "val_ppl": None, "reason": f"{error.what}.", "seconds": seconds}
        self.progress.skip(before + steps - self.progress.own)
        if self.is_main:
            write_json(folder / "result.json", record)
            CheckpointFolder(folder / CHECKPOINTS).remove()
        return record

    def _recorded(self, folder: Path, needed: Mapping[str, Any], weights: str) -> dict[str, Any] | None:
        found = None
        if self.is_main:
            found = read_result(folder / "result.json", {"val_ppl": float | None, "seconds": float})
            if found is not None:
                found = read_result(
                    folder / "result.json", DIVERGED_KEYS if found["val_ppl"] is None else needed
                )
            is_whole = found is not None and found["val_ppl"] is not None
            if is_whole and weights and read_weights(folder / weights) is None:
                found = None
        return broadcast(self.accelerator, found)

    def grid(
        self,
        factors: Mapping[str, Sequence[Any]],
        trial: Callable[..., dict[str, Any]],
        *,
        name: str = f"{INTERNALS}/trials",
        place: Callable[[Point], str] | None = None,
        draw: Callable[[list[Trial]], Path | None] | None = None,
        across_machines: bool = True,
    ) -> list[dict[str, Any]]:
        """``trial(place, **point)`` once for every point of a grid, here or by who shares it; the records in grid order.

        Shared are points with the processes of one training, with workers on this machine, and through PostgreSQL
        (``storage``) with whoever has the same settings.

        Args:
            name: folder of the trials' own folders; with ``storage`` also what tells a study's grids apart.
            place: a trial's folder below that one; "alpha_0.5_seed_1" where nothing else is said.
            draw: draws the trials that are done so far; called in the main process, at most every ten seconds.
            across_machines: False where a trial leaves files that every machine needs: with ``storage`` each then does all.
        """
        points = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
        records: dict[tuple, dict[str, Any]] = {}
        self._grids += 1

        def folder_of(point: Point) -> str:
            return f"{name}/{(place or place_of)(point)}".rstrip("/")

        def run(point: Point) -> dict[str, Any]:
            key = tuple(point.values())
            if key not in records:
                broadcast(self.accelerator, point)
                place, of_helper = folder_of(point), folder_of(point) in self._helped
                records[key] = trial(place, **point)
                track(self.accelerator, place.removeprefix(f"{INTERNALS}/"), records[key])
                if (own := place in self._trained) or not (of_helper or workers.link):
                    self._tell(points, len(records), point, records[key], own)
                self._draw(points, records, draw)
            return records[key]

        if not self.is_main:
            while (point := broadcast(self.accelerator, None)) is not None:
                records[tuple(point.values())] = trial(folder_of(point), **point)
            return [records[tuple(p.values())] for p in points]
        if workers.link is not None:
            workers.link.work_off(self._grids, run)
        elif (storage := getattr(self.config, "storage", None)) and across_machines:
            self._share(storage, name, factors, run, folder_of)
        elif (pool := self._helpers(len(points))) is not None:
            pool.work_off(self._grids, points, run)
            self._helped |= {folder_of(point): steps for point, steps in pool.steps_of_helpers()}
        for point in points:
            run(point)
        broadcast(self.accelerator, None)
        return [records[tuple(p.values())] for p in points]

    def best_rate(
        self,
        factor: str,
        arms: Sequence[str],
        rates: Sequence[float],
        trial: Callable[..., dict[str, Any]],
        *,
        name: str = f"{INTERNALS}/search",
        place: Callable[[Point], str] | None = None,
        may_diverge: bool = False,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The best learning rate of each arm by validation perplexity, and the records of the search.

        ``trial(place, **{factor: arm, "learning_rate": rate})`` gives a record. A single rate is taken without a search.

        Raises:
            RuntimeError: an arm diverged with every rate; where it ``may_diverge`` it gets the smallest.
        """
        if len(rates) == 1:
            return dict.fromkeys(arms, rates[0]), []
        searched = self.grid({factor: arms, "learning_rate": rates}, trial, name=name, place=place)
        best = {}
        for arm in arms:
            tried = {r["learning_rate"]: r["val_ppl"] for r in searched if r[factor] == arm}
            scored = {rate: ppl for rate, ppl in tried.items() if ppl is not None}
            if not scored and not may_diverge:
                raise RuntimeError(
                    f"learning_rates: {arm} diverged with each of {', '.join(f'{r:g}' for r in rates)}; add smaller ones, in "
                    "another output_dir."
                )
            best[arm] = min(scored or rates, key=scored.get if scored else None)
            edge = ", at the edge of those tried" if best[arm] in (min(rates), max(rates)) else ""
            listed = ", ".join(f"{r:g}: {'diverged' if p is None else f'{p:.1f}'}" for r, p in tried.items())
            log.info("Learning rate of %s: %g (%s%s)", arm, best[arm], listed, edge)
        return best, searched

    @property
    def is_watched(self) -> bool:
        """Whether anybody watches the figures that ``show`` draws."""
        return self._on_figure is not None

    def show(self, picture: Path | None) -> None:
        """Tell whoever watches that a picture was drawn."""
        if picture is not None and self._on_figure is not None:
            self._on_figure(picture)

    def _tell(self, points: list[Point], done: int, point: Point, record: dict[str, Any], own: bool) -> None:
        """One line on a trial; how many are done and the time left are known to the study's own process alone."""
        # A part that is no trial, such as a model's first phase, has no score.
        if record.get("val_ppl") is None:
            return
        words = f"{_name_point(point)}: validation PPL {record['val_ppl']:.1f}"
        if workers.link is None:
            done = max(done, self._pool.done(len(points)) if self._pool and own else 0)
            left = self.progress.time_left() if own else "; found"
            words = f"Trial {done} of {len(points)}, {words}{left}"
        log.info("%s", words)

    def _draw(self, points: list[Point], records: dict[tuple, dict[str, Any]], draw: Callable | None) -> None:
        if draw is None or workers.link is not None or time.monotonic() - self._drawn < SECONDS_BETWEEN_FIGURES:
            return
        self.show(draw([records[key] for p in points if (key := tuple(p.values())) in records]))
        self._drawn = time.monotonic()

    def _share(
        self, storage: str, name: str, factors: Mapping[str, Sequence[Any]], run: Callable, folder_of: Callable
    ) -> None:
        """Work on the grid together with others in a database; what they found is written down as if found here."""
        # Optuna and SQLAlchemy take a second to import, and nobody else needs them.
        from bklm.sharing.sweep import Sweep

        # Two grids may share a folder: a search finds the trials of the grid that follows it.
        told_apart = "-".join([experiment_name(self.config, fingerprint(self.text)), name, *factors])
        shared = Sweep(storage, told_apart, factors)

        def adopt() -> None:
            for point, record in shared.results():
                path = self.folder / folder_of(point) / "result.json"
                if not path.exists():
                    write_json(path, record)

        def evaluate(point: Point) -> float:
            score = run(point)["val_ppl"]
            return math.inf if score is None else score

        adopt()
        shared.run(evaluate, run)
        adopt()

    def _helpers(self, points: int) -> workers.Pool | None:
        """Workers beside this process, where the settings or the machine allow more than one."""
        if self.accelerator.num_processes > 1:
            return None
        count = workers.number(self.config, points)
        # Those of an earlier grid wait for the end of this one, too; a larger grid has work for more of them.
        if self._pool is not None and self._pool.size < count:
            self.dismiss_helpers()
        if self._pool is None and count > 1:
            self._pool = workers.Pool(self.config, count, self.progress)
        return self._pool


def place_of(point: Mapping[str, Any]) -> str:
    """A trial's folder, such as "alpha_0.5_seed_1"."""
    return "_".join(f"{key}_{re.sub('[^A-Za-z0-9.+-]+', '-', _in_name(value))}" for key, value in point.items())


def _in_name(value: Any) -> str:
    # A config's values differ within these six digits.
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name_point(point: Mapping[str, Any]) -> str:
    """ "alpha 0.5, seed 1"."""
    return ", ".join(f"{key.replace('_', ' ')} {_in_name(value)}" for key, value in point.items())
