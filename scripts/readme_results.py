"""Write the sweep's results into the README and docs/results.md from finished studies and their manifests.

Two things are typed here. ORIGINAL_CODE holds the published code's perplexities on the same text, from a run of it outside this
repository, of which nothing but these three numbers is kept. And the number of seeds behind MOE_TABLE.csv, which that table does
not say, is the default of benchmarks/moe_perplexity.py.

    python scripts/readme_results.py CORRECTED ORIGINAL INITIALISATION.csv MOE_TABLE.csv

CORRECTED and ORIGINAL are output folders of `bklm.studies.grad_blend` (each holds grad_blend/), one per protocol. Tables and
figures go to docs/results, the text between the two `results` comments of both pages is replaced.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

from readme_section import DOCS, write_details, write_digest

from bklm.harness.statistics import Perplexity, interval95

SETTINGS = """Validation perplexity over {seeds} seeds (mean, 95% interval), {epochs} epochs, batch {batch}, learning rate {rate}, on a WikiText-2 sample
("wikitext-2-mini", SHA-256 {sha}...): train is the official test split, valid and test the two halves of the official validation
split, cut at an article heading. Baselines of the same tokens: {baselines}."""

PROVENANCE = """The fourth column is the published code on the same text, run once outside this repository. Settings, versions and machine of the
others: [corrected](docs/results/corrected_manifest.json), [as published](docs/results/original_manifest.json), {revisions}."""

COMMANDS = """```bash
python -m bklm.studies.grad_blend --profile full --data_dir FOLDER --epochs_per_trial {epochs} \\
    --protocol corrected --output_dir results/corrected
python -m bklm.studies.grad_blend --profile full --data_dir FOLDER --epochs_per_trial {epochs} \\
    --protocol original --output_dir results/original
```
"""

PICTURE = (
    "![Validation perplexity by alpha, corrected protocol](docs/results/corrected_grad_blend_analysis.png)"
)

DIGEST = f"""
## Does blending "hypothesis-7" into the gradient help?

{{corrected}} {{versus}}

{{table}}

{PICTURE}

