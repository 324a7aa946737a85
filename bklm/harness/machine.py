"""The machine that a study ran on, as its manifest records it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

import bklm
from bklm import __version__

RECORDED_PACKAGES = (
    "torch", "numpy", "numba", "triton", "scipy", "datasets", "tokenizers", "safetensors", "accelerate", "optuna",
    "matplotlib", "papermill",
)  # fmt: skip


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
    """The parts of this machine that a measured time or memory on ``device`` depends on."""
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
    here = Path(bklm.__file__).resolve().parent.parent
    top = _output_of("git", "-C", str(here), "rev-parse", "--show-toplevel")
    revision = _output_of("git", "-C", str(here), "rev-parse", "HEAD")
    # A copy, or an installation in an environment, that lies inside another repository is at no revision of that one.
    if top is None or revision is None or Path(top).resolve() != here:
        return "not a git checkout"
    changed = _output_of("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+changes" if changed else "")


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
