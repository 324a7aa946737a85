"""``python -m bklm.batch SETS.yaml``: exit code 0 when every run is done, 1 when one failed, 2 when nothing was started."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bklm.batch.plan import read_runs
from bklm.batch.run import check_limits, run_batch
from bklm.harness.values import anchored, as_path


@dataclass(frozen=True)
class Arguments:
    """Run notebooks with many parameter sets; runs that are done are kept, and the same command goes on."""

    sets: Annotated[Path, tyro.conf.Positional]
    """YAML file: which notebooks with which parameters (docs/batch.yaml is an example)"""
    output_dir: Path = Path("results/batch")
    """one folder per run, summary.html, and beside it the zip"""
    workers: int = 1
    """notebooks at a time"""
    minutes: float | None = None
    """longest time for one run"""
    check: bool = False
    """only check the file and list the runs"""


def main(words: list[str] | None = None, prog: str = "python -m bklm.batch") -> int:
    given = tyro.cli(Arguments, args=words, prog=prog, use_underscores=True)
    try:
        check_limits(given.workers, given.minutes)
        runs = read_runs(Path(as_path("sets", given.sets)))
        for run in runs:
            print(f"{run.name}: {run.notebook.name}, {run.parameters}")
        if given.check:
            return 0
        folder = Path(anchored("output_dir", as_path("output_dir", given.output_dir)))
        result = run_batch(runs, folder, workers=given.workers, minutes=given.minutes)
    except KeyboardInterrupt:
        print("Stopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"Summary: {result.summary.resolve()}\nResults: {result.bundle.resolve()}")
    if result.failed:
        print(f"{len(result.failed)} of {len(runs)} runs failed: {', '.join(o.name for o in result.failed)}.")
    return 1 if result.failed else 0


if __name__ == "__main__":
    # A shell's background job starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
