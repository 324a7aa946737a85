"""Which of torch's two libraries should take a matrix product, and does the package choose it?

    python benchmarks/products.py                # with as many threads as torch takes
    OMP_NUM_THREADS=1 python benchmarks/products.py
    python benchmarks/products.py --quick        # small sizes, for CI

For float32 on a CPU torch's own operators call MKL; oneDNN, which torch carries too, is called by name. *taken* is what
`bklm/moe/products.py` does here. *forward* is x W^T of x (rows, K) and W (V, K), *input's* d W of d (rows, V), *weight's*
G += d^T x. *An expert's rows* are drawn at each call, as each token goes to one of eight experts at random, so that a number
comes again now and then; *a number never seen* is another one at every call, which oneDNN has to prepare for. *A slice* is a W
whose rows do not follow one another in memory. Arms take turns in one process; medians with quartiles.
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
    "a weight's least size": (512, 64, 256),
    "a small map": (64, 64, 64),
}
"""Rows, K and V."""
RAGGED = {
    "a small layer": (64, 64, 256),
    "a layer": (512, 64, 256),
    "many tokens": (2048, 64, 256),
    "a large layer": (512, 256, 1024),
}
"""The same, the mean of the rows."""
EXPERTS = 8
NEVER_SEEN = {"a layer": (512, 64, 256), "a large layer": (512, 256, 1024)}
"""The same, the fewest rows; calls have up to ``MORE_ROWS`` more."""
MORE_ROWS = 512
SLICES = {"8 rows": (8, 256, 256), "64 rows": (64, 256, 256), "1,024 rows": (1024, 256, 256)}
QUICK = {"an expert's map": (128, 64, 256)}
ALLOWED = 1.2
"""What is taken may cost so many times the faster library."""


def arms(call: Callable[[], object]) -> Arms:
    """``call`` as the package takes it here, and with each library throughout."""
    limits = "is_intel", "ONEDNN_FROM", "WEIGHT_GRADIENT_FROM", "RAGGED_FROM"
    decided = [getattr(products, name) for name in limits]

    def throughout(library: str, least: int) -> Callable[[], object]:
        forced = [lambda: library == "MKL", least, least, least]

        def timed() -> object:
            # Attributes are set, as a context manager would take longer than a small product.
            for name, value in zip(limits, forced, strict=True):
                setattr(products, name, value)
            try:
                return call()
            finally:
                for name, value in zip(limits, decided, strict=True):
                    setattr(products, name, value)

        return timed

    return {"taken": call, "MKL": throughout("MKL", 2**62), "oneDNN": throughout("oneDNN", 0)}


def products_of(rows: int, k: int, v: int) -> dict[str, Arms]:
    x, d, w, total = torch.randn(rows, k), torch.randn(rows, v), torch.randn(v, k), torch.zeros(v, k)
    return {
        "forward": arms(lambda: products.scaled_linear(x, w)),
        "input's": arms(lambda: products.scaled_linear(d, w.t())),
        "weight's": arms(lambda: products.add_weight_gradient(total, d, x)),
    }


def products_of_an_expert(rows: int, k: int, v: int) -> dict[str, Arms]:
    drawn = torch.distributions.Binomial(EXPERTS * rows, torch.tensor(1 / EXPERTS)).sample((10_000,))
    return products_of_some(drawn.int().tolist(), k, v)


def products_never_seen(rows: int, k: int, v: int) -> dict[str, Arms]:
    """oneDNN keeps about a thousand preparations: it has forgotten a number by the time it comes again."""
    return products_of_some([rows + 7 * i % MORE_ROWS for i in range(MORE_ROWS)], k, v)


def products_of_some(rows: list[int], k: int, v: int) -> dict[str, Arms]:
    x, d, w, total = torch.randn(max(rows), k), torch.randn(max(rows), v), torch.randn(v, k), torch.zeros(v, k)
    numbers = itertools.cycle(rows)

    def forward() -> object:
        return products.scaled_linear(x[: next(numbers)], w)

    def weights() -> None:
        n = next(numbers)
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
        "an expert's rows": (QUICK if args.quick else RAGGED, products_of_an_expert),
        "a number of rows never seen": (QUICK if args.quick else NEVER_SEEN, products_never_seen),
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
