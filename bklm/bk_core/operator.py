"""``resolvent_diagonal``: the diagonal of ``(T - z I)^-1`` for a tridiagonal T, differentiable, O(N).

T has diagonal ``a_i`` (i = 0..N-1), super-diagonal ``b_i`` and sub-diagonal ``c_i``; write ``d_i = a_i - z`` and
``k_i = b_i c_i`` (only the products enter the diagonal).

    left   L_i = 1 / (d_i - k_{i-1} L_{i-1})        right   R_i = 1 / (d_i - k_i R_{i+1})
    G_i = 1 / (d_i - k_{i-1} L_{i-1} - k_i R_{i+1})   bidirectional: sees every position
    G_i = L_i                                         causal: sees positions <= i only

Backward, from ``dG_ii/dd_j = -G_ij G_ji`` and the factorisation of the off-diagonal entries into L and R. With
``gbar = dL/dRe G + i dL/dIm G`` and ``P_i = conj(gbar_i) G_i^2``:

    bidirectional                                       causal
    s_i = P_i + k_i L_i^2 s_{i+1}                        m_i = conj(gbar_i) + k_i L_{i+1}^2 m_{i+1}
    t_i = P_i + k_{i-1} R_i^2 t_{i-1}                    D_i = -L_i^2 m_i
    D_i = P_i - s_i - t_i                                K_i = L_i L_{i+1}^2 m_{i+1}
    K_i = L_i s_{i+1} + R_{i+1} t_i

    dL/da = Re D,  dL/db = Re(c K),  dL/dc = Re(b K),  dL/dz = -conj(sum D);  conjugates for complex a, b, c.

For real ``a`` and ``k >= 0`` everything is bounded by ``1 / |Im z|`` and errors do not build up: no length overflows.
"""

from __future__ import annotations

import functools
import math
import numbers

import torch
from torch import Tensor

from . import autograd, pivots
from .gradients import materialised

GRADIENTS = ("exact", "local", "original")

_SINGLE = (torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64)
_DOUBLE = (torch.float64, torch.complex128)
_SMALLEST_SINGLE = torch.finfo(torch.float32).tiny


