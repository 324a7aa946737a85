"""Run benchmarks and write the page that shows what they printed: docs/benchmarks.md.

    python scripts/benchmarks.py moe baseline_step  # these; the others keep what they printed last
    python scripts/benchmarks.py --jax PYTHON --nltk PYTHON --text FOLDER    # all of them, on two quiet cores three hours
    python scripts/benchmarks.py --page             # only the page

What each prints is kept as it is in docs/results/benchmarks/NAME.txt, under the command, the date and the revision, which
is a clean one. ``--jax`` and ``--nltk`` are interpreters that have what a script compares with; ``--text`` is a folder with
train.txt, valid.txt and test.txt, for what trains.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bklm.harness.machine import git_revision

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "results" / "benchmarks"
ON_INTEL, ON_ANOTHER = OUTPUTS / "intel", OUTPUTS / "another_epyc"
BENCHMARKS = {
    "bk_core": "The BK-core: forward and exact backward against the published recursion, a plain copy, and what one "
    "would pick instead. Targets: 150 and 60 times the loop at (32, 128) and (32, 512); for (8, 65536) and (1, 1000000) "
    "at most 6 and 4 copies of 52 B per element (52 read and 52 written, in one thread, as when the targets were set; "
    "the table shows a copy on all threads beside it), 20 B of extra memory per element, 6 times faster than jax's "
    "solve with its gradient (``--jax``); 10 s of compilation in all, 0.3 s of import above torch's. The passes' bytes hold "
    "what a processor reads before it writes, the copies' do not: *of a copy's* may be up to half too high. Turns settle in "
    "jax's table alone, so that a time there is the shortest of its call.",
    "resolvent_solve": "The solve against jax's and scipy's, and as models use it against a copy. Targets: 5 times "
    "faster than scipy forward; with gradients 6, 4 and 4 times faster than jax (``--jax``; it needs a Python of its "
    "own).",
    "reading_step": "A training step of the model that reads beside GPT, LSTM, NewLLM and the diagonal model of its "
    "size, and a token of generation by position. Targets: 1.5, 2, 3 and 5 times GPT's tokens/s at windows of 64, "
    "1,024, 4,096 and 16,384; not fewer than the LSTM's; 1.25 times the time of its own products; half of GPT's memory at "
    "1,024; an exponent of 0.9 to 1.1 over N; a token takes as long at position 100,000 as at 100 (beyond 2,000 positions the "
    "state is that of a text of 2,000: it is as large at any).",
    "train_step": "One optimiser step of ResNet-BK, with the published mixer and with GRAD_BLEND's (solve), against "
    "whole logits and the recursion. Targets: 2 times the tokens/s of the faster with whole logits (aim 3), a third of the "
    "peak memory; for both models "
    "at most 1.3 times the time of their matrix products.",
    "products": "Single matrix products and whole training steps by MKL, by oneDNN, and by what the package takes of both "
    "(`bklm/moe/products.py`). Target: what is taken costs at most 1.2 times the faster of both.",
    "moe": "The analytic mixture of experts against autograd. Targets: *selected* 2 times in time and memory at E = 8, "
    "k = 1; *exact* not slower than *dense*; at E = 4, k = 1 as fast as the dense layer of its active size. Claimed by "
    "the original: 10 times.",
    "baseline_step": "A training step of NewLLM against the literal loop over positions, and against *steps*: one "
    "position after the other, NewLLM's only engine when the targets were set; fresh weights, and trained ones take more "
    "sweeps (``--weights``). Targets: 1.3 times the tokens/s of "
    "*steps* at 16 x 64 positions, 2 times at 1 x 4,096.",
    "quick_sweep": "Notebook 01's quick sweep, whole process, against the revision before the house was rebuilt. "
    "Target: 1.5 times faster on two cores.",
    "data_scale": "Text of 10 to 100 MB to ids and to a Kneser-Ney model of order 5, against tokenizers, KenLM's "
    "published layout and nltk. Targets: time linear (an exponent of at most 1.1), 24 bytes an n-gram at most in "
    "training, model and scoring, 1,000 times as fast as nltk.",
    "sweep_storm": "A sweep that workers share through PostgreSQL, with trials that cost nothing: workers killed, the "
    "server crashed, and by the costs when the database is the limit. Targets: no point lost or stored twice; no cost "
    "that grows with the points by more than a tenth.",
    "scaling": "Several processes on one machine: notebooks, one training, one shared sweep. No target; "
    "[scaling.md](scaling.md) says what follows.",
    "reading_search": "Which defaults read best: one epoch of four for each variant of the model that reads, of GPT and of "
    "the LSTM that study 03 compares, one seed (``--text``; other models of study 03 have the published defaults). *taken* is "
    "what the package has. No target; more variants were tried of the model that reads (`bklm/models/resnet_bk_config.py`).",
    "gpt_search": "What makes the GPT of study 03 good, all eight epochs of its protocol, one seed; *taken* drops a tenth and "
    "is trained at 0.001. Version 0.1.0 took the rate 0.0003 and dropped attention weights, too. No target.",
    "freeze_phase2": "An epoch of phase 2 with cached contexts against the token-by-token procedure. Target: 30 times.",
}
# Those that are a run of another script, by its command line.
RUNS = {
    "gpt_search": "reading_search --model gpt --epochs 8 --schedule 8 --only taken 'rate 0.0003' "
    "'rate 0.0003, attention weights dropped' 'no warm-up' 'branches not scaled down' 'head of its own'",
}
# What these print does not depend on what else the machine does.
PERPLEXITIES = {"reading_search", "gpt_search"}
# What a script needs to be told, and by which option of its own.
NEEDS = {
    "bk_core": {"jax": "--jax"},
    "resolvent_solve": {"jax": "--jax"},
    "data_scale": {"nltk": "--nltk"},
    "reading_search": {"text": "--data_dir"},
    "gpt_search": {"text": "--data_dir"},
}
SHOWN = {"jax": "PYTHON", "nltk": "PYTHON", "text": "FOLDER"}  # the page names no path of a machine
# Of what misses a target, as far as its tables tell why; shown only where one is missed.
WHY = {
    "products": "An expert of 2,048 tokens lies at the limit from which ragged groups go to oneDNN, so that half of its calls "
    "are MKL's; a lower limit would cost where numbers of rows do not come again, which nobody knows before.",
    "bk_core": "More than half of the compilation is the solve's kernels (*Compilation*); selftest and notebook 00 compile "
    "some of models besides.",
    "reading_step": "A step is not its matrix products alone: the optimiser, norms, dropout, the mixer and the loss pass "
    "over memory that the products do not, and now that oneDNN halves the products' time on this processor these weigh more. "
    "At 64 one and a half times GPT's speed would be a step of 52 ms, 1.2 times the products alone, and the LSTM's step takes "
    "1.3 times these. GPT's fused attention keeps none of its N x N weights for the "
    "backward, so both models keep some numbers a position, and ours more. An exponent below 0.9: short "
    "rows pay for what does not grow with N.",
    "train_step": "Most of the step is the head over 30,000 words: most of the floor is its products, and the loss "
    "passes over 123 million logits besides; the blocks' norms, dropout, mixture and mixer take about as "
    "long as that (*where the time goes*). The arms of whole logits hold 1.4 GB, and their times change "
    "from run to run by half; the faster of the two is judged.",
    "moe": "With one active expert of four the router, the sort of tokens by expert, gathers and the sums back "
    "are passes that a dense layer of the active size does not have; the smaller the layer, the more they"
    " weigh. The backward computes the hidden activations again, one product in seven, which is what "
    "saves the memory. *exact* asks every expert, for the router's gradient: with two of four active it does about what "
    "dense does.",
    "baseline_step": "At 16 x 64 positions parallel sweeps would cost more than they win, so that both arms go one "
    "position after the other; most of a step is matrix products (*of the floor*), and what is left are "
    "some calls at each of 64 positions, the head's loss and the optimiser. *steps* has the "
    "faster products that came with this work, so that it is faster than NewLLM was when the target was set.",
    "quick_sweep": "Nine tenths of it is optimiser steps (measured once by hand), with matrix products that both revisions "
    "compute alike; this one scores each arm without its mixer and in windows besides.",
    "data_scale": "Training sorts the positions of the text, which by itself grows by an exponent of 1.06 (N log N), "
    "and reads the text in the order that it found, presumably from the processor's cache at 10 MB and from "
    "memory at 100. Scoring finds an n-gram by bisection among those of its history; its time a word rises between 10 and "
    "30 MB of text alone, and why was not found.",
}
HEAD = """# Benchmarks

