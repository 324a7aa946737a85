"""Which of torch's two libraries should take a matrix product, and does the package choose it?

    python benchmarks/products.py                # with as many threads as torch takes
    OMP_NUM_THREADS=1 python benchmarks/products.py
    python benchmarks/products.py --quick        # small sizes, for CI

For float32 on a CPU torch's own operators call MKL; oneDNN, which torch carries too, is called by name. *taken* is what
`bklm/moe/products.py` does here. *forward* is x W^T of x (rows, K) and W (V, K), *input's* d W of d (rows, V), *weight's*
G += d^T x. With *another number of rows* each call has up to ``MORE_ROWS`` more, as an expert's tokens change, and its time
varies as they do; *a slice* is a W whose rows do not follow one another in memory. Arms take turns in one process; medians
with quartiles.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from _timing import print_table, take_turns, target, where
from reading_step import training_step
from torch.nn import functional as F

from bklm.models import GPT, ResNetBK
from bklm.models.sizing import gpt_of_size, resnet_bk_of_size
from bklm.moe import products

Arms = dict[str, Callable[[], object]]
SHAPES = {
    "head of 30,000 words": (1024, 64, 30_000),
    "GPT's wider map": (1024, 256, 1024),
    "an expert's map": (1024, 64, 256),
    "a thin map": (4096, 64, 16),
    "at the least size": (512, 64, 64),
    "a small map": (64, 64, 64),
}
"""Rows, K and V."""
MORE_ROWS = 3000
RAGGED = {"a small expert": (200, 64, 256), "an expert": (1000, 64, 256), "a large expert": (2000, 256, 1024)}
"""The same, the fewest rows."""
SLICES = {"8 rows": (8, 256, 256), "32 rows": (32, 256, 256), "1,024 rows": (1024, 256, 256)}
QUICK = {"an expert's map": (128, 64, 256)}
ALLOWED = 1.2
"""What is taken may cost so many times the faster library."""


def arms(call: Callable[[], object]) -> Arms:
    """``call`` as the package takes it here, and with each library throughout."""
    decided = products.is_intel, products.ONEDNN_FROM, products.RAGGED_FROM

    def throughout(library: str, least: int) -> Callable[[], object]:
        def timed() -> object:
            # Attributes are set, as a context manager would take longer than a small product.
            products.is_intel, products.ONEDNN_FROM, products.RAGGED_FROM = (
                lambda: library == "MKL",
                least,
                least,
            )
            try:
                return call()
            finally:
                products.is_intel, products.ONEDNN_FROM, products.RAGGED_FROM = decided

        return timed

    return {"taken": call, "MKL": throughout("MKL", 2**62), "oneDNN": throughout("oneDNN", 0)}


def products_of(rows: int, k: int, v: int) -> dict[str, Arms]:
    x, d, w, total = torch.randn(rows, k), torch.randn(rows, v), torch.randn(v, k), torch.zeros(v, k)
    return {
        "forward": arms(lambda: products.scaled_linear(x, w)),
        "input's": arms(lambda: products.scaled_linear(d, w.t())),
        "weight's": arms(lambda: products.add_weight_gradient(total, d, x)),
    }


def products_of_other_rows(rows: int, k: int, v: int) -> dict[str, Arms]:
    """The same, each call with a number of rows that the calls before did not have."""
    x, d = torch.randn(rows + MORE_ROWS, k), torch.randn(rows + MORE_ROWS, v)
    w, total = torch.randn(v, k), torch.zeros(v, k)
    # Steps of a prime through all of them: oneDNN has forgotten a number by the time it comes again.
    others = itertools.cycle([rows + 7 * i % MORE_ROWS for i in range(MORE_ROWS)])

    def forward() -> object:
        return products.scaled_linear(x[: next(others)], w)

    def weights() -> None:
        n = next(others)
        products.add_weight_gradient(total, d[:n], x[:n])

    return {"forward": arms(forward), "weight's": arms(weights)}


def products_of_slice(rows: int, k: int, v: int) -> dict[str, Arms]:
    x, w = torch.randn(rows, k), torch.randn(v, 2 * k)[:, :k]
    return {
        "forward": {
            "taken": lambda: products.linear(x, w),
            "MKL": lambda: F.linear(x, w),
            "oneDNN": lambda: products.onednn_linear(x, w, None),
        }
    }


def report(title: str, found: dict[tuple[str, str], Arms], seconds: float) -> float:
    """Print a row for each; the most that what is taken costs, in times of the faster library."""
    rows, most = [], 0.0
    for (what, product), measured in found.items():
        times = take_turns(measured, seconds)
        faster = min(times["MKL"].median, times["oneDNN"].median)
        most = max(most, times["taken"].median / faster)
        rows.append(
            {
                "product": f"{what}, {product}" if product else what,
                **{name: str(time) for name, time in times.items()},
                "oneDNN / MKL": f"x{times['oneDNN'].median / times['MKL'].median:.2f}",
                "taken / faster": f"x{times['taken'].median / faster:.2f}",
            }
        )
    print_table(title, rows)
    return most


def table_of(shapes: dict[str, tuple[int, int, int]], make: Callable[[int, int, int], dict[str, Arms]]):
    return {
        (f"{what}: {rows:,} x {k:,} x {v:,}", product): measured
        for what, (rows, k, v) in shapes.items()
        for product, measured in make(rows, k, v).items()
    }


def training_steps(parameters: int, vocab_size: int) -> dict[tuple[str, str], Arms]:
    ids = torch.randint(vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    size = parameters, vocab_size
    models = {
        "ResNetBK (solve)": ResNetBK(resnet_bk_of_size(*size, None, mixer="solve", num_experts=1).config),
        "GPT": GPT(gpt_of_size(*size, 64).config),
    }
    return {
        (f"{name}, {model.num_parameters():,} parameters", ""): arms(training_step(model, ids))
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for CI")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measurement, about, for each row")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(where())
    chosen = "oneDNN from the least size on" if products.onednn_serves(torch.ones(1)) else "MKL for all"
    print(f"taken here: {chosen}")
    seconds = 0.1 if args.quick else args.seconds
    found = {
        "a number of rows seen before": (QUICK if args.quick else SHAPES, products_of),
        "another number of rows at each call": (QUICK if args.quick else RAGGED, products_of_other_rows),
        "a weight that is a slice": (QUICK if args.quick else SLICES, products_of_slice),
    }
    costs = {title: report(title, table_of(*how), seconds) for title, how in found.items()}
    parameters, vocab_size = (20_000, 200) if args.quick else (2_740_000, 10_000)
    title = "a training step, 16 x 64 tokens"
    costs[title] = report(title, training_steps(parameters, vocab_size), 5 * seconds)
    print()
    for title, cost in costs.items():
        target(
            f"what is taken / the faster library, at most, {title}", None if args.quick else cost, most=ALLOWED
        )


if __name__ == "__main__":
    main()
