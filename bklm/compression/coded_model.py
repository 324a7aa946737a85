"""A coded model: a model of its own class whose tensors hold what a small file can hold, and the codes that say how.

It is used, scored and trained like any other; products run in float32. Its codes are the file: a tensor that was changed
since it was coded is refused when it is saved.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bklm import models
from bklm.compression.coding import Coded, Tied, half
from bklm.models import LanguageModel
from bklm.models.by_name import CLASSES
from bklm.moe.layer import AnalyticMoE

SMALLEST = 8  # a matrix with fewer inputs or outputs is not worth a scale a row
MEASURED = ("val_ppl", "val_ppl_without_unk", "val_loss", "val_accuracy", "test_ppl", "context_gain", "epochs")
MULTIPLIED = 16  # inputs and outputs of a map, below which its products stay in float


def model_of(given: Any, caller: str) -> LanguageModel:
    """The language model in what a caller was given: the model itself, or the one of a loaded run (``bklm.load``).

    Raises:
        TypeError: neither, or a model that no configuration of ``bklm.models`` describes.
    """
    model = given if isinstance(given, LanguageModel) else getattr(given, "model", None)
    if not isinstance(model, LanguageModel):
        raise TypeError(
            f"{caller}: got {type(given).__name__}; give a language model of bklm.models, or a run of bklm.load."
        )
    if type(model) is not getattr(models, type(model).__name__, None) or type(model).__name__ not in CLASSES:
        raise TypeError(
            f"{caller}: got a {type(model).__name__}; it takes a plain {', '.join(CLASSES)}: of a wrapped model give the "
            "model inside, of an int8 copy the float one."
        )
    return model


def like(given: Any, made: LanguageModel) -> Any:
    """``made`` as what was given: a model for a model, a loaded run with it for a loaded run.

    The run's record loses what was measured of the model before, and says which one that was ("changed_from").
    """
    if isinstance(given, LanguageModel):
        return made
    run = copy.copy(given)
    run.model = made
    record = {key: value for key, value in run.record.items() if key not in MEASURED}
    run.record = {
        "changed_from": {"model": run.name, "val_ppl": run.record.get("val_ppl")},
        **record,
        "model_class": getattr(made, "plain_class", type(made)).__name__,
        "model_config": dataclasses.asdict(made.config),
    }
    return run


def copy_of(model: LanguageModel) -> LanguageModel:
    """A copy on the CPU, float32, in evaluation mode, with the codes of the model."""
    return copy.deepcopy(model).cpu().float().eval()


def codes_of(model: nn.Module) -> dict[str, Coded]:
    """The codes of a model's tensors by name; {} where none is coded."""
    return model.__dict__.get("codes", {})


def is_compressed(model: nn.Module) -> bool:
    """Whether something of this package made it: its file is one of ``save_compressed``."""
    return "codes" in model.__dict__


@torch.no_grad()
def put(model: LanguageModel, codes: Mapping[str, Coded]) -> None:
    """Give tensors the values of these codes, and remember the codes."""
    named, held = dict(model.named_parameters()), codes_of(model) | dict(codes)
    for name, coded in codes.items():
        if not isinstance(coded, Tied):
            named[name].copy_(coded.decode())
    # What is tied to another follows it.
    for name, coded in held.items():
        if isinstance(coded, Tied):
            held[name] = dataclasses.replace(coded, left=named[coded.source])
            named[name].copy_(held[name].decode())
    model.__dict__["codes"] = held


def maps_of(model: nn.Module) -> list[str]:
    """Names of the linear maps whose products may be replaced: at least ``MULTIPLIED`` wide, and called as modules.

    A mixture reads its router's weight itself, so that the router stays as it is.
    """
    mixtures = (m for m in model.modules() if isinstance(m, AnalyticMoE))
    routers = {id(m) for mixture in mixtures for m in mixture.modules()}
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and id(m) not in routers and min(m.weight.shape) >= MULTIPLIED
    ]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state_dict holds, by name."""
    named = dict(model.named_buffers())
    return {name: named[name] for name in model.state_dict() if name in named}


def forget_codes(model: LanguageModel) -> None:
    """Of a model whose weights are about to change."""
    model.__dict__.pop("codes", None)


def matrices(model: LanguageModel) -> dict[str, Tensor]:
    """The weights worth coding, by name, a shared one once: matrices (out, in), and stacks of them (experts, out, in).

    Those that no logit depends on, such as an auxiliary term's, are not.
    """
    apart = {id(p) for p in model.parameters_apart()}
    return {
        n: p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and min(p.shape[-2:]) >= SMALLEST and id(p) not in apart
    }


def outer_names(model: LanguageModel) -> set[str]:
    """Names of embeddings and head: what grows with the vocabulary or the length, and not with the depth."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(t) for t in model.head() if t is not None}
    return {name for name, p in model.named_parameters() if id(p) in tables}


def halve_the_rest(model: LanguageModel) -> None:
    """Code in half precision what has no code yet and lies within its range."""
    rest = {name: half(p) for name, p in model.named_parameters() if name not in codes_of(model)}
    put(model, {name: coded for name, coded in rest.items() if coded is not None})
