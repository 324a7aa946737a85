"""What do training and generating with the ResNetBK that reads cost, beside GPT, LSTM, NewLLM and the diagonal ResNetBK?

    python benchmarks/reading_step.py                            # 2.74 M parameters; windows of 64 to 16,384
    python benchmarks/reading_step.py --windows 64 1024          # these alone
    python benchmarks/reading_step.py --quick                    # a small size, for CI

A step is forward, loss, backward, clip and AdamW, with dropout 0.1, on up to TOKENS tokens (at 64 README's 16 rows). GPT has
torch's fused attention, without dropout on its weights. Its positions are parameters, so that at equal size it is narrower
the longer the window: *GPT, wider* keeps the width that it has at 64. The products are the solve model's matrix products
alone, forward and backward, of the same shapes, by the faster of torch's libraries, which all arms but the LSTM's recurrence
call (`bklm/moe/products.py`). Arms take turns in one process; medians with quartiles. Memory is what torch
holds at most during one step beside weights, moments and gradients. Linear in N: one row of 256 to the largest window, the
exponent by least squares through the logarithms.

Generation: milliseconds a token from a state at that position, one row. GPT's key-value cache is filled with random numbers,
which take as long to read; the others read a text of that length (more than LONGEST_READ positions: of LONGEST_READ).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _timing import Timing, duration, peak_tensor_memory, print_table, take_turns, target, where
from torch import Tensor, nn

from bklm.models import GPT, LSTM, LanguageModel, NewLLM, NewLLMConfig, ResNetBK
from bklm.models.gpt import GPTState, KVCache
from bklm.models.sizing import gpt_of_size, lstm_of_size, resnet_bk_of_size
from bklm.moe.products import linear, weight_gradient
from bklm.training.allocator import keep_freed_memory

SOLVE, PRODUCTS = "ResNetBK (solve)", "its products"
SHORT = 64  # the window at which GPT is as wide as study 03's
TOKENS = 4096
LONGEST_READ = 2000
OVER_GPT = {64: 1.5, 1024: 2.0, 4096: 3.0, 16384: 5.0}
"""Targets: windows, and by how much the solve model's tokens/s exceed GPT's."""
OVER_LSTM = (64, 1024, 4096)
"""Windows at which the solve model's tokens/s should not be below the LSTM's."""
LEAST_WINDOW = 256  # of the exponent: below, what does not depend on N counts


def models(parameters: int, vocab_size: int, n_seq: int, heads: int) -> dict[str, LanguageModel]:
    """The arms, of about equal size; GPT with ``n_seq`` positions, and where these are many a second one."""
    size = parameters, vocab_size
    solve = resnet_bk_of_size(*size, None, mixer="solve", num_experts=1, n_heads=heads)
    wider = dataclasses.replace(gpt_of_size(*size, SHORT).config, n_seq=n_seq)
    return {
        SOLVE: ResNetBK(solve.config),
        "GPT": GPT(gpt_of_size(*size, n_seq).config),
        **({"GPT, wider": GPT(wider)} if n_seq > SHORT else {}),
        "LSTM": LSTM(lstm_of_size(*size).config),
        "NewLLM": NewLLM(new_llm_of_size(*size)),
        "ResNetBK (diagonal)": ResNetBK(resnet_bk_of_size(*size, None).config),
    }


def new_llm_of_size(parameters: int, vocab_size: int) -> NewLLMConfig:
    """The published proportions, hidden layers twice as wide as context and embedding: with a width of w and a vocabulary
    of V, 30 w^2 + 3 V w parameters beside biases."""
    width = round((math.sqrt(9 * vocab_size**2 + 120 * parameters) - 3 * vocab_size) / 60)
    return NewLLMConfig(vocab_size, width, 2 * width, width)


def width_of(model: LanguageModel) -> int:
    """Of its embedding."""
    return model.head()[0].shape[1]


def rows_of(window: int) -> int:
    return max(1, min(16, TOKENS // window))


def training_step(model: LanguageModel, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.train()

    def step() -> None:
        model.loss(ids, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def products(model: ResNetBK, tokens: int) -> Callable[[], None]:
    """Every matrix product of a step, of inputs and weights, and the two of its gradient, by the library that serves it."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)] + [model.embedding.weight]
    data = [
        (w.detach(), torch.randn(tokens, w.shape[1]), torch.randn(tokens, w.shape[0]))
        for w in weights
        if w.dim() == 2
    ]

    @torch.no_grad()
    def step() -> None:
        for w, x, g in data:
            linear(x, w)
            linear(g, w.t())
            weight_gradient(g, x)

    return step


def steps_table(window: int, options: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, float]]:
    """One row an arm; the solve model's tokens/s over GPT's, its time over its products', its memory over GPT's."""
    rows = rows_of(window)
    ids = torch.randint(options.vocab_size, (rows, window), generator=torch.Generator().manual_seed(0))
    built = models(options.parameters, options.vocab_size, window, options.heads)
    steps = {name: training_step(model, ids) for name, model in built.items()}
    found = take_turns({**steps, PRODUCTS: products(built[SOLVE], ids.numel())}, options.seconds)
    memory = {name: peak_tensor_memory(step) for name, step in steps.items()}
    mine = found[SOLVE].median
    table = [
        {
            "step": name,
            "width": width_of(built[name]) if name in built else "",
            "parameters": f"{built[name].num_parameters():,}" if name in built else "",
            "time (quartiles)": str(time),
            "tokens/s": f"{ids.numel() / time.median:,.0f}",
            "solve's tokens/s to its": f"x{time.median / mine:.2f}",
            "memory": f"{memory[name] / 1e6:,.0f} MB" if name in memory else "",
            "of GPT's": f"x{memory[name] / memory['GPT']:.2f}" if name in memory else "",
        }
        for name, time in found.items()
    ]
    judged = {
        "gain": found["GPT"].median / mine,
        "over_lstm": found["LSTM"].median / mine,
        "products": mine / found[PRODUCTS].median,
        "memory": memory[SOLVE] / memory["GPT"],
    }
    return table, judged


