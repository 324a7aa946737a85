"""Does the router's exact gradient help? ResNet-BK with it, with the original's router that never learns, and dense.

    python benchmarks/moe_perplexity.py --data_dir FOLDER       WikiText-2's files, 3 seeds, 3 epochs each
    python benchmarks/moe_perplexity.py --quick                 embedded text, small models: does it run?

The dense arm has one expert: the same active parameters per token, a quarter of the experts' parameters in all. Every arm
is the study `bklm.studies.grad_blend` at alpha 0, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bklm.files.atomic import read_result
from bklm.harness.folder import INTERNALS
from bklm.harness.report import as_text, write_csv
from bklm.harness.statistics import Perplexity
from bklm.moe.layer import usage_entropy
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.run import run_grad_blend

ARMS = {
    "4 experts, exact router gradient": {"num_experts": 4, "router_gradient": "exact"},
    "4 experts, exact, balanced (0.01)": {"num_experts": 4, "router_gradient": "exact", "balance": 0.01},
    "4 experts, router never learns": {"num_experts": 4, "router_gradient": "none"},
    "dense, same active size": {"num_experts": 1, "router_gradient": "exact"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--output_dir", type=Path, default=Path("results/moe_perplexity"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    common = {"profile": "smoke", "dataset": "embedded"} if arguments.quick else {"profile": "full"}
    scores: dict[str, list[float]] = {}
    entropies, parameters = {}, {}
    for number, (name, changes) in enumerate(ARMS.items(), start=1):
        result = run_grad_blend(
            GradBlendConfig(
                **common,
                **changes,
                mixer="diagonal",
                alphas=(0.0,),
                seeds=arguments.seeds,
                epochs_per_trial=arguments.epochs,
                final_epochs=1,
                data_dir=arguments.data_dir,
                output_dir=str(arguments.output_dir / f"arm_{number}"),
            )
        )
        trials = [read_result(p) for p in sorted(result.folder.glob(f"{INTERNALS}/trials/*/result.json"))]
        scores[name] = [t["val_ppl"] for t in sorted(trials, key=lambda t: t["seed"])]
        entropies[name] = _entropy(trials)
        parameters[name] = result.final["parameters"]
    base = next(iter(scores.values()))
    rows = [
        {
            "arm": name,
            "parameters": f"{parameters[name]:,}",
            "val PPL (95%)": "a seed diverged" if None in values else str(Perplexity.over_seeds(values)),
            "ratio to the first, paired": _ratio(values, base) if values is not base else "",
            "expert usage entropy": entropies[name],
        }
        for name, values in scores.items()
    ]
    print(as_text(rows))
    write_csv(arguments.output_dir / "table.csv", rows)


def _ratio(values: list[float | None], base: list[float | None]) -> str:
    if None in (*values, *base):
        return "a seed diverged: no verdict"
    ratio = Perplexity.over_seeds([v / b for v, b in zip(values, base, strict=True)])
    if not ratio.is_judged:
        return f"x{ratio} (fewer than three seeds, no verdict)"
    verdict = "worse" if ratio.low > 1 else "better" if ratio.high < 1 else "no difference"
    return f"x{ratio}: {verdict}"


def _entropy(trials: list[dict]) -> str:
    counts = [layer for t in trials for layer in t["epochs"][-1]["expert_counts"]]
    if len(counts[0]) == 1:
        return "-"
    values = [usage_entropy(layer, normalised=True) for layer in counts]
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
