"""Write the results of the embedding-freeze study into the README and docs/results.md: no number there is typed by hand.

    python scripts/readme_freeze.py PEPS WIKITEXT LM_TABLE.csv

The first two are output folders of `bklm.studies.embedding_freeze` (each holds embedding_freeze/), on the Python
Enhancement Proposals and on the WikiText-2 sample; the third is what benchmarks/freeze_lm_embedding.py wrote on the
Proposals. Tables and figures go to docs/results, the text between the two `freeze` comments of both pages is replaced.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

from readme_section import DOCS, markdown_table, write_details, write_digest

from bklm.harness.statistics import Perplexity, with_interval
from bklm.studies.embedding_freeze.config import INEQUALITY
from bklm.studies.embedding_freeze.tables import REPORTED

REPORT = """\
The original reported that freezing GPT-2's embedding lowers perplexity by 66-72%; its "trained" arm did not train the
embedding."""

LM_TABLE = """GPT-2's table was the tied head of a language model, and an SVD's was not. On the PEPs, with a table
that a tied model of the same size learnt from the documents kept apart
(`python benchmarks/freeze_lm_embedding.py --data_dir FOLDER`):

{lm_table}

{lm_words}"""

COMMAND = """```bash
{command}
```
"""

DIGEST = f"""
## Does freezing the embedding help?

{REPORT} Here every combination of pretrained or random, frozen or trained, tied or untied is trained on the same
tokens and scored on the same documents, with {{seeds}} seeds and the same learning-rate search for every arm. Ratios of
perplexities, all else equal; *pretrained* is an SVD of the PPMI of other documents:

{{main_effects}}

![Effects of pretraining, freezing and tying on the PEPs](docs/results/freeze_peps_effects.png)

{LM_TABLE}

