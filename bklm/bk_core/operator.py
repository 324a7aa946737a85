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

import torch
from torch import Tensor

from bklm.bk_core import autograd, backends, pivots
from bklm.bk_core.arguments import as_number, as_precision, coupling, precision_of, real_number, shift, widened
from bklm.bk_core.gradients import materialised

GRADIENTS = ("exact", "local", "original")


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
            (reference.hypothesis7_gradient); b, c and z keep their exact gradient. Like ``gradient`` it shapes the backward
            alone: forward mode gives the exact tangent whatever they are.
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
        TypeError: not tensors or numbers, integer, boolean or sparse tensors, causal neither True nor False.
        ValueError: wrong shapes, mixed devices, N = 0, Im z = 0, unknown gradient, grad_blend outside [0, 1],
            b, c or z requiring a gradient with gradient="local" or "original".
        SmallPivotError (a ValueError): negative or complex b c, or complex a, for which a pivot is lost in rounding.
        BackendUnavailableError (an OSError): the named backend does not run here.
    """
    simple = type(b) is type(c) is type(grad_blend) is float and type(z) is complex and type(gradient) is str
    simple = simple and type(causal) is bool and isinstance(a, Tensor) and a.layout is torch.strided
    if simple and a.is_cpu and not return_min_pivot and autograd.is_plain(a):
        # What every layer asks for: all but the values of ``a`` is known from an earlier call.
        known = _known(b, c, z, a.shape, a.dtype, causal, gradient, grad_blend, backend)
        if known is not None:
            if a.dim() == 2:
                return autograd.known(materialised(a), known)
            rows = materialised(a.reshape(known[1].shape[0], a.shape[-1]))
            return autograd.known(rows, known).reshape(a.shape)
    check_options(causal, gradient, grad_blend)
    if not isinstance(b, Tensor):
        b = as_number("b", b)
    if not isinstance(c, Tensor):
        c = as_number("c", c)
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a torch tensor (..., N), got {type(a).__name__}.")
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ValueError(
            f"a has shape {tuple(a.shape)}: at least one position is needed, (..., N) with N >= 1."
        )
    batch, n = a.shape[:-1], a.shape[-1]
    precision = precision_of({"a": a, "b": b, "c": c})
    m = math.prod(batch)
    owner = f"a of shape {tuple(a.shape)}"
    rows_z, fits_32_bits = shift(z, tuple(batch), a.device, precision, ("a", owner))
    if precision == torch.float32 and not fits_32_bits:
        options = {"causal": causal, "gradient": gradient, "grad_blend": grad_blend, "backend": backend}
        return _in_64_bits(a, b, c, z, return_min_pivot=return_min_pivot, **options)
    rows_a = a if a.dtype == precision else a.to(as_precision(a.dtype, precision))
    k, bounded = coupling(b, c, tuple(a.shape), rows_a, owner)
    if gradient != "exact" and torch.is_grad_enabled() and (k.requires_grad or rows_z.requires_grad):
        raise ValueError(
            f"gradient={gradient!r} is defined for a alone, and b, c or z requires a gradient: detach them, or "
            f"use gradient='exact'."
        )
    if gradient == "original" and rows_a.is_complex():
        raise ValueError("gradient='original' is defined for a real a only: use 'exact' or 'local'.")
    bounded = bounded and not rows_a.is_complex()
    if m == 0:
        # nothing to compute, but gradients of the right shape for everything that wants one
        empty = (rows_a.reshape(m, n) + k.sum(-1, keepdim=True) + rows_z[:, None]).reshape(a.shape)
        return (empty, empty.detach().real.new_empty(batch)) if return_min_pivot else empty
    rows_a = materialised(rows_a if rows_a.dim() == 2 else rows_a.reshape(m, n))

    if return_min_pivot:
        bounded = True  # nothing to raise: the caller judges
    G = autograd.apply(rows_a, k, rows_z, causal, gradient, float(grad_blend), backend, bounded)
    if not return_min_pivot:
        return G if a.dim() == 2 else G.reshape(a.shape)

    def sweep(a: Tensor, k: Tensor, z: Tensor) -> Tensor:
        return autograd.apply(materialised(a), materialised(k), z, True, "exact", 0.0, backend, True)

    rows = rows_a.detach(), k.detach(), rows_z.detach(), G.detach()
    pivot = pivots.smallest_pivot(*rows, causal, sweep)
    return G.reshape(a.shape), pivot.reshape(batch)


@functools.lru_cache(maxsize=32)
def _known(
    b: float,
    c: float,
    z: complex,
    shape: torch.Size,
    dtype: torch.dtype,
    causal: bool,
    gradient: str,
    grad_blend: float,
    backend: str,
) -> autograd.Known | None:
    """What a plain eager call on the CPU with numbers b, c and z needs beside a; None where it is not that simple.

    Nothing of it may be written to: the next call gets the same tensors.
    """
    if dtype not in (torch.float32, torch.float64) or not shape or not math.prod(shape):
        return None
    check_options(causal, gradient, grad_blend)
    owner = f"a of shape {tuple(shape)}"
    rows_z, fits_32_bits = shift(z, tuple(shape[:-1]), torch.device("cpu"), dtype, ("a", owner))
    if dtype == torch.float32 and not fits_32_bits:
        return None
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later training step
        k, bounded = coupling(b, c, tuple(shape), torch.empty(0, dtype=dtype, device="cpu"), owner)
    # Pivots to check, or another direction to take, is more than one backend does.
    whole = bounded and gradient == "exact" and grad_blend == 0
    chosen = backends.select(backend, torch.device("cpu")) if whole else None
    return k, rows_z, (causal, gradient, float(grad_blend), backend, bounded), chosen


def _in_64_bits(a: Tensor, b: Tensor | complex, c: Tensor | complex, z: Tensor | complex, **options):
    """As :func:`resolvent_diagonal`, computed and differentiated in 64 bits, returned in 32."""
    result = resolvent_diagonal(*widened((a, b, c, z)), **options)
    if not options["return_min_pivot"]:
        return result.to(torch.complex64)
    return result[0].to(torch.complex64), result[1].to(torch.float32)


def check_options(causal: bool, gradient: str, grad_blend: float) -> None:
    """Refuse what is no truth value, an unknown direction and a blend outside [0, 1]."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal={causal!r}: True or False is needed, got {type(causal).__name__}.")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown: use one of {list(GRADIENTS)}.")
    if not 0.0 <= real_number("grad_blend", grad_blend) <= 1.0:
        raise ValueError(
            f"grad_blend={grad_blend} is outside [0, 1]: 0 is the pure theory gradient, 1 pure hypothesis-7."
        )
