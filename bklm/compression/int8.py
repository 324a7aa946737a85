"""Int8 copies of trained models: smaller files, int8 products, and what both cost in perplexity.

Dynamic quantisation by torch.ao: weights int8 with one scale per output unit, activations to 8 bits at each call with one
scale per tensor, products and sums in integers, results float32. A tied model's one matrix stays one: embeddings are rows
of the int8 head, so a large vocabulary takes a quarter. Untied embeddings, positions, LayerNorms, biases, a mixture's experts
and linear maps too small to gain stay float32. The kernels are the CPU's, so a copy lives there. ``int8_linear`` makes
them as exact for small numbers as for large ones, so that no rescaling that leaves the model's function as it is changes a
copy's.

Where a few activations are far larger than the rest, one scale for all of them is coarse; ``with_float_products`` keeps the
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from bklm import models
from bklm.compression.coded_model import maps_of, persistent_buffers
from bklm.compression.coding import CannotServeError
from bklm.compression.int8_linear import Int8Embedding, Int8Linear, row_exponents
from bklm.compression.int8_model import HEAD, Quantised, class_of
from bklm.compression.int8_modules import with_modules
from bklm.compression.saving import require_file
from bklm.files.atomic import replacing
from bklm.models import LanguageModel
from bklm.models.by_name import CLASSES
from bklm.moe.products import Linear
from bklm.training.evaluation import evaluate

MODELS = tuple(getattr(models, name) for name in CLASSES)


def quantised(model: LanguageModel) -> LanguageModel:
    """An int8 copy of a trained model, on the CPU and in evaluation mode; the model itself is left as it is.

    Its products are in int8; not to be confused with ``bklm.compression.quantise``, whose files are small and whose products
    are in float.

    It is used as the model is (logits, token_losses, loss without a gradient, generate, step). The embedding of a tied
    model is looked up in the int8 head (``Int8Embedding``). Activations are scaled per call, so a row's logits depend,
    within quantisation error, on what else is in the batch.

    Raises:
        TypeError: no model of ``MODELS``, or an int8 copy already. CannotServeError (a ValueError): weights that are not
        finite. RuntimeError: this torch has no int8 kernels.
    """
    if not isinstance(model, MODELS) or isinstance(model, Quantised):
        names = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(f"quantised: got {type(model).__name__}; it takes a float {names}.")
    for name, p in model.named_parameters():
        if not bool(p.detach().isfinite().all()):
            raise CannotServeError(
                f"quantised: {name} holds NaN or infinity, so the model has diverged; take an earlier checkpoint."
            )
    result = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    weight, bias = result.head()
    tied = result.embedding.weight is weight
    with_modules(result)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    head.weight, head.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
    for name, child in list(result.named_children()):
        if isinstance(child, nn.Linear) and child.weight is weight:
            delattr(result, name)  # an untied head
    result.add_module(HEAD, head)
    exponents = {}
    for name in dict.fromkeys([*maps_of(result), HEAD]):
        linear = result.get_submodule(name)
        weight = linear.weight.double()
        exponents[name] = row_exponents(weight.abs().amax(1) / 127.5)
        scaled = weight * torch.pow(2.0, exponents[name].double()).unsqueeze(1)
        linear.weight = nn.Parameter(scaled.float(), False)
        if type(linear) is Linear:
            # torch.ao knows a map by its very class.
            linear.__class__ = nn.Linear
    with _torch_ao() as ao:
        result = ao.quantize_dynamic(
            result, dict.fromkeys(exponents, ao.per_channel_dynamic_qconfig), inplace=True
        )
    for name, rows in exponents.items():
        _replace(result, name, Int8Linear(result.get_submodule(name), rows))
    if tied:
        result.embedding = Int8Embedding(result.get_submodule(HEAD))
    result.__class__ = class_of(type(model))
    result._counted = model.num_parameters()
    return result


def with_float_products(int8: LanguageModel) -> LanguageModel:
    """An int8 copy whose maps hold the same rounded weights in float32 and multiply in float32: no activation is rounded."""
    result = copy.deepcopy(int8)
    for name, linear in list(_int8_linears(result)):
        integers, scales, bias = linear.weight_and_bias()
        plain = nn.Linear(linear.in_features, linear.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(integers.float() * scales.unsqueeze(1), False)
        plain.bias = None if bias is None else nn.Parameter(bias, False)
        _replace(result, name, plain)
    if isinstance(result.embedding, Int8Embedding):
        weight = result.get_submodule(HEAD).weight
        result.embedding = nn.Embedding(*weight.shape, device="meta")
        result.embedding.weight = weight
    return result


def save_quantised(model: LanguageModel, path: Path | str) -> Path:
    """Write a copy of ``quantised`` to a safetensors file, whole or not at all; returns its path.

    Per int8 map it holds the integers, scales and bias, and the rest in float32; the matrix of a tied model is there once, as
    ``int8_head``. It does not say which model it is of: ``load_quantised`` is given one. Not to be confused with
    ``save_compressed``, whose files are smaller and say it.

    Raises:
        WriteError (an OSError): the disk is full, or the folder may not be written.
    """
    path = Path(path)
    state = {}
    for name, linear in _int8_linears(model):
        integers, scales, bias = linear.weight_and_bias()
        state |= {f"{name}.int8": integers, f"{name}.scale": scales}
        if bias is not None:
            state[f"{name}.bias"] = bias
    state |= {name: p.detach().contiguous() for name, p in model.named_parameters()}
    state |= persistent_buffers(model)
    with replacing(path) as temporary:
        save_file(state, str(temporary))
    return path


def load_quantised(model: LanguageModel, path: Path | str) -> LanguageModel:
    """The int8 copy in a file of ``save_quantised``; ``model``, a float one of the same configuration, is left as it is.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, or holds another model or configuration, naming
            the first thing that differs.
    """
    require_file(Path(path), "save_quantised")
    result = quantised(model)
    try:
        state = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save the copy again.") from error
    expected = {name: p.shape for name, p in result.named_parameters()}
    # An earlier version wrote none.
    buffers = {name: b for name, b in persistent_buffers(result).items() if name in state}
    expected |= {name: b.shape for name, b in buffers.items()}
    linears = dict(_int8_linears(result))
    for name, linear in linears.items():
        integers, scales, bias = linear.weight_and_bias()
        expected |= {f"{name}.int8": integers.shape, f"{name}.scale": scales.shape}
        if bias is not None:
            expected[f"{name}.bias"] = bias.shape
    for name in sorted(expected.keys() | state.keys()):
        held, wanted = (
            tuple(x) if x is not None else "nothing"
            for x in (getattr(state.get(name), "shape", None), expected.get(name))
        )
        if name == "embedding.weight" and wanted == "nothing":
            raise ValueError(
                f"{path}: holds the embedding in float32 beside the int8 matrix that it is tied to, as older versions wrote "
                "it; write it again with save_quantised."
            )
        if held != wanted:
            raise ValueError(
                f"{path}: holds {held} for {name} where this {type(model).__name__} has {wanted}; "
                "give a model of the configuration that was saved."
            )
    with torch.no_grad(), _torch_ao():
        for name, tensor in (*result.named_parameters(), *buffers.items()):
            tensor.copy_(state[name])
        for name, linear in linears.items():
            linear.set_weight_and_bias(state[f"{name}.int8"], state[f"{name}.scale"], state.get(f"{name}.bias"))
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
    QuantisationRow("planned for NewLLM by its original: float32", 31_000_000, None, None, None, None),
    QuantisationRow("planned for NewLLM by its original: int8 (+1% to +3%)", 8_000_000, None, 0.03, None, None),
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
        batches: (x, y) as for ``bklm.training.evaluate``; every target is scored, and the time is that of scoring them.
        new_tokens: how many to generate, from a prompt of one token, for the time of generation.
        rounds: the arms take turns this often; speeds are medians.
        int8: the copy to judge, where it exists already.

    Raises:
        ValueError: rounds or new_tokens below 1, or no target to score. Also what ``quantised`` raises.
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
    prompt = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
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


def _int8_linears(model: LanguageModel) -> Iterator[tuple[str, Int8Linear]]:
    if not isinstance(model, Quantised):
        raise TypeError(
            f"got a {type(model).__name__} that is not an int8 copy; make one with quantised(model)."
        )
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            yield name, module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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
        # Kernels are the CPU's, whatever the default device of new tensors is.
        with torch.device("cpu"):
            yield quantization
