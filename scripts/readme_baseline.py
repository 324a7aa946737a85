"""Write the results of the baseline study into the README and docs/results.md: no number there is typed by hand.

    python scripts/readme_baseline.py WIKITEXT PEPS ORIGINAL

All are output folders of `bklm.studies.baseline` (each holds baseline/): on the WikiText-2 sample, on the Python
Enhancement Proposals, and NewLLM with protocol "original" on the first of these texts. The first one's also holds
int8.csv of NewLLM, from `bklm.studies.baseline.int8_table`. Tables and figures go to docs/results, the text between
the two `baseline` comments of both pages is replaced.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pandas as pd
from readme_section import DOCS, markdown_table, write_details, write_digest

from bklm.harness.report import command_words
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.models import TITLES
from bklm.studies.baseline.tables import (
    REPORTED_EPOCHS,
    REPORTED_PPL,
    readable_contexts,
    readable_cost,
    readable_quality,
    readable_search,
)

NAMES = {
    "wikitext": "WikiText-2 sample",
    "peps": "Python Enhancement Proposals",
    "original": "WikiText-2 sample, windows and schedule of the original",
}
ORIGINAL_WINDOWS = 51_026  # training windows an epoch, reported by the original
FILES = (
    "training_curves.png", "context_lengths.png", "table.csv", "learning_rates.csv", "epochs.csv", "summary.json",
)  # fmt: skip

SETTINGS = """\
NewLLM was published with a validation perplexity of 23.34 on WikiText-2 and without a competitor. Here it stands beside
a GPT and a ResNetBK of the same parameter count: the same text, batches and steps, {seeds} seeds, the same search of
the learning rate for each, batch {batch} x {seq_len}, {schedule} schedule. The texts are small and the budgets those of
a CPU. Vocabulary: the {vocab:,} most frequent words in lower case, and a token for all others."""

AS_PUBLISHED = """
**As published**: NewLLM alone with the original's windows of lines, learning rate {rate} and clipping, seed {seed}, on
the same sample. Lowest validation PPL {ppl} at epoch {epoch} of {epochs} (without `<unk>` {known}); {count_name} of the
same windows: {count}. The original had more than eight times this text: these {steps:,} steps are {their_epochs:.1f} of
its epochs, and it reported {before[val_ppl]} after {before[epoch]} and {after[val_ppl]} after {after[epoch]}; the
{reported} after 27 would take its text.
"""

COMMANDS = """```bash
{commands}
```
"""

DIGEST = f"""
## How good is NewLLM beside competitors of its size?

{SETTINGS}
{{findings}}
{{quality}}
{{published}}
{{picture}}

