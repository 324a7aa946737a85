"""Phase 1: contexts of a corpus in parallel against the sweep, the training's gradient, stopping rule, effective rank."""

import itertools
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.training.two_phase import contexts as corpus_contexts_module
from bklm.training.two_phase import phase1 as fixed_point
from bklm.training.two_phase.contexts import corpus_contexts
from bklm.training.two_phase.phase1 import FixedPointSettings, effective_rank, train_context, train_in_its_place

VOCABULARY = 40


def model_of(seed=0, width=8, layers=2, double=True):
    torch.manual_seed(seed)
    model = ContextTokenLM(ContextTokenConfig(VOCABULARY, width, width, layers))
    return model.double() if double else model


def ids_of(length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def walked(model, ids, starts=()):
    """Final contexts (T, D) by one sweep from token to token, document by document."""
    edges = [0, *(t for t in starts if t > 0), len(ids)]
    parts = [torch.as_tensor(ids[a:b])[None] for a, b in itertools.pairwise(edges)]
    with torch.no_grad():
        return torch.cat([model.contexts(part)[0, :, -1] for part in parts])


def chaotic(model):
    """Context weights so large that f no longer forgets."""
    with torch.no_grad():
        for linear in model.context_block.linears:
            linear.weight[:, : model.config.context_dim].mul_(60.0)
    return model


# --- contexts of a corpus --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 70), chunk=st.integers(1, 80), data=st.data())
def test_parallel_contexts_are_those_of_the_sweep_whatever_the_cut(length, chunk, data):
    starts = data.draw(st.lists(st.integers(0, length - 1), max_size=4, unique=True))
    model, ids = model_of(), ids_of(length)
    found = corpus_contexts(model, ids, chunk=chunk, document_starts=starts, max_sweeps=100)
    torch.testing.assert_close(found.final, walked(model, ids, sorted(starts)), rtol=0, atol=1e-4)
    assert found.method == "parallel"
    assert max(found.residual, found.error) <= 1e-4
    assert 1 <= found.sweeps <= -(-length // chunk)  # after k sweeps the first k chunks are exact


def test_a_forgetting_block_needs_few_sweeps_and_little_more_than_one_evaluation_a_token():
    model, ids = model_of(width=32, double=False), ids_of(3000)
    found = corpus_contexts(model, ids, chunk=300)
    assert found.method == "parallel"
    assert found.sweeps <= 3
    assert found.passes < 2
    torch.testing.assert_close(found.final, walked(model, ids), rtol=0, atol=1e-4)
    one = corpus_contexts(model, ids, chunk=1, max_sweeps=200, verify=0)
    assert one.passes > 10  # the plain iteration evaluates every token in every sweep
    assert str(found).startswith(f"3000 contexts, parallel, {found.sweeps} sweeps")


def test_where_the_iteration_does_not_converge_the_sweep_is_used_and_said(caplog):
    model, ids = chaotic(model_of(layers=3)), ids_of(400)
    with caplog.at_level(logging.WARNING, "bklm"):
        found = corpus_contexts(model, ids, chunk=20, max_sweeps=4)
    assert found.method == "sequential"
    assert found.sweeps == 4
    assert "not converged after 4 sweeps; all 400 tokens computed sequentially" in caplog.text
    torch.testing.assert_close(found.final, walked(model, ids), rtol=0, atol=1e-9)


def test_a_parallel_result_that_fails_verification_is_not_returned(caplog, monkeypatch):
    model, ids = model_of(), ids_of(200)
    monkeypatch.setattr(corpus_contexts_module, "_verify", lambda *a: (0.0, 1e-3, 100, 2))
    with caplog.at_level(logging.WARNING, "bklm"):
        found = corpus_contexts(model, ids)
    assert found.method == "sequential"
    assert "the parallel result changed by 1.0e-03 (allowed 1.0e-04)" in caplog.text
    torch.testing.assert_close(found.final, walked(model, ids), rtol=0, atol=1e-12)


def test_a_difference_that_grows_late_in_the_text_is_found_and_put_right():
    """Within the tolerance at every seam, 4e-4 away from token 1766 on: no look at the first chunks shows it."""
    model, ids = model_of(seed=3, width=16), ids_of(2500, seed=3)
    with torch.no_grad():
        for linear in model.context_block.linears:
            linear.weight[:, :16].mul_(2.0)
    expected = walked(model, ids)
    assert (corpus_contexts(model, ids, verify=0).final - expected).abs().max() > 2e-4
    found = corpus_contexts(model, ids)
    assert found.seams > 1
    assert "walked on from" in str(found) or found.method == "sequential"
    torch.testing.assert_close(found.final, expected, rtol=0, atol=1e-4)


def test_what_is_wrong_anywhere_in_the_text_shows_in_the_residual(monkeypatch):
    model, ids = model_of(), ids_of(3000)
    iterate = corpus_contexts_module._iterate

    def wrong_at_one_token(*args):
        final, *rest = iterate(*args)
        final[2222] += 0.5
        return final, *rest

    monkeypatch.setattr(corpus_contexts_module, "_iterate", wrong_at_one_token)
    assert (corpus_contexts(model, ids, verify=0).final - walked(model, ids)).abs().max() > 0.4
    torch.testing.assert_close(corpus_contexts(model, ids).final, walked(model, ids), rtol=0, atol=1e-4)


def test_a_text_goes_on_from_the_context_it_is_given():
    model, ids = model_of(), ids_of(300)
    first = corpus_contexts(model, ids[:170])
    second = corpus_contexts(model, ids[170:], start=first.final[-1])
    torch.testing.assert_close(torch.cat([first.final, second.final]), walked(model, ids), rtol=0, atol=1e-4)


def test_no_gradient_and_no_change_comes_from_computing_contexts():
    model = model_of()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not corpus_contexts(model, ids_of(50)).final.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([], {}, ValueError, "token_ids: got shape"),
        ([[1, 2]], {}, ValueError, "token_ids: got shape"),
        ([0.5], {}, TypeError, "token_ids: got torch.float64"),
        ([0, VOCABULARY], {}, ValueError, f"token_ids: got 0 to {VOCABULARY}"),
        ([1, 2], {"document_starts": [2]}, ValueError, "document_starts: got 2 to 2; allowed is 0 to 1"),
        ([1, 2], {"chunk": 0}, ValueError, "chunk: got 0"),
        ([1, 2], {"max_sweeps": 0}, ValueError, "max_sweeps: got 0"),
        ([1, 2], {"tolerance": -1.0}, ValueError, "tolerance: got -1.0"),
    ],
)
def test_texts_and_numbers_that_cannot_be_are_refused(ids, options, error, message):
    with pytest.raises(error, match=message):
        corpus_contexts(model_of(), ids, **options)


