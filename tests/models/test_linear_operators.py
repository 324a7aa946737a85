"""DMD and EDMD against known maps, PyDMD and deeptime; spectra against their formula; blocks that stand in for others."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bklm.models import LSTM, LSTMConfig, ResNetBK, ResNetBKConfig
from bklm.models.koopman import Dictionary, LinearBlock, TokenBlock, dmd, edmd, replaced, spectrum, tie_blocks
from bklm.training.koopman import published_dmd

PAIRS = 100


def linear_pairs(d: int, dtype=torch.float32, count: int = PAIRS):
    """Noise-free snapshots (count, d) of a known map with eigenvalues inside the unit circle, and the map."""
    random = torch.Generator().manual_seed(d)
    known = torch.randn(d, d, generator=random, dtype=torch.float64) / d**0.5 * 0.9
    x = torch.randn(count, d, generator=random, dtype=torch.float64)
    return x.to(dtype), (x @ known).to(dtype), known


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_a_known_linear_map_is_recovered_in_float32_and_the_published_fit_misses_it(d):
    x, y, known = linear_pairs(d)
    for operator in (dmd(x, y), edmd(x, y)):
        assert error(x.double() @ operator, y.double()) < 1e-4
        if d <= 64:
            assert error(operator, known) < 1e-4
    published = published_dmd(x, y)
    if d < PAIRS:
        assert published is None, "the shapes clash, and the original swallowed that"
    else:
        assert error(x @ published.mT, y) > 1


@pytest.mark.parametrize("d", [5, 32])
def test_dmd_and_edmd_agree_with_pydmd_and_deeptime(d):
    pydmd = pytest.importorskip("pydmd")
    decomposition = pytest.importorskip("deeptime.decomposition")
    basis = pytest.importorskip("deeptime.basis")
    x, y, _ = linear_pairs(d, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Snapshots are columns there.
        theirs = pydmd.DMD(svd_rank=d, exact=True).fit(x.numpy().T, y.numpy().T)
    ours = torch.linalg.eigvals(dmd(x, y)).numpy()
    for value in theirs.eigs.astype(complex):
        assert np.abs(ours - value).min() < 1e-5
    fitted = decomposition.EDMD(basis.Identity(), n_eigs=d).fit((x.numpy(), y.numpy())).fetch_model()
    # Its operator acts from the right, as ours.
    assert error(edmd(x, y), torch.from_numpy(fitted.operator)) < 1e-5
    monomials = basis.Monomials(p=2, d=2)
    z, after = (torch.from_numpy(monomials(t[:, :2].numpy())) for t in (x, y))
    lifted = decomposition.EDMD(monomials, n_eigs=z.shape[1]).fit((x[:, :2].numpy(), y[:, :2].numpy()))
    theirs = torch.from_numpy(lifted.fetch_model().operator)
    assert error(z @ edmd(z, after), z @ theirs.to(z)) < 1e-5


def test_a_truncated_dmd_has_that_rank_and_agrees_with_pydmd():
    pydmd = pytest.importorskip("pydmd")
    x, y, _ = linear_pairs(12, torch.float64)
    found = dmd(x, y, rank=4)
    assert int(torch.linalg.matrix_rank(found)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pydmd.DMD(svd_rank=4).fit(x.numpy().T, y.numpy().T)
    values = torch.linalg.eigvals(found).numpy()
    for value in theirs.eigs.astype(complex):
        assert np.abs(values - value).min() < 1e-5


def test_a_rank_above_snapshots_or_features_a_ridge_below_0_and_unpaired_rows_are_refused():
    x, y, _ = linear_pairs(8, count=5)
    with pytest.raises(
        ValueError, match=r"^rank: got 6 with 5 snapshots of 8 features; it can be 1 to 5: give a smaller"
    ):
        dmd(x, y, rank=6)
    with pytest.raises(ValueError, match=r"^rank: got 0 "):
        dmd(x, y, rank=0)
    with pytest.raises(ValueError, match=r"^ridge: got -1\.0; it must be 0 or a positive, finite number\.$"):
        edmd(x, y, -1.0)
    with pytest.raises(ValueError, match=r"^snapshots: got shapes \(5, 8\) and \(4, 8\); "):
        dmd(x, y[:4])


def test_a_ridge_shrinks_the_operator_and_a_tiny_one_hardly():
    x, y, known = linear_pairs(8)
    assert error(edmd(x, y, 1e-9), known) < 1e-6
    assert edmd(x, y, 1.0).norm() < 0.8 * known.norm()


def test_eigenvalues_of_a_linear_map_have_no_residual_and_those_of_a_wrong_dictionary_have():
    x, y, known = linear_pairs(6, torch.float64)
    found = spectrum(x, y)
    wanted = torch.linalg.eigvals(known)
    assert max(float((wanted - value).abs().min()) for value in found.eigenvalues) < 1e-6
    assert float(found.residuals.max()) < 1e-6
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    spoilt = spectrum(x, y + noise)
    assert float(spoilt.residuals.min()) > 0.3
    # The formula of Colbrook and Townsend, with G = Z*Z/M, A = Z*Z'/M, L = Z'*Z'/M.
    z, after = x.to(torch.complex128), (y + noise).to(torch.complex128)
    g, a, ell = (p.mH @ q / len(x) for p, q in ((z, z), (z, after), (after, after)))
    values, vectors = torch.linalg.eig(edmd(x, y + noise, 1e-9))
    squares = []
    for value, v in zip(values, vectors.mT, strict=True):
        matrix = ell - value * a.mH - value.conj() * a + value.abs() ** 2 * g
        squares.append(float(((v.conj() @ matrix @ v) / (v.conj() @ g @ v)).real))
    assert sorted(spoilt.residuals.square().tolist()) == pytest.approx(sorted(squares), rel=1e-6)


def test_a_spectrum_leaves_the_constant_out_and_its_residuals_are_those_of_held_out_pairs():
    x, y, known = linear_pairs(6, torch.float64, 2 * PAIRS)
    random = torch.Generator().manual_seed(2)
    noise, shift = (torch.randn(n, 6, generator=random, dtype=torch.float64) for n in (len(y), 1))
    # An affine map: [1, x] has the constant, of eigenvalue 1, besides the map's own.
    one = torch.ones(len(x), 1, dtype=torch.float64)
    before, after = torch.cat((one, x), 1), torch.cat((one, y + shift), 1)
    found, wanted = spectrum(before, after).eigenvalues, torch.linalg.eigvals(known)
    assert len(found) == 6
    assert max(float((wanted - value).abs().min()) for value in found) < 1e-6
    # Fitted to few noisy pairs, the operator errs more on others than it tells of those.
    after = torch.cat((one, y + noise), 1)
    few, others = slice(10), slice(10, None)
    told = spectrum(before[few], after[few]).residuals
    true = spectrum(before[few], after[few], held_out=(before[others], after[others])).residuals
    assert float(true.mean()) > 1.5 * float(told.mean())


def test_a_dictionary_reads_its_own_and_earlier_positions_only():
    x = torch.randn(3, 9, 4)
    dictionary = Dictionary(x.flatten(0, 1), taps=3, units=5)
    z = dictionary(x)
    assert z.shape == (3, 9, dictionary.size) == (3, 9, 1 + 12 + 5)
    assert torch.equal(z[..., 0], torch.ones(3, 9))
    assert torch.equal(z[:, 4, 1:13], torch.cat((x[:, 4], x[:, 3], x[:, 2]), -1))
    assert torch.equal(z[:, 1, 9:13], torch.zeros(3, 4))
    changed = x.clone()
    changed[:, 5] += 1
    moved = (dictionary(changed) != z).any(-1).any(0).nonzero().flatten().tolist()
    assert moved == [5, 6, 7]
    assert Dictionary(x.flatten(0, 1), 2)(x[:, :1]).shape == (3, 1, 9)


def test_a_block_fitted_to_a_linear_increment_reproduces_it():
    x = torch.randn(8, 20, 4)
    before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :20]
    after = x + 0.3 * before + 0.1 * x.flip(-1) + 0.2
    dictionary = Dictionary(x.flatten(0, 1), taps=2)
    block = LinearBlock(dictionary, edmd(dictionary(x).flatten(0, 1), (after - x).flatten(0, 1)))
    assert torch.allclose(block(x)[0], after, atol=1e-5)
    one = Dictionary(x.flatten(0, 1))
    blind = LinearBlock(one, edmd(one(x).flatten(0, 1), (after - x).flatten(0, 1)))
    assert (blind(x)[0] - after).square().mean() > 0.05


def test_blocks_are_replaced_within_and_put_back_after_and_models_without_them_are_refused():
    model, ids = solve_model(3).eval(), torch.randint(11, (2, 6))
    before, blocks = model(ids), list(model.blocks)
    with replaced(model, dict.fromkeys(range(3), TokenBlock())):
        assert torch.equal(model.hidden(ids), model.norm(model.embedding(ids)))
    assert list(model.blocks) == blocks
    assert torch.equal(model(ids), before)
    wanted = r"^blocks: a LSTM has none to replace; take a ResNetBK or LinearContext\.$"
    with pytest.raises(TypeError, match=wanted), replaced(LSTM(LSTMConfig(11, 8)), {}):
        pass


def solve_model(layers: int) -> ResNetBK:
    return ResNetBK(ResNetBKConfig(11, 8, layers, mixer="solve", num_experts=1, n_heads=2))


def test_tied_blocks_are_one_at_every_depth():
    model, one = tie_blocks(solve_model(3)), solve_model(1)
    assert model.num_parameters() == one.num_parameters()
    ids = torch.randint(11, (2, 5))
    x = model.eval().embedding(ids)
    for _ in range(3):
        x = model.blocks[0](x)[0]
    assert torch.equal(model.hidden(ids), model.norm(x))
