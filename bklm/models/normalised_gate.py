"""What a mixer of ResNet-BK does to its solution, in few passes: normalise each head, gate each channel.

With y (B, H, N, w) complex, one head's channels at one position y_h, and gates g (B, N, H w):

    r = (mean of Re y_h^2 and Im y_h^2, over 2 w numbers, + eps)^-1/2
    out = [silu(g) r Re y, silu(g) r Im y]    (B, N, 2, H w)

Backward, with o the gradient of out, s = silu(g) and p = o_Re Re y + o_Im Im y per channel:

    dL/ds = r p,    dL/dg = dL/ds silu'(g),    dL/dy = s r o - y r^3 q / 2w,    q = the head's sum of s p
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bklm.bk_core.autograd import in_forward_mode, is_plain
from bklm.bk_core.gradients import materialised
from bklm.models import gate_kernels
from bklm.models.second_derivatives import differentiable_gradients

EPS = 1e-5


def normalised(y: Tensor) -> Tensor:
    """[r Re y, r Im y], (B, N, 2, H w), of y (B, H, N, w); plain torch operations."""
    # Not view_as_real: in torch 2.6 its gradient fails where all of y is one number a row.
    parts = torch.stack([y.real, y.imag], -1)
    parts = parts * torch.rsqrt(parts.square().mean((-2, -1), keepdim=True) + EPS)
    return parts.permute(0, 2, 4, 1, 3).flatten(3)


def gated(features: Tensor, gates: Tensor) -> Tensor:
    """Features (B, N, 2, H w) by silu of gates (B, N, H w)."""
    return features * F.silu(gates).unsqueeze(2)


def normalised_gate(y: Tensor, gates: Tensor) -> Tensor:
    """``gated(normalised(y), gates)``; y and gates of one precision.

    Plain calls take few passes, on a CPU one (``bklm.models.gate_kernels``); transforms, tracers and compilers are given the
    plain operations, and so are derivatives of the gradient.
    """
    if not is_plain(y, gates) or in_forward_mode():
        return gated(normalised(y), gates)
    return _NormalisedGate.apply(y, gates)


class _NormalisedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gates):
        s = F.silu(gates).contiguous()
        ctx.save_for_backward(y, gates, s)
        if _has_kernel(y):
            return gate_kernels.forward(materialised(y), s, EPS)
        sr = _by_head(s, y) * _inverse_size(y)
        return torch.stack([part * sr for part in _parts(y)], 2).flatten(3)

    @staticmethod
    def backward(ctx, o):
        y, gates, s = ctx.saved_tensors
        # This gradient will be differentiated, or comes in batches.
        if torch.is_grad_enabled() or not is_plain(o) or in_forward_mode():
            return _plain_gradients(y, gates, o)
        if _has_kernel(y):
            d_y, d_s = gate_kernels.backward(materialised(y), s, materialised(o), EPS)
        else:
            d_y, d_s = _gradients(y, s, o)
        return d_y, torch.ops.aten.silu_backward(d_s, gates)


def _plain_gradients(y: Tensor, gates: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients as functions of y, the gates and o that may be differentiated again."""
    return tuple(differentiable_gradients(lambda y, gates: gated(normalised(y), gates), (y, gates), o))


def _has_kernel(y: Tensor) -> bool:
    return y.device.type == "cpu"


def _parts(y: Tensor) -> tuple[Tensor, Tensor]:
    """Re y and Im y as (B, N, H, w)."""
    return tuple(part.transpose(1, 2) for part in torch.view_as_real(y).unbind(-1))


def _by_head(s: Tensor, y: Tensor) -> Tensor:
    """s (B, N, H w) as (B, N, H, w)."""
    return s.view(*s.shape[:2], y.shape[1], y.shape[3])


def _inverse_size(y: Tensor) -> Tensor:
    """r (B, N, H, 1)."""
    # Over both parts of a head's channels at once: they lie side by side.
    size = torch.linalg.vector_norm(torch.view_as_real(y).flatten(3), dim=-1)
    return size.square_().mul_(1 / (2 * y.shape[-1])).add_(EPS).rsqrt_().transpose(1, 2).unsqueeze(-1)


def _gradients(y: Tensor, s: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dy and dL/ds (B, N, H w) in torch operations, for other devices than the CPU."""
    batch, heads, length, width = y.shape
    o = o.reshape(batch, length, 2, heads, width)
    parts, r, s = _parts(y), _inverse_size(y), _by_head(s, y)
    p = (o[:, :, 0] * parts[0]).addcmul_(o[:, :, 1], parts[1])
    factor = (p * s).sum(-1, keepdim=True).mul_(r**3).mul_(-1 / (2 * width))
    d_y = torch.empty_like(y, memory_format=torch.contiguous_format)
    for k, d_part in enumerate(_parts(d_y)):
        torch.mul(o[:, :, k], s * r, out=d_part).addcmul_(parts[k], factor)
    return d_y, p.mul_(r).flatten(2)