def exponent(windows: list[int], options: argparse.Namespace) -> tuple[float, dict[int, Timing]]:
    """Of the solve model's step time over N, one row."""
    model = models(options.parameters, options.vocab_size, 1, options.heads)[SOLVE]
    ids = {n: torch.randint(options.vocab_size, (1, n)) for n in windows}
    found = take_turns({n: training_step(model, x) for n, x in ids.items()}, options.seconds)
    return float(np.polyfit(np.log(windows), np.log([found[n].median for n in windows]), 1)[0]), found


@torch.no_grad()
def generation(position: int, options: argparse.Namespace) -> tuple[list[dict[str, object]], float]:
    """One row an arm: milliseconds a token, and the state's bytes; and the solve model's seconds a token."""
    arms, states = {}, {}
    built = models(options.parameters, options.vocab_size, position + 1, options.heads)
    for name, model in built.items():
        model.eval()
        token = torch.zeros(1, dtype=torch.long)
        if isinstance(model, GPT):
            config = model.config
            shape = (1, config.n_heads, position + 1, config.d_model // config.n_heads)
            caches = [KVCache(torch.randn(shape), torch.randn(shape)) for _ in model.blocks]
            for cache in caches:
                cache._filled = position
            state = GPTState(position, tuple(caches))
        else:
            state = model.prefill(torch.randint(options.vocab_size, (1, min(position, LONGEST_READ))))[1]
        states[name] = model.state_bytes(position)

        def step(model: LanguageModel = model, state: object = state, token: Tensor = token) -> None:
            # The cache's last place is written again and again: its cost is that of the position, not of copies.
            if isinstance(state, GPTState):
                for cache in state.caches:
                    cache._filled = state.position
            model.step(token, state)

        arms[name] = step
    found = take_turns(arms, options.seconds)
    table = [
        {
            "generating": name,
            "width": width_of(built[name]),
            "ms a token": f"{time.median * 1e3:.3g} ({time.low * 1e3:.3g} - {time.high * 1e3:.3g})",
            "state": f"{states[name]:,} bytes",
            "of GPT's": f"x{states[name] / states['GPT']:.3g}",
        }
        for name, time in found.items()
    ]
    return table, found[SOLVE].median


def judge(judged: dict[Any, Any]) -> None:
    """Print every target and whether it is held; what was not measured at the full size is left out of ``judged``."""
    for window, least in OVER_GPT.items():
        found = judged.get(window, {})
        target(f"{SOLVE}'s tokens/s over GPT's, windows of {window:,}", found.get("gain"), least=least)
        target(f"its time over its products', windows of {window:,}", found.get("products"), most=1.25)
    target("its memory over GPT's, windows of 1,024", judged.get(1024, {}).get("memory"), most=0.5)
    for window in OVER_LSTM:
        name = f"{SOLVE}'s tokens/s over the LSTM's, windows of {window:,}"
        target(name, judged.get(window, {}).get("over_lstm"), least=1.0)
    target("exponent of its step time over N", judged.get("exponent"), least=0.9)
    target("exponent of its step time over N", judged.get("exponent"), most=1.1)
    target("a token at the last position over one at the first", judged.get("generation"), most=1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small size, short windows and rounds, for CI")
    parser.add_argument("--parameters", type=int, default=2_740_000)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=8, help="of the solve model")
    parser.add_argument("--windows", type=int, nargs="+", default=None)
    parser.add_argument("--positions", type=int, nargs="*", default=None, help="of the generation")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to measure each table")
    options = parser.parse_args()
    windows, positions = (64, 1024, 4096, 16384), (100, 1000, 10_000, 100_000)
    if options.quick:
        options.parameters, options.vocab_size, options.heads, options.seconds = 40_000, 100, 2, 0.2
        windows, positions = (16, 64), (10, 100)
    windows = options.windows or list(windows)
    positions = positions if options.positions is None else options.positions
    if min([*windows, *positions]) < 1:
        parser.error("--windows, --positions: at least 1 position is needed.")
    keep_freed_memory()  # as training does
    print(where())
    judged: dict[Any, Any] = {}
    for window in windows:
        table, judged[window] = steps_table(window, options)
        print_table(f"Training, {rows_of(window)} x {window} tokens", table)
        print(f"  {SOLVE}: x{judged[window]['products']:.2f} the time of its own matrix products")
    least = 16 if options.quick else LEAST_WINDOW
    lengths = [n for n in (least, 4 * least, 16 * least, 64 * least) if n <= max(windows)]
    if len(lengths) > 1:
        judged["exponent"], found = exponent(lengths, options)
        times = ", ".join(f"{n:,}: {duration(t.median)}" for n, t in found.items())
        print(f"\nexponent of the step time over N, one row: {judged['exponent']:.2f} ({times})")
    token = []
    for position in positions:
        table, seconds = generation(position, options)
        token.append(seconds)
        print_table(f"Generation at position {position:,}, one row", table)
    judged["generation"] = token[-1] / token[0] if len(token) > 1 else None
    print()
    judge({} if options.quick else judged)


if __name__ == "__main__":
    main()
