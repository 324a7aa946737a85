"""Files of compressed models: one safetensors file that says itself which model it holds, and loads again to equal logits."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bklm.compression.activations import Activations, activations_of, multiply
from bklm.compression.coded_model import codes_of, model_of, persistent_buffers, put
from bklm.compression.coding import Coded, pack_bits, read, unpack_bits
from bklm.files.atomic import replacing
from bklm.models import LanguageModel
from bklm.models.by_name import CLASSES, built

HEADER = "bklm"
JOINED = ("half", "codes")  # kinds of tensors of which a model has many short ones
BYTES_OF_A_NUMBER = 4


def save_compressed(model: Any, path: Path | str) -> Path:
    """Write a model, compressed or not, to a safetensors file that ``load_compressed`` reads; return its path.

    Coded tensors take their bits and scales; of others that hold many zeros, a mask of one bit a number and the numbers that
    are not zero; the rest is float32.

    Raises:
        TypeError: no plain model. ValueError: a tensor was changed since it was coded, or the model's configuration does not
            describe its tensors.
    """
    inside = model if isinstance(model, LanguageModel) else getattr(model, "model", model)
    how = activations_of(inside) if isinstance(inside, LanguageModel) else None
    model = inside if how is not None else model_of(model, "save_compressed")
    kind = getattr(model, "plain_class", type(model))
    tensors, facts = {}, {}
    for name, held in _held(model, kind).items():
        own, facts[name] = held.stored() if isinstance(held, Coded) else _plainly(held)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in own.items()}
    for name, value in _buffers(model, kind).items():
        tensors[f"{name}.values"], facts[name] = value, {"kind": "plain"}
    header = {
        "class": kind.__name__,
        "config": dataclasses.asdict(model.config),
        "tensors": facts,
        "joined": _join(tensors),
        "activations": None if how is None else dataclasses.asdict(how),
    }
    path = Path(path)
    with replacing(path) as temporary:
        # Packed, since what is said of each tensor repeats itself: of a small model plain words take a percent of the file.
        save_file(tensors, str(temporary), {HEADER: _pack(header)})
    return path


def load_compressed(path: Path | str) -> LanguageModel:
    """The model in a file of ``save_compressed``, on the CPU in evaluation mode, with the codes that it was saved with.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no file of ``save_compressed``, or a damaged one.
    """
    path = Path(path)
    require_file(path, "save_compressed")
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
        header = _unpack(text) if text else None
    except (SafetensorError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again.") from error
    if header is None:
        raise ValueError(
            f"{path} holds no compressed model of bklm; give a file of save_compressed, or load a run with bklm.load."
        )
    if header["class"] not in CLASSES:
        raise ValueError(
            f"{path} holds a {header['class']!r}, which this version of bklm does not have; update bklm."
        )
    try:
        return _read(header, tensors)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged, or of a version of bklm that this one does not know ({type(error).__name__}: {error}); save "
            "the model again, or update bklm."
        ) from error


def require_file(path: Path, writer: str) -> None:
    """Refuse what is no file.

    Raises:
        FileNotFoundError: it does not exist, or is a folder.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; give a file that {writer} wrote.")


def _read(header: dict[str, Any], tensors: dict[str, Tensor]) -> LanguageModel:
    """The model that a file's header and tensors describe; whatever they lack is an error of its own kind."""
    _part(tensors, header.get("joined", {}))
    model = built(header["class"], header["config"]).eval()
    named = dict(model.named_parameters())
    # Without this a tensor would stay as it was drawn.
    if missing := sorted(named.keys() - header["tensors"].keys()):
        raise LookupError(f"no {missing[0]}")
    # An earlier version wrote no buffers.
    named |= persistent_buffers(model)
    codes = {}
    with torch.no_grad():
        for name, facts in header["tensors"].items():
            own = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if facts["kind"] == "plain":
                named[name].copy_(own["values"])
            elif facts["kind"] == "masked":
                count = named[name].numel()
                alive = unpack_bits(own["mask"], 1, count).bool()
                named[name].copy_(torch.zeros(count).masked_scatter(alive, own["values"]).view_as(named[name]))
            else:
                codes[name] = read(own, facts)
    put(model, codes)
    how = header["activations"]
    return model if how is None else multiply(model, Activations(**how))


