"""What does the analytic mixture of experts cost beside plain autograd, in time and in memory?

    python benchmarks/moe.py                   # T = 4096, 32768; D = 64, 256; E = 4, 8; k = 1, 2
    python benchmarks/moe.py --quick           # a small size, for CI
    python benchmarks/moe.py -T 4096 -D 64 --threads 1
    python benchmarks/moe.py --save results.json   # interrupted? the same command goes on with the next case

Arms, all forward + backward of the same mixture with the same weights, noise and dropout mask (drawn outside):
dense       plain autograd, every expert on every token (the faster of the ways to write it that were tried)
loop        plain autograd, a loop over the experts on their own tokens; biased router gradient, as in "selected"
exact       bklm, exact router gradient: what dense computes
selected    bklm, selected experts only: what loop computes
layer       plain autograd, no mixture: one feed-forward layer as wide as the k experts that a token meets

Time: one process, the arms in turn so that a busy moment of the machine hits all of them; median and quartiles.
Memory: a fresh process per arm; the kernel's peak counter is set back (/proc/self/clear_refs) after the inputs exist and a
small run has loaded the libraries, and read after one forward + backward. It holds the gradients, which every arm returns.
A rise below a megabyte, the counter's own grain, is no measurement: its ratios are left out.
On a GPU: torch.cuda.max_memory_allocated above what the inputs take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from _timing import memory_ratio, peak_memory, target, where
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bklm.moe.analytic import Settings
from bklm.moe.ops import draw, mixture
from bklm.moe.reference import dense_moe, looped_moe
from bklm.training.allocator import keep_freed_memory

MB = 2**20
DROPOUT = 0.1


class Case(NamedTuple):
    tokens: int
    width: int
    experts: int
    top_k: int

    def bytes_needed(self) -> int:
        """Upper estimate for the hungriest arm, dense: two hidden and two output activations per token and expert."""
        activations = self.tokens * self.width * (6 * self.experts + 12)
        weights = 4 * self.experts * self.width * self.width
        return 4 * (activations + 3 * weights)


class Arm(NamedTuple):
    name: str
    run: Callable[..., Tensor]
    router_gradient: str


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    mask: Tensor,
) -> Tensor:
    """The layer beside which a mixture would be free: its active size, no router; dropout's mask is scaled already."""
    return F.linear(torch.relu(F.linear(x, up_weight, up_bias)) * mask, down_weight, down_bias)


ARMS = (
    Arm("dense", dense_moe, "exact"),
    Arm("loop", looped_moe, "selected"),
    Arm("exact", lambda *a: mixture(*a)[0], "exact"),
    Arm("selected", lambda *a: mixture(*a)[0], "selected"),
    Arm("layer", feed_forward, "none"),
)


class Problem:
    """The inputs of one case; `step` is one forward + backward of an arm."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        tokens, d, experts, self.top_k = case
        sizes = [
            (tokens, d),
            (experts, d),
            (experts,),
            (experts, 2 * d, d),
            (experts, 2 * d),
            (experts, d, 2 * d),
        ]
        self.inputs = [torch.randn(s, device=device).mul_(s[-1] ** -0.5) for s in [*sizes, (experts, d)]]
        self.inputs[0].mul_(d**0.5)
        for a in self.inputs:
            a.requires_grad_()
        self.grad_y = torch.randn((tokens, d), device=device)
        noise_of = experts if self.top_k < experts else 0
        self.noise, self.keep, self.keep_p = draw(self.inputs[0].detach(), noise_of, 2 * d, DROPOUT)
        wide = 2 * d * self.top_k
        shapes = [(wide, d), (wide,), (d, wide), (d,)]
        layer = [torch.randn(s, device=device).mul_(s[-1] ** -0.5).requires_grad_() for s in shapes]
        self.layer = [self.inputs[0], *layer]
        self.layer_mask = self.keep.float().repeat(1, self.top_k).div_(self.keep_p)

    def step(self, arm: Arm) -> tuple[Tensor, tuple[Tensor, ...]]:
        if arm.name == "layer":
            y = feed_forward(*self.layer, self.layer_mask)
            return y.detach(), torch.autograd.grad(y, self.layer, self.grad_y)
        settings = Settings(self.top_k, 1.0, arm.router_gradient, self.keep_p, torch.float32)
        y = arm.run(*self.inputs, self.noise, self.keep, settings)
        return y.detach(), torch.autograd.grad(y, self.inputs, self.grad_y)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check_equal(problem: Problem) -> None:
    """What is timed is the same function: outputs and gradients agree, exact with dense and selected with loop.

    Not to rounding (the tests see to that): among millions of hidden units one or two sit within rounding of zero, and a
    unit that ReLU lets through in one arm only moves a gradient by 1e-3 of its norm.
    """
    for ours, theirs in ((ARMS[2], ARMS[0]), (ARMS[3], ARMS[1])):
        y, grads = problem.step(ours)
        z, others = problem.step(theirs)
        for a, b in zip((y, *grads), (z, *others), strict=True):
            if (error := (a - b).norm() / b.norm()) > 1e-2:
                raise SystemExit(
                    f"{ours.name} and {theirs.name} differ by {error:.1e} (relative norm): not a comparison"
                )


def times(problem: Problem, device: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each arm, at least five rounds, then until `rounds` or the time is used up."""
    taken: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - begin > seconds:
            break
        for arm in ARMS:
            _synchronise(device)
            start = time.perf_counter()
            problem.step(arm)
            _synchronise(device)
            taken[arm.name].append(time.perf_counter() - start)
    return taken


