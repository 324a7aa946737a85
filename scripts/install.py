"""Install what the suite needs into the Python that runs this file; standard library and pip only.

    python scripts/install.py                     the suite
    python scripts/install.py --extra test        and what its tests need
    python scripts/install.py --keep-installed    (Colab) add only what is missing; what is there keeps its version
    python scripts/install.py --like-colab        take the versions that Colab has
    python scripts/install.py --versions lowest   take the ends of the ranges: lowest, newest; colab: Colab's, with its torch

Requirements come from requirements.txt. On the Python versions for which constraints/tested.txt was made, the tested
versions are taken.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_OF_SILENCE = 20  # after which a person wonders
HEAVY = ("torch", "numpy", "scipy", "pandas", "numba", "triton", "pyarrow")
COLAB_TORCH = ("torch==2.11.0", "triton==3.6.0")  # without Colab's own build for its driver
TESTED_PYTHONS = ((3, 11), (3, 14))  # from, up to but without: constraints/tested.txt has wheels for these


def pip(*arguments: str) -> None:
    words = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    started = time.monotonic()
    with subprocess.Popen(words) as process:
        while True:
            try:
                code = process.wait(SECONDS_OF_SILENCE)
                break
            except subprocess.TimeoutExpired:
                print(f"... still installing ({time.monotonic() - started:.0f} s)", flush=True)
    if code:
        raise subprocess.CalledProcessError(code, words)


def installed() -> dict[str, str]:
    """Installed distributions and their versions, names normalised."""
    return {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }


def add_missing(extra: str | None) -> None:
    """Install beside what a prepared runtime (Colab) holds, with every installed version as a constraint."""
    before = installed()
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as pins:
        # Local versions such as 2.11.0+cu128 cannot be downloaded, but as constraints they hold what is installed.
        pins.writelines(f"{name}=={version}\n" for name, version in sorted(before.items()) if name != "bklm")
    pip("-r", str(ROOT / "requirements.txt"), "-c", pins.name)
    pip("--no-deps", "-e", str(ROOT))
    if extra:
        pip("-c", pins.name, *extra_requirements(extra))
    Path(pins.name).unlink()
    importlib.invalidate_caches()
    after = installed()
    changed = [f"{n} {before[n]} -> {after.get(n)}" for n in HEAVY if n in before and after.get(n) != before[n]]
    if changed:
        sys.exit(
            f"The installation changed {', '.join(changed)}; choose Runtime > Restart session before going on."
        )
    added = sorted(set(after) - set(before) - {"bklm"})
    print(f"Added: {', '.join(added) or 'nothing, all was there'}. torch and numpy are as they were.")


def tested(name: str) -> str:
    """A package's line of constraints/tested.txt."""
    lines = (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def extra_requirements(extras: str) -> list[str]:
    """The requirements of extras ("test" or "test,browser") of the installed package."""
    requirements = [r.replace("'", '"') for r in importlib.metadata.requires("bklm") or []]
    return [r.split(";")[0].strip() for e in extras.split(",") for r in requirements if f'extra == "{e}"' in r]


def lowest() -> list[str]:
    """The lowest versions that requirements.txt and the extra "test" allow, as constraints."""
    files = (ROOT / "requirements.txt", ROOT / "pyproject.toml")
    lines = "\n".join(path.read_text(encoding="utf-8") for path in files)
    found = re.findall(r"^\W*([\w-]+)(?:\[\w+\])?>=([\d.]+)", lines, re.MULTILINE)
    return list({name: f"{name}=={version}" for name, version in reversed(found)}.values())


def ends(which: str) -> list[str]:
    """Words for pip that take one end of the ranges: "lowest", "newest", or "colab"."""
    if which == "newest":
        return ["--upgrade", "--upgrade-strategy", "eager"]
    colab = (ROOT / "constraints" / "colab.txt").read_text(encoding="utf-8").splitlines()
    pins = lowest() if which == "lowest" else [*colab, *COLAB_TORCH]
    path = Path(tempfile.mkdtemp()) / "pins.txt"
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return ["-c", str(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--keep-installed", action="store_true")
    way.add_argument("--like-colab", action="store_true")
    way.add_argument("--versions", choices=("lowest", "colab", "newest"))
    arguments = parser.parse_args()
    if arguments.keep_installed:
        add_missing(arguments.extra)
        return
    constraints: list[str] = []
    if arguments.versions:
        constraints = ends(arguments.versions)
    elif arguments.like_colab:
        # No index outside Colab has its torch: the tested one stands in for it.
        constraints = ["-c", str(ROOT / "constraints" / "colab.txt"), tested("torch")]
    elif TESTED_PYTHONS[0] <= sys.version_info[:2] < TESTED_PYTHONS[1]:
        constraints = ["-c", str(ROOT / "constraints" / "tested.txt")]
    else:
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            f"Python {version} is outside the tested ones: taking the newest versions that requirements.txt allows."
        )
    target = str(ROOT) + (f"[{arguments.extra}]" if arguments.extra else "")
    pip(*constraints, "-e", target)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip stopped with exit code {error.returncode}; its own message is above.")
