"""The Ward identity, Im G_ii = Im z sum_j |G_ij|^2: of the dense inverse, and of every backend at hard values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.bk_core import resolvent_diagonal
from bklm.bk_core import ward as module
from bklm.bk_core.ward import ward_residual

BACKENDS = ["reference", "torch", "cpu"]


def dense(a, bonds, z):
    """G (N, N) of one row a, in complex128."""
    bonds = bonds.expand(len(a) - 1)
    matrix = torch.diag(a) + torch.diag(bonds, 1) + torch.diag(bonds, -1)
    return torch.linalg.inv(matrix.to(torch.complex128) - z * torch.eye(len(a), dtype=torch.complex128))


def drawn(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dtype=torch.float64, generator=g), torch.rand(n - 1, dtype=torch.float64, generator=g)


@given(seed=st.integers(0, 2**20), n=st.integers(1, 40), eta=st.floats(0.01, 5), energy=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_the_diagonal_obeys_it_with_the_dense_inverses_rows(seed, n, eta, energy):
    a, bonds = drawn(n, seed)
    z = complex(energy, eta)
    G = resolvent_diagonal(a, bonds, bonds, z)
    want = eta * dense(a, bonds, z).abs().square().sum(-1)
    torch.testing.assert_close(G.imag, want, rtol=1e-10, atol=0)
    L = resolvent_diagonal(a, bonds, bonds, z, causal=True)
    last = [dense(a[: i + 1], bonds[:i], z)[-1] for i in range(n)]
    want = torch.stack([eta * row.abs().square().sum() for row in last])
    torch.testing.assert_close(L.imag, want, rtol=1e-10, atol=0)


HARD = {
    "weakly damped": lambda a, b: (a, b, 0.2 + 1e-3j),
    "strongly damped": lambda a, b: (a, b, 1e3j),
    "below the axis": lambda a, b: (a, b, 0.5 - 0.3j),
    "all alike, in the band": lambda a, b: (a * 0, b * 0 + 1, 0.02j),
    "large potentials": lambda a, b: (1e4 * a, b, 1j),
    "closed bonds": lambda a, b: (a, b * (b > 0.5), 0.1j),
    "negative bonds": lambda a, b: (a, b - 0.5, 0.1j),
    "one wall": lambda a, b: (a + 1e6 * (torch.arange(len(a)) == len(a) // 2), b, 0.1j),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", HARD)
def test_every_backend_obeys_it_at_hard_values(case, backend, causal):
    for n in (1, 2, 33, 130):
        a, bonds, z = HARD[case](*drawn(n, n))
        residual = ward_residual(a, bonds, z, causal=causal, backend=backend)
        scale = resolvent_diagonal(a, bonds, bonds, z, causal=causal).imag.abs()
        # The largest: beside it a small one is rounded as it is. Rounding grows with 1 / eta.
        assert (residual.abs() / scale.max()).max() < 1e-13 * (10 + 10 / abs(z.imag)), n


def test_it_tells_a_wrong_operator_from_a_right_one(monkeypatch):
    a, bonds = drawn(20)
    assert ward_residual(a, bonds, 0.3j).abs().max() < 1e-13
    for wrong in (
        lambda a, b, c, z, **more: resolvent_diagonal(a, b, c, 1.01 * z, **more),
        lambda a, b, c, z, **more: resolvent_diagonal(a, 1.01 * b, c, z, **more),
        lambda a, b, c, z, **more: resolvent_diagonal(a.flip(-1), b, c, z, **more),
    ):
        monkeypatch.setattr(module, "resolvent_diagonal", wrong)
        assert ward_residual(a, bonds, 0.3j).abs().max() > 1e-4


def test_complex_entries_are_refused_for_they_obey_no_such_law():
    with pytest.raises(ValueError, match=r"^ward_residual: got complex entries; .*: give real a and bonds\.$"):
        ward_residual(torch.ones(3, dtype=torch.complex128), 1.0, 1j)


def test_rows_with_shifts_of_their_own_have_the_residuals_that_they_have_alone_and_complex_bonds_are_refused():
    torch.manual_seed(0)
    a, z = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.3 + 1j, -0.2 + 0.5j, 0.1 - 2j])
    found = ward_residual(a, 1.0, z)
    assert found.shape == (3, 5)
    assert found.abs().max() < 1e-12
    for row, shift, residual in zip(a, z.tolist(), found, strict=True):
        torch.testing.assert_close(ward_residual(row, 1.0, shift), residual, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="got complex entries"):
        ward_residual(a, 1j, 1j)