def memory_of(case: Case, arm: Arm, device: str) -> float:
    """Bytes at the peak of one step above those before it, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", arm.name, "--device", device]
    command += ["--threads", str(torch.get_num_threads())]
    numbers = [str(n) for n in case]
    result = subprocess.run([*command, "--case", *numbers], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"the memory measurement of {arm.name} at {case} failed:\n{result.stderr}")
    return float(result.stdout)


def measure_memory(case: Case, arm: Arm, device: str) -> float:
    """In the child process of `memory_of`."""
    Problem(Case(64, 16, case.experts, case.top_k), device).step(arm)
    problem = Problem(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = problem.step(arm)
        return torch.cuda.max_memory_allocated() - before if kept else 0
    return peak_memory(lambda: problem.step(arm))


class Gain(NamedTuple):
    """What an arm gains in time and memory over dense, and in time over the layer of its active size."""

    time: float
    memory: float | None  # None: not measured, or too small to be told
    over_layer: float


def report(case: Case, taken: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Gain]:
    """Print the rows of a case."""
    gains = {}
    middle = {name: statistics.median(t) for name, t in taken.items()}
    for name, t in taken.items():
        low, _, high = statistics.quantiles(t, n=4, method="inclusive") if len(t) > 1 else (t[0],) * 3
        gain = [middle[rival] / middle[name] for rival in ("dense", "loop", "layer")]
        line = f"{case.tokens:6d} {case.width:4d} {case.experts:2d} {case.top_k:2d}  {name:9s} {middle[name] * 1e3:9.2f}"
        line += f" ({low * 1e3:8.2f} ... {high * 1e3:8.2f}) {gain[0]:7.2f}x {gain[1]:6.2f}x {gain[2]:7.2f}x"
        if memory:
            saving = [memory_ratio(memory[rival], memory[name]) for rival in ("dense", "loop")]
            shown = ["-" if s is None else f"{s:.2f}x" for s in saving]
            line += f" {memory[name] / MB:9.1f} {shown[0]:>8} {shown[1]:>7}"
        gains[name] = Gain(gain[0], saving[0] if memory else None, gain[2])
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
    return gains


def worst_of(gains: list[Gain]) -> tuple[float, float | None]:
    """The smallest gain in time and, over the cases large enough to tell it, in memory."""
    told = [g.memory for g in gains if g.memory is not None]
    return min(g.time for g in gains), min(told) if told else None


def judge(ours: dict[Case, dict[str, Gain]]) -> None:
    """Print the targets and whether the worst case holds them."""
    sparse = [gains["selected"] for case, gains in ours.items() if case.experts == 8 and case.top_k == 1]
    exact = [gains["exact"] for gains in ours.values()]
    for name, gains, least in (("selected at E = 8, k = 1", sparse, 2.0), ("exact", exact, 1.0)):
        if gains:
            time_gain, memory_gain = worst_of(gains)
            target(f"{name}, worst case: dense's time over its own", time_gain, least=least)
            target(f"{name}, worst case: dense's memory over its own", memory_gain, least=least)
    for arm in ("selected", "exact"):
        slower = [1 / g[arm].over_layer for case, g in ours.items() if case.experts == 4 and case.top_k == 1]
        if slower:
            what = (
                f"{arm} at E = 4, k = 1, worst case (best {min(slower):.2f}): its time over its active layer's"
            )
            target(what, max(slower), most=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds")
    parser.add_argument("-T", "--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("-D", "--width", type=int, nargs="+", default=[64, 256])
    parser.add_argument("-E", "--experts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("-k", "--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30, help="at most so many rounds of a case")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="no new round of a case after this time (from the third)"
    )
    parser.add_argument("--save", type=Path, help="keep finished cases here, and go on from them")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: its own choice)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory-of", choices=[arm.name for arm in ARMS], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        arm = next(a for a in ARMS if a.name == args.memory_of)
        print(measure_memory(Case(*args.case), arm, args.device))
        return
    if args.quick:
        args.tokens, args.width, args.experts, args.top_k, args.rounds = [2048], [64], [8], [1], 5
    cases = [
        Case(*c) for c in itertools.product(args.tokens, args.width, args.experts, args.top_k) if c[3] < c[2]
    ]
    with_memory = args.device == "cuda" or Path("/proc/self/clear_refs").exists()
    if not with_memory:
        print(
            "this system keeps no peak counter that can be set back (/proc/self/clear_refs): memory is left out"
        )
    keep_freed_memory()  # as training does
    print(f"{where()}, {args.device}, float32, forward + backward")
    print(
        "     T    D  E  k  arm       median ms    (quartiles)           vs dense vs loop vs layer   peak MB vs dense vs loop"
    )
    done = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    ours = {}
    for case in tqdm(cases, desc="moe", unit="case", file=sys.stderr):
        key = f"{args.device} {torch.get_num_threads()} threads {args.rounds} rounds {args.seconds} s {tuple(case)}"
        if key in done:
            ours[case] = report(case, *done[key])
            continue
        free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
        if case.bytes_needed() > free:
            need, have = case.bytes_needed() / MB, free / MB
            tqdm.write(
                f"{case}: refused, its dense arm needs about {need:,.0f} MB and {have:,.0f} MB are free",
                file=sys.stdout,
            )
            continue
        memory = {arm.name: memory_of(case, arm, args.device) for arm in ARMS} if with_memory else {}
        problem = Problem(case, args.device)
        check_equal(problem)
        done[key] = times(problem, args.device, args.rounds, args.seconds), memory
        if args.save:
            unfinished = args.save.with_suffix(".part")
            unfinished.write_text(json.dumps(done, indent=1))
            unfinished.replace(args.save)
        ours[case] = report(case, *done[key])
    judge(ours)


if __name__ == "__main__":
    main()
