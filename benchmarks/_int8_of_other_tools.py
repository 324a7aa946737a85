"""A GPT in int8 by bklm, torch.ao, torchao, optimum-quanto and bitsandbytes: size, perplexity, time. For other_tools.py."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bklm.compression import quantised, save_quantised
from bklm.models import LanguageModel

ROUNDS = 3
TIED_APART = "the head is a matrix of its own in int8, and the embedding that it was tied to stays float32"


class AsModules(nn.Module):
    """A model whose tied head is a linear module, as other tools look for it: ids (B, N) -> logits (B, N, V)."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(*reversed(model.head()[0].shape), bias=False, device="meta")
        self.head.weight = model.head()[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model.hidden(ids))


def size(module: nn.Module) -> int:
    """Bytes of the state, as torch.save writes it: what is shared is written once."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def rows(model: LanguageModel, ids: torch.Tensor) -> Iterator[tuple[str, str, float | str, str]]:
    """(tool, what, value, why) of each arm; ``ids`` (n_seq * windows + 1,) are scored, and the arms take turns."""
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    x, y = ids[:-1].view(-1, model.n_seq), ids[1:].view(-1, model.n_seq)
    made: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, str]] = {}
    failed: list[tuple[str, str, str, str]] = []
    for name, (make, why) in ARMS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = (*make(copy.deepcopy(model)), why)
        except ImportError:
            failed.append((name, "-", "not installed", "pip could not install it here, or it was not asked to"))
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    with one_thread():
        for _ in range(ROUNDS):
            for name, (arm, _, _) in made.items():
                start = time.perf_counter()
                losses[name] = loss(arm, x, y)
                seconds[name].append(time.perf_counter() - start)
    plain = next(iter(made))
    for name, (_, bytes_, why) in made.items():
        factor = statistics.median(a / b for a, b in zip(seconds[name], seconds[plain], strict=True))
        change = math.expm1(losses[name] - losses[plain])
        what = f"{bytes_ / 1e6:.2f} MB, perplexity {change:+.2%}, {factor:.2f} times float32's time"
        yield name, what, math.exp(losses[name]), why
    yield from failed


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def loss(arm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean cross-entropy in nats of the targets y, eight windows at a time."""
    total = 0.0
    for ids_in, ids_out in zip(x.split(8), y.split(8), strict=True):
        logits = arm(ids_in).float().flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, ids_out.flatten(), reduction="sum"))
    return total / y.numel()


def _float32(model: LanguageModel):
    return model, size(AsModules(model))


def _ours(model: LanguageModel):
    made = quantised(model)
    with tempfile.TemporaryDirectory() as folder:
        save_quantised(made, Path(folder) / "int8.safetensors")
        return made, (Path(folder) / "int8.safetensors").stat().st_size


def _torch_ao(model: LanguageModel):
    made = torch.ao.quantization.quantize_dynamic(AsModules(model), {nn.Linear}, torch.qint8)
    return made, size(made)


def _torchao(config: str):
    def make(model: LanguageModel):
        from torchao import quantization

        made = AsModules(model)
        quantization.quantize_(made, getattr(quantization, config)())
        return made, size(made)

    return make


def _quanto(model: LanguageModel):
    from optimum import quanto

    made = AsModules(model)
    quanto.quantize(made, weights=quanto.qint8)
    quanto.freeze(made)
    return made, size(made)


def _bitsandbytes(model: LanguageModel):
    import bitsandbytes

    made = AsModules(model)
    for name, linear in [(n, m) for n, m in made.named_modules() if isinstance(m, nn.Linear)]:
        small = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        small.load_state_dict(linear.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, small.to("cpu"))
    return made, size(made)


ARMS = {
    "bklm, float32": (_float32, "the tied matrix once"),
    "bklm": (
        _ours,
        "the tied matrix once, in int8, embeddings are its rows; activations int8, one scale a call",
    ),
    "torch": (_torch_ao, f"torch.ao's quantize_dynamic: activations int8, one scale a call; {TIED_APART}"),
    "torchao": (
        _torchao("Int8DynamicActivationInt8WeightConfig"),
        f"activations int8, one scale a row; {TIED_APART}",
    ),
    "torchao, weights only": (_torchao("Int8WeightOnlyConfig"), f"products in float32; {TIED_APART}"),
    "optimum-quanto": (_quanto, f"products in float32; {TIED_APART}"),
    "bitsandbytes": (
        _bitsandbytes,
        f"Linear8bitLt, activations int8, one scale a row, outliers apart; {TIED_APART}",
    ),
}
