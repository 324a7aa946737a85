"""Int8 copies of trained models: smaller files, int8 products, and what both cost in perplexity.

Dynamic quantisation by torch.ao: weights int8 with one scale per output unit, activations to 8 bits at each call with one
scale per tensor, products and sums in integers, results float32. Embeddings, LayerNorms, biases and linear maps too
small to gain stay float32. The kernels are the CPU's, so a copy lives there.

Where a few activations are far larger than the rest, one scale for all of them is coarse; `with_float_products` keeps the
small file and multiplies in float32, which tells the cost of the weights' rounding from that of the activations'.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import GPT, LanguageModel, LinearContext, NewLLM, ResNetBK, TokenLosses
from bklm.models.loss import IGNORE_INDEX
from bklm.training.evaluation import evaluate

SMALLEST = 16  # a linear map with fewer inputs or outputs stays float32
_HEAD = "int8_head"


class _Quantised:
    """What an int8 copy does differently from the model whose class it also has: its head, and that it does not train."""

    _counted: int

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Of the model that was quantised; none is trainable."""
        return 0 if trainable_only else self._counted

    def head(self) -> tuple[Tensor, Tensor | None]:
        raise TypeError("an int8 model has no float head; use its logits() or token_losses().")

    def logits(self, hidden: Tensor) -> Tensor:
        return getattr(self, _HEAD)(hidden)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        self.check_ids(input_ids)
        self.check_targets(input_ids, targets)
        logits = self.logits(self.hidden(input_ids))
        nll = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        return TokenLosses(nll.view(targets.shape), logits.argmax(-1) == targets)

    @torch.no_grad()
    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}; allowed are 'mean' and 'sum'.")
        count = (targets != IGNORE_INDEX).sum()
        if reduction == "mean" and count == 0:
            raise ValueError(
                f"targets: all {targets.numel()} are {IGNORE_INDEX} (ignored): no loss to average."
            )
        total = self.token_losses(input_ids, targets).nll.sum()
        return total / count if reduction == "mean" else total

    def train(self, mode: bool = True) -> LanguageModel:
        if mode:
            raise TypeError("an int8 model is not trained: its weights have no gradient; train the float one.")
        return super().train(False)


def quantised(model: LanguageModel) -> LanguageModel:
    """An int8 copy of a trained model, on the CPU and in evaluation mode; the model itself is left as it is.

    It is used as the model is (logits, token_losses, loss without a gradient, generate, step). A tied head becomes an
    int8 matrix of its own; the embedding that it was tied to stays float32. Activations are scaled per call, so a
    row's logits depend, within quantisation error, on what else is in the batch.

    Raises:
        TypeError: a model whose linear maps are not used as modules. RuntimeError: this torch has no int8 kernels.
    """
    kinds = (NewLLM, GPT, ResNetBK, LinearContext)
    if not isinstance(model, kinds) or isinstance(model, _Quantised):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"quantised: got {type(model).__name__}; it takes a float {names}.")
    result = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    weight, bias = result.head()
    head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    head.weight, head.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
    for name, child in list(result.named_children()):
        if isinstance(child, nn.Linear) and child.weight is weight:
            delattr(result, name)  # an untied head
    result.add_module(_HEAD, head)
    large = [
        name
        for name, m in result.named_modules()
        if isinstance(m, nn.Linear) and min(m.in_features, m.out_features) >= SMALLEST
    ]
    with _torch_ao() as ao:
        result = ao.quantize_dynamic(
            result, dict.fromkeys([*large, _HEAD], ao.per_channel_dynamic_qconfig), inplace=True
        )
    result.__class__ = type(f"Quantised{type(model).__name__}", (_Quantised, type(model)), {})
    result._counted = model.num_parameters()
    return result


def with_float_products(int8: LanguageModel) -> LanguageModel:
    """An int8 copy whose maps hold the same rounded weights in float32 and multiply in float32: no activation is rounded."""
    result = copy.deepcopy(int8)
    for name, linear in list(_int8_linears(result)):
        weight, bias = linear._weight_bias()
        plain = nn.Linear(linear.in_features, linear.out_features, bias is not None)
        plain.weight = nn.Parameter(weight.dequantize(), False)
        plain.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        parent, _, last = name.rpartition(".")
        setattr(result.get_submodule(parent), last, plain)
    return result


