"""Can a trained model's blocks be replaced by linear operators? Fitted on pairs of states, scored as models.

Replacements of block l are fitted to the states before and after it at training positions: ``x_{l+1} = x_l + Z A``. Beside
R^2 of the increment on held-out text (0 for predicting no change) stands the context gain kept,

    (L_alone - L_replaced) / (L_alone - L),

L_alone the lowest loss that is reached where the replaced blocks read their own position alone: with their mixers off, left
out, or replaced by an operator or a dense layer of one position. Mixers that are merely off cost more than the context
they brought, since nothing is fitted to their absence; against them alone a bigram model would seem to keep half of it.
So what reads one position keeps none, and where L_alone - L is nothing, there was nothing to linearise.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bklm.models import LanguageModel
from bklm.models.koopman import Dictionary, LinearBlock, TokenBlock, dmd, edmd, replaced
from bklm.models.mixing import replacing
from bklm.models.modes import evaluating
from bklm.training.auxiliary import recorded_states
from bklm.training.evaluation import evaluate

Batches = Iterable[tuple[Tensor, Tensor]]
RIDGE = 1e-6
MLP_STEPS, MLP_ROWS, MLP_RATE = 300, 1024, 3e-3


@torch.no_grad()
def collect_states(model: LanguageModel, batches: Batches, positions: int) -> list[Tensor]:
    """The states (W, N, D) before the first block and after each, over whole windows of ``batches`` until ``positions``.

    Raises:
        ValueError: there are no windows.
    """
    device = next(model.parameters()).device
    found: list[list[Tensor]] = []
    seen = 0
    with evaluating(model):
        for x, _ in batches:
            if seen >= positions:
                break
            if found and x.shape[1] != found[0][0].shape[1]:
                continue
            x = x[: max(1, math.ceil((positions - seen) / x.shape[1]))]
            with recorded_states(model) as states:
                model.hidden(x.to(device))
            found.append(list(states))
            seen += x.numel()
    if not found:
        raise ValueError("states: got no batch to collect them from; give more text.")
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def fit_blocks(
    states: Sequence[Tensor], *, units: int, taps: Sequence[int], rank: int | None = None, seed: int = 0
) -> dict[str, list[nn.Module]]:
    """Replacements of every block by name, fitted to states as ``collect_states`` gives them.

    "skip" leaves the block out; "affine" is DMD with a constant, of ``rank`` where one is given, of this position or of
    several; "EDMD" has ``units`` random tanh besides; "MLP" is a dense layer of about the cost of EDMD at one position,
    trained on the same pairs.

    Raises:
        ValueError: a rank above the number of snapshots or features.
    """
    found: dict[str, list[nn.Module]] = {"skip": [TokenBlock() for _ in states[1:]]}

    def linear(before: Tensor, after: Tensor, reach: int, tanh: int) -> LinearBlock:
        dictionary = Dictionary(before.flatten(0, 1), reach, tanh, seed)
        z, change = dictionary(before).flatten(0, 1), (after - before).flatten(0, 1)
        operator = edmd(z, change, RIDGE) if tanh or rank is None else dmd(z, change, rank)
        return LinearBlock(dictionary, operator)

    for name, tanh in (("affine", 0), ("EDMD", units)):
        for reach in taps:
            key = name if reach == 1 else f"{name}, {reach} positions"
            found[key] = [linear(*pair, reach, tanh) for pair in itertools.pairwise(states)]
    found["MLP"] = [_mlp(*pair, units + states[0].shape[-1] // 2, seed) for pair in itertools.pairwise(states)]
    return found


def _mlp(before: Tensor, after: Tensor, width: int, seed: int) -> TokenBlock:
    x, change = before.flatten(0, 1), (after - before).flatten(0, 1)
    d = x.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = nn.LayerNorm(d)
        net = nn.Sequential(norm, nn.Linear(d, width), nn.GELU(), nn.Linear(width, d)).to(x)
        optimizer = torch.optim.Adam(net.parameters(), lr=MLP_RATE)
        for step in range(MLP_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = MLP_RATE * (1 - step / MLP_STEPS)
            rows = torch.randint(len(x), (MLP_ROWS,)).to(x.device)
            optimizer.zero_grad()
            (net(x[rows]) - change[rows]).square().mean().backward()
            optimizer.step()
    return TokenBlock(net.requires_grad_(False))


@torch.no_grad()
def score_blocks(
    model: LanguageModel, fitted: dict[str, list[nn.Module]], train: Batches, held_out: Batches, positions: int
) -> list[dict[str, Any]]:
    """One row per replacement and block ("all" besides): r2 of the increment, val_loss, context_gain_kept.

    The rows "original" and "mixer off" come first. ``train`` gives the mean features that stand in for a mixer.

    Args:
        held_out: scored whole; r2 is over its first ``positions``.
    """
    with model.recording_mixing() as recorded:
        evaluate(model, train, None)
    points, means = model.mixing_points(), recorded.means()
    states = collect_states(model, held_out, positions)
    depth = len(states) - 1

    def loss() -> float:
        return evaluate(model, held_out, None).loss

    # A block may mix positions at several points.
    own = [[k for k, p in enumerate(points) if p in set(block.modules())] for block in model.blocks]

    def off(which: Sequence[int]) -> contextlib.AbstractContextManager:
        chosen = [k for i in which for k in own[i]]
        return replacing([points[k] for k in chosen], [means[k] for k in chosen])

    original, rows = loss(), []
    for name, which in [*((str(i + 1), [i]) for i in range(depth)), ("all", list(range(depth)))]:
        found = {"original": (1.0, original)}
        with off(which):
            found["mixer off"] = (_r2(states, which, [model.blocks[i](states[i])[0] for i in which]), loss())
        for kind, blocks in fitted.items():
            with replaced(model, {i: blocks[i] for i in which}):
                found[kind] = (_r2(states, which, [blocks[i](states[i])[0] for i in which]), loss())
        alone = ["mixer off", *(kind for kind, blocks in fitted.items() if not _reads_others(blocks[0]))]
        floor = min(found[kind][1] for kind in alone)
        gain = floor - original
        for kind, (r2, value) in found.items():
            rows.append(
                {
                    "block": name, "replacement": kind, "r2": r2, "val_loss": value, "context_gain_nats": gain,
                    "context_gain_kept": (floor - value) / gain if gain > 0 else None,
                }
            )  # fmt: skip
    return rows


def _reads_others(block: nn.Module) -> bool:
    return isinstance(block, LinearBlock) and block.dictionary.taps > 1


def _r2(states: Sequence[Tensor], which: Sequence[int], guesses: Sequence[Tensor]) -> float:
    """1 - |error|^2 / |increment|^2, mean over blocks: 0 for predicting no change."""
    shares = [
        1 - float((states[i + 1] - guess).square().sum() / (states[i + 1] - states[i]).square().sum())
        for i, guess in zip(which, guesses, strict=True)
    ]
    return sum(shares) / len(shares)