def resolvent_diagonal(
    a: Tensor,
    b: Tensor | complex,
    c: Tensor | complex,
    z: Tensor | complex,
    *,
    causal: bool = False,
    gradient: str = "exact",
    grad_blend: float = 0.0,
    backend: str = "auto",
    return_min_pivot: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``diag((T - z I)^-1)`` (..., N), complex64 for inputs of 32 bits or fewer, complex128 for 64-bit ones.

    Args:
        a: diagonal of T, (..., N), N >= 1, real or complex floating point.
        b: super-diagonal, a number or a tensor that broadcasts to (..., N - 1); never changes the shape of ``a``.
        c: sub-diagonal, likewise. ``b != c`` and negative or complex ``b c`` are allowed.
        z: shift, a number or a tensor that broadcasts to (...), finite, ``Im z != 0``. Takes the precision of a, b, c.
        causal: entry i depends on positions 0..i only, bit for bit (the last diagonal entry of each leading block).
        gradient: what ``a`` receives. "exact"; "local", the term of the same position only, ``-Re(conj(gbar) G^2)``;
            "original", the published formula (no conjugate, clamped to +-1000; see reference.original_gradient).
            b, c and z have a gradient with "exact" only.
        grad_blend: alpha in [0, 1]; ``(1 - alpha) * gradient + alpha * hypothesis-7`` for ``a``
            (reference.hypothesis7_gradient); b, c and z keep their exact gradient.
        backend: "auto", or one of :func:`available_backends`.
        return_min_pivot: also return the smallest |pivot| of every row, (...), real, without gradient, 0 where the
            recursion broke down; no error is raised for small pivots then.

    NaN and infinite entries of a, b or c are not refused and not hidden: every output that depends on a NaN is NaN, one
    that depends on an infinity is NaN or its limit (which of them depends on the backend).
    16-bit inputs are computed in 32 bits, also under autocast. Where values cannot be asked for (under torch.func,
    on device "meta", while a CUDA graph is captured) they are not checked. A compiled function that builds z from a
    number that changes should build a tensor: torch.compile cannot trace ``complex`` of such a number.

    Range. With 32-bit inputs, a shift beyond 2^40 (about 1e12), or nearer to the real axis than 2^-40, is computed and
    differentiated in 64 bits (a tensor z that is traced or mapped over is not: its values cannot be asked for). Apart
    from that the numbers must fit the precision of the computation: the result and its derivatives, the products
    ``b c`` (where one overflows, dependent outputs are NaN; one that underflows counts as 0, and so do factors ``b c L^2``
    and ``b c R^2`` of a gradient) and, for the gradients of b and c, dL/d(b c), a term of the third power of the result:
    infinite or 0 where pivots leave 2^-40 ... 2^40 (2^-340 ... 2^340 in 64 bits). Backends "cpu" and "reference" need no
    more. "triton" gives NaN where a modulus of a pivot leaves 2^-63 ... 2^63 (2^-511 ... 2^511), because it squares them;
    "torch" computes 32-bit inputs in 64 bits, and needs 64-bit ones not to have all moduli beyond 2^340, or below 2^-340:
    digits are lost there, or the result is NaN.

    Raises:
        TypeError: not tensors or numbers, integer or boolean tensors.
        ValueError: wrong shapes, mixed devices, N = 0, Im z = 0, unknown gradient, grad_blend outside [0, 1],
            b, c or z requiring a gradient with gradient="local" or "original".
        SmallPivotError (a ValueError): negative or complex b c, or complex a, for which a pivot is lost in rounding.
        BackendUnavailableError (an OSError): the named backend does not run here.
    """
    check_options(gradient, grad_blend)
    if not isinstance(b, Tensor):
        b = _as_number("b", b)
    if not isinstance(c, Tensor):
        c = _as_number("c", c)
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a torch tensor (..., N), got {type(a).__name__}.")
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ValueError(
            f"a has shape {tuple(a.shape)}: at least one position is needed, (..., N) with N >= 1."
        )
    batch, n = a.shape[:-1], a.shape[-1]
    precision = _precision(a, b, c)
    m = math.prod(batch)

    moderate = True
    if isinstance(z, Tensor):
        rows_z = _shift_rows(z, a, m, precision)
        if autograd.is_plain(rows_z):
            moderate = pivots.check_shift(rows_z.detach())
    else:
        z = _number_shift(z, precision)
        moderate = pivots.is_moderate(z)
        rows_z = _constant(z, (m,), _as_precision(torch.complex64, precision), a.device)
    if precision == torch.float32 and not moderate:
        options = {"causal": causal, "gradient": gradient, "grad_blend": grad_blend, "backend": backend}
        return _in_64_bits(a, b, c, z, return_min_pivot=return_min_pivot, **options)
    k, contracts = _coupling(b, c, a, precision)
    if gradient != "exact" and torch.is_grad_enabled() and (k.requires_grad or rows_z.requires_grad):
        raise ValueError(
            f"gradient={gradient!r} is defined for a alone, and b, c or z requires a gradient: detach them, or "
            f"use gradient='exact'."
        )
    rows_a = a if a.dtype == precision else a.to(_as_precision(a.dtype, precision))
    if gradient == "original" and rows_a.is_complex():
        raise ValueError("gradient='original' is defined for a real a only: use 'exact' or 'local'.")
    contracts = contracts and not rows_a.is_complex()
    if m == 0:
        # nothing to compute, but gradients of the right shape for everything that wants one
        empty = (rows_a.reshape(m, n) + k.sum(-1, keepdim=True) + rows_z[:, None]).reshape(a.shape)
        return (empty, empty.detach().real.new_empty(batch)) if return_min_pivot else empty
    rows_a = materialised(rows_a if rows_a.dim() == 2 else rows_a.reshape(m, n))

    if return_min_pivot:
        contracts = True  # nothing to raise: the caller judges
    G = autograd.apply(rows_a, k, rows_z, causal, gradient, float(grad_blend), backend, contracts)
    if not return_min_pivot:
        return G if a.dim() == 2 else G.reshape(a.shape)

    def sweep(a: Tensor, k: Tensor, z: Tensor) -> Tensor:
        return autograd.apply(materialised(a), materialised(k), z, True, "exact", 0.0, backend, True)

    rows = rows_a.detach(), k.detach(), rows_z.detach(), G.detach()
    pivot = pivots.smallest_pivot(*rows, causal, sweep)
    return G.reshape(a.shape), pivot.reshape(batch)


def _in_64_bits(a: Tensor, b: Tensor | complex, c: Tensor | complex, z: Tensor | complex, **options):
    """As :func:`resolvent_diagonal`, computed and differentiated in 64 bits, returned in 32."""
    wide = [x.to(_as_precision(x.dtype, torch.float64)) if isinstance(x, Tensor) else x for x in (a, b, c, z)]
    result = resolvent_diagonal(*wide, **options)
    if not options["return_min_pivot"]:
        return result.to(torch.complex64)
    return result[0].to(torch.complex64), result[1].to(torch.float32)


def check_options(gradient: str, grad_blend: float) -> None:
    """Refuse an unknown direction or a blend outside [0, 1]."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown: use one of {list(GRADIENTS)}.")
    if not 0.0 <= real_number("grad_blend", grad_blend) <= 1.0:
        raise ValueError(
            f"grad_blend={grad_blend} is outside [0, 1]: 0 is the pure theory gradient, 1 pure hypothesis-7."
        )