def save_quantised(model: LanguageModel, path: Path | str) -> None:
    """Write an int8 copy to a safetensors file: per int8 map its integers, scales and bias; the rest in float32."""
    state = {}
    for name, linear in _int8_linears(model):
        weight, bias = linear._weight_bias()
        state[f"{name}.int8"] = weight.int_repr()
        state[f"{name}.scale"] = weight.q_per_channel_scales().float()
        if bias is not None:
            state[f"{name}.bias"] = bias.detach()
    state |= {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(state, str(path))


def load_quantised(model: LanguageModel, path: Path | str) -> LanguageModel:
    """The int8 copy in a file of `save_quantised`; ``model``, a float one of the same configuration, is left as it is.

    Raises:
        ValueError: the file holds another model or configuration, naming the first thing that differs.
    """
    result, state = quantised(model), load_file(str(path))
    expected = {name: p.shape for name, p in result.named_parameters()}
    linears = dict(_int8_linears(result))
    for name, linear in linears.items():
        weight, bias = linear._weight_bias()
        expected |= {f"{name}.int8": weight.shape, f"{name}.scale": weight.shape[:1]}
        if bias is not None:
            expected[f"{name}.bias"] = bias.shape
    for name in sorted(expected.keys() | state.keys()):
        held, wanted = (
            tuple(x) if x is not None else "nothing"
            for x in (getattr(state.get(name), "shape", None), expected.get(name))
        )
        if held != wanted:
            raise ValueError(
                f"{path}: holds {held} for {name} where this {type(model).__name__} has {wanted}; "
                "give a model of the configuration that was saved."
            )
    with torch.no_grad(), _torch_ao():
        for name, p in result.named_parameters():
            p.copy_(state[name])
        for name, linear in linears.items():
            scale = state[f"{name}.scale"]
            zeros = torch.zeros_like(scale, dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(state[f"{name}.int8"], scale, zeros, 0)
            linear.set_weight_bias(weight, state.get(f"{name}.bias"))
    return result


@dataclass(frozen=True)
class QuantisationRow:
    """One way to keep a model, or a number that the original announced. None where there is nothing to say."""

    weights: str
    file_bytes: int | None
    perplexity: float | None
    perplexity_change: float | None  # share, against float32
    scored_tokens_per_second: float | None
    generated_tokens_per_second: float | None  # one sequence

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# The original's plan for int8; it was not carried out. Its 31 MB are weights and Adam's two moments.
ORIGINAL_PLAN = (
    QuantisationRow("planned by the original: float32", 31_000_000, None, None, None, None),
    QuantisationRow("planned by the original: int8 (+1% to +3%)", 8_000_000, None, 0.03, None, None),
)


def quantisation_report(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    new_tokens: int = 64,
    rounds: int = 3,
    int8: LanguageModel | None = None,
) -> list[QuantisationRow]:
    """Size, perplexity and speed of a model in float32, in int8, and with int8 weights but float32 products, all on the
    CPU, then the original's plan.

    Args:
        batches: (x, y) as for `bklm.training.evaluate`; every target is scored, and the time is that of scoring them.
        new_tokens: how many to generate, from a prompt of one token, for the time of generation.
        rounds: the arms take turns this often; speeds are medians.
        int8: the copy to judge, where it exists already.

    Raises:
        ValueError: rounds or new_tokens below 1, or no target to score. Also what `quantised` raises.
    """
    if rounds < 1 or new_tokens < 1:
        raise ValueError(f"rounds and new_tokens: got {rounds} and {new_tokens}; each must be at least 1.")
    batches = list(batches)
    plain = copy.deepcopy(model).cpu().float().eval()
    int8 = quantised(model) if int8 is None else int8
    arms = {"float32": plain, "int8": int8, "int8, products in float32": with_float_products(int8)}
    scored: dict[str, list[float]] = {name: [] for name in arms}
    generated: dict[str, list[float]] = {name: [] for name in arms}
    scores = {}
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    if model.n_seq is not None:
        new_tokens = min(new_tokens, model.n_seq - 1)
    for _ in range(rounds):
        for name, arm in arms.items():
            scores[name], seconds = _timed(lambda arm=arm: evaluate(arm, batches, None))
            scored[name].append(scores[name].tokens / seconds)
            _, seconds = _timed(lambda arm=arm: arm.generate(prompt, new_tokens, temperature=0.0))
            generated[name].append(new_tokens / seconds)
    with tempfile.TemporaryDirectory() as folder:
        save_model(plain, str(Path(folder, "float32")))
        save_quantised(arms["int8"], Path(folder, "int8"))
        sizes = {name: Path(folder, name.split(",")[0]).stat().st_size for name in arms}
    rows = [
        QuantisationRow(
            name,
            sizes[name],
            scores[name].perplexity,
            math.expm1(scores[name].loss - scores["float32"].loss),
            statistics.median(scored[name]),
            statistics.median(generated[name]),
        )
        for name in arms
    ]
    moments = 2 * sum(p.numel() * p.element_size() for p in plain.parameters())
    with_adam = QuantisationRow(
        "float32 with Adam's moments", sizes["float32"] + moments, None, None, None, None
    )
    return [rows[0], with_adam, *rows[1:], *ORIGINAL_PLAN]


def _int8_linears(model: LanguageModel) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, _Quantised):
        raise TypeError(
            f"got a {type(model).__name__} that is not an int8 copy; make one with quantised(model)."
        )
    for name, module in model.named_modules():
        if hasattr(module, "set_weight_bias") and hasattr(module, "in_features"):
            yield name, module


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


@contextlib.contextmanager
def _torch_ao() -> Iterator[Any]:
    """torch.ao.quantization, if this torch has it with kernels; its notices that it will move to torchao are silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"torch\.ao\.quantization is deprecated", category=DeprecationWarning
        )
        warnings.filterwarnings(
            "ignore", message=r"torch\.(quantize_per_tensor|_?make_per)", category=UserWarning
        )
        try:
            from torch.ao import quantization
        except ImportError as error:
            raise RuntimeError(
                f"quantised: torch {torch.__version__} no longer has torch.ao.quantization; use torch 2.13 or older."
            ) from error
        if torch.backends.quantized.engine == "none":
            raise RuntimeError(
                "quantised: this build of torch has no int8 kernels for this CPU; use another machine."
            )
        yield quantization