def is_compressed_file(path: Path | str) -> bool:
    """Whether a safetensors file is one of ``save_compressed``; False for one that cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def file_sizes(model: Any) -> tuple[int, int]:
    """Bytes of a model's file as ``save_compressed`` writes it, and of that file packed by zlib."""
    return sizes_of(lambda place: save_compressed(model, place))


def sizes_of(write: Callable[[Path], Any]) -> tuple[int, int]:
    """Bytes of the file that ``write`` writes where it is told, and of that file packed by zlib."""
    with tempfile.TemporaryDirectory() as folder:
        write(place := Path(folder, "model.safetensors"))
        whole = place.read_bytes()
    return len(whole), len(zlib.compress(whole, 9))


def _join(tensors: dict[str, Tensor]) -> dict[str, list[tuple[str, list[int]]]]:
    """Put the many short tensors of a kind into one, in place: the entry of each in a file's head is longer than it is.

    Returns their names and shapes by kind, as they follow each other.
    """
    joined: dict[str, list[tuple[str, list[int]]]] = {}
    for kind in JOINED:
        names = [name for name in tensors if name.endswith(f".{kind}")]
        parts = [tensors.pop(name) for name in names]
        if parts:
            joined[kind] = [(name, list(part.shape)) for name, part in zip(names, parts, strict=True)]
            tensors[kind] = torch.cat([part.flatten() for part in parts])
    return joined


def _part(tensors: dict[str, Tensor], joined: dict[str, list[tuple[str, list[int]]]]) -> None:
    """Undo ``_join``, in place; an earlier version joined nothing."""
    for kind, parts in joined.items():
        sizes = [math.prod(shape) for _, shape in parts]
        for (name, shape), part in zip(parts, tensors.pop(kind).split(sizes), strict=True):
            tensors[name] = part.view(shape)


def _pack(header: dict[str, Any]) -> str:
    return base64.b85encode(zlib.compress(json.dumps(header).encode(), 9)).decode()


def _unpack(text: str) -> dict[str, Any]:
    # Earlier versions wrote plain JSON.
    return json.loads(text if text.startswith("{") else zlib.decompress(base64.b85decode(text)))


def _plainly(values: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    alive = values != 0
    zeros = values.numel() - int(alive.sum())
    if zeros * 8 * BYTES_OF_A_NUMBER <= values.numel():
        return {"values": values}, {"kind": "plain"}
    return {"mask": pack_bits(alive.to(torch.uint8), 1), "values": values[alive]}, {"kind": "masked"}


def _held(model: LanguageModel, kind: type[LanguageModel]) -> dict[str, Tensor | Coded]:
    """What each tensor of a model's configuration is here: its code, or itself in float32.

    Raises:
        ValueError: as ``save_compressed`` does.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in kind(model.config).named_parameters()}
    codes, named = codes_of(model), dict(model.named_parameters())
    if activations_of(model) is None:
        _require_described(model, {n: tuple(p.shape) for n, p in named.items()}, expected)
    held: dict[str, Tensor | Coded] = {}
    for name in expected:
        plain = named[name].detach().to("cpu", torch.float32) if name in named else None
        # A map that multiplies in int8 has its weight in its code alone.
        if name in codes and (plain is None or torch.equal(codes[name].decode(), plain)):
            held[name] = codes[name]
        elif name in codes:
            raise ValueError(
                f"save_compressed: {name} was changed since it was coded; compress the model again, then save it."
            )
        else:
            held[name] = model.__dict__.get("moved", {}).get(name) if plain is None else plain
    return held


def _buffers(model: LanguageModel, kind: type[LanguageModel]) -> dict[str, Tensor]:
    """The buffers that a state_dict of its class holds, such as how a context block was trained."""
    with torch.device("meta"):
        expected = persistent_buffers(kind(model.config))
    return {name: model.get_buffer(name).detach().cpu() for name in expected}


def _require_described(
    model: LanguageModel, own: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a model whose tensors are not those of its configuration, such as one with blocks that share their weights."""
    for name in sorted(own.keys() | expected.keys()):
        if own.get(name) != expected.get(name):
            raise ValueError(
                f"save_compressed: {name} is {own.get(name, 'missing')} in this {type(model).__name__}, where its "
                f"configuration makes it {expected.get(name, 'missing')}; a file holds what a configuration describes."
            )
