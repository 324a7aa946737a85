"""What does one optimiser step of ResNet-BK cost, in time and memory, and what would it cost written plainly?

    python benchmarks/train_step.py            # the published size: vocabulary 30,000, batch 32, 128 positions
    python benchmarks/train_step.py --quick    # a small size, for CI
    python benchmarks/train_step.py --chunks   # also: the loss by chunk size, beside torch's own chunked loss
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --cpu-time    # on a busy machine: processor time, one thread

The plain arms are the same model (same weights, experts, AdamW, clip) with logits held whole, F.cross_entropy, and the
theta/phi recursion as a Python loop in complex128 under vmap: once with the published diagonal backward, once with
autograd through the loop. The loop is bidirectional, so the arm to compare with is the bidirectional one, whose first
loss must agree; the causal rows are what the package trains by default, and the GRAD_BLEND study (mixer "solve").

Time: every arm lives in a process of its own; the parent asks them for a step in turn, so that a busy moment of the
machine hits all of them, and reports medians and quartiles. Memory: a fresh process per arm, warmed by one step
(optimiser state exists, gradients do not); then the kernel's peak counter is set back (/proc/self/clear_refs) and read
after one step. malloc is told to return freed blocks, which it would otherwise keep and so hide from the difference.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _matrix_products import HEADS, GemmFloor, Size
from _timing import memory_ratio, peak_memory, target, where
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.bk_core import reference
from bklm.models import ResNetBK, ResNetBKConfig, linear_cross_entropy
from bklm.training.allocator import keep_freed_memory

BKLM, SOLVE, PEER, LOOP, AUTOGRAD = (
    "bklm, causal (default)",
    "bklm, causal, mixer solve (GRAD_BLEND's)",
    "bklm, bidirectional",
    "whole logits + loop, published backward",
    "whole logits + loop, autograd through it",
)
ARMS = (BKLM, SOLVE, PEER, LOOP, AUTOGRAD)
FLOORS = {BKLM: "products", LOOP: "products", SOLVE: "products with the mixer's"}
MB = 2**20


QUICK = Size(vocab_size=3_000, batch=8, length=32, n_layers=2)


class LoopCore(nn.Module):
    """The theta/phi loop in place of BKCore; v (B, N, 1) -> (B, N, 2)."""

    def __init__(self, published_backward: bool) -> None:
        super().__init__()
        self.published_backward = published_backward

    def forward(self, v: Tensor) -> Tensor:
        a = v.squeeze(-1).double() - 2
        g = _PublishedLoop.apply(a) if self.published_backward else _loop(a)
        return torch.view_as_real(g).to(v.dtype)


def _loop(a: Tensor) -> Tensor:
    ones = a.new_ones(a.shape[1] - 1)
    return torch.vmap(lambda row: reference.theta_phi(row, ones, ones, 1j))(a)


class _PublishedLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        g = _loop(a)
        ctx.save_for_backward(g)
        return g

    @staticmethod
    def backward(ctx, gbar):
        return reference.original_gradient(gbar, *ctx.saved_tensors)


class Trainer:
    """One arm: a model, its optimiser, a fixed batch."""

    def __init__(self, arm: str, size: Size, now: Callable[[], float]) -> None:
        self.now = now
        torch.manual_seed(0)
        mixer = {"mixer": "solve", "n_heads": HEADS} if arm == SOLVE else {}
        sizes = size.vocab_size, size.d_model, size.n_layers, size.length, size.num_experts
        config = ResNetBKConfig(*sizes, causal=arm in (BKLM, SOLVE), **mixer)
        self.model = ResNetBK(config).train()
        self.plain = arm in (LOOP, AUTOGRAD)
        if self.plain:
            for block in self.model.blocks:
                block.core = LoopCore(published_backward=arm == LOOP)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        tokens = torch.randint(0, size.vocab_size, (size.batch, size.length + 1))
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self) -> dict[str, float]:
        """One optimiser step; seconds of its parts, and the loss before it."""
        torch.manual_seed(1)  # the same dropout and expert noise in every arm
        clock = [self.now()]
        hidden = self.model.hidden(self.x)
        clock.append(self.now())
        if self.plain:
            logits = F.linear(hidden, *self.model.head())
            loss = F.cross_entropy(logits.flatten(0, 1), self.y.flatten())
            del logits
        else:
            loss = linear_cross_entropy(hidden, *self.model.head(), self.y)
        del hidden
        clock.append(self.now())
        loss.backward()
        clock.append(self.now())
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        clock.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.append(self.now())
        names = ("blocks forward", "head and loss", "backward", "clip", "AdamW")
        parts = dict(zip(names, (b - a for a, b in itertools.pairwise(clock)), strict=True))
        return {**parts, "total": clock[-1] - clock[0], "loss": loss.item()}


def serve(arm: str, size: Size, now: Callable[[], float], pipe) -> None:
    """In a process of its own: answer "time" with the timings of a step, "memory" with its extra peak bytes."""
    keep_freed_memory()  # as training does; where memory is measured, variables of the environment forbid it
    is_floor = arm in FLOORS.values()
    work = GemmFloor(size, now, mixer=arm == FLOORS[SOLVE]) if is_floor else Trainer(arm, size, now)
    pipe.send(work.step())
    while (request := pipe.recv()) != "stop":
        if request == "time":
            # Not timed: after another process's turn two threads share a core for a while.
            work.step()
        pipe.send(work.step() if request == "time" else peak_memory(work.step))


class Worker:
    def __init__(self, arm: str, size: Size, now: Callable[[], float] = time.perf_counter) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(arm, size, now, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.first = self.pipe.recv()

    def ask(self, request: str):
        self.pipe.send(request)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join()


def measure_time(
    size: Size, rounds: int, now: Callable[[], float]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    workers = {arm: Worker(arm, size, now) for arm in (*ARMS, *dict.fromkeys(FLOORS.values()))}
    timings = {arm: [] for arm in workers}
    for i in range(rounds):
        print(f"\rround {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for arm, worker in workers.items():
            timings[arm].append(worker.ask("time"))
    print(file=sys.stderr)
    losses = {arm: workers[arm].first["loss"] for arm in ARMS}
    for worker in workers.values():
        worker.stop()
    return timings, losses


def measure_memory(size: Size) -> dict[str, int]:
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for arm in ARMS:
        worker = Worker(arm, size)
        peaks[arm] = worker.ask("memory")
        worker.stop()
    return peaks


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report(size: Size, rounds: int, now: Callable[[], float]) -> None:
    timings, losses = measure_time(size, rounds, now)
    peaks = measure_memory(size) if Path("/proc/self/clear_refs").exists() else None
    if not abs(losses[PEER] - losses[LOOP]) < 1e-4 > abs(losses[PEER] - losses[AUTOGRAD]):
        raise SystemExit(f"the arms do not compute the same model: first losses {losses}")
    print(
        f"\n{'one optimiser step':44}{'ms (quartiles)':>22}{'tokens/s':>10}{'speed':>8}{'peak MB':>9}{'memory':>8}"
    )
    middle = {arm: quartiles([t["total"] for t in timings[arm]]) for arm in timings}
    for arm in ARMS:
        low, mid, high = (1e3 * q for q in middle[arm])
        speed = middle[LOOP][1] / middle[arm][1]
        share = memory_ratio(peaks[arm], peaks[LOOP]) if peaks else None
        memory = f"{peaks[arm] / MB:9.0f}" if peaks else f"{'-':>9}"
        memory += f"{'-':>8}" if share is None else f"{share:8.2f}"
        cells = f"{mid:8.0f} ({low:.0f}-{high:.0f})"
        print(f"{arm:44}{cells:>22}{size.tokens / middle[arm][1]:10.0f}{speed:7.2f}x{memory}")
    if peaks is None:
        print("peak memory: not measured, this system has no /proc/self/clear_refs")
    for arm, floor in FLOORS.items():
        flop = GemmFloor(size, now, mixer=arm == SOLVE).flop
        print(
            f"{arm}: {middle[arm][1] / middle[floor][1]:.2f}x the time of the matrix {floor}, "
            f"{1e3 * middle[floor][1]:.0f} ms ({flop / middle[floor][1] / 1e9:.0f} GFLOP/s)"
        )
    print("\nwhere the time goes (median ms)")
    for arm in FLOORS:
        parts = {
            p: statistics.median(t[p] for t in timings[arm])
            for p in timings[arm][0]
            if p not in ("total", "loss")
        }
        print(f"{arm:44}" + "  ".join(f"{p} {1e3 * s:.1f}" for p, s in parts.items()))
    print()
    full = size == Size()
    # Which of the two is faster changes from run to run: their logits of 30,000 words take 1.4 GB.
    gain = min(middle[LOOP][1], middle[AUTOGRAD][1]) / middle[BKLM][1] if full else None
    target(f"tokens/s of {BKLM} over those of the faster with whole logits", gain, least=2)
    target(f"tokens/s of {BKLM} over those of the faster with whole logits (aim)", gain, least=3)
    share = memory_ratio(peaks[BKLM], peaks[LOOP]) if peaks and full else None
    target(f"peak memory of {BKLM} over that of {LOOP}", share, most=0.333)
    for arm in (SOLVE, BKLM):
        distance = middle[arm][1] / middle[FLOORS[arm]][1] if full else None
        target(f"step of {arm} over its matrix products", distance, most=1.3)


def report_chunks(size: Size, rounds: int) -> None:
    """Loss and its three gradients by rows per chunk, ours and torch's (where this torch has it)."""
    torch.manual_seed(0)
    h = torch.randn(size.tokens, size.d_model, requires_grad=True)
    w = (0.02 * torch.randn(size.vocab_size, size.d_model)).requires_grad_()
    b = torch.zeros(size.vocab_size, requires_grad=True)
    y = torch.randint(0, size.vocab_size, (size.tokens,))
    arms = {"whole logits": lambda: F.cross_entropy(F.linear(h, w, b), y)}
    for rows in (32, 64, 128, 256, 512):
        arms[f"bklm, {rows} rows"] = lambda rows=rows: linear_cross_entropy(h, w, b, y, chunk_rows=rows)
        if hasattr(nn, "LinearCrossEntropyOptions"):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
            arms[f"torch, {rows} rows"] = lambda o=options: F.linear_cross_entropy(
                h, w, y, linear_bias=b, options=o
            )
    arms["bklm, default"] = lambda: linear_cross_entropy(h, w, b, y)
    seconds = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, loss in arms.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(), (h, w, b))
            seconds[name].append(time.perf_counter() - start)
    print("\nloss with its gradients, by rows of logits held at once")
    for name, values in seconds.items():
        low, mid, high = (1e3 * q for q in quartiles(values[1:]))
        print(f"{name:44}{mid:8.0f} ms ({low:.0f}-{high:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small size and few rounds, for CI")
    parser.add_argument("--chunks", action="store_true", help="also compare chunk sizes of the loss")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--rounds", type=int, help="steps of each arm (default 7, quick 3)")
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    rounds = args.rounds or (3 if args.quick else 7)
    if rounds < 2:
        parser.error(f"--rounds: got {rounds}; at least 2 are needed for quartiles.")
    clock = "processor" if args.cpu_time else "wall"
    print(f"{where()}\n{clock} time; {size}")
    report(size, rounds, time.process_time if args.cpu_time else time.perf_counter)
    if args.chunks:
        report_chunks(size, rounds)


if __name__ == "__main__":
    main()