# --- training --------------------------------------------------------------------------------------------------------


def formula_gradient(model, ids, former, noise, weight, group):
    """Gradient of the loss as the formula says it, all tokens in one graph."""
    previous = torch.cat([torch.zeros_like(former[:1]), former[:-1]]) + noise
    update = model.context_block.final(previous, model.embed(torch.as_tensor(ids)).detach())
    parts = update.split(group or len(update))
    diversity = -torch.stack([(c - c.mean(0)).norm() / len(c) for c in parts]).mean()
    loss = (1 - weight) * torch.nn.functional.mse_loss(update, former) + weight * diversity
    return loss.item(), torch.autograd.grad(loss, list(model.context_block.parameters()))


@pytest.mark.parametrize("group", [None, 16])
def test_gradient_over_chunks_is_that_of_the_formula_over_all_tokens(group, monkeypatch):
    monkeypatch.setattr(fixed_point, "CHUNK", 13)
    model, ids = model_of(), ids_of(60)
    former = torch.randn(60, 8, dtype=torch.float64)
    chosen = FixedPointSettings(diversity=0.3, group=group)
    iteration = fixed_point._Iteration(
        model, torch.as_tensor(ids), torch.tensor([], dtype=torch.int64), former, chosen, 5
    )
    noisy = torch.cat([before for _, before, _ in iteration._inputs()])
    noise = noisy - torch.cat([torch.zeros_like(former[:1]), former[:-1]])
    assert 0.09 < noise.std() < 0.11
    update = iteration.contexts()
    iteration.backward(update, list(model.context_block.parameters()))
    loss, expected = formula_gradient(model, ids, former, noise, 0.3, group)
    assert iteration.losses(update)["loss"] == pytest.approx(loss, rel=1e-12)
    for p, value in zip(model.context_block.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-9, atol=1e-14)
    assert model.embedding.weight.grad is None