Every arm, both texts, the side claims and what phase 1 does:
[docs/results.md](docs/results.md#does-freezing-the-embedding-help).

{COMMAND}"""

DETAILS = f"""
## Does freezing the embedding help?

{REPORT} Here every combination is trained on the same tokens and scored on the same documents, with {{seeds}} seeds
and the same search over the learning rates {{rates}} for every arm, at most {{epochs}} epochs, patience {{patience}} (the
original's schedule). The sizes are ones that two CPU cores can do: {{layers}} layers of width {{width}}, a byte-level BPE
of {{vocab:,}} tokens. For want of GPT-2's table *pretrained* means a truncated SVD of the PPMI of documents that no
model is trained or scored on; unlike GPT-2's, such a table was never the output of a language model. PEPs: {{peps}}.
WikiText-2 sample (made as above): {{wiki}}.

Validation perplexity at the best epoch (mean, 95% interval; the seconds are phase 2's on a machine shared with other work):

{{arms}}

Count models of the same tokens: {{baselines}}. {{reported}}

![Validation perplexity of every arm on the PEPs](docs/results/freeze_peps_arms.png)

**What made the difference.** Ratios of perplexities, all else equal, over paired seeds; one whose 95% interval holds
1 is no difference.

{{effects}}

- PEPs: {{finding_peps}}
- WikiText-2 sample: {{finding_wiki}}

![Effects of pretraining, freezing and tying on the PEPs](docs/results/freeze_peps_effects.png)

**Was it the SVD?** {LM_TABLE}

**The original's side claims**, on the PEPs. {{side}}

{{inequality}}

![Phase 1: tokens converged and effective rank by iteration, on the PEPs](docs/results/freeze_peps_phase1.png)

{COMMAND}"""
PICTURES = ("arms.png", "curves.png", "effects.png", "phase1.png", "budget.png")
TABLES = ("table.csv", "effects.csv", "phase1.csv")

# What differs from the quick profile.
GIVEN = (
    "samples", "val_documents", "document_tokens", "pretraining_documents", "vocab_size", "epochs", "learning_rates",
)  # fmt: skip


class Study:
    """One finished study and the name that the README gives its text."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / "embedding_freeze", name
        self.summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.config = self.manifest["config"]

    def describe(self) -> str:
        tokens, removed = self.summary["tokens"], self.summary["near_duplicates"]
        cut = self.config["document_tokens"]
        samples = " and ".join(
            f"{n} documents, {tokens[f'{n} samples']:,} tokens" for n in self.config["samples"]
        )
        documents, left_out = self.config["val_documents"], len(removed["removed"])
        return (
            f"{samples}, each cut at {cut:,}; {tokens['validation']:,} validation tokens in {documents} documents; "
            f"{left_out} of {removed['examined']} training documents left out as near-duplicates"
        )

    def cell(self, arm: str, samples: int) -> str:
        row = next(r for r in self.summary["table"] if (r["arm"], r["samples"]) == (arm, samples))
        return str(Perplexity(row["val_ppl"], row["val_ppl_low"], row["val_ppl_high"]))

    def without_unk(self, arm: str) -> dict[str, str]:
        """PPL of the larger sample without <unk>, where the text has any."""
        n = max(self.config["samples"])
        row = next(r for r in self.summary["table"] if (r["arm"], r["samples"]) == (arm, n))
        if row["val_ppl_without_unk"] == row["val_ppl"]:
            return {}
        return {f"{self.name}, {n}, without `<unk>`": str(Perplexity(row["val_ppl_without_unk"], None, None))}

    def finding(self, words: str) -> str:
        return next((s for s in self.summary["findings"] if words in s), "")


def arm_rows(studies: list[Study]) -> list[dict[str, str]]:
    """One row per arm: PPL on every text and size, and what the first text's larger sample gives beside it."""
    first = studies[0]
    largest = max(first.config["samples"])
    rows = []
    for own in (r for r in first.summary["table"] if r["samples"] == largest):
        row = {"arm": own["arm"]}
        for study in studies:
            row |= {f"{study.name}, {n}": study.cell(own["arm"], n) for n in study.config["samples"]}
            row |= study.without_unk(own["arm"])
        accuracy = with_interval(100 * own["accuracy"], own["accuracy_95"] and 100 * own["accuracy_95"])
        beside = f"({first.name}, {largest})"
        row |= {
            f"accuracy % {beside}": accuracy,
            f"val - train, nats {beside}": with_interval(own["gap"], own["gap_95"], 2),
            f"best epoch {beside}": with_interval(own["best_epoch"], own["best_epoch_95"]),
            f"seconds {beside}": with_interval(own["seconds"], own["seconds_95"], 0),
            "trained / all parameters": f"{own['trainable_parameters']:,} / {own['parameters']:,}",
            f"tokens per trained {beside}": f"{own['tokens_per_parameter']:.2g}",
        }
        rows.append(row)
    return rows


def effect_rows(studies: list[Study]) -> list[dict[str, str]]:
    """Every effect over all cells and within the other factors' values, one column a text."""
    rows = []
    for effect in studies[0].summary["effects"]:
        if "samples" in effect["where"]:
            continue
        row = {"change": effect["change"], "where": effect["where"]}
        for study in studies:
            same = next(
                e
                for e in study.summary["effects"]
                if (e["factor"], e["where"]) == (effect["factor"], effect["where"])
            )
            ratio = Perplexity(same["ratio"], same["ratio_low"], same["ratio_high"])
            row[study.name] = f"x{ratio}: {same['verdict']}"
        rows.append(row)
    return rows


def main_effects(studies: list[Study]) -> list[dict[str, str]]:
    """The effects over all cells."""
    return [
        {k: v for k, v in row.items() if k != "where"} for row in effect_rows(studies) if row["where"] == "all"
    ]


def baselines(studies: list[Study]) -> str:
    parts = []
    for study in studies:
        for samples in study.config["samples"]:
            listed = [
                f"{b['name']} {b['val_ppl']:.1f}" for b in study.summary["baselines"] if b["samples"] == samples
            ]
            parts.append(f"{study.name}, {samples}: {', '.join(listed)}")
    return "; ".join(parts)


def reported() -> str:
    listed = [f'"{arm}", {samples} samples: {row["val_ppl"]}' for (arm, samples), row in REPORTED.items()]
    return f"Reported by the original (UltraChat, GPT-2's embedding, tokeniser and sizes, one seed): {'; '.join(listed)}."


def command(study: Study) -> str:
    """The command that repeats a study with a folder of one's own."""
    flags = [
        f"--{name} {' '.join(map(str, v)) if isinstance(v := study.config[name], list) else v}"
        for name in GIVEN
    ]
    lines = [
        "python -m bklm.studies.embedding_freeze --profile quick --dataset wikitext-2 --data_dir FOLDER",
        f"--output_dir results/{study.name.lower()}",
    ]
    return " \\\n    ".join([*lines, " ".join(flags[:4]), " ".join(flags[4:])])


def changes_by_table(rows: list[dict[str, str]]) -> list[tuple[str, float, str]]:
    """What freezing does with each pretrained table, from rows of benchmarks/freeze_lm_embedding.py.

    Returns:
        the table's name, the change of perplexity and the verdict on it, for each table.
    """
    changes = []
    for row in rows:
        if measured := row["frozen instead of trained, paired"]:  # "x0.959 (0.933 to 0.986): lower"
            ratio, verdict = float(measured.split()[0].lstrip("x")), measured.rsplit(": ", 1)[1]
            changes.append((row["pretrained embedding"], ratio - 1, verdict))
    return changes


def verdict_by_table(rows: list[dict[str, str]]) -> str:
    changes = changes_by_table(rows)
    words = [f"{change:+.0%} with {table} table ({verdict})" for table, change, verdict in changes]
    depends = "depends" if len({verdict for *_, verdict in changes}) > 1 else "does not depend"
    return f"So the verdict on freezing {depends} on the table: PPL changes by {' and '.join(words)}. Reported: -66% to -72%."


def main() -> None:
    studies = [Study(Path(sys.argv[1]), "PEPs"), Study(Path(sys.argv[2]), "WikiText-2")]
    peps, wiki = studies
    DOCS.mkdir(parents=True, exist_ok=True)
    for study, short in zip(studies, ("peps", "wikitext"), strict=True):
        for name in (*PICTURES, *TABLES):
            shutil.copy(study.folder / name, DOCS / f"freeze_{short}_{name}")
    shutil.copy(sys.argv[3], DOCS / "freeze_lm_embedding.csv")
    with Path(sys.argv[3]).open(encoding="utf-8") as file:
        lm_rows = list(csv.DictReader(file))
    config = peps.config
    side = [
        peps.finding(start)
        for start in (
            "Phase 1:",
            "Tokens per",
            "beat Kneser-Ney",
            "trials ended at",
            "profit from",
            "A trained embedding",
            "The original's unequal",
        )
    ]
    fields = {
        "seeds": len(config["seeds"]),
        "rates": ", ".join(f"{rate:g}" for rate in config["learning_rates"]),
        "epochs": config["epochs"],
        "patience": config["patience"],
        "layers": config["n_layers"],
        "width": config["context_dim"],
        "vocab": config["vocab_size"],
        "peps": peps.describe(),
        "wiki": wiki.describe(),
        "arms": markdown_table(arm_rows(studies)),
        "baselines": baselines(studies),
        "reported": reported(),
        "effects": markdown_table(effect_rows(studies)),
        "main_effects": markdown_table(main_effects(studies)),
        "finding_peps": peps.summary["findings"][0],
        "finding_wiki": wiki.summary["findings"][0],
        "lm_table": markdown_table(lm_rows),
        "lm_words": verdict_by_table(lm_rows),
        "side": "\n\n".join(sentence for sentence in side if sentence),
        "inequality": INEQUALITY,
        "command": "\n".join(command(study) for study in studies),
    }
    write_digest("freeze", DIGEST.format(**fields))
    write_details("freeze", DETAILS.format(**fields))


if __name__ == "__main__":
    main()
