"""What does one training step of NewLLM cost, and what does it cost written position by position?

    python benchmarks/baseline_step.py                  # the published size: batch 32, 63 positions, vocabulary 1,000
    python benchmarks/baseline_step.py --model advanced
    python benchmarks/baseline_step.py --batch 1 --length 4096 --arms bklm steps
    python benchmarks/baseline_step.py --quick          # a small size, for CI
    python benchmarks/baseline_step.py --device cuda

A step is forward, loss, backward, clip and Adam, with dropout. The literal arm is the published description as a loop
over positions through torch's modules, under autograd: embedding, six layers, head and gates at each position, then
one cross-entropy. A second literal arm takes the head out of the loop. "steps" is bklm's own engine for other devices, which
takes one position after the other where the CPU's sweeps windows. Before anything is timed, losses and gradients of
all arms are compared without dropout. Arms take turns in one process; medians with quartiles.

The floor is the matrix products alone, on the same library as bklm's: at each position the layers' and gates' thin
products, once forward and once backward; all else as single products over all positions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from unittest import mock

import torch
from _timing import Timing, duration, print_table, processor, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import NewLLM, NewLLMConfig, new_llm_loop, new_llm_steps
from bklm.models.new_llm_plain import CONTEXT_LIMIT
from bklm.models.products import PreparedLinear, linear, weight_gradient
from bklm.training.allocator import keep_freed_memory

BKLM, STEPS, LITERAL, HEAD_OUTSIDE = "bklm", "steps", "literal", "literal, head outside the loop"


def literal_loss(model: NewLLM, ids: Tensor, targets: Tensor, head_in_loop: bool) -> Tensor:
    """Mean cross-entropy of the published recurrence, one position after the other."""
    p, context = model.config.dropout_p, model.init_state(ids.shape[0]).context
    written = []
    for t in range(ids.shape[1]):
        h = torch.cat((model.embedding(ids[:, t]), context), -1)
        for layer in model.layers:
            h = F.dropout(F.relu(layer(h)), p, model.training)
        written.append(model.output(h) if head_in_loop else h)
        forget, write = torch.sigmoid(model.forget_gate(h)), torch.sigmoid(model.input_gate(h))
        mixed = forget * context + write * model.update(h)
        context = model.norm(mixed).clamp(-CONTEXT_LIMIT, CONTEXT_LIMIT)
    stacked = torch.stack(written, 1)
    logits = stacked if head_in_loop else model.output(stacked)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def steps_loss(model: NewLLM, ids: Tensor, targets: Tensor) -> Tensor:
    with mock.patch.object(new_llm_loop, "_engine", return_value=new_llm_steps):
        return model.loss(ids, targets)


LOSSES: dict[str, Callable[[NewLLM, Tensor, Tensor], Tensor]] = {
    BKLM: lambda model, x, y: model.loss(x, y),
    STEPS: steps_loss,
    LITERAL: lambda model, x, y: literal_loss(model, x, y, head_in_loop=True),
    HEAD_OUTSIDE: lambda model, x, y: literal_loss(model, x, y, head_in_loop=False),
}


def training_step(config: NewLLMConfig, arm: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model = NewLLM(config).to(x.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        LOSSES[arm](model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


@torch.no_grad()
def floor_step(config: NewLLMConfig, x: Tensor) -> tuple[Callable[[], None], int]:
    """The products of a step and how many floating-point operations they are."""
    batch, length = x.shape
    e, c, h, v = config.embed_dim, config.context_dim, config.hidden_dim, config.vocab_size
    new = torch.empty(0, device=x.device).new_zeros
    thin = [(h, c), *[(h, h)] * (config.n_layers - 1), (3 * c, h)]
    loop = [PreparedLinear(new(shape), rows=batch) for shape in (*thin, *(s[::-1] for s in thin))]
    inputs = {k: new(batch, k) for k in (c, h, 3 * c)}
    pairs = [(new(length * batch, a), new(length * batch, b)) for a, b in (*thin, (h, e), (v, h))]
    outside = [(new(length * batch, e), new(h, e)), (new(length * batch, h), new(v, h))]

    @torch.no_grad()
    def step() -> None:
        for _ in range(length):
            for thin_linear, (_, columns) in zip(loop, (*thin, *(s[::-1] for s in thin)), strict=True):
                thin_linear(inputs[columns])
        for d, a in pairs:
            weight_gradient(d, a)
        for (a, weight), (d, _) in zip(outside, pairs[-2:], strict=True):
            linear(a, weight)
            linear(d, weight.t())
        if x.is_cuda:
            torch.cuda.synchronize()

    weights = sum(a * b for a, b in (*thin, (h, e), (v, h)))
    return step, 3 * 2 * weights * batch * length


def check_arms_agree(config: NewLLMConfig, x: Tensor, y: Tensor) -> None:
    """In double: at the first weights the update's bias has a gradient that rounding in float32 moves by 0.3%."""
    torch.manual_seed(0)
    model = NewLLM(config).to(x.device).double().eval()
    found = {}
    for arm, loss in LOSSES.items():
        value = loss(model, x[:2], y[:2])
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        found[arm] = value.item(), flat
    reference, gradient = found[LITERAL]
    for arm, (value, flat) in found.items():
        error = ((flat - gradient).norm() / gradient.norm()).item()
        if not (abs(value - reference) < 1e-9 and error < 1e-9):
            raise SystemExit(
                f"{arm} computes another function: loss {value} against {reference}, gradient off by {error:.1e}"
            )


def row(name: str, timing: Timing, tokens: int, reference: float, floor: float) -> dict[str, str]:
    return {
        "training step": name,
        "time (quartiles)": str(timing),
        "tokens/s": f"{tokens / timing.median:,.0f}",
        "speed": f"{reference / timing.median:.2f}x",
        "of the floor": f"{timing.median / floor:.2f}x",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small size and few rounds, for CI")
    parser.add_argument("--model", choices=("baseline", "advanced"), default="baseline")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=63)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.length, args.seconds = 8, 12, 2.0
    make = NewLLMConfig.advanced if args.model == "advanced" else NewLLMConfig
    config = make(args.vocab_size)
    tokens = torch.randint(0, args.vocab_size, (args.batch, args.length + 1), device=args.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    check_arms_agree(config, x[:, :64], y[:, :64])
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    place = torch.cuda.get_device_name() if x.is_cuda else f"{processor()}, {torch.get_num_threads()} threads"
    print(f"{config}, batch {args.batch}, {args.length} positions; torch {torch.__version__}, {place}{load}")
    keep_freed_memory()  # as training does
    floor, operations = floor_step(config, x)
    arms = {arm: training_step(config, arm, x, y) for arm in args.arms}
    found = take_turns({**arms, "floor": floor}, args.seconds)
    bottom, slowest = found["floor"].median, args.arms[-1]
    rows = [row(name, found[name], x.numel(), found[slowest].median, bottom) for name in args.arms]
    print_table(f"speed against: {slowest}", rows)
    print(
        f"\nfloor: {duration(bottom)} for the matrix products alone ({operations / bottom / 1e9:.0f} GFLOP/s)"
    )


if __name__ == "__main__":
    main()
