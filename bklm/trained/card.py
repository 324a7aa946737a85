"""The model card of an exported model: what it is, what it was trained on, and what was measured, with intervals."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from bklm import __version__
from bklm.data.corpus import UNKNOWN_LICENCE

if TYPE_CHECKING:
    from bklm.trained.model import Trained

REPOSITORY = "https://github.com/bklm/bklm"


def model_card(trained: Trained) -> str:
    """README.md of the exported folder, with the hub's front matter."""
    record, manifest, model = trained.record, trained.manifest, trained.model
    corpus = manifest.get("corpus") or {}
    limit = "any number of positions" if model.n_seq is None else f"{model.n_seq} positions"
    seen = (
        "\n**This model sees the future**: its perplexity is no language model's.\n"
        if trained.sees_the_future
        else ""
    )
    version = manifest.get("environment", {}).get("bklm", "")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bklm, {type(model).__name__.lower()}, linear-time]
---

# {trained.name}: a {type(model).__name__} trained on {trained.text_name}

{model.num_parameters():,} parameters, {limit}, a vocabulary of {model.vocab_size:,}. It was trained by the study
`{manifest.get("study")}` of [bklm]({REPOSITORY}) {version}, profile `{manifest["config"].get("profile")}`.
It is small, and writes accordingly: a subject of experiments, not an assistant.
{seen}
## Use

```python
# pip install "git+{REPOSITORY}"
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)
ids = tokenizer("{_example(trained)}", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))
```

## Text

{corpus.get("name", "unnamed")}, from {_without_place(corpus.get("source", "an unknown source"))}.
SHA-256 of the text: `{corpus.get("sha256", "unknown")}`.
Licence of the text: {corpus.get("licence", UNKNOWN_LICENCE)}.

## What was measured

| on the validation split | value |
| --- | --- |
{_rows(trained)}

A perplexity is per token, over {_scored(trained)}. The interval is over the seeds of the study; the weights here are of
seed {record.get("seed", "unknown")}. An n-gram model of the same tokens that is below the model reads better than it.

Exported by bklm {__version__}. The command that trained it:

```bash
{_without_places(manifest.get("command", "unknown"))}
```
"""


def _without_place(source: str) -> str:
    """Where a text comes from without the folder: where it lay on a machine is nobody's business."""
    return re.split(r" in (?=/|[A-Za-z]:[\\/]|\\\\)", source)[0]


def _without_places(command: str) -> str:
    """A shell command whose absolute paths are their last parts alone."""
    return shlex.join(_last_part(word) for word in shlex.split(command))


def _last_part(word: str) -> str:
    name, equals, value = word.rpartition("=")
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return f"{name}{equals}{kind(value).name}"
    return word


def _example(trained: Trained) -> str:
    words = trained.decode(range(2, min(5, trained.model.vocab_size)))
    return words.replace('"', "'").replace("\n", " ").replace("\\", "").strip() or "a"


def _rows(trained: Trained) -> str:
    record, summary = trained.record, trained.summary
    rows: list[tuple[str, str]] = []
    if (changed := record.get("changed_from")) and changed["val_ppl"] is not None:
        rows.append(
            (f"perplexity of {changed['model']}, which this was made from", f"{changed['val_ppl']:.2f}")
        )
    if record.get("val_ppl") is not None:
        rows.append(("perplexity of these weights", f"{record['val_ppl']:.2f}"))
    for name, title in (
        ("val_ppl_without_unk", "without the unknown token"),
        ("test_ppl", "perplexity on the test split"),
    ):
        if record.get(name) is not None:
            rows.append((title, f"{record[name]:.2f}"))
    if record.get("val_accuracy") is not None:
        rows.append(("tokens foretold", f"{record['val_accuracy']:.1%}"))
    if not changed and (row := _of_model(trained)) and row.get("val_ppl_low") is not None:
        interval = f"{row['val_ppl']:.2f} ({row['val_ppl_low']:.2f} to {row['val_ppl_high']:.2f})"
        kind = "range" if row["seeds"] == 2 else "95% interval"
        trials = trained.manifest["config"].get("epochs_per_trial")
        # The weights may be of a longer training than those that were compared.
        of = "" if trials in (None, len(record.get("epochs", []))) else f", trials of {trials} epochs"
        rows.append((f"mean over {row['seeds']} seeds ({kind}{of})", interval))
    if (gain := record.get("context_gain")) is not None:
        rows.append(("gain from context", f"{gain:.2%}"))
    rows += [
        (b["name"], f"{b['val_ppl']:.2f}")
        for b in summary.get("baselines", [])
        if b.get("val_ppl") is not None and _is_of(record, b)
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _of_model(trained: Trained) -> dict[str, Any] | None:
    """The row of the study's table that this model belongs to."""
    for row in trained.summary.get("table", []):
        for factor in ("model", "alpha", "arm"):
            if factor in row and row[factor] == trained.record.get(factor) and _is_of(trained.record, row):
                return row
    return None


def _is_of(record: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is of the size of training text that a model was trained on, where a study has several."""
    return "samples" not in row or row["samples"] == record.get("samples")


def _scored(trained: Trained) -> str:
    """Which tokens a perplexity is of."""
    if trained.manifest.get("study") == "dialogue":
        return "every token of the replies, which follow a turn of the user's"
    return "every token of the split"
