"""Int8 products for a whole model: scales per token or per tensor, SmoothQuant, outlier columns in float.

SmoothQuant (Xiao et al. 2023) moves size from activations to weights, Y = (X / s) (s W), with

    s_j = max |X_j|^a / max |W_j|^(1 - a)

of each input j over a calibration text: columns that stick out no longer spend the scale of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bklm.compression.calibration import Inputs, read_inputs
from bklm.compression.coded_model import (
    MULTIPLIED,
    codes_of,
    copy_of,
    halve_the_rest,
    like,
    maps_of,
    matrices,
    model_of,
    put,
)
from bklm.compression.coding import Integers, integers, is_whole
from bklm.compression.products import HEAD, Int8Product, class_with_int8_products
from bklm.models import GPT, LanguageModel, LinearContext, NewLLM, ResNetBK

PER = ("token", "tensor")
KINDS = (NewLLM, GPT, ResNetBK, LinearContext)  # the others use weights of maps past the maps
HEAD_INPUTS = 64
LEAST = 1e-5  # of a column's size, before it divides


@dataclass(frozen=True)
class Activations:
    """How activations are rounded, as a file keeps it: per what, whether the head's are, and which columns stay in float."""

    per: str
    head: bool
    outliers: Mapping[str, list[int]] = field(default_factory=dict)


def with_int8_products(
    model: Any,
    per: str = "token",
    *,
    smooth: float | None = None,
    outliers: int = 0,
    calibration: Iterable[tuple[Tensor, Tensor]] = (),
    head: bool | None = None,
) -> Any:
    """A copy on the CPU whose linear maps multiply in int8, for inference. The model is left as it is.

    Weights are those of ``quantise`` with 8 bits, one scale an output; embeddings, mixtures of experts and maps with fewer
    than 16 inputs or outputs multiply in float with weights that are rounded all the same. Nothing here depends on what else
    is in a batch, unless scales are per tensor.

    Args:
        model: a language model, or a run of ``bklm.load``; the result is of the same kind.
        per: "token": a scale for each row of activations; "tensor": one for all rows of a call.
        smooth: SmoothQuant's a, between 0 and 1, for all maps but a tied head, whose columns are also its embedding's.
        outliers: so many columns of each map, those of the largest activations, stay in float.
        calibration: batches (x, y) of training text, which ``smooth`` and ``outliers`` need.
        head: whether the output head multiplies in int8, too; None: where it has at least 64 inputs, since with fewer the
            scaling of as many numbers as there are words takes most of what the products save.

    Raises:
        TypeError: a model without such maps. ValueError: a value outside what is allowed, or no calibration where one is
        needed.
    """
    plain = model_of(model, "with_int8_products")
    if per not in PER:
        raise ValueError(f"per: got {per!r}; allowed are {', '.join(map(repr, PER))}.")
    if smooth is not None and not 0.0 <= smooth <= 1.0:
        raise ValueError(f"smooth: got {smooth}; it must lie between 0 and 1, or be None for no smoothing.")
    if not is_whole(outliers) or outliers < 0:
        raise ValueError(f"outliers: got {outliers!r}; give a number of columns, 0 or more.")
    made = copy_of(plain)
    output = made.head()[0]
    head = (output.shape[1] >= HEAD_INPUTS if head is None else head) and min(output.shape) >= MULTIPLIED
    maps = _maps(made, head)
    known = codes_of(made)
    inputs: dict[str, Inputs] = {}
    if smooth is not None or outliers:
        inputs = read_inputs(made, calibration, "with_int8_products")
    coded = {}
    for name, p in matrices(made).items():
        columns = None
        if smooth is not None and name in maps and not _is_shared(made, p):
            columns = 1.0 / _sizes(inputs[name].largest, p, smooth)
        elif _serves(known.get(name)):
            continue
        coded[name] = integers(p, 8, columns=columns)
    put(made, coded)
    halve_the_rest(made)
    chosen = {}
    if outliers:
        chosen = {
            name: _largest(inputs[name], codes_of(made)[name], outliers) for name in maps if name in inputs
        }
    return like(model, multiply(made, Activations(per, head, chosen)))


def multiply(made: LanguageModel, how: Activations) -> LanguageModel:
    """The coded model itself, its maps replaced by int8 products of the integers that it holds."""
    codes, counted = codes_of(made), made.num_parameters()
    output = made.head()
    for name in _maps(made, how.head):
        outliers = torch.tensor(how.outliers[name]) if name in how.outliers else None
        if name == _name_of(made, output[0]):
            continue
        place = name.removesuffix(".weight")
        linear = made.get_submodule(place)
        parent, _, last = place.rpartition(".")
        product = Int8Product(codes[name], linear.bias, how.per, outliers)
        setattr(made.get_submodule(parent), last, product)
    if how.head:
        name = _name_of(made, output[0])
        outliers = torch.tensor(how.outliers[name]) if name in how.outliers else None
        head = Int8Product(codes[name], output[1], how.per, outliers)
        for child, module in list(made.named_children()):
            if isinstance(module, nn.Linear) and module.weight is output[0]:
                delattr(made, child)
                # Its bias is the product's from here on; a file still has it under its name.
                made.__dict__.setdefault("moved", {})[f"{child}.bias"] = output[1]
        made.add_module(HEAD, head)
    made.__class__ = class_with_int8_products(type(made))
    made._counted = counted
    made.__dict__["activations"] = how
    return made.eval().requires_grad_(False)


def activations_of(model: nn.Module) -> Activations | None:
    """How a model's activations are rounded; None where they are not."""
    return model.__dict__.get("activations")


def _maps(model: LanguageModel, head: bool) -> list[str]:
    """Names of the weights that multiply in int8."""
    names = {id(p): name for name, p in model.named_parameters()}
    weight = model.head()[0]
    maps = (model.get_submodule(name).weight for name in maps_of(model))
    found = [names[id(w)] for w in maps if w is not weight]
    if not found or not isinstance(model, KINDS):
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(
            f"with_int8_products: got a {type(model).__name__} without maps that are modules with at least {MULTIPLIED} "
            f"inputs and outputs; it serves {names} with such maps: round the weights alone with quantise(model)."
        )
    return found + [names[id(weight)]] * head


def _name_of(model: LanguageModel, tensor: Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is tensor)


def _is_shared(model: LanguageModel, tensor: Tensor) -> bool:
    """Whether a tensor is an embedding, and so read by rows, too."""
    return any(isinstance(m, nn.Embedding) and m.weight is tensor for m in model.modules())


def _serves(coded: Any) -> bool:
    return isinstance(coded, Integers) and coded.bits == 8 and coded.scales.shape[1] == 1


def _sizes(largest: Tensor, weight: Tensor, a: float) -> Tensor:
    """SmoothQuant's s (K,)."""
    of_weight = weight.detach().abs().amax(0).clamp_min(LEAST)
    # An input that was silent on the calibration text may speak up on another: it is taken for an ordinary one.
    spoke = largest > 0
    ordinary = largest[spoke].median() if bool(spoke.any()) else torch.ones(())
    return (torch.where(spoke, largest, ordinary).clamp_min(LEAST) ** a / of_weight ** (1 - a)).clamp_min(LEAST)


def _largest(inputs: Inputs, coded: Any, count: int) -> list[int]:
    sizes = inputs.largest if coded.columns is None else inputs.largest * coded.columns
    return sorted(sizes.topk(min(count, len(sizes))).indices.tolist())
