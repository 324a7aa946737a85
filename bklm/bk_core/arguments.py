"""Checks of a, b, c and z, and their form as rows: one precision, one device, flat batches."""

from __future__ import annotations

import functools
import math
import numbers

import torch
from torch import Tensor

from bklm.bk_core import autograd, pivots
from bklm.bk_core.gradients import materialised

_SINGLE = (torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64)
_DOUBLE = (torch.float64, torch.complex128)
_SMALLEST_SINGLE = torch.finfo(torch.float32).tiny


def real_number(name: str, value: object) -> float:
    """The value as a float, numpy's scalars included; TypeError for anything else."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}={value!r}: a real number is needed, got {type(value).__name__}.")
    return float(value)


def as_number(name: str, value: object) -> float | complex:
    """Python's own number for numpy's and others' scalars; TypeError for anything else."""
    if type(value) in (float, complex):  # at once: asking the abstract classes below takes longer
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Complex):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}.")
    try:
        return float(value) if isinstance(value, numbers.Real) else complex(value)
    except OverflowError as error:
        raise ValueError(f"{name} is beyond the range of 64 bits: give a number that they hold.") from error


def precision_of(values: dict[str, Tensor | complex]) -> torch.dtype:
    """float32 or float64: the widest of the tensors. Numbers follow. The first one is a tensor and gives the device."""
    found = torch.float32
    reference = next(iter(values))
    device = values[reference].device
    for name, x in values.items():
        if isinstance(x, Tensor):
            if x.layout != torch.strided:
                raise TypeError(
                    f"{name} has layout {x.layout}: a dense tensor is needed, for instance {name}.to_dense()."
                )
            if x.dtype in _DOUBLE:
                found = torch.float64
            elif x.dtype not in _SINGLE:
                raise TypeError(
                    f"{name} has dtype {x.dtype}: real or complex floating point is needed, for instance {name}.float()."
                )
            if x.device != device:
                raise ValueError(
                    f"{name} is on {x.device} and {reference} on {device}: move all inputs to one device."
                )
    return found


