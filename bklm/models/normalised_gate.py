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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-5


def normalised(y: Tensor) -> Tensor:
    """[r Re y, r Im y], (B, N, 2, H w), of y (B, H, N, w); plain torch operations."""
    parts = torch.view_as_real(y)
    parts = parts * torch.rsqrt(parts.square().mean((-2, -1), keepdim=True) + EPS)
    return parts.permute(0, 2, 4, 1, 3).flatten(3)


def gated(features: Tensor, gates: Tensor) -> Tensor:
    """Features (B, N, 2, H w) by silu of gates (B, N, H w)."""
    return features * F.silu(gates).unsqueeze(2)


def normalised_gate(y: Tensor, gates: Tensor) -> Tensor:
    """``gated(normalised(y), gates)``, differentiable once; y and gates of one precision."""
    return _NormalisedGate.apply(y, gates)


def _parts(y: Tensor) -> tuple[Tensor, Tensor]:
    """Re y and Im y as (B, N, H, w)."""
    return tuple(part.transpose(1, 2) for part in torch.view_as_real(y).unbind(-1))


class _NormalisedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gates):
        batch, heads, length, width = y.shape
        # Over both parts of a head's channels at once: they lie side by side.
        size = torch.linalg.vector_norm(torch.view_as_real(y).flatten(3), dim=-1)
        r = size.square_().mul_(1 / (2 * width)).add_(EPS).rsqrt_().transpose(1, 2).unsqueeze(-1)
        s = F.silu(gates).view(batch, length, heads, width)
        sr = s * r
        out = sr.new_empty(batch, length, 2, heads, width)
        for k, part in enumerate(_parts(y)):
            torch.mul(part, sr, out=out[:, :, k])
        ctx.save_for_backward(y, gates, r, s, sr)
        return out.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx, o):
        y, gates, r, s, sr = ctx.saved_tensors
        batch, heads, length, width = y.shape
        o = o.reshape(batch, length, 2, heads, width)
        parts = _parts(y)
        p = (o[:, :, 0] * parts[0]).addcmul_(o[:, :, 1], parts[1])
        factor = (p * s).sum(-1, keepdim=True).mul_(r**3).mul_(-1 / (2 * width))
        d_gates = torch.ops.aten.silu_backward(p.mul_(r).flatten(2), gates)
        d_y = torch.empty_like(y, memory_format=torch.contiguous_format)
        for k, d_part in enumerate(_parts(d_y)):
            torch.mul(o[:, :, k], sr, out=d_part).addcmul_(parts[k], factor)
        return d_y, d_gates
