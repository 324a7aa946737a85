"""What the commands of ``bklm`` do, once their words are known to be right."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

from bklm.batch.summary import findings_of
from bklm.files.atomic import write_text
from bklm.harness.bundle import PAGE
from bklm.harness.report import as_text, write_csv
from bklm.trained.model import Trained, load
from bklm.trained.run import open_run


def _load(given: argparse.Namespace) -> Trained:
    trained = load(given.run, given.model)
    if trained.sees_the_future:
        print("This model sees the future.", file=sys.stderr)
    return trained


def generate(given: argparse.Namespace) -> None:
    """Print a text and what a model writes after it."""
    print(_load(given).generate(given.prompt, given.tokens, given.temperature, given.seed))


def score(given: argparse.Namespace) -> None:
    """Print how well a model foretells a text."""
    trained = _load(given)
    print(f"{trained.name}: {trained.score(given.file)}.")


def features(given: argparse.Namespace) -> None:
    """Print potential and resolvent of every word, and draw them."""
    found = _load(given).features(given.text)
    if given.csv:
        write_csv(given.csv, found.rows())
        print(f"Table: {given.csv.resolve()}")
    else:
        print(as_text(found.rows()))
    print(f"Picture: {found.figure(given.figure).resolve()}")


def export(given: argparse.Namespace) -> None:
    """Write a model for another library, and upload it where that is asked for."""
    from bklm.trained import export as write
    from bklm.trained import push

    folder = write(_load(given), given.output, given.format)
    print(f"Written: {folder.resolve()}")
    if given.push:
        print(f"Uploaded: {push(folder, given.push)}")


def chat(given: argparse.Namespace) -> None:
    """Talk with a model of dialogues until an empty line: its replies as they are written, and what it saw."""
    from bklm.trained.chat import Chat

    talk = Chat(_load(given), given.temperature, given.seed, given.tokens)
    print(f"{talk.trained.name}. An empty line ends the chat.")
    try:
        while turn := input("you: ").strip():
            print("model: ", end="", flush=True)
            for piece in talk.say(turn):
                print(piece, end="", flush=True)
            print(f"\n  ({talk.saw})")
    except (EOFError, KeyboardInterrupt):
        print()


def report(given: argparse.Namespace) -> None:
    """Print what a run found, and say where its page lies."""
    run = open_run(given.run)
    facts, summary = run.manifest, run.summary()
    about = {
        "study": facts.get("study"), "text": (facts.get("corpus") or {}).get("name"),
        "profile": facts["config"].get("profile"), "finished": facts.get("finished"), "command": facts.get("command"),
    }  # fmt: skip
    print("\n".join(f"{name}: {value}" for name, value in about.items() if value))
    table: list[dict[str, Any]] = summary.get("table") or []
    if table:
        shown = [name for name in table[0] if not isinstance(table[0][name], dict | list)][:8]
        print("\n" + as_text([{name: row.get(name) for name in shown} for row in table]))
    print("\n" + "\n".join(findings_of(summary)))
    page = run.folder / PAGE
    if not page.exists():
        print(f"{run.source} holds no {PAGE}: it is of an earlier version, or not finished.")
        return
    where: Any = page.resolve() if run.temporary is None else f"{PAGE} in {run.source}"
    if given.open:
        if run.temporary is not None:
            # A browser reads it when what was unpacked is gone.
            where, held = Path.cwd() / f"{run.source.stem}_{PAGE}", page.read_text(encoding="utf-8")
            if where.exists() and where.read_text(encoding="utf-8", errors="replace") != held:
                raise ValueError(
                    f"report: {where} is another page; move it away, or start bklm in another folder."
                )
            write_text(where, held)
        webbrowser.open(where.as_uri())
    print(f"Page: {where}")


def selftest(given: argparse.Namespace) -> None:
    """Say whether the operator is right on this machine, and how long the studies take here.

    Raises:
        RuntimeError: it is wrong.
    """
    from bklm.notebook.selftest import check_operator, machine, readable_checks, study_times

    print(as_text(machine()))
    checks = check_operator()
    print(as_text(readable_checks(checks)))
    if not all(check["ok"] for check in checks):
        raise RuntimeError("The operator is wrong on this machine; please report the table above.")
    print(as_text(study_times()))


def lab(given: argparse.Namespace) -> None:
    """Open JupyterLab where notebooks and results are seen; install it first where it is missing.

    Raises:
        RuntimeError: it cannot be installed, or it ended with an error.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        print("Installing JupyterLab (a minute) ...")
        if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jupyterlab>=4.2"]).returncode:
            raise RuntimeError("lab: JupyterLab could not be installed; the message above says why.")
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "notebooks" / "00_setup.ipynb").exists()), here)
    first = [f for f in ("notebooks/00_setup.ipynb",) if (root / f).exists()]
    words = ["--no-browser"] if given.no_browser else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            f"--ServerApp.root_dir={root}",
            *words,
            *(str(root / f) for f in first),
        ]
    )
    if done.returncode:
        raise RuntimeError(f"lab: JupyterLab ended with {done.returncode}; the message above says why.")