def real_number(name: str, value: object) -> float:
    """The value as a float, numpy's scalars included; TypeError for anything else."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}={value!r}: a real number is needed, got {type(value).__name__}.")
    return float(value)


def _as_number(name: str, value: object) -> float | complex:
    """Python's own number for numpy's and others' scalars; TypeError for anything else."""
    if type(value) in (float, complex):  # at once: asking the abstract classes below takes longer
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Complex):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}.")
    return float(value) if isinstance(value, numbers.Real) else complex(value)


def _precision(*values: Tensor | complex) -> torch.dtype:
    """float32 or float64: the widest of the tensors. Numbers follow."""
    found = torch.float32
    for name, x in zip("abc", values, strict=True):
        if isinstance(x, Tensor):
            if x.dtype in _DOUBLE:
                found = torch.float64
            elif x.dtype not in _SINGLE:
                raise TypeError(
                    f"{name} has dtype {x.dtype}: real or complex floating point is needed, for instance {name}.float()."
                )
            if x.device != values[0].device:
                raise ValueError(
                    f"{name} is on {x.device} and a on {values[0].device}: move all inputs to one device."
                )
    return found


def _as_precision(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """The real or complex type of that precision, real or complex as ``dtype`` is."""
    if not dtype.is_complex:
        return precision
    return torch.complex128 if precision == torch.float64 else torch.complex64


def _coupling(
    b: Tensor | complex, c: Tensor | complex, a: Tensor, precision: torch.dtype
) -> tuple[Tensor, bool]:
    """k = b c as (1 or M, N - 1), and whether k >= 0 is known without looking at the values."""
    batch, n = a.shape[:-1], a.shape[-1]
    for name, x in (("b", b), ("c", c)):
        if isinstance(x, Tensor):
            _check_broadcast(
                name, x, (*batch, n - 1), f"(..., N - 1) = {(*batch, n - 1)} for a of shape {tuple(a.shape)}"
            )
    if not isinstance(b, Tensor) and not isinstance(c, Tensor):
        product = b * c
        known = not isinstance(product, complex) and product >= 0
        return _constant_coupling(product, n - 1, precision, a.device), known
    known = b is c and not b.is_complex()
    if isinstance(b, Tensor):
        b = b.to(_as_precision(b.dtype, precision))
    if isinstance(c, Tensor):
        c = c.to(_as_precision(c.dtype, precision))
    k = b * c
    if k.dim() <= 1 or math.prod(k.shape[:-1]) == 1:
        return materialised(k.reshape(1, -1).expand(1, n - 1)), known
    return materialised(k.expand(*batch, n - 1).reshape(math.prod(batch), n - 1)), known


def _check_broadcast(name: str, x: Tensor, shape: tuple[int, ...], wanted: str) -> None:
    fits = x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must broadcast to {wanted}.")


def _shift_rows(z: Tensor, a: Tensor, m: int, precision: torch.dtype) -> Tensor:
    """A tensor shift as (M,) complex."""
    if z.dtype not in _SINGLE + _DOUBLE:
        raise TypeError(f"z has dtype {z.dtype}: a complex tensor or number is needed, for instance 1j.")
    if z.device != a.device:
        raise ValueError(f"z is on {z.device} and a on {a.device}: move all inputs to one device.")
    _check_broadcast(
        "z", z, tuple(a.shape[:-1]), f"(...) = {tuple(a.shape[:-1])} for a of shape {tuple(a.shape)}"
    )
    z = z.to(_as_precision(torch.complex64, precision))
    return materialised(z.expand(a.shape[:-1]).reshape(m))


def _number_shift(z: complex, precision: torch.dtype) -> complex:
    """A number as a shift, refused where it is none."""
    z = complex(_as_number("z", z))
    if not (math.isfinite(z.real) and math.isfinite(z.imag)) or z.imag == 0:
        raise ValueError(
            f"z = {z}: it must be finite with Im z != 0, because the resolvent has its poles on the real axis; "
            f"add an imaginary part, for instance z + 1j."
        )
    if abs(z.imag) < _SMALLEST_SINGLE and precision == torch.float32:
        raise ValueError(f"z = {z}: Im z vanishes in 32 bits; use 64-bit inputs or a larger |Im z|.")
    if abs(z) > 1 / _SMALLEST_SINGLE and precision == torch.float32:
        raise ValueError(f"z = {z}: 1 / |z| vanishes in 32 bits; use 64-bit inputs or a smaller |z|.")
    return z


def _constant_coupling(product: complex, length: int, precision: torch.dtype, device: torch.device) -> Tensor:
    dtype = _as_precision(torch.complex64 if isinstance(product, complex) else torch.float32, precision)
    return _constant(product, (1, length), dtype, device)


def _constant(value: complex, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
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
