"""Write the README's results from finished studies, so that no number there is typed by hand.

    python scripts/readme_results.py CORRECTED ORIGINAL [MOE_TABLE.csv]

CORRECTED and ORIGINAL are output folders of `bklm.studies.grad_blend` (each holds grad_blend/), one per protocol. Tables and
figures go to docs/results, the text between the README's two `results` comments is replaced.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"

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
            "summary.json",
        ):
            shutil.copy(folder / name, DOCS / f"{protocol}_{name}")
    text = sweep_section(read(corrected), read(original))
    if len(sys.argv) > 3:
        shutil.copy(sys.argv[3], DOCS / "moe_perplexity.csv")
        text += moe_section(DOCS / "moe_perplexity.csv")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def read(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def number(mean: float | None, half: float | None = None) -> str:
    if mean is None:
        return "-"
    digits = 1 if mean < 1000 else 0
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def sweep_section(corrected: dict, original: dict) -> str:
    ours = {row["alpha"]: row for row in corrected["table"]}
    theirs = {row["alpha"]: row for row in original["table"]}
    lines = [
        "| alpha | corrected (causal, exact gradient) | as published, re-run here: **sees the future** "
        "| original code, same text: sees the future | reported by the original, WikiText-2: sees the future |",
        "|---|---|---|---|---|",
    ]
    for alpha, row in ours.items():
        seen = theirs.get(alpha)
        lines.append(
            f"| {alpha:g} | {number(row['val_ppl'], row['val_ppl_95'])} "
            f"| {number(seen['val_ppl'], seen['val_ppl_95']) if seen else '-'} "
            f"| {number(ORIGINAL_CODE.get(alpha))} | {number(row['original_val_ppl'])} |"
        )
    baselines = ", ".join(f"{b['name']} {b['val_ppl']:.1f}" for b in corrected["baselines"])
    seeds = corrected["table"][0]["seeds"]
    return f"""## What the sweep says

Validation perplexity, mean and 95% interval over {seeds} seeds, 3 epochs, batch 32, learning rate 1e-3, on a WikiText-2 sample (train: the official test
split; valid and test: the two halves of the official validation split, cut at an article heading). Baselines of the same tokens: {baselines}.

{chr(10).join(lines)}

**Corrected:** {corrected["finding"]}

**As published:** {original["finding"]}

![Validation perplexity by alpha, corrected protocol](docs/results/corrected_grad_blend_analysis.png)

Why hypothesis-7 hurts once the chain rule is right, and did not when it was wrong: as published both formulas lack the same complex conjugate. Hypothesis-7
divides by G² where the exact gradient multiplies, which turns the phase the other way; the missing conjugate turns it back. With the conjugate in
place hypothesis-7 points against the gradient and is longer than it:

![Cosine and length of the blended gradients, corrected protocol](docs/results/corrected_gradient_directions.png)

```bash
python -m bklm.studies.grad_blend --profile full --data_dir FOLDER --epochs_per_trial 3 --protocol corrected --output_dir results/corrected
python -m bklm.studies.grad_blend --profile full --data_dir FOLDER --epochs_per_trial 3 --protocol original --alphas 0 0.5 1 --output_dir results/original
```
"""


def moe_section(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    head = " | ".join(rows[0])
    lines = "\n".join("| " + " | ".join(row.values()) + " |" for row in rows)
    return f"""
## Does the router have to learn?

The original's router never received a gradient. The same text, model and schedule at alpha 0, `python benchmarks/moe_perplexity.py --data_dir FOLDER`:

| {head} |
|{"---|" * len(rows[0])}
{lines}
"""


if __name__ == "__main__":
    main()
