"""What does one training step of NewLLM cost, and what does it cost written position by position?

    python benchmarks/baseline_step.py                  # the published size: 16 x 64 and 1 x 4,096 positions, vocabulary 1,000
    python benchmarks/baseline_step.py --model advanced
    python benchmarks/baseline_step.py --batch 32 --length 63 --arms bklm literal
    python benchmarks/baseline_step.py --quick          # a small size, for CI
    python benchmarks/baseline_step.py --weights FILE    # of a trained NewLLM (study 03), which takes more sweeps
    python benchmarks/baseline_step.py --device cuda

A step is forward, loss, backward, clip and Adam, with dropout. The literal arm is the published description as a loop
over positions through torch's modules, under autograd: embedding, six layers, head and gates at each position, then
one cross-entropy. A second literal arm takes the head out of the loop. "steps" is bklm's own engine for other devices, which
takes one position after the other where the CPU's sweeps windows: the only engine, on a CPU too, until revision 1971b0f, so
it stands for the speed that the targets multiply (1.3 times at 16 x 64, 2 times at 1 x 4,096). Before anything is timed,
losses and gradients of all arms are compared without dropout. Arms take turns in one process; medians with quartiles.

Of a long text only bklm's two are timed: the literal ones would take minutes a step.

The floor is the matrix products alone, on the same library as bklm's: at each position the layers' and gates' thin
products, once forward and once backward; all else as single products over all positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from _timing import duration, print_table, take_turns, target, where
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import NewLLM, NewLLMConfig, new_llm_loop, new_llm_steps
from bklm.models.new_llm_plain import CONTEXT_LIMIT
from bklm.moe.products import PreparedLinear, linear, weight_gradient
from bklm.training.allocator import keep_freed_memory

TARGETS = {(16, 64): 1.3, (1, 4096): 2.0}  # times as fast as steps
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


def training_step(
    config: NewLLMConfig, arm: str, x: Tensor, y: Tensor, weights: Path | None
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = NewLLM(config)
    if weights is not None:
        load_model(model, str(weights))
    model.to(x.device).train()
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


def measure(
    config: NewLLMConfig, batch: int, length: int, names: list[str], args: argparse.Namespace
) -> float | None:
    """Print the table of one size; how many times as fast as steps bklm is."""
    tokens = torch.randint(0, args.vocab_size, (batch, length + 1), device=args.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    arms = {arm: training_step(config, arm, x, y, args.weights) for arm in names}
    # A sweep's products are others than a loop's.
    floor, operations = floor_step(config, x) if LITERAL in names else (None, 0)
    found = take_turns({**arms, "floor": floor} if floor else arms, args.seconds)
    slowest = found[names[-1]].median
    table = [
        {
            "training step": name,
            "time (quartiles)": str(found[name]),
            "tokens/s": f"{x.numel() / found[name].median:,.0f}",
            f"speed against {names[-1]}": f"{slowest / found[name].median:.2f}x",
            "of the floor": f"{found[name].median / found['floor'].median:.2f}x" if floor else "",
        }
        for name in names
    ]
    print_table(f"{batch} x {length} positions", table)
    if floor:
        bottom = found["floor"].median
        print(
            f"  floor: {duration(bottom)} for the matrix products alone ({operations / bottom / 1e9:.0f} GFLOP/s)"
        )
    return found[STEPS].median / found[BKLM].median if {STEPS, BKLM} <= found.keys() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small size and few rounds, for CI")
    parser.add_argument("--model", choices=("baseline", "advanced"), default="baseline")
    parser.add_argument("--batch", type=int, help="one size only, with --length")
    parser.add_argument("--length", type=int)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", choices=LOSSES, help="which, the reference last")
    parser.add_argument(
        "--weights", type=Path, help="a NewLLM's safetensors file; fresh ones where none is given"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="about how long to measure each size")
    args = parser.parse_args()
    if (args.batch is None) != (args.length is None):
        parser.error("--batch, --length: give both or neither.")
    sizes = [(args.batch, args.length)] if args.batch else [(16, 64), (1, 4096)]
    if args.quick:
        sizes, args.seconds = [(8, 12), (1, 200)], min(args.seconds, 2.0)
    make = NewLLMConfig.advanced if args.model == "advanced" else NewLLMConfig
    config = make(args.vocab_size)
    x, y = torch.randint(0, args.vocab_size, (2, 2, 64), device=args.device)
    check_arms_agree(config, x, y)
    keep_freed_memory()  # as training does
    print(f"{torch.cuda.get_device_name() + ', ' if x.is_cuda else ''}{where()}\n{config}")
    print("fresh weights" if args.weights is None else "weights of a trained model")
    gains = {}
    for batch, length in sizes:
        arms = args.arms or (list(LOSSES) if length <= 128 else [BKLM, STEPS])
        gains[batch, length] = measure(config, batch, length, arms, args)
    print()
    for (batch, length), least in TARGETS.items():
        what = f"times as fast as steps, {batch} x {length} positions"
        target(what, gains.get((batch, length)) if args.model == "baseline" else None, least=least)


if __name__ == "__main__":
    main()
