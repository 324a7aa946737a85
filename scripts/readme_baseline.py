"""Write the README's section on the baseline study from finished studies, so that no number there is typed by hand.

    python scripts/readme_baseline.py WIKITEXT [PEPS]

Both are output folders of `bklm.studies.baseline` (each holds baseline/), on the WikiText-2 sample and on the Python
Enhancement Proposals. Tables and figures go to docs/results, the text between the README's two `baseline` comments is
replaced.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

from readme_section import DOCS, markdown_table, write_section

from bklm.reporting import command_words
from bklm.studies.baseline import BaselineConfig
from bklm.studies.baseline_models import TITLES
from bklm.studies.baseline_table import (
    readable_contexts,
    readable_cost,
    readable_quality,
    readable_search,
)

NAMES = {"wikitext": "WikiText-2 sample", "peps": "Python Enhancement Proposals"}
FILES = ("training_curves.png", "context_lengths.png", "table.csv", "learning_rates.csv", "epochs.csv")

TEXT = """
## NewLLM beside competitors of its size

NewLLM was published with a validation perplexity of 23.34 on WikiText-2 and without a competitor. Here it stands beside
a GPT and a ResNetBK of the same parameter count: the same text, batches and steps, {seeds} seeds, the same search over
the learning rates {rates}, batch {batch} x {seq_len}, {schedule} schedule. The budget is one for a CPU, {steps}
steps, and so the ranking one of how fast a model learns. The original trained for 27 epochs on more than eight times
this text and on other windows: its number is no target here. Vocabulary: the {vocab:,} most frequent words in lower
case, and a token for all others.
{texts}
**What it costs**, of the same models on {machine}; training memory is weights, Adam's moments and the peak of one step:

{cost}

GPT was trained on {seq_len} positions; only for the timing its table was lengthened to 2,048. Its state grows with
every word, that of the others never does.

```bash
{commands}
```
"""

ONE_TEXT = """
**{name}**, {train:,} training targets an epoch, {epochs}. {finding} {counting}

{quality}

By window length, on the first {context_tokens:,} validation tokens, the same targets in every column. {gain}

{contexts}
"""

PICTURES = """
![Perplexity by epoch on the {name}](docs/results/baseline_{key}_training_curves.png)

![Perplexity by context length on the {name}](docs/results/baseline_{key}_context_lengths.png)
"""


class Study:
    """One finished study."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.name = folder / "baseline", key, NAMES[key]
        self.summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.config = self.manifest["config"]

    def section(self) -> str:
        table, summary = self.summary["table"], self.summary
        quality = [
            {k.replace("<unk>", "`<unk>`"): v for k, v in row.items() if k != "best epoch"}
            for row in readable_quality(table, summary["baselines"])[:-1]
        ]
        contexts = [{"val PPL with windows of": row.pop("model"), **row} for row in readable_contexts(table)]
        epochs = self.config["epochs"]
        return ONE_TEXT.format(
            name=self.name,
            train=summary["train_targets"],
            epochs="1 epoch" if epochs == 1 else f"{epochs} epochs",
            finding=summary["finding"],
            counting=self.counting(),
            quality=markdown_table(quality),
            contexts=markdown_table(contexts),
            context_tokens=self.config["context_tokens"],
            gain=self.gain(),
        )

    def counting(self) -> str:
        """Which models beat the best count model of the same tokens."""
        best = min(self.summary["baselines"], key=lambda b: b["val_ppl"])
        below = [TITLES[r["model"]] for r in self.summary["table"] if r["val_ppl"] < best["val_ppl"]]
        who = ", ".join(below) if below else "No model"
        verb = "are" if len(below) > 1 else "is"
        return f"{who} {verb} below the {best['name']} of the same tokens, {best['val_ppl']:.1f}."

    def gain(self) -> str:
        """What the longest windows bring over the shortest, at best."""
        found = {}
        for row in self.summary["table"]:
            values = [v for k, v in row.items() if k.startswith("val_ppl_context_") and v is not None]
            found[TITLES[row["model"]]] = 1 - min(values) / values[0]
        name = max(found, key=found.get)
        return f"The most that more than 16 words of context bring is {found[name]:.1%}, to {name}."

    def command(self) -> str:
        """The command that repeats the study, what the profile says left out."""
        profile = BaselineConfig(profile=self.config["profile"]).resolved().to_dict()
        given = {
            n: v
            for n, v in self.config.items()
            if profile[n] != v or n in ("profile", "data_dir", "output_dir")
        }
        given |= {"data_dir": "FOLDER", "output_dir": f"results/{self.key}"}
        given.pop("keep_checkpoints", None)
        config = BaselineConfig(**given)
        words = command_words("bklm.studies.baseline", config)
        kept, i = words[:3], 3
        while i < len(words):  # a flag and its values
            j = i + 1
            while j < len(words) and not words[j].startswith("--"):
                j += 1
            if words[i].removeprefix("--") in given:
                kept += words[i:j]
            i = j
        return " \\\n    ".join(
            textwrap.wrap(shlex.join(kept), 110, break_long_words=False, break_on_hyphens=False)
        )

    def copy(self) -> None:
        for name in FILES:
            shutil.copy(self.folder / name, DOCS / f"baseline_{self.key}_{name}")


def main() -> None:
    studies = [Study(Path(folder), key) for folder, key in zip(sys.argv[1:], NAMES, strict=False)]
    DOCS.mkdir(parents=True, exist_ok=True)
    for study in studies:
        study.copy()
    first = studies[0]
    config, summary = first.config, first.summary
    texts = "".join(study.section() for study in studies)
    texts += PICTURES.format(name=first.name, key=first.key)
    texts += "\nThe searches, validation PPL after each trial; a rate at the edge of the list may not be the best there is:\n"
    for study in studies:
        rows = readable_search(study.summary["learning_rate_search"], study.summary["table"])
        head = f"{study.name}, {study.summary['learning_rate_search'][0]['steps']} steps a trial"
        named = [{head: row.pop("model"), **row} for row in rows]
        texts += f"\n{markdown_table(named)}\n"
    write_section(
        "baseline",
        TEXT.format(
            seeds=len(config["seeds"]),
            rates=", ".join(f"{r:g}" for r in config["learning_rates"]),
            batch=config["batch_size"],
            seq_len=config["seq_len"],
            schedule=config["schedule"],
            steps=" and ".join(str(study.summary["table"][0]["steps"]) for study in studies),
            vocab=config["vocab_size"],
            texts=texts,
            machine=_machine(first.manifest["environment"]),
            cost=markdown_table(readable_cost(summary["table"], summary["measured"])),
            commands="\n".join(study.command() for study in studies),
        ),
    )


def _machine(environment: dict) -> str:
    if environment["gpu"]:
        return environment["gpu"]["name"]
    threads = environment["torch_threads"]
    return f"{threads} thread{'s' if threads > 1 else ''} of an {environment['processor']}"


if __name__ == "__main__":
    main()