What each script printed, on two cores of a shared virtual machine without a GPU; its first lines name the revision, the
processor and how busy the machine was. Compare within a table, not between tables: the arms of one table took turns in one
run. A script ends with its targets and whether they are held. There was no GPU; `benchmarks/bk_core_gpu.py` is ready
for one (the diagonal; the solve has none).
The scripts were run at several revisions and on two machines whose processors have one name ([runs](#runs)); what some of them
printed on the other of these, and earlier ones on an Intel Xeon, [stands below](#on-another-amd-epyc).
The speeds in [findings.md](findings.md) were measured by their study, on the machine that is named there.

Write this page again with `python scripts/benchmarks.py`.
"""
ELSEWHERE = """## On another AMD EPYC

Earlier, on a machine whose processor has the same name and two cores as well, and where a copy in one thread takes
about twice as long: {epyc}. Of what is judged beside jax and scipy, our calls took 1.3 to 2.3 times as long there,
jax's and scipy's 1.1 to 1.5 times: jax / ours {epyc_jax} for the diagonal with long rows, and with gradients
{epyc_solve} for the solve. The first of these is a miss; half of that call is not its kernels (*A call with gradients
from Python* above). The table of passes there, and on the Xeon, counts shared hoppings in full.

## On an Intel Xeon

What scripts of earlier revisions printed there, on a machine that was not always quiet: {intel}.

There these targets of *bk_core* were missed: {missed}. *resolvent_solve* was 1.6 to 3.3 times as fast as jax (wanted:
6, 4 and 4) and 2.9 to 3.3 times as scipy (5), *exact* of *moe* once slower than dense (0.96). *reading_step* trained at
1.01, 1.57, 2.15 and 4.58 times GPT's tokens/s (1.5, 2, 3 and 5) and, in windows of 64, at 0.86 of the LSTM's (1), in
1.54 to 1.81 times the time of its products (1.25); *train_step* took 1.59 times that of its own (1.3). Turns were not
settled then (`benchmarks/_timing.py`), so that the ratios to jax and scipy may be too low; why the loop is 94 and not
150 times slower there was not examined, and none was measured there again.
"""
QUIET, LONGEST_WAIT = 0.5, 300.0
"""The load below which a script starts, and the seconds for which that is waited for."""
TARGET = re.compile(
    r"^target: (.*), (at (?:least|most) [\d.,e+-]+), measured: (.*?)(?:, (held|missed))?$", re.MULTILINE
)


def wait_until_quiet() -> None:
    """Until the work of the script before has left the average of a minute, so that the head tells of others' alone.

    Raises:
        SystemExit: others keep the machine busy.
    """
    until = time.monotonic() + LONGEST_WAIT
    while hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > QUIET:
        if time.monotonic() > until:
            raise SystemExit(
                f"the load is {load:.1f} after {LONGEST_WAIT:.0f} s; timings need a quiet machine: end what runs."
            )
        time.sleep(5)


def run(name: str, told: Mapping[str, str | None]) -> None:
    """Run one script and keep what it prints."""
    script, *words = shlex.split(RUNS.get(name, name))
    words = [f"benchmarks/{script}.py", *words]
    command, said = [sys.executable, *words], ["$ python", shlex.join(words)]
    for option, own in NEEDS.get(name, {}).items():
        if told[option]:
            command += [own, told[option]]
            said += [own, SHOWN[option]]
    shown = f"{' '.join(said)}    # {datetime.date.today()}, revision {git_revision()[:12]}\n"
    if name not in PERPLEXITIES:
        wait_until_quiet()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with exit code {done.returncode}; the page keeps its last output.")
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    (OUTPUTS / f"{name}.txt").write_text(shown + done.stdout.strip("\n") + "\n", encoding="utf-8")


def page() -> str:
    """docs/benchmarks.md from the kept outputs: which targets are missed, then each script with what it printed."""
    outputs = {
        name: path.read_text(encoding="utf-8")
        for name in BENCHMARKS
        if (path := OUTPUTS / f"{name}.txt").exists()
    }
    found = [(name, *match) for name, output in outputs.items() for match in TARGET.findall(output)]
    missed = [row for row in found if row[-1] == "missed"]
    told = f"{sum(row[-1] == 'held' for row in found)} targets are held, {len(missed)} are missed"
    if unmeasured := [row for row in found if not row[-1]]:
        told += f", {len(unmeasured)} were not measured"
    older = [
        name for name, output in outputs.items() if "arget" in BENCHMARKS[name] and not TARGET.search(output)
    ]
    if older := [f"[{name}](#{name})" for name in older if "No target" not in BENCHMARKS[name]]:
        told += f". Not among them: {', '.join(older)}, whose kept output is older than its lines of targets"
    parts = [HEAD, f"## Targets\n\n{told}.\n"]
    if missed:
        lines = [
            f"| [{name}](#{name}) | {what} | {wanted} | {value} |" for name, what, wanted, value, _ in missed
        ]
        parts.append(
            "| missed in | what | wanted | measured |\n| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
        )
    parts.append(runs_table(outputs))
    for name, output in outputs.items():
        why = f"{WHY[name]}\n\n" if name in WHY and any(row[0] == name for row in missed) else ""
        parts.append(f"## {name}\n\n{BENCHMARKS[name]}\n\n{why}```text\n{output}```\n")
    parts.append(elsewhere())
    if missing := [f"`{name}`" for name in BENCHMARKS if name not in outputs]:
        parts.append(f"Of {', '.join(missing)} no output is kept yet.\n")
    return "\n".join(parts)


def runs_table(outputs: Mapping[str, str]) -> str:
    """When, at which revision and where each kept output was printed."""
    rows = []
    for name, output in outputs.items():
        date, revision = re.search(r"# ([\d-]+), revision (\w+)", output).groups()
        place = output.splitlines()[1].partition(", vectors")[0]
        rows.append(f"| [{name}](#{name}) | {date} | {revision} | {place} |")
    rule = "| --- | --- | --- | --- |\n"
    return "## Runs\n\n| script | date | revision | processor |\n" + rule + "\n".join(rows) + "\n"


def elsewhere() -> str:
    """What scripts printed on other machines."""

    def targets(folder: Path, name: str) -> list[tuple[str, ...]]:
        return TARGET.findall((folder / f"{name}.txt").read_text(encoding="utf-8"))

    def listed(folder: Path) -> str:
        return ", ".join(
            f"[{p.stem}](results/benchmarks/{folder.name}/{p.name})" for p in sorted(folder.glob("*.txt"))
        )

    def beside_jax(name: str) -> str:
        *rest, last = (row[2] for row in targets(ON_ANOTHER, name) if row[0].startswith("jax / ours"))
        return f"{', '.join(rest)} and {last}"

    missed = [
        f"{what} {value} ({wanted})"
        for what, wanted, value, state in targets(ON_INTEL, "bk_core")
        if state == "missed"
    ]
    return ELSEWHERE.format(
        epyc=listed(ON_ANOTHER),
        epyc_jax=beside_jax("bk_core"),
        epyc_solve=beside_jax("resolvent_solve"),
        intel=listed(ON_INTEL),
        missed=", ".join(missed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--jax", metavar="PYTHON", help="a Python interpreter that has jax")
    parser.add_argument("--nltk", metavar="PYTHON", help="a Python interpreter that has nltk")
    parser.add_argument("--text", metavar="FOLDER", help="the text of what trains")
    parser.add_argument("--page", action="store_true", help="run nothing, only write the page")
    given = parser.parse_args()
    if unknown := [n for n in given.names if n not in BENCHMARKS]:
        parser.error(f"got {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}.")
    names = [] if given.page else given.names or list(BENCHMARKS)
    told = {option: getattr(given, option) for option in SHOWN}
    for name in names:
        if untold := [option for option in NEEDS.get(name, {}) if not told[option]]:
            parser.error(
                f"{name} needs --{untold[0]} {SHOWN[untold[0]]}, without which its kept numbers would be lost; give it, or "
                "name other scripts."
            )
    if names and "+" in git_revision():
        parser.error(
            "the checkout has changes that are not committed; a kept output names a clean revision: commit them."
        )
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        run(name, told)
    (ROOT / "docs" / "benchmarks.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
