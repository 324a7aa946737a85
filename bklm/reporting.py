"""What a study leaves behind: tables, intervals, the manifest and one zip. Figures are in `bklm.figures`."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from scipy.special import stdtrit

from bklm import __version__
from bklm.checkpoints import replacing, write_json, write_text
from bklm.evaluation import LARGEST_PERPLEXITY

RECORDED_PACKAGES = (
    "torch", "numpy", "numba", "triton", "scipy", "datasets", "tokenizers", "safetensors", "accelerate", "optuna",
    "matplotlib", "papermill",
)  # fmt: skip


def interval95(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% t-interval; the half-width of a single value is None (unknown, not zero)."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return float(sample.mean()), None
    half = stdtrit(len(sample) - 1, 0.975) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean()), float(half)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over seeds: exp of the mean loss, and the 95% t-interval of that mean, in nats, carried over by exp.

    The loss is what is averaged: in perplexities one diverged seed would outweigh all others, and an interval could
    reach below zero. ``low`` and ``high`` are None for one seed.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def over_seeds(cls, perplexities: Sequence[float]) -> Perplexity:
        loss, half = interval95(np.log(perplexities))
        if half is None:
            return cls(float(np.exp(loss)), None, None)
        # A few diverged seeds can give an interval beyond any number; JSON has no infinity.
        low, high = np.exp(loss - half), np.exp(min(loss + half, 700.0))
        return cls(float(np.exp(loss)), float(low), float(high))

    @classmethod
    def ratio_over_seeds(cls, others: Sequence[float], bests: Sequence[float]) -> Perplexity:
        """One model's perplexities over another's of the same seeds. Without an interval where one of them is off the scale:
        of two that are, nobody recorded which is the larger, and their ratio of 1 would look like a result."""
        ratio = cls.over_seeds([other / best for other, best in zip(others, bests, strict=True)])
        return cls(ratio.mean, None, None) if any(map(is_off_the_scale, (*others, *bests))) else ratio

    def __str__(self) -> str:
        if self.low is None:
            return _short(self.mean)
        return f"{_short(self.mean)} ({_short(self.low)} to {_short(self.high)})"


def is_off_the_scale(perplexity: float) -> bool:
    """Whether a recorded perplexity is the largest that is ever recorded, which stands for anything above it, too."""
    return perplexity >= LARGEST_PERPLEXITY * (1 - 1e-9)


def _short(value: float) -> str:
    """A perplexity or a ratio of perplexities for people: "268.4", "2,180", "1e+09"."""
    if value < 10:
        return f"{value:.3f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def with_interval(mean: float, half: float | None, digits: int = 1) -> str:
    """ "303.1 ± 2.4", or "303.1" when one seed gives no interval."""
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically."""
    with replacing(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


def as_text(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned plain-text table."""
    return pd.DataFrame(rows).fillna("").to_string(index=False)


def environment() -> dict[str, Any]:
    """Versions, processor, memory and GPU of this machine, as the manifest records them."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return {
        "bklm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "packages": versions,
    }


def machine_fingerprint(device: str) -> dict[str, Any]:
    """What a measured time or memory on ``device`` depends on besides a study's config."""
    found = environment()
    return {
        "device": device,
        "processor": found["processor"],
        "cores": found["cores"],
        "threads": found["torch_threads"],
        "gpu": found["gpu"] and found["gpu"]["name"],
        "torch": found["packages"]["torch"],
        "numba": found["packages"]["numba"],
    }


def git_revision() -> str:
    """Revision of the checkout this package runs from, with "+changes" when it was edited, or "not a git checkout"."""
    here = Path(__file__).resolve().parent.parent
    top = _output_of("git", "-C", str(here), "rev-parse", "--show-toplevel")
    revision = _output_of("git", "-C", str(here), "rev-parse", "HEAD")
    # A copy, or an installation in an environment, that lies inside another repository is at no revision of that one.
    if top is None or revision is None or Path(top).resolve() != here:
        return "not a git checkout"
    changed = _output_of("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+changes" if changed else "")


def command_for(module: str, config: Any) -> str:
    """The command line that repeats a run with this (resolved) config."""
    return shlex.join(command_words(module, config))


def command_words(module: str, config: Any) -> list[str]:
    """The words of the command line that runs a study's module with a config; empty fields are left out."""
    words = ["python", "-m", module]
    for name, value in config.to_dict().items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(v) for v in values)]
    return words


def write_manifest(path: Path, *, config: Any, corpus: Any, module: str, seconds: float, **extra: Any) -> None:
    """Write manifest.json: everything needed to repeat and to judge the run.

    ``seconds`` is computing time in all; ``corpus`` is None for a study that reads no text.
    """
    write_json(
        path,
        {
            "study": config.study,
            "config": config.to_dict(),
            "corpus": corpus and {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256},
            "git_revision": git_revision(),
            "environment": environment(),
            "seconds": round(seconds, 1),
            "command": command_for(module, config),
            **extra,
        },
    )


@dataclass(frozen=True)
class Bundle:
    """A finished results zip."""

    path: Path
    size: int  # bytes
    sha256: str

    def __str__(self) -> str:
        return f"{self.path}  {self.size / 1e6:.2f} MB  SHA-256 {self.sha256}"


def zip_study(folder: Path, notebook: Path | None = None) -> Bundle:
    """Zip a study's folder to ``<folder>.zip``, atomically.

    Args:
        notebook: an executed notebook; it is copied into the folder with its HTML rendering first.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"results zip: there is no study folder {folder}; run the study first.")
    if notebook is not None:
        add_notebook(folder, notebook.read_text(encoding="utf-8"), notebook.name)
    target = folder.with_name(folder.name + ".zip")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    with (
        replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for file in files:
            archive.write(file, Path(folder.name) / file.relative_to(folder))
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return Bundle(target, target.stat().st_size, digest)


def add_notebook(folder: Path, notebook: str, name: str) -> None:
    """Put an executed notebook, given as its JSON text, and its HTML rendering into a study's folder."""
    # Two seconds that a study on its own need not wait for.
    import nbformat
    from nbconvert import HTMLExporter

    read = nbformat.reads(notebook, as_version=4)
    html, _ = HTMLExporter().from_notebook_node(read)
    write_text(folder / name, nbformat.writes(read))
    write_text((folder / name).with_suffix(".html"), html)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output_of(*command: str) -> str | None:
    """A command's output, or None where it cannot be run (the manifest then says that it is unknown)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """``python -m bklm.reporting FOLDER --notebook EXECUTED.ipynb``: put the notebook in and write the zip again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--notebook", type=Path)
    arguments = parser.parse_args()
    bundle = zip_study(arguments.folder, arguments.notebook)
    print(
        f"Results: {bundle.path}\nSize:    {bundle.size / 1e6:.2f} MB ({bundle.size} bytes)\nSHA-256: {bundle.sha256}"
    )


if __name__ == "__main__":
    main()