What longer windows bring, the searches, memory and the speed of generation:
[docs/results.md](docs/results.md#newllm-beside-competitors-of-its-size).

{COMMANDS}"""

DETAILS = f"""
## NewLLM beside competitors of its size

{SETTINGS}
{{texts}}{{published}}
{{published_curves}}

**What it costs**, of the same models on {{machine}}; training memory is weights, Adam's moments and the peak of one step:

{{cost}}

GPT was trained on {{seq_len}} positions; only for the timing its table was lengthened to 2,048. Its state grows with
every word, that of the others never does.

**In int8**, NewLLM of seed 0 on the first {{context_tokens:,}} validation tokens of the WikiText-2 sample; the original
planned 31 MB to 8 MB for 1 to 3% of perplexity, and its 31 MB were weights and Adam's moments. What costs perplexity is
not the rounded weights but the activations, which int8 products round with one scale for a whole batch:

{{int8}}

{COMMANDS}"""

ONE_TEXT = """
{finding}

{quality}

By window length, on the first {context_tokens:,} validation tokens, the same targets in every column. {gain}

{contexts}
"""

CURVES = "![Perplexity by epoch on the {name}](docs/results/baseline_{key}_training_curves.png)"
CONTEXTS = """
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
        table, _summary = self.summary["table"], self.summary
        contexts = [{"val PPL with windows of": row.pop("model"), **row} for row in readable_contexts(table)]
        return ONE_TEXT.format(
            finding=self.finding(),
            quality=self.quality(),
            contexts=markdown_table(contexts),
            context_tokens=self.config["context_tokens"],
            gain=self.gain(),
        )

    def finding(self) -> str:
        """The text, the budget and the verdict, in a few sentences."""
        epochs = "1 epoch" if self.config["epochs"] == 1 else f"{self.config['epochs']} epochs"
        steps = f"{self.summary['table'][0]['steps']:,} steps"
        size = f"{self.summary['train_targets']:,} training targets an epoch, {epochs} ({steps})"
        return f"**{self.name}**, {size}. {self.summary['finding']} {self.counting()}"

    def quality(self) -> str:
        rows = readable_quality(self.summary["table"], self.summary["baselines"])[:-1]
        return markdown_table(
            [{k.replace("<unk>", "`<unk>`"): v for k, v in r.items() if k != "best epoch"} for r in rows]
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
        words = command_words(config)
        kept, i = words[:3], 3
        while i < len(words):  # a flag and its values
            j = i + 1
            while j < len(words) and not words[j].startswith("--"):
                j += 1
            if words[i].removeprefix("--") in given:
                kept += words[i:j]
            i = j
        # No line ends inside a quoted word.
        glued = " ".join(shlex.quote(word).replace(" ", "\0") for word in kept)
        lines = textwrap.wrap(glued, 110, break_long_words=False, break_on_hyphens=False)
        return " \\\n    ".join(lines).replace("\0", " ")

    def as_published(self) -> str:
        """One training with the original's protocol, in a few sentences."""
        (row,), config = self.summary["table"], self.config
        count = min(self.summary["baselines"], key=lambda b: b["val_ppl"])
        their_epochs = row["steps"] / math.ceil(ORIGINAL_WINDOWS / config["batch_size"])
        return AS_PUBLISHED.format(
            rate=f"{row['learning_rate']:g}",
            seed=config["seeds"][0],
            ppl=f"{row['val_ppl']:.2f}",
            epoch=f"{row['best_epoch']:g}",
            epochs=self.epochs_done(),
            known=f"{row['val_ppl_without_unk']:.1f}",
            count_name=count["name"],
            count=f"{count['val_ppl']:.2f}",
            steps=row["steps"],
            their_epochs=their_epochs,
            before=max((e for e in REPORTED_EPOCHS if e["epoch"] <= their_epochs), key=lambda e: e["epoch"]),
            after=min((e for e in REPORTED_EPOCHS if e["epoch"] > their_epochs), key=lambda e: e["epoch"]),
            reported=REPORTED_PPL,
        )

    def epochs_done(self) -> int:
        return int(pd.read_csv(self.folder / "epochs.csv")["epoch"].max())

    def copy(self) -> None:
        for name in FILES:
            if (self.folder / name).exists() or self.key != "original":
                shutil.copy(self.folder / name, DOCS / f"baseline_{self.key}_{name}")


def main() -> None:
    *studies, published = (Study(Path(f), key) for f, key in zip(sys.argv[1:], NAMES, strict=True))
    for study in (*studies, published):
        study.copy()
    first = studies[0]
    config, summary = first.config, first.summary
    texts = "".join(study.section() for study in studies)
    curves = CURVES.format(name=first.name, key=first.key)
    texts += f"\n{curves}\n{CONTEXTS.format(name=first.name, key=first.key)}"
    texts += "\nThe searches, validation PPL after each trial; a rate at the edge of the list may not be the best there is:\n"
    for study in studies:
        rows = readable_search(study.summary["learning_rate_search"], study.summary["table"])
        head = f"{study.name}, {study.summary['learning_rate_search'][0]['steps']} steps a trial"
        named = [{head: row.pop("model"), **row} for row in rows]
        texts += f"\n{markdown_table(named)}\n"
    fields = {
        "seeds": len(config["seeds"]),
        "batch": config["batch_size"],
        "seq_len": config["seq_len"],
        "schedule": config["schedule"],
        "vocab": config["vocab_size"],
        "findings": "".join(f"\n{study.finding()}\n" for study in reversed(studies)),
        "quality": first.quality(),
        "picture": curves,
        "texts": texts,
        "published": published.as_published(),
        "published_curves": CURVES.format(name=published.name, key=published.key),
        "machine": _machine(first.manifest["environment"]),
        "cost": markdown_table(readable_cost(summary["table"], summary["measured"])),
        "context_tokens": config["context_tokens"],
        "int8": int8_table(first.folder / "int8.csv"),
        "commands": "\n".join(study.command() for study in (*studies, published)),
    }
    write_digest("baseline", DIGEST.format(**fields))
    write_details("baseline", DETAILS.format(**fields))


def int8_table(path: Path) -> str:
    shutil.copy(path, DOCS / "baseline_wikitext_int8.csv")
    measured = pd.read_csv(path)
    return markdown_table(
        [
            {
                "weights": row.weights,
                "file": f"{row.file_bytes / 1e6:.1f} MB",
                "val PPL": f"{row.perplexity:.2f}",
                "change": f"{row.perplexity_change:+.2%}",
                "scored tokens/s": f"{row.scored_tokens_per_second:,.0f}",
                "generated tokens/s": f"{row.generated_tokens_per_second:,.0f}",
            }
            for row in measured[measured.perplexity.notna()].itertuples()
        ]
    )


def _machine(environment: dict) -> str:
    if environment["gpu"]:
        return environment["gpu"]["name"]
    threads = environment["torch_threads"]
    return f"{threads} thread{'s' if threads > 1 else ''} of an {environment['processor']}"


if __name__ == "__main__":
    main()
