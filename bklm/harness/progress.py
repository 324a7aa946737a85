"""One progress bar over all trainings of a study, and an honest guess of the time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm.auto import tqdm


class Progress:
    """Counts optimiser steps; silent where ``shown`` is false (all processes but one).

    ``tell`` is called with the number of steps just trained: in a worker, whose steps another process shows.
    """

    def __init__(self, total: int, shown: bool = True, tell: Callable[[int], None] | None = None) -> None:
        self._tell = tell
        self.bar = tqdm(total=total, unit="step", mininterval=1.0, disable=not shown)
        # Of all that is done, ``own`` is this process's: a trial sets its count right while helpers go on.
        self.total, self.done, self.own = total, 0, 0
        self.started, self.trained = time.monotonic(), 0

    def expect(self, steps: int, unit: str = "step") -> None:
        """There will be so many steps in all; those to come may take another time than those before."""
        self.total = self.bar.total = steps
        self.started, self.trained = time.monotonic(), 0
        self.bar.unit = unit
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()

    def describe(self, what: str) -> None:
        self.bar.set_description(what)

    def step(self, steps: int) -> None:
        """Steps just trained."""
        if self._tell is not None:
            self._tell(steps)
        self.own += steps
        self.step_of_helper(steps)

    def step_of_helper(self, steps: int) -> None:
        """Steps just trained by another process."""
        self.trained += steps
        self.done += steps
        self.bar.update(steps)

    def skip(self, steps: int) -> None:
        """Steps that need no training: an earlier run did them, or a run ended early. They do not flatter the speed."""
        self.own += steps
        self.done += steps
        if not self.bar.disable:
            self.bar.n += steps
            self.bar.initial += steps
            self.bar.refresh()

    def time_left(self) -> str:
        """ "; about 3.2 min left", or "" before anything was trained."""
        if not self.trained:
            return ""
        seconds = (time.monotonic() - self.started) / self.trained * (self.total - self.done)
        return f"; about {seconds / 60:.1f} min left" if seconds >= 60 else f"; about {seconds:.0f} s left"
