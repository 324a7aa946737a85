"""Write the English dialogues of PyPI's chatterbot-corpus (BSD licence) as a folder that notebook 08 reads as data_dir.

    pip install --no-deps --target PACKAGE chatterbot-corpus==1.3.3
    python scripts/chatterbot_dialogues.py PACKAGE FOLDER

Some nine hundred short ones, most of a question and a reply: enough to show the study on dialogues that people wrote, too few
to conclude anything from. An eighth is for validation, an eighth for the test.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import yaml

CORPUS = "chatterbot_corpus/data/english"
HELD_OUT = 8


def read_dialogues(package: Path) -> list[list[str]]:
    """Turns of every dialogue with a reply, each dialogue once, the first speaker's first.

    Raises:
        SystemExit: the package is not in that folder.
    """
    files = sorted((package / CORPUS).glob("*.yml"))
    if not files:
        raise SystemExit(
            f"chatterbot_dialogues.py: got {package}, which holds no {CORPUS}; install it there, as --help shows."
        )
    found = {}
    for path in files:
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            texts = [" ".join(str(turn).split()) for turn in turns]
            if len(texts) > 1:
                found[tuple(texts)] = texts
    return list(found.values())


def write_splits(dialogues: list[list[str]], folder: Path) -> None:
    """train.jsonl, valid.jsonl and test.jsonl, a dialogue a line, in an order that a seed decides."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0).sample(dialogues, len(dialogues))
    held_out = len(drawn) // HELD_OUT
    splits = {"valid": drawn[:held_out], "test": drawn[held_out : 2 * held_out], "train": drawn[2 * held_out :]}
    for split, own in splits.items():
        lines = [json.dumps({"turns": turns}, ensure_ascii=False) for turns in own]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(own):,} dialogues, {sum(len(t.split()) for turns in own for t in turns):,} words")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write_splits(read_dialogues(Path(sys.argv[1])), Path(sys.argv[2]))