def as_precision(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """The real or complex type of that precision, real or complex as ``dtype`` is."""
    if not dtype.is_complex:
        return precision
    return torch.complex128 if precision == torch.float64 else torch.complex64


def as_rows(x: Tensor, shape: tuple[int, ...], rows: tuple[int, ...]) -> Tensor:
    """``x`` broadcast to ``shape``, then reshaped to ``rows``; itself where it is so: every view is a node of autograd's."""
    if x.shape != shape:
        x = x.expand(shape)
    return x if x.shape == rows else x.reshape(rows)


def widened(values: tuple[Tensor | complex, ...]) -> list[Tensor | complex]:
    """The tensors in 64 bits; numbers as they are."""
    return [x.to(as_precision(x.dtype, torch.float64)) if isinstance(x, Tensor) else x for x in values]


def check_broadcast(name: str, x: Tensor, shape: tuple[int, ...], wanted: str) -> None:
    """ValueError where ``x`` does not broadcast to ``shape``, or would change it."""
    fits = x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must broadcast to {wanted}.")


def coupling(
    b: Tensor | complex, c: Tensor | complex, shape: tuple[int, ...], like: Tensor, owner: str
) -> tuple[Tensor, bool]:
    """k = b c as (1 or M, N - 1), and whether k >= 0 is known without looking at the values.

    Args:
        shape: (..., N) of the rows, the batch flattened to M.
        like: has the device and the precision of the computation.
        owner: whose shape asks for it, for the message: "a of shape (2, 4)".
    """
    wanted = (*shape[:-1], shape[-1] - 1)
    for name, x in (("b", b), ("c", c)):
        if isinstance(x, Tensor):
            check_broadcast(name, x, wanted, f"(..., N - 1) = {wanted} for {owner}")
    if not isinstance(b, Tensor) and not isinstance(c, Tensor):
        product = b * c
        known = not isinstance(product, complex) and product >= 0
        return between_rows(product, wanted, like), known
    known = b is c and not b.is_complex()
    precision = like.real.dtype
    if isinstance(b, Tensor):
        b = b.to(as_precision(b.dtype, precision))
    if isinstance(c, Tensor):
        c = c.to(as_precision(c.dtype, precision))
    return between_rows(b * c, wanted, like), known


def between_rows(x: Tensor | complex, wanted: tuple[int, ...], like: Tensor) -> Tensor:
    """A number or a tensor that broadcasts to ``wanted`` (..., N - 1) as (M, N - 1), or (1, N - 1) where rows share it.

    In the precision and on the device of ``like``.
    """
    if not isinstance(x, Tensor):
        dtype = as_precision(torch.complex64 if isinstance(x, complex) else torch.float32, like.real.dtype)
        return constant(_in_range(x, torch.finfo(dtype).max), (1, wanted[-1]), dtype, like.device)
    x = x.to(as_precision(x.dtype, like.real.dtype))
    if x.dim() <= 1 or math.prod(x.shape[:-1]) == 1:
        return materialised(x.reshape(1, -1).expand(1, wanted[-1]))
    return materialised(as_rows(x, wanted, (math.prod(wanted[:-1]), wanted[-1])))


def _in_range(x: complex, most: float) -> complex:
    """A number as its precision holds it, infinite beyond: torch refuses one that does not fit, and makes it of a tensor's."""

    def part(value: float) -> float:
        return math.copysign(math.inf, value) if abs(value) > most else value

    return complex(part(x.real), part(x.imag)) if isinstance(x, complex) else part(x)


def shift(
    z: Tensor | complex,
    batch: tuple[int, ...],
    device: torch.device,
    precision: torch.dtype,
    owner: tuple[str, str],
) -> tuple[Tensor, bool]:
    """z as (M,) complex, and whether 32 bits suffice for it (pivots.fits_32_bits; a traced tensor is not asked).

    ``owner``: a name and a phrase for messages, whose batch it is: ("a", "a of shape (2, 4)").
    """
    m = math.prod(batch)
    if not isinstance(z, Tensor):
        z = _number_shift(z, precision)
        return constant(z, (m,), as_precision(torch.complex64, precision), device), pivots.fits_32_bits(z)
    if z.layout != torch.strided:
        raise TypeError(f"z has layout {z.layout}: a dense tensor is needed, for instance z.to_dense().")
    if z.dtype not in _SINGLE + _DOUBLE:
        raise TypeError(f"z has dtype {z.dtype}: a complex tensor or number is needed, for instance 1j.")
    if z.device != device:
        raise ValueError(f"z is on {z.device} and {owner[0]} on {device}: move all inputs to one device.")
    check_broadcast("z", z, batch, f"(...) = {batch} for {owner[1]}")
    z = z.to(as_precision(torch.complex64, precision))
    rows = materialised(as_rows(z, batch, (m,)))
    return rows, pivots.check_shift(rows.detach()) if autograd.is_plain(rows) else True


def _number_shift(z: complex, precision: torch.dtype) -> complex:
    """A number as a shift, refused where it is none."""
    z = complex(as_number("z", z))
    if not (math.isfinite(z.real) and math.isfinite(z.imag)) or z.imag == 0:
        raise ValueError(
            f"z = {z}: it must be finite with Im z != 0, because the resolvent has its poles on the real axis; "
            f"add an imaginary part, for instance z + 1j."
        )
    if abs(z.imag) < _SMALLEST_SINGLE and precision == torch.float32:
        raise ValueError(f"z = {z}: Im z vanishes in 32 bits; use 64-bit inputs or a larger |Im z|.")
    if math.hypot(z.real, z.imag) > 1 / _SMALLEST_SINGLE and precision == torch.float32:
        raise ValueError(f"z = {z}: 1 / |z| vanishes in 32 bits; use 64-bit inputs or a smaller |z|.")
    return z


def constant(value: complex, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one value; the same one again in plain eager calls, so nobody may write to it."""
    # What is made while a CUDA graph is captured lives in that graph's memory.
    if autograd.is_plain() and not pivots.is_capturing(device):
        return _cached_constant(value, shape, dtype, device)
    return torch.full(shape, value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=32)
def _cached_constant(
    value: complex, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later training step
        return torch.full(shape, value, dtype=dtype, device=device)
