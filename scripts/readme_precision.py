"""Write the results on precision and speed into the README and docs/results.md: no number there is typed by hand.

    python scripts/readme_precision.py FOLDER

FOLDER is an output folder of `bklm.studies.precision` (it holds precision/). Figures and tables go to docs/results.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
from readme_section import DOCS, markdown_table, write_details, write_digest

from bklm.studies.precision.claims import claims_readable
from bklm.studies.precision.tables import summary_readable

COMMAND = """```bash
python -m bklm.studies.precision --profile quick --output_dir results/precision
```
"""

DIGEST = f"""
## Which recursion, which precision, how fast?

{{recommendation}}

![Errors of theta/phi and left/right by length and precision](docs/results/precision_errors.png)

Speeds ({{machine}}; paired calls, median and quartiles, forward included):

{{claims}}

Times, memory and errors of every recursion and precision:
[docs/results.md](docs/results.md#which-recursion-which-precision-how-fast).

{COMMAND}"""

DETAILS = f"""
## Which recursion, which precision, how fast

{{recommendation}}

{{summary}}

"not finite" is the shortest length at which a value or gradient was infinite or not a number; errors are relative, the
worst of the grid; *theta/phi loop* is what was published, a Python loop of torch operations with the diagonal term alone as
its gradient. Measured on {{machine}}.

![The speed-ups that were announced beside what was measured](docs/results/precision_claims.png)

{COMMAND}"""
FIGURES = ("precision_errors.png", "claims.png")


def describe(machine: dict) -> str:
    if machine["gpu"] is not None:
        return machine["gpu"]["name"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['packages']['torch']}, no GPU"


def main() -> None:
    folder = Path(sys.argv[1]) / "precision"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in (*FIGURES, "claims.csv", "grid.csv"):
        shutil.copy(folder / name, DOCS / (name if name.startswith("precision") else f"precision_{name}"))
    claims = pd.read_csv(folder / "claims.csv").astype(object)
    claims = claims.where(claims.notna(), None).to_dict("records")
    fields = {
        "recommendation": summary["recommendation"],
        "summary": markdown_table(summary_readable(summary["grid"])),
        "claims": markdown_table(claims_readable(claims)),
        "machine": describe(manifest["environment"]),
    }
    write_digest("precision", DIGEST.format(**fields))
    write_details("precision", DETAILS.format(**fields))


if __name__ == "__main__":
    main()
