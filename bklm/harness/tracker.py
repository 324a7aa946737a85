"""A run's curves in a tracker, through Accelerate's own: each trial's epochs when the trial is done, or was read back."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed here.

    Raises:
        ValueError: what to install, or to choose.
    """
    known = PACKAGES.get(name, (name,))
    if name != "none" and not any(importlib.util.find_spec(package) for package in known):
        raise ValueError(
            f"tracker: got {name!r}, which is not installed here; pip install {known[0]}, or choose tracker 'none'."
        )


def start_tracker(accelerator: Accelerator, config: Any, folder: Path) -> None:
    """Begin a run in a resolved config's tracker; TensorBoard's goes to ``folder``/tracker, the others' to their own places.

    Raises:
        ValueError: this version of Accelerate does not know it.
    """
    name = getattr(config, "tracker", "none")
    if name == "none":
        return
    from accelerate.tracking import filter_trackers

    try:
        accelerator.log_with = filter_trackers([name], folder / "tracker")
    except ValueError as error:
        raise ValueError(
            f"tracker: got {name!r}, which this Accelerate does not know ({error}); update it."
        ) from error
    # Trackers take numbers and words.
    settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.to_dict().items()}
    accelerator.project_configuration.logging_dir = str(folder / "tracker")
    try:
        accelerator.init_trackers(f"bklm-{config.study}", settings)
    except BaseException:
        accelerator.trackers = []  # begun by half: they cannot be ended
        raise


def track(accelerator: Accelerator, place: str, record: Mapping[str, Any]) -> None:
    """Log a trial's epochs, "trials/alpha_0.5_seed_1/val_perplexity" and so on; nothing where no tracker was begun."""
    if not accelerator.trackers:
        return
    for number, epoch in enumerate(record.get("epochs") or [], 1):
        values = {
            f"{place}/{name}": float(value)
            for name, value in epoch.items()
            if name != "epoch" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        accelerator.log(values, step=int(epoch.get("epoch", number)))


def stop_tracker(accelerator: Accelerator) -> None:
    """End the run in the tracker, with what was logged so far written."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