def test_phase_1_trains_the_context_block_alone_and_leaves_no_gradient_behind():
    model = model_of(double=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = train_context(model, ids_of(100), FixedPointSettings(iterations=4, fraction=1.0, threshold=1e-9))
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"context_block"}
    assert all(p.grad is None for p in model.parameters())
    assert not result.converged
    assert result.steps == 3
    assert [row["iteration"] for row in result.rows] == [1, 2, 3, 4]
    assert int(model.context_block.fixed_point_iterations) == 4
    assert result.rows[0]["loss"] is None  # the sweep trains nothing
    assert all(math.isfinite(row[name]) for row in result.rows[1:] for name in ("loss", "mse", "diversity"))


def test_the_first_contexts_are_let_go_of_when_the_next_iteration_has_its_own(monkeypatch):
    found, alive = [], []

    def watched(*args, **options):
        result = corpus_contexts(*args, **options)
        found.append(weakref.ref(result.final))
        return result

    monkeypatch.setattr(fixed_point, "corpus_contexts", watched)
    settings = FixedPointSettings(iterations=4, fraction=1.0, threshold=1e-9)
    train_context(
        model_of(), ids_of(50), settings, on_iteration=lambda row: alive.append(found[0]() is not None)
    )
    assert alive == [True, True, False, False]  # iteration 2 starts from them


def test_training_stops_when_enough_tokens_have_settled_but_not_before_the_third_iteration():
    easy = FixedPointSettings(threshold=10.0)
    assert len(train_context(model_of(), ids_of(50), easy).rows) == 3
    late = FixedPointSettings(threshold=10.0, min_iterations=5)
    result = train_context(model_of(), ids_of(50), late)
    assert len(result.rows) == 5
    assert result.converged
    assert result.rows[-1]["converged"] == 1.0


def test_first_iteration_without_noise_starts_at_the_fixed_point():
    rows = train_context(model_of(), ids_of(80), FixedPointSettings(iterations=2, noise=0.0)).rows
    assert rows[1]["mse"] < 1e-9
    assert rows[1]["converged"] == 1.0


def test_training_repeats_with_its_seed_and_noise_changes_with_it():
    losses = []
    for seed in (0, 0, 1):
        rows = train_context(model_of(), ids_of(60), FixedPointSettings(iterations=3, seed=seed)).rows
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_without_the_mse_the_contexts_spread_and_without_diversity_they_settle():
    def trained(diversity):
        model, ids = model_of(), ids_of(200)
        chosen = FixedPointSettings(iterations=10, diversity=diversity, fraction=1.0, threshold=1e-9)
        return train_context(model, ids, chosen).rows

    spread, settled = trained(1.0), trained(0.0)
    assert spread[-1]["diversity"] < settled[-1]["diversity"]
    assert settled[-1]["mse"] < spread[-1]["mse"]


