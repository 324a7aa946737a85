"""Write the README's section on precision and speed from a finished study, so that no number there is typed by hand.

    python scripts/readme_precision.py FOLDER

FOLDER is an output folder of `bklm.studies.precision` (it holds precision/). Figures and tables go to docs/results.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
from readme_section import DOCS, markdown_table, write_section

from bklm.studies.precision_claims import claims_readable
from bklm.studies.precision_tables import summary_readable

TEXT = """
## Which recursion, which precision, how fast

{recommendation}

![Errors of theta/phi and left/right by length and precision](docs/results/precision_errors.png)

{summary}

"not finite" is the shortest length at which a value or gradient was infinite or not a number; errors are relative, the
worst of the grid; *theta/phi loop* is what was published, a Python loop of torch operations with the diagonal term alone as
its gradient.

**What was claimed, and what is true here** ({machine}; paired calls, median and quartiles, forward included).

{claims}

![The speed-ups that were announced beside what was measured](docs/results/precision_claims.png)

```bash
python -m bklm.studies.precision --profile quick --output_dir results/precision
```
"""
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
    write_section(
        "precision",
        TEXT.format(
            recommendation=summary["recommendation"],
            summary=markdown_table(summary_readable(summary["grid"])),
            claims=markdown_table(claims_readable(claims)),
            machine=describe(manifest["environment"]),
        ),
    )


if __name__ == "__main__":
    main()