{SETTINGS} That is a small text for a neural model; the comparison between the columns is what it is for. Why hypothesis-7 wrecks a
training whose chain rule is right, what the first weights have to do with it, and whether the router has to learn:
[docs/results.md](docs/results.md#what-the-sweep-says).

{COMMANDS}"""

SWEEP = f"""
## What the sweep says

{SETTINGS}

**{{versus}}** The sample is a small text for a neural model; the comparison between the columns is what it is for.

{{table}}

**Corrected.** {{corrected}}

**As published.** {{original}}

{PROVENANCE}

{PICTURE}

Why does hypothesis-7 wreck the training once the chain rule is right, when it merely slowed it as published? It divides by G² where
the exact gradient multiplies. In the models trained with the exact gradient (alpha 0, at the end, first 8 training windows) its cosine
with that gradient is {{cosine}}, and it is {{ratio}} times as long; the diagonal term alone has {{diagonal}}. The published code left out a
complex conjugate; without it hypothesis-7 has {{published}}: two errors that partly cancel. (Mean and 95% interval over the seeds.) The
original protocol also keeps the potential small by its clamps. The figure below pools all trials, diverged ones included.

![Cosine and length of the blended gradients, corrected protocol](docs/results/corrected_gradient_directions.png)

{COMMANDS}"""

HEAD = """\
| alpha | corrected: causal, exact gradient | as published, run here: **sees the future** \
| original code, same text: sees the future | reported by the original, WikiText-2: sees the future |
|---|---|---|---|---|
"""

INITIALISATION = """
**A caveat that we measured.** How much alpha matters depends on how the potential's weights start. bklm draws them wide; with
torch's default for a linear layer, as the original had it, the potential stays small and its gradient, right or wrong, hardly
counts. The same corrected training then ends at {results} (`python benchmarks/grad_blend_initialisation.py --data_dir FOLDER`). So
hypothesis-7 does harm where the potential is large and none that {seeds} seeds can see where it is small; nothing here shows that it helps.
"""

MOE = """
## Does the router have to learn?

The original's router never received a gradient. The same text, model and schedule at alpha 0, three seeds:
`python benchmarks/moe_perplexity.py --data_dir FOLDER`.

| {head} |
|{rule}
{table}
"""

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
# Of the original code on the same text, 3 epochs, batch 32, learning rate 1e-3, while it saw the future.
ORIGINAL_CODE = {0.0: 361.8, 0.5: 374.9, 1.0: 378.5}


def main() -> None:
    corrected, original = (Path(a) / "grad_blend" for a in sys.argv[1:3])
    DOCS.mkdir(parents=True, exist_ok=True)
    for protocol, folder in (("corrected", corrected), ("original", original)):
        for name in (
            "grad_blend_analysis.png",
            "gradient_directions.png",
            "training_curves.png",
            "table.csv",
            "gradient_directions.csv",
            "summary.json",
        ):
            shutil.copy(folder / name, DOCS / f"{protocol}_{name}")
        copy_manifest(folder / "manifest.json", protocol)
    fields = sweep_fields(read(corrected), read(original), exact_directions(corrected))
    shutil.copy(sys.argv[3], DOCS / "potential_initialisation.csv")
    shutil.copy(sys.argv[4], DOCS / "moe_perplexity.csv")
    text = SWEEP.format(**fields)
    text += initialisation_section(DOCS / "potential_initialisation.csv")
    text += moe_section(DOCS / "moe_perplexity.csv")
    write_details("results", text)
    write_digest("results", DIGEST.format(**fields))


def copy_manifest(path: Path, protocol: str) -> None:
    """The manifest without the folders of the machine that made it."""
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)["config"]
    text = text.replace(config["data_dir"], Path(config["data_dir"]).name)
    text = text.replace(config["output_dir"], f"results/{protocol}")
    (DOCS / f"{protocol}_manifest.json").write_text(text, encoding="utf-8")


def read(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def exact_directions(folder: Path) -> dict[str, dict[str, str]]:
    """Cosine and length against the exact gradient, over the seeds of alpha 0, as mean and 95% interval."""
    measured: dict[str, dict[str, list[float]]] = {}
    for result in sorted(folder.glob("trials/alpha_0_seed_*/result.json")):
        for row in json.loads(result.read_text(encoding="utf-8"))["directions"]["at the end"]:
            if row["layer"] == "all":
                kept = measured.setdefault(row["direction"], {"cosine": [], "norm_ratio": []})
                for key, values in kept.items():
                    values.append(row[key])
    return {
        name: {
            "cosine": "{:+.2f} ± {:.2f}".format(*interval95(values["cosine"])),
            "ratio": "{:.0f} ± {:.0f}".format(*interval95(values["norm_ratio"])),
        }
        for name, values in measured.items()
    }


def against_kneser_ney(corrected: dict) -> str:
    """Whether the best corrected model beats the best count model of the same tokens, in one sentence."""
    best = min(corrected["table"], key=lambda row: row["val_ppl"])
    model = number(best)
    count = min(corrected["baselines"], key=lambda b: b["val_ppl"])
    rival = f"{count['name']} ({count['val_ppl']:.1f})"
    if best["val_ppl_high"] < count["val_ppl"]:
        return f"The best corrected model, {model}, beats {rival}."
    if best["val_ppl_low"] > count["val_ppl"]:
        return f"The best corrected model, {model}, does not beat {rival}."
    return f"The best corrected model, {model}, cannot be told from {rival}."


def number(row: dict | None, key: str = "val_ppl") -> str:
    if row is None or row.get(key) is None:
        return "-"
    if key == "original_val_ppl":
        return f"{row[key]:.2f}"
    return str(Perplexity(row[key], row.get(f"{key}_low"), row.get(f"{key}_high")))


def sweep_fields(corrected: dict, original: dict, measured: dict[str, dict[str, str]]) -> dict[str, object]:
    theirs = {row["alpha"]: row for row in original["table"]}
    lines = []
    for row in corrected["table"]:
        code = ORIGINAL_CODE.get(row["alpha"])
        cells = [f"{row['alpha']:g}", number(row), number(theirs.get(row["alpha"])), f"{code or '-'}"]
        lines.append("| " + " | ".join([*cells, number(row, "original_val_ppl")]) + " |")
    manifest = json.loads((DOCS / "corrected_manifest.json").read_text(encoding="utf-8"))
    mantissa, exponent = f"{manifest['config']['learning_rate']:e}".split("e")
    baselines = ", ".join(f"{b['name']} {b['val_ppl']:.1f}" for b in corrected["baselines"])
    return {
        "seeds": corrected["table"][0]["seeds"],
        "epochs": manifest["config"]["epochs_per_trial"],
        "batch": manifest["config"]["batch_size"],
        "rate": f"{float(mantissa):g}e{int(exponent)}",
        "baselines": baselines,
        "table": HEAD + "\n".join(lines),
        "corrected": corrected["finding"],
        "original": original["finding"],
        "cosine": measured["hypothesis-7"]["cosine"],
        "ratio": measured["hypothesis-7"]["ratio"],
        "published": measured["original hypothesis-7"]["cosine"],
        "diagonal": measured["local"]["cosine"],
        "versus": against_kneser_ney(corrected),
        "revisions": revisions(),
        "sha": manifest["corpus"]["sha256"][:16],
    }


def revisions() -> str:
    """From which state of the code the two sweeps come."""
    found = []
    for protocol in ("corrected", "original"):
        revision = json.loads((DOCS / f"{protocol}_manifest.json").read_text(encoding="utf-8"))["git_revision"]
        commit, _, changes = revision.partition("+")
        found.append(f"{commit[:12]}{' with changes that were committed later' if changes else ''}")
    return f"made at revisions {' and '.join(found)}"


def initialisation_section(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_alpha: dict[str, list[float]] = {}
    for row in rows:
        by_alpha.setdefault(f"{float(row['alpha']):g}", []).append(float(row["val_ppl"]))
    parts = [
        f"{Perplexity.over_seeds(values)} at alpha {alpha} ({len(values)} seed{'s' if len(values) > 1 else ''})"
        for alpha, values in by_alpha.items()
    ]
    seeds = max(len(values) for values in by_alpha.values())
    return INITIALISATION.format(results=", ".join(parts), seeds=NUMBERS.get(seeds, seeds))


def moe_section(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = "\n".join("| " + " | ".join(row.values()) + " |" for row in rows)
    return MOE.format(head=" | ".join(rows[0]), rule="---|" * len(rows[0]), table=table)


if __name__ == "__main__":
    main()