def test_documents_do_not_hear_each_other_in_phase_1():
    """A token changed in the first document moves nothing of the second one's contexts."""
    ids = ids_of(40)
    starts = [0, 20]
    changed = ids.copy()
    changed[10] = (ids[10] + 1) % VOCABULARY
    finals = []
    for text in (ids, changed):
        model = model_of()
        iteration = fixed_point._Iteration(
            model, torch.as_tensor(text), torch.tensor(starts),
            corpus_contexts(model, text, document_starts=starts).final, FixedPointSettings(), 0,
        )  # fmt: skip
        finals.append(iteration.contexts())
    # Within rounding: how many tokens are swept together, and so the shape of the products, may differ.
    torch.testing.assert_close(finals[0][20:], finals[1][20:], rtol=0, atol=1e-5)
    assert (finals[0][10:20] - finals[1][10:20]).abs().max() > 1e-3
    assert not torch.equal(finals[0][10:20], finals[1][10:20])


def test_a_frozen_block_a_broken_one_and_too_little_memory_are_refused(monkeypatch):
    model = model_of()
    model.freeze_context()
    with pytest.raises(ValueError, match="its context block is frozen"):
        train_context(model, ids_of(20))
    broken = model_of()
    with torch.no_grad():
        broken.context_block.linears[0].bias.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="some are infinite or NaN"):
        train_context(broken, ids_of(20))
    with pytest.raises(ArithmeticError, match="in iteration 3 the loss was nan"):
        train_context(model_of(), ids_of(20), FixedPointSettings(learning_rate=1e300))
    monkeypatch.setattr(fixed_point, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="are free on cpu; give fewer tokens"):
        train_context(model_of(), ids_of(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 1}, "iterations: got 1; .* at least 2"),
        ({"min_iterations": 0}, "min_iterations: got 0"),
        ({"group": 0}, "group: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"noise": -0.1}, "noise: got -0.1"),
        ({"fraction": 1.5}, "fraction: got 1.5"),
        ({"diversity": float("nan")}, "diversity: got nan"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FixedPointSettings(**changes)


# --- effective rank --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 12), shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_effective_rank_is_the_entropy_of_the_singular_values(rows, width, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randn(rows, width, generator=generator, dtype=torch.float64) + shift
    for centred in (False, True):
        if centred and rows == 1:
            continue
        matrix = contexts - contexts.mean(0) if centred else contexts
        p = torch.linalg.svdvals(matrix)
        p = p / p.sum()
        expected = float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum())) / width
        assert effective_rank(contexts, centred) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(6).repeat(5, 1)) == pytest.approx(1.0)
    assert effective_rank(torch.outer(torch.randn(50), torch.randn(10))) == pytest.approx(0.1, abs=1e-3)
    shared = 100 * torch.ones(10) + torch.randn(5000, 10, generator=torch.Generator().manual_seed(0))
    assert effective_rank(shared) < 0.2 < 0.99 < effective_rank(shared, centred=True)


def test_effective_rank_looks_at_rows_from_the_whole_text():
    contexts = torch.zeros(30_000, 4)
    contexts[:15_000, 0] = 1.0
    contexts[15_000:, 1] = 1.0
    assert effective_rank(contexts) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("contexts", "centred"), [(torch.zeros(5, 3), False), (torch.ones(5, 3), True)])
def test_contexts_without_spread_have_no_rank_and_it_is_said(contexts, centred):
    with pytest.raises(ValueError, match="they have no effective rank"):
        effective_rank(contexts, centred)
    with pytest.raises(ValueError, match="got shape"):
        effective_rank(contexts[0])


@pytest.mark.parametrize("kind", ["first", "Diversity", None])
def test_an_unknown_stand_in_for_phase_1_is_refused_with_the_known_ones(kind):
    model = model_of()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"^kind: got .*; allowed are '' \(phase 1\) and 'diversity' and 'untrained'\.$"
    ):
        train_in_its_place(model, ids_of(30), FixedPointSettings(iterations=2), kind)
    assert all(map(torch.equal, before, model.parameters()))
