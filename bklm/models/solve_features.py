"""What a mixer of ResNet-BK makes of its inputs: solve, normalise each head, gate each channel; on a CPU in one pass.

A row of ``read`` holds a position's values x and gates g (d each), and each head's potential v and bond before its sigmoid,
beta. Per head, b = sigmoid(beta), z = i eta:

    L_n = 1 / (v_n - z - b_n^2 L_{n-1}),    y_n = L_n (x_n - b_n y_{n-1}),    out_n = [silu(g) r Re y, silu(g) r Im y]

with r as in ``normalised_gate``. Backward, from the last position to the first, with G_n what reaches y_n from out_n and from
y_{n+1}, and l_n what reaches L_n:

    p_n = conj(L_n) G_n,    dL/dx_n = Re p_n,    G_{n-1} gets -b_n p_n
    l_n = sum over channels of conj(y_n) G_n / conj(L_n), and -b_{n+1}^2 D_{n+1} of the next,    D_n = -conj(L_n^2) l_n
    dL/dv_n = Re D_n,    dL/deta = -sum of Im D_n
    dL/db_n = -Re sum of conj(y_{n-1}) p_n - 2 b_n Re conj(L_{n-1}) D_n
"""

from __future__ import annotations

import torch
from torch import Tensor

from bklm.bk_core import SolveState, resolvent_solve
from bklm.bk_core.autograd import in_forward_mode, is_plain
from bklm.bk_core.gradients import materialised
from bklm.models import solve_features_kernels as kernels
from bklm.models.normalised_gate import EPS, gated, normalised
from bklm.models.second_derivatives import differentiable_gradients


def is_fused(read: Tensor, log_eta: Tensor) -> bool:
    """Whether ``solve_features`` has kernels for these: plain float32 or float64 on a CPU, in one precision."""
    plain = is_plain(read, log_eta) and not in_forward_mode()
    return plain and read.device.type == "cpu" and read.dtype == log_eta.dtype and read.dtype.itemsize >= 4


def solve_features(read: Tensor, log_eta: Tensor) -> tuple[Tensor, SolveState]:
    """Features (B, N, 2, d) of read (B, N, 2 d + 2 H) and log eta (H,), N at least 1; and the state after the last position.

    The features are differentiable any number of times, the state is not.
    """
    out, y, left = _SolveFeatures.apply(read, log_eta)
    heads = len(log_eta)
    last = y[:, -1].view(len(y), 2, heads, y.shape[-1] // heads)
    return out, SolveState(torch.view_as_complex(left[:, :, -1]), torch.complex(last[:, 0], last[:, 1]))


def plain_features(read: Tensor, log_eta: Tensor) -> Tensor:
    """The same features by the operator and torch's operations."""
    heads = len(log_eta)
    d = read.shape[-1] // 2 - heads
    values, gates, potential, beta = read.split((d, d, heads, heads), -1)
    z = torch.complex(torch.zeros_like(log_eta), log_eta.exp()).expand(len(read), heads)
    bond = torch.sigmoid(beta).transpose(1, 2)[..., 1:]
    values = values.unflatten(-1, (heads, -1)).transpose(1, 2)
    y = resolvent_solve(values, potential.transpose(1, 2), bond, bond, z, causal=True)
    return gated(normalised(y), gates)


class _SolveFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, read, log_eta):
        contiguous, eta = materialised(read), log_eta.exp()
        out, y, left = kernels.forward(contiguous, eta, EPS)
        ctx.save_for_backward(read, log_eta, eta, y, left)
        ctx.mark_non_differentiable(y, left)
        ctx.set_materialize_grads(False)  # not for y and left, which have none
        return out, y, left

    @staticmethod
    def backward(ctx, o, _y, _left):
        if o is None:
            return None, None
        read, log_eta, eta, y, left = ctx.saved_tensors
        # This gradient will be differentiated, or comes in batches.
        if torch.is_grad_enabled() or not is_plain(o) or in_forward_mode():
            return _plain_gradients(read, log_eta, o)
        d_read, d_eta = kernels.backward(materialised(read), y, left, materialised(o), EPS)
        return d_read, d_eta.sum(0) * eta


def _plain_gradients(read: Tensor, log_eta: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients as functions of read, log eta and o that may be differentiated again."""
    return tuple(differentiable_gradients(plain_features, (read, log_eta), o))
