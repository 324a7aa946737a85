"""What does an epoch of phase 2 cost with kept contexts, beside the token-by-token procedure it replaces?

    python benchmarks/freeze_phase2.py            # width 64, vocabulary 2,000, frozen embedding, tied head, 512-token batches
    python benchmarks/freeze_phase2.py --gpt2     # the published size: width 768, vocabulary 50,257
    python benchmarks/freeze_phase2.py --sweeps   # also: ways to find the contexts of a corpus
    python benchmarks/freeze_phase2.py --quick    # a small size, for CI
    python benchmarks/freeze_phase2.py --device cuda

Arms, one epoch each: the same model, tokens, batches, loss, Adam, clip; the first losses must agree.
token by token   context block, token block and head for one token at a time, the logits of 512 tokens collected, then one
                 backward and one step
walked contexts  the contexts token by token in each epoch, the token block on 512 tokens at once
kept contexts    bklm: one epoch of bklm.training.train; computing the contexts, once before the first epoch, is a row of
                 its own, and so is an epoch with contexts computed again, as a trained embedding needs them

The slow arms run on their first batches only, and their epoch is that time multiplied: the cost of a token does not
change along the text. Arms take turns after a warm-up; medians with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass

import torch
from _timing import Timing, duration, print_table, take_turns, target, where
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.contexts import corpus_contexts
from bklm.training.two_phase.phase1 import FixedPointSettings, train_context
from bklm.training.two_phase.phase2 import build

BATCH = 512


@dataclass(frozen=True)
class Size:
    """Tokens: one more than an epoch has targets."""

    vocab_size: int = 2000
    width: int = 64
    tokens: int = 50_001
    slow_batches: int = 2  # of the slow arms in each round


SIZES = {
    "default": Size(),
    "quick": Size(vocab_size=300, width=16, tokens=6_001, slow_batches=1),
    "gpt2": Size(vocab_size=50_257, width=768, tokens=1_025, slow_batches=1),
}


class Walk:
    """The procedure without kept contexts on a copy of the model, with an Adam of its own."""

    def __init__(self, model: ContextTokenLM, ids: Tensor, batched: bool) -> None:
        self.model, self.ids = copy.deepcopy(model), ids
        self.hidden = self.batched_hidden if batched else self.single_hidden
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=2e-3, weight_decay=0.0, fused=True)

    def run(self, batches: int) -> float:
        """Train on the first ``batches`` from the zero context on; the loss of the first."""
        first, state = None, self.model.init_state(1).context
        for x, y in zip(self.ids[:-1].split(BATCH)[:batches], self.ids[1:].split(BATCH), strict=False):
            logits, state = self.hidden(x, state)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            first = float(loss.detach()) if first is None else first
        return first

    def single_hidden(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        model, context, token = self.model, self.model.context_block, self.model.token_block
        rows = []
        for word in x.split(1):
            given = model.norm(model.embedding(word))
            layers = []
            with torch.no_grad():
                for linear, norm in zip(context.linears, context.norms, strict=True):
                    state = norm(state + F.relu(linear(torch.cat([state, given], -1))))
                    layers.append(state)
            h = given
            for linear, norm, c in zip(token.linears, token.norms, layers, strict=True):
                h = norm(h + F.relu(linear(torch.cat([c, h], -1))))
            rows.append(model.logits(h))
        return torch.cat(rows), state

    def batched_hidden(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            contexts = self.model.contexts(x.unsqueeze(0), state)
        hidden = self.model.token_block(self.model.embed(x.unsqueeze(0)), contexts)
        return self.model.logits(hidden)[0], contexts[:, -1, -1]


def scaled(timing: Timing, factor: float) -> Timing:
    return Timing(*(factor * value for value in timing))


def report(size: Size, device: str, seconds: float, trained: bool) -> float:
    """Print the table; how many times as fast kept contexts are as token by token."""
    torch.manual_seed(0)
    sizes = ContextTokenConfig(size.vocab_size, size.width, size.width)
    model = ContextTokenLM(sizes).to(device)
    ids = zipf(size.tokens, size.vocab_size).to(device)
    train_context(model, ids[:BATCH], FixedPointSettings(iterations=2))
    model.freeze_context()
    if not trained:
        model.freeze_embedding()
    plain, walked = Walk(model, ids, batched=False), Walk(model, ids, batched=True)
    began = time.perf_counter()
    cached = build(copy.deepcopy(model), {"train": ids, "none": ids[:2]})
    once = time.perf_counter() - began
    loader, none = cached.batches("train", BATCH), cached.batches("none")
    settings = TrainingSettings(epochs=1, learning_rate=2e-3, weight_decay=0.0, clip=1.0)
    accelerator = make_accelerator(device, "fp32")
    first = [
        plain.run(1),
        walked.run(1),
        float(cached.loss(*(t.to(device) for t in next(iter(loader)))).detach()),
    ]
    if max(first) - min(first) > 1e-3:
        raise SystemExit(f"the arms do not compute the same: first losses {first}")
    times = take_turns(
        {
            "token by token": lambda: plain.run(size.slow_batches),
            "walked contexts": lambda: walked.run(size.slow_batches),
            "kept contexts": lambda: train(cached, loader, none, settings, accelerator=accelerator),
        },
        seconds,
    )
    share = (size.tokens - 1) / (size.slow_batches * BATCH)
    epochs = {name: scaled(times[name], share) for name in ("token by token", "walked contexts")}
    epochs["kept contexts"] = times["kept contexts"]
    slow = epochs["token by token"].median
    rows = [
        {"one epoch": name, "time": time, "per token": duration(time.median / (size.tokens - 1)),
         "faster": f"{slow / time.median:.1f}x"}
        for name, time in epochs.items()
    ]  # fmt: skip
    again = epochs["kept contexts"].median + once
    rows.append(
        {"one epoch": "kept, computed again", "time": duration(again),
         "per token": duration(again / (size.tokens - 1)), "faster": f"{slow / again:.1f}x"}
    )  # fmt: skip
    rows.append({"one epoch": "contexts, once before", "time": duration(once)})
    print_table(f"{size}, embedding {'trained' if trained else 'frozen'}, {device}", rows)
    print(
        f"slow arms: {size.slow_batches * BATCH} of {size.tokens - 1} tokens measured, their epoch extrapolated"
    )
    print(f"kept: {cached.plan}; {cached.reports['train'][0]}")
    return slow / epochs["kept contexts"].median


def report_sweeps(size: Size, device: str) -> None:
    torch.manual_seed(0)
    model = ContextTokenLM(ContextTokenConfig(size.vocab_size, size.width, size.width)).to(device)
    ids = zipf(min(size.tokens, 20_000), size.vocab_size).to(device)
    with torch.no_grad():
        began, x = time.perf_counter(), model.embed(ids).unsqueeze(0)
        expected = torch.cat(
            [layers[-1] for layers in model.context_block.steps(x, model.init_state(1).context)]
        )
        slow = time.perf_counter() - began
    rows = [{"contexts": "token by token", "time": duration(slow), "faster": "1.0x"}]
    for name, chunk, most in (
        ("chunks, chosen", None, 8),
        ("chunks of 512", 512, 8),
        ("plain, chunks of 1", 1, 200),
    ):
        found = corpus_contexts(model, ids, chunk=chunk, max_sweeps=most, verify=0)
        rows.append(
            {
                "contexts": name,
                "time": duration(found.seconds),
                "faster": f"{slow / found.seconds:.1f}x",
                "sweeps": found.sweeps,
                "evaluations per token": f"{found.passes:.2f}",
                "largest difference": f"{float((found.final - expected).abs().max()):.1e}",
                "": "" if found.method == "parallel" else "not converged",
            }
        )
    keys = {key: "" for row in rows for key in row}
    print_table(f"contexts of {len(ids)} tokens, width {size.width}", [{**keys, **row} for row in rows])


def zipf(tokens: int, vocab_size: int) -> Tensor:
    """Tokens drawn with probabilities that fall as 1 / rank, as words' do."""
    weights = 1.0 / torch.arange(1, vocab_size + 1)
    return torch.multinomial(weights, tokens, replacement=True, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="a small size, for CI"
    )
    parser.add_argument("--gpt2", action="store_const", const="gpt2", dest="size", help="the published size")
    parser.add_argument("--trained", action="store_true", help="train the embedding too")
    parser.add_argument("--sweeps", action="store_true", help="also: ways to find the contexts of a corpus")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=30.0, help="of measurement, about")
    args = parser.parse_args()
    size = SIZES[args.size or "default"]
    print(where())
    gain = report(size, args.device, args.seconds, args.trained)
    if args.sweeps:
        report_sweeps(size, args.device)
    print()
    target("kept contexts over token by token", None if args.size == "quick" else gain, least=30)


if __name__ == "__main__":
    main()
