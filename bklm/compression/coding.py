"""How a tensor is kept in few bytes: integers of 2 to 8 bits with scales, half precision, or two factors of low rank.

A coded tensor is exact about what it holds: ``decode`` gives the same float32 numbers here and from its file. Integers:

    w ~ s round(w / s),   s = max |w| / (2^(bits - 1) - 1)   over a row of inputs, or over ``group`` of them

symmetric, one scale a row or a group. Below 7 bits the scale that makes the least squared error is searched among 11 smaller
ones: clipping one large weight may be cheaper than coarse steps for all. A scale takes one byte, as QLoRA's double
quantisation does (Dettmers 2023), here on a logarithmic scale: base 2^(-c / 16), rounded up, so that nothing is clipped by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

BITS = tuple(range(2, 9))
STEPS_AN_OCTAVE = 16
SMALLEST_SHARE = 2.0 ** (-255 / STEPS_AN_OCTAVE)
SHRUNK = tuple(1.0 - 0.05 * i for i in range(12))  # of the scale that clips nothing
WELL_FILLED = 7  # bits from which the scale that clips nothing is taken

Stored = dict[str, Tensor]


class CannotServeError(ValueError):
    """A method cannot serve this trained model: its numbers, not the call, are to blame."""


@dataclass(frozen=True)
class Integers:
    """Integers with scales.

    Attributes:
        values: int8 (rows, K), each between -(2^(bits-1) - 1) and that.
        codes: uint8 (rows, groups), or None where scales are too far apart for a byte; then ``scales`` hold them.
        base: the largest scale, float32.
        columns: float32 (K,), by which inputs were divided before rounding (SmoothQuant); None: by nothing.
    """

    values: Tensor
    codes: Tensor | None
    scales: Tensor
    base: float
    bits: int
    group: int
    shape: tuple[int, ...]
    columns: Tensor | None = None

    def decode(self) -> Tensor:
        """float32 of the tensor's shape."""
        rows, width = self.values.shape
        groups = self.scales.shape[1]
        padded = torch.nn.functional.pad(self.values.float(), (0, groups * self.group - width))
        plain = (padded.view(rows, groups, self.group) * self.scales.unsqueeze(2)).view(rows, -1)[:, :width]
        plain = plain if self.columns is None else plain * self.columns
        return plain.reshape(self.shape)

    def stored(self) -> tuple[Stored, dict[str, Any]]:
        tensors = {}
        flat = self.values.flatten()
        alive = flat != 0
        # A mask of one bit a weight pays where more than that is saved by leaving zeros out.
        is_sparse = bool((~alive).sum() * self.bits > flat.numel())
        if is_sparse:
            tensors["mask"] = pack_bits(alive.to(torch.uint8), 1)
            flat = flat[alive]
        tensors["ints"] = pack_bits(flat + 2 ** (self.bits - 1), self.bits)
        if self.codes is None:
            tensors["scales"] = self.scales
        else:
            tensors["codes"] = self.codes
        if self.columns is not None:
            tensors["columns"] = self.columns
        facts = {"kind": "integers", "bits": self.bits, "group": self.group, "shape": self.shape}
        return tensors, facts | {"base": self.base, "sparse": is_sparse}

    @staticmethod
    def read(tensors: Stored, facts: dict[str, Any]) -> Integers:
        shape, bits, group = tuple(facts["shape"]), facts["bits"], facts["group"]
        width = shape[-1]
        count = math.prod(shape)
        alive = unpack_bits(tensors["mask"], 1, count).bool() if facts["sparse"] else None
        held = unpack_bits(tensors["ints"], bits, count if alive is None else int(alive.sum()))
        held = (held.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        values = held if alive is None else torch.zeros(count, dtype=torch.int8).masked_scatter(alive, held)
        codes = tensors.get("codes")
        scales = tensors["scales"] if codes is None else _scales(codes, facts["base"])
        columns = tensors.get("columns")
        return Integers(
            values.view(-1, width), codes, scales, facts["base"], bits, group, shape, columns
        )  # fmt: skip


@dataclass(frozen=True)
class Half:
    """float16."""

    values: Tensor

    def decode(self) -> Tensor:
        return self.values.float()

    def stored(self) -> tuple[Stored, dict[str, Any]]:
        return {"half": self.values}, {"kind": "half"}

    @staticmethod
    def read(tensors: Stored, facts: dict[str, Any]) -> Half:
        return Half(tensors["half"])


@dataclass(frozen=True)
class Factors:
    """A matrix (V, D) as left (V, r) times right (r, D), each kept in a way of its own."""

    left: Integers | Half
    right: Integers | Half

    def decode(self) -> Tensor:
        return self.left.decode() @ self.right.decode()

    def stored(self) -> tuple[Stored, dict[str, Any]]:
        tensors, facts = {}, {"kind": "factors"}
        for name in ("left", "right"):
            own, facts[name] = getattr(self, name).stored()
            tensors |= {f"{name}.{key}": value for key, value in own.items()}
        return tensors, facts

    @staticmethod
    def read(tensors: Stored, facts: dict[str, Any]) -> Factors:
        return Factors(*(
            read({k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}, facts[name])
            for name in ("left", "right")
        ))  # fmt: skip


@dataclass(frozen=True)
class Tied:
    """A matrix (V, D) as another tensor (V, e) of its model times right (e, D), which is float16."""

    source: str  # that tensor's name
    right: Tensor
    left: Tensor | None = None  # the tensor itself, once the model is known

    def decode(self) -> Tensor:
        return self.left.detach().cpu().float() @ self.right.float()

    def stored(self) -> tuple[Stored, dict[str, Any]]:
        return {"right": self.right}, {"kind": "tied", "source": self.source}

    @staticmethod
    def read(tensors: Stored, facts: dict[str, Any]) -> Tied:
        return Tied(facts["source"], tensors["right"])


Coded = Integers | Half | Factors | Tied


def read(tensors: Stored, facts: dict[str, Any]) -> Coded:
    """What ``stored`` gave."""
    return {"integers": Integers, "half": Half, "factors": Factors, "tied": Tied}[facts["kind"]].read(
        tensors, facts
    )


def check_rounding(bits: int, group: int | None) -> None:
    """Refuse, by a ValueError, bits other than 2 to 8 and a group that is no whole number from 1."""
    if not is_whole(bits) or bits not in BITS:
        raise ValueError(f"bits: got {bits!r}; a weight is rounded to {BITS[0]} to {BITS[-1]} bits.")
    if group is not None and (not is_whole(group) or group < 1):
        raise ValueError(
            f"group: got {group!r}; give the number of inputs that share a scale, or None for a whole row."
        )


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_finite(weights: Iterable[Tensor]) -> None:
    """Refuse, by a ``CannotServeError``, weights that are not finite."""
    if not all(bool(w.isfinite().all()) for w in weights):
        raise CannotServeError(
            "weights hold NaN or infinity, so the model has diverged; take an earlier checkpoint."
        )


def integers(
    weight: Tensor, bits: int = 8, group: int | None = None, columns: Tensor | None = None
) -> Integers:
    """Round a tensor (..., K) to integers of ``bits`` bits.

    Args:
        group: inputs that share a scale; None: all of a row. The last group of a row may be smaller.
        columns: (K,) positive: inputs are divided by it before rounding and multiplied again by ``decode``.

    Raises:
        ValueError: bits not 2 to 8, a group below 1. CannotServeError: weights that are not finite.
    """
    check_rounding(bits, group)
    check_finite([weight])
    width = weight.shape[-1]
    rows = weight.detach().to("cpu", torch.float32).reshape(-1, width)
    rows = rows if columns is None else rows / columns
    size = width if group is None else min(group, width)
    groups = -(-width // size)
    blocks = torch.nn.functional.pad(rows, (0, groups * size - width)).view(len(rows), groups, size)
    levels = 2 ** (bits - 1) - 1
    widest = blocks.abs().amax(2).double() / levels
    base = float(widest.max().float())
    coded = bool((widest[widest > 0] >= base * SMALLEST_SHARE).all())
    best: tuple[Tensor, ...] | None = None
    for share in SHRUNK if bits < WELL_FILLED else (1.0,):
        wanted = widest * share
        codes = _codes(wanted, base) if coded else None
        scales = wanted.float() if codes is None else _scales(codes, base)
        safe = torch.where(scales > 0, scales, 1.0).unsqueeze(2)
        values = (blocks / safe).round_().clamp_(-levels, levels)
        error = (values * scales.unsqueeze(2) - blocks).square_().sum(2)
        marks = torch.zeros_like(error, dtype=torch.uint8) if codes is None else codes
        found = (values.to(torch.int8), marks, scales, error)
        if best is None:
            best = found
            continue
        better = error < best[3]
        best = tuple(
            torch.where(better.unsqueeze(2) if new.ndim == 3 else better, new, old)
            for new, old in zip(found, best, strict=True)
        )
    values, codes, scales, _ = best
    values = values.view(len(rows), -1)[:, :width].contiguous()
    shape = tuple(weight.shape)
    return Integers(values, codes if coded else None, scales, base, bits, size, shape, columns)


def half(values: Tensor) -> Half | None:
    """A tensor in half precision; None where its numbers are outside that range."""
    plain = values.detach().to("cpu", torch.float32)
    found = plain.half()
    largest = float(plain.abs().max()) if plain.numel() else 0.0
    fits = bool(found.isfinite().all()) and float((found.float() - plain).abs().max()) <= 1e-3 * largest
    return Half(found) if plain.numel() and fits else None


def factors(weight: Tensor, rank: int, bits: int | None = 8) -> Factors:
    """The nearest matrix of that rank (Eckart and Young 1936) of a weight (V, D), its factors in ``bits`` bits or, with None,
    in half precision.

    Raises:
        ValueError: a tensor that is no matrix, or a rank outside 1 to its smaller side. CannotServeError: weights that are not
            finite, or factors beyond half precision.
    """
    if weight.ndim != 2 or not is_whole(rank) or not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank: got {rank!r} for a weight of shape {tuple(weight.shape)}; a matrix has ranks 1 to its smaller side."
        )
    check_finite([weight])
    u, s, v = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    root = s[:rank].sqrt()
    left, right = (u[:, :rank] * root).float(), (root.unsqueeze(1) * v[:rank]).float()
    if bits is None:
        halves = Half(left.half()), Half(right.half())
        if not all(bool(part.values.isfinite().all()) for part in halves):
            raise CannotServeError("its factors hold numbers beyond half precision; give bits 2 to 8.")
        return Factors(*halves)
    return Factors(integers(left, bits), integers(right, bits))


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Numbers 0 to 2^bits - 1 in that many bits each, one after the other, the lowest bit first: uint8 (ceil(n bits / 8),)."""
    whole = values.flatten().to(torch.int16).numpy().astype(np.uint8)
    if bits == 8:
        return torch.from_numpy(whole.copy())
    planes = (whole[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of ``pack_bits``, uint8 (count,)."""
    if bits == 8:
        return packed[:count].clone()
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    whole = (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return torch.from_numpy(whole)


def _codes(scales: Tensor, base: float) -> Tensor:
    """The largest code whose scale is not below the one given; 255 for a scale of 0."""
    share = torch.where(scales > 0, base / scales, float("inf"))
    return (STEPS_AN_OCTAVE * share.log2()).floor().clamp(0, 255).to(torch.uint8)


def _scales(codes: Tensor, base: float) -> Tensor:
    table = torch.tensor([base * 2.0 ** (-c / STEPS_AN_OCTAVE) for c in range(256)], dtype=torch.float32)
    return table[codes.long()]
