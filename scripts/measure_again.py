"""Run the studies again as docs/findings.md and docs/results.md tell of them, and write their sections.

    python scripts/measure_again.py --wikitext FOLDER --peps FOLDER --dialogues FOLDER --output_dir FOLDER
    python scripts/measure_again.py koopman physics --wikitext FOLDER --output_dir FOLDER    # these
    python scripts/measure_again.py --commands --wikitext FOLDER --output_dir FOLDER         # only say what would be run

One run after the other, each on both of two cores (``--workers``); all of them take some ten hours there. What was stopped
goes on where it was, and a run that was finished is written from what is there. ``--wikitext`` and ``--peps`` are folders with
train.txt, valid.txt and test.txt, ``--dialogues`` the one that scripts/chatterbot_dialogues.py writes. Tables of benchmarks
that a page also shows stay as docs/results keeps them (scripts/readme.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from readme import PREFIXES

from bklm.harness.cli import parse
from bklm.harness.folder import other_experiment
from bklm.harness.int8 import int8_table
from bklm.studies import STUDIES, configs
from bklm.studies.baseline import BaselineConfig
from bklm.studies.baseline.run import prepare_text, run_baseline

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("wikitext", "peps", "dialogues")
FREEZE = (
    "--profile quick --document_tokens {} --samples {} --val_documents {} --pretraining_documents 400 --vocab_size 2048 \
--epochs 10 --learning_rates 0.0003 0.001 0.004 0.01 --phase1_arms True"
)
# Wider than the profile's: of four rates the best of many alphas is the smallest or the largest.
BLEND = "--profile full --epochs_per_trial 3 --learning_rates 0.0003 0.001 0.003 0.01 0.03 0.1"
BASELINE = "--profile full --batch_size 16 --clip 1 --schedule cosine --context_tokens 16384"
# Words by study and run; TEXT in capitals stands for a folder.
RUNS = {
    "grad_blend": {
        "corrected": f"{BLEND} --final_epochs 5 --mixer diagonal --data_dir WIKITEXT",
        "original": "--profile full --epochs_per_trial 3 --protocol original --data_dir WIKITEXT",
        "reads": f"{BLEND} --final_epochs 5 --data_dir WIKITEXT",
        # Each layer as torch starts it, as the original had it.
        "weights": f"{BLEND} --mixer diagonal --first_weights torch --alphas 0 0.5 1 --data_dir WIKITEXT",
    },
    "precision": {"": "--profile quick"},
    "baseline": {
        "wikitext": f"{BASELINE} --epochs 8 --learning_rates 0.0001 0.0003 0.001 0.003 0.01 0.03 --dropouts 0 0.1 0.3 "
        "--data_dir WIKITEXT",
        # The models that read, at sizes at which the head does not take most of the parameters, once over the whole text.
        "peps": f"{BASELINE} --epochs 1 --learning_rates 0.0003 0.001 0.003 0.01 0.03 --search_tokens 400000 "
        "--model readers --tokenizer bpe --vocab_size 8000 --embed_dim 128 --hidden_dim 256 --context_dim 128 --data_dir PEPS",
        # As WikiText-2 is scored elsewhere, but of the sample and small: two cores, not a GPU.
        "field": "--profile full --protocol field --epochs 5 --learning_rates 0.0003 0.001 0.003 0.01 0.03 "
        "--search_tokens 240000 --batch_size 16 --embed_dim 32 --hidden_dim 64 --context_dim 32 --n_layers 4 "
        "--context_tokens 16384 --data_dir WIKITEXT",
        "original": "--profile full --model newllm --protocol original --seeds 0 --epochs 27 --learning_rates 0.0001 "
        "--seq_len 63 --clip '0.5@1, 1@11' --context_tokens 16384 --data_dir WIKITEXT",
    },
    "embedding_freeze": {
        "peps": FREEZE.format(512, "40 80", 30) + " --data_dir PEPS",
        "wikitext": FREEZE.format(1024, "15 30", 15) + " --data_dir WIKITEXT",
    },
    "koopman": {
        "corrected": "--profile full --data_dir WIKITEXT",
        "original": "--profile full --protocol original --data_dir WIKITEXT",
        # Recall alone, further than the others: of the text, which it has no use for, next to nothing.
        "recall": "--profile full --parts recall --recall_pairs 2 --trained_distance 256 --distances 16 32 64 128 256 512 "
        "1024 2048 --epochs 1 --learning_rates 0.01 --vocab_size 500 --max_train_tokens 8192 --data_dir WIKITEXT",
    },
    "physics": {
        "corrected": "--profile full --data_dir WIKITEXT",
        "original": "--profile full --protocol original --data_dir WIKITEXT",
    },
    "compression": {"": "--profile full --torchao True --data_dir WIKITEXT"},
    "dialogue": {
        "grammar": "--profile full --pretraining_dir WIKITEXT",
        "real": "--profile full --dataset dailydialog --epochs 8 --pretraining_dir WIKITEXT --data_dir DIALOGUES",
    },
    "integration": {"": "--profile full --data_dir WIKITEXT"},
}
# These time what they compute, or keep the batch before of one process.
ALONE = {"precision"}


def command(study: str, run: str, folders: dict[str, Path | None], output_dir: Path, workers: int) -> list[str]:
    """One run as a command line.

    Raises:
        SystemExit: the folder of its text was not given.
    """
    words = shlex.split(RUNS[study][run])
    for name in TEXTS:
        if name.upper() in words and folders[name] is None:
            raise SystemExit(
                f"measure_again.py: {study} {run} reads a folder that was not given; give --{name} FOLDER."
            )
        words = [str(folders[name]) if word == name.upper() else word for word in words]
    shared = [] if study in ALONE else ["--workers", str(workers)]
    place = output_dir / "_".join(filter(None, (study, run)))
    return [
        sys.executable,
        "-m",
        f"bklm.studies.{study}",
        *words,
        "--device",
        "cpu",
        *shared,
        "--output_dir",
        str(place),
    ]


def is_finished(study: str, words: list[str]) -> bool:
    """Whether the run of this command line that ended lies in its folder.

    Raises:
        SystemExit: a run with other settings does.
    """
    manifest = Path(words[-1]) / study / "manifest.json"
    if not manifest.exists() or not json.loads(manifest.read_text(encoding="utf-8")).get("finished"):
        return False
    kind = next(c for c in configs() if c.study == study)
    if different := other_experiment(parse(kind, words[3:]).resolved()):
        raise SystemExit(
            f"measure_again.py: {words[-1]} holds a run with other settings: {'; '.join(different)}. Choose another "
            "--output_dir, or remove it."
        )
    return True


def add_int8(place: Path) -> None:
    """int8.csv of NewLLM beside the results of 03 in ``place``, as its notebook writes it."""
    manifest = json.loads((place / "baseline" / "manifest.json").read_text(encoding="utf-8"))
    config = BaselineConfig(**manifest["config"])
    text = prepare_text(config)
    # Of what is finished nothing is trained again.
    int8_table(run_baseline(config, text=text), text, "newllm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all where none is named"
    )
    for option in ("--wikitext", "--peps", "--dialogues"):
        parser.add_argument(option, type=lambda path: Path(path).resolve())
    parser.add_argument("--output_dir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--commands", action="store_true", help="print the commands that are left, run none")
    given = parser.parse_args()
    if unknown := [name for name in given.studies if name not in STUDIES]:
        parser.error(f"got {', '.join(unknown)}; allowed is {', '.join(STUDIES)}.")
    folders = {name: getattr(given, name) for name in TEXTS}
    for study in given.studies or STUDIES:
        own = {run: command(study, run, folders, given.output_dir, given.workers) for run in RUNS[study]}
        for words in own.values():
            if is_finished(study, words):
                continue
            print(f"\n$ {shlex.join(words[1:])}", flush=True)
            if not given.commands:
                subprocess.run(words, cwd=ROOT, check=True)
        if study == "baseline" and not given.commands:
            add_int8(Path(own["wikitext"][-1]))
        if not given.commands:
            kept = [f"{run}={words[-1]}" if PREFIXES.get(study) else words[-1] for run, words in own.items()]
            subprocess.run(
                [sys.executable, str(ROOT / "scripts/readme.py"), study, *kept], cwd=ROOT, check=True
            )


if __name__ == "__main__":
    main()
