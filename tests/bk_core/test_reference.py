"""The reference forms agree with each other, and theta/phi overflows where it is said to."""

import pytest
import torch

from bklm.bk_core import reference


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_three_forms_of_the_diagonal_agree(n):
    a = torch.randn(2, n, dtype=torch.float64)
    b, c = torch.randn(2, 2, n - 1, dtype=torch.float64).abs().unbind()
    dense = reference.dense(a, b, c, 0.4 + 1j)
    torch.testing.assert_close(reference.theta_phi(a, b, c, 0.4 + 1j), dense)
    torch.testing.assert_close(reference.left_right(a, b, c, 0.4 + 1j), dense)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_causal_form_is_the_last_entry_of_each_leading_block(n):
    a = torch.randn(3, n, dtype=torch.float64)
    b, c = torch.rand(2, n - 1, dtype=torch.float64).unbind()
    z = torch.tensor([1j, 2j, 1 - 1j])
    causal = reference.left_right(a, b, c, z, causal=True)
    torch.testing.assert_close(causal, reference.dense_causal(a, b, c, z))
    torch.testing.assert_close(causal[..., -1], reference.dense(a, b, c, z)[..., -1])


@pytest.mark.parametrize(
    ("dtype", "fine", "overflown"), [(torch.complex64, 50, 130), (torch.complex128, 400, 1100)]
)
def test_theta_phi_overflows_and_left_right_does_not(dtype, fine, overflown):
    for n, finite in ((fine, True), (overflown, False)):
        a = torch.full((n,), -2.0, dtype=torch.float64) + torch.sin(torch.arange(n))
        k = torch.ones(n - 1, dtype=torch.float64)
        products = reference.theta_phi(a, k, k, 1j, dtype)
        assert bool(torch.isfinite(torch.view_as_real(products)).all()) is finite
        assert torch.isfinite(torch.view_as_real(reference.left_right(a, k, k, 1j))).all()


def test_exact_gradient_equals_the_one_through_dense_inversion():
    a = torch.randn(2, 12, dtype=torch.float64)
    k, gbar = torch.rand(11, dtype=torch.float64), torch.randn(2, 12, dtype=torch.complex128)
    for causal in (False, True):
        leaf = a.clone().requires_grad_()
        G = (reference.dense_causal if causal else reference.dense)(leaf, k, k, 0.5j)
        expected = torch.autograd.grad(G, leaf, gbar)[0]
        torch.testing.assert_close(reference.exact_gradient(gbar, a, k, k, 0.5j, causal), expected)
