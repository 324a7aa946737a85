"""The engine of arms: equal budgets, controls that change nothing where nothing may change, and paired verdicts."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from bklm.compression.retraining import RoundedModel
from bklm.harness.arms import (
    NOT_SHOWN,
    WEIGHTS,
    Arm,
    all_hold,
    any_holds,
    claim,
    helps,
    readable_verdicts,
    train_arms,
    verdicts,
)
from bklm.harness.comparison import Column, Comparison
from bklm.harness.study import run_study
from bklm.harness.text import prepare_text
from bklm.harness.windows import readable_windows, window_rows
from bklm.models import GPT, LSTM, GPTConfig, LSTMConfig, ResNetBK, ResNetBKConfig
from bklm.models.wrapped import Wrapped
from bklm.training.auxiliary import WithTerm, other_sequence, recorded_states, without_term
from bklm.training.schedules import TrainingSettings
from bklm.training.weights import load_weights

ARMS = Comparison(by="arm", title=str)


def test_windows_are_means_over_seeds_of_the_arms_whose_every_trial_measured_them():
    def trial(arm, seed, *ppl):
        # A record that was read back has words for keys.
        lengths = (1, 8) if seed else ("1", "8")
        found = {"mixer_off": 2 * ppl[0], "by_window": dict(zip(lengths, ppl, strict=True))} if ppl else None
        return {"arm": arm, "seed": seed, "val_ppl": 10.0} | ({"windows": found} if found else {})

    rows = window_rows(
        ARMS, [trial("a", 0, 20.0, 10.0), trial("a", 1, 45.0, 10.0), trial("b", 0, 20.0, 9.0), trial("b", 1)]
    )
    expected = {"val_ppl_mixer_off": 60.0, "val_ppl_context_1": 30.0, "val_ppl_context_8": 10.0}
    assert rows == [{"arm": "a", "seeds": 2} | {k: pytest.approx(v) for k, v in expected.items()}]
    assert readable_windows(ARMS, rows) == [{"arm": "a", "mixer off": "60.0", "1": "30.0", "8": "10.0"}]
    assert window_rows(ARMS, [trial("b", 0)]) == []


class Predicts(nn.Module):
    """An example of a term: each block's output is foretold from its input by a linear map."""

    def __init__(self, width: int, blocks: int, placebo: bool = False) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.placebo = placebo

    def forward(self, states):
        pairs = itertools.pairwise(states)
        losses = [
            (other_sequence(after) if self.placebo else after).sub(foretell(before)).square().mean()
            for foretell, (before, after) in zip(self.maps, pairs, strict=True)
        ]
        return torch.stack(losses).mean()


def plain(vocabulary: int) -> ResNetBK:
    return ResNetBK(ResNetBKConfig(vocabulary, 8, 2, mixer="solve", num_experts=1, n_heads=2))


def with_term(weight: float, placebo: bool = False, **more) -> Arm:
    def build(vocabulary):
        model = plain(vocabulary)
        return WithTerm(model, Predicts(8, 2, placebo), weight, **more)

    return Arm(build, ("none", "placebo"))


class Breaks(nn.Module):
    """A term that is no number."""

    def forward(self, states):
        return states[-1].sum() * math.nan


@pytest.fixture(scope="module")
def finished(small_text, tmp_path_factory):
    """(config, arms, trials, folder) of a finished experiment."""
    from bklm.studies.grad_blend.config import GradBlendConfig

    config = GradBlendConfig(
        profile="smoke", data_dir=str(small_text), output_dir=str(tmp_path_factory.mktemp("arms")), device="cpu",
        seeds=(0, 1), batch_size=8, seq_len=8, max_train_tokens=400, workers=1,
    )  # fmt: skip
    arms = {
        "none": Arm(plain),
        "weight 0": dataclasses.replace(with_term(0.0), kept=False),
        "detached": with_term(1.0, detached=True),
        "placebo": with_term(1.0, placebo=True),
        "term": with_term(1.0),
        "broken": Arm(lambda vocabulary: WithTerm(plain(vocabulary), Breaks(), 1.0)),
    }
    settings = TrainingSettings(2, learning_rate=3e-3, clip=0.05)

    def run(arms=arms):
        folders = []

        def work(study):
            folders.append(study.folder)
            return train_arms(study, arms, settings, measure=lambda model: {"kind": type(model).__name__},
                              needed={"kind": str})  # fmt: skip

        return run_study(config, work, lambda study, found: found, prepare=prepare_text), folders[0]

    trials, folder = run()
    return arms, trials, folder, run


def perplexities(trials, arm):
    return [t["val_ppl"] for t in trials if t["arm"] == arm]


@pytest.mark.parametrize("control", ["weight 0", "detached"])
def test_a_term_that_may_not_reach_the_model_leaves_its_training_as_it_was(finished, control):
    _, trials, *_ = finished
    assert perplexities(trials, control) == pytest.approx(perplexities(trials, "none"), rel=1e-6)


def test_a_term_that_reaches_the_model_changes_it(finished):
    _, trials, *_ = finished
    for arm in ("term", "placebo"):
        for found, without in zip(perplexities(trials, arm), perplexities(trials, "none"), strict=True):
            assert abs(found / without - 1) > 1e-5


def test_an_arm_that_diverges_is_a_row(finished):
    _, trials, *_ = finished
    assert perplexities(trials, "broken") == [None, None]
    rows = {row["arm"]: row for row in ARMS.rows(trials)}
    assert (rows["broken"]["seeds"], rows["broken"]["diverged"]) == (0, 2)


def test_what_was_measured_and_the_model_without_its_term_are_kept_and_nothing_is_trained_twice(
    finished, monkeypatch
):
    from bklm.harness import arms as engine

    _, trials, folder, run = finished
    term = next(t for t in trials if t["arm"] == "term")
    assert term["kind"] == "WithTerm"
    model = plain(_vocabulary(folder))
    load_weights(model, folder / "trials" / "arm_term_seed_0" / WEIGHTS)
    assert not (folder / "trials" / "arm_weight-0_seed_0" / WEIGHTS).exists()
    monkeypatch.setattr(engine, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run()[0] == trials


def test_the_best_trial_of_a_search_is_measured_and_not_trained_again(small_text, tmp_path, monkeypatch):
    from bklm.harness import arms as engine
    from bklm.studies.grad_blend.config import GradBlendConfig

    config = GradBlendConfig(
        profile="smoke", data_dir=str(small_text), output_dir=str(tmp_path), device="cpu", seeds=(0, 1), batch_size=8,
        seq_len=8, max_train_tokens=400, workers=1,
    )  # fmt: skip
    arms = {"term": with_term(1.0), "broken": Arm(lambda v: WithTerm(plain(v), Breaks(), 1.0), kept=False)}
    folders, steps, measured = [], [], []
    real = engine.train

    def counted(*given, on_step, **options):
        return real(*given, on_step=lambda n: steps.append(n) or on_step(n), **options)

    def work(study):
        folders.append(study.folder)
        once = len(study.text.train_loader(0)) * 2
        found = train_arms(
            study, arms, TrainingSettings(2, clip=0.05), rates=(1e-3, 3e-3), name="own",
            measure=lambda model: measured.append(model) or {"size": float(without_term(model).norm.weight.detach().sum())},
        )  # fmt: skip
        return found, once

    monkeypatch.setattr(engine, "train", counted)
    trials, once = run_study(config, work, lambda study, found: found, prepare=prepare_text)
    first, second, *broken = trials
    # Two rates with the first seed, and the second seed; each try of an arm that breaks is a step, and it is a row as well.
    assert sum(steps) == 3 * once + 2 * (2 + 2)
    assert len(measured) == 2
    assert [t["val_ppl"] for t in broken] == [None, None]
    model = plain(len(measured[0].model.embedding.weight))
    load_weights(model, folders[0] / "own" / "arm_term_seed_0" / WEIGHTS)
    assert float(model.norm.weight.detach().sum()) == first["size"]
    assert not list(folders[0].rglob("epoch_*"))
    monkeypatch.undo()
    torch.manual_seed(0)
    alone = run_study(
        dataclasses.replace(config, output_dir=str(tmp_path / "alone")),
        lambda study: train_arms(
            study, {"term": arms["term"]}, TrainingSettings(2, clip=0.05, learning_rate=first["learning_rate"])
        ),
        lambda study, found: found,
        prepare=prepare_text,
    )
    assert [t["val_ppl"] for t in alone] == [first["val_ppl"], second["val_ppl"]]


def _vocabulary(folder) -> int:
    from safetensors import safe_open

    with safe_open(str(folder / "trials" / "arm_none_seed_0" / WEIGHTS), "pt") as file:
        return file.get_slice("embedding.weight").get_shape()[0]


def trial(arm, seed, ppl):
    return {"arm": arm, "seed": seed, "val_ppl": ppl}


def test_verdicts_are_of_paired_seeds_and_an_arm_helps_where_it_beats_every_control():
    scores = {
        "none": (100, 200, 150),
        "placebo": (99, 201, 150),
        "better": (90, 181, 135),
        "same": (99, 202, 149),
    }
    trials = [trial(arm, seed, ppl) for arm, found in scores.items() for seed, ppl in enumerate(found)]
    arms = {arm: Arm(plain, ("none", "placebo") if arm in ("better", "same") else ()) for arm in scores}
    rows = verdicts(ARMS, trials, arms)
    assert [(r["arm"], r["against"], r["verdict"]) for r in rows] == [
        ("better", "none", "lower loss"), ("better", "placebo", "lower loss"),
        ("same", "none", "no difference"), ("same", "placebo", "no difference"),
    ]  # fmt: skip
    assert rows[0]["loss_difference"] == pytest.approx(math.log(0.9), abs=5e-3)
    assert helps(rows, "better") is True
    # An interval that holds 0 denies nothing.
    assert helps(rows, "same") is NOT_SHOWN
    assert helps(rows, "none") is None
    assert claim("converges better", "x", helps(rows, "same"))["verdict"] == "not shown"
    worse = [{"arm": "a", "low": low, "high": 0.3} for low in (-0.1, 0.1)]
    assert claim("converges better", "x", helps(worse, "a"))["verdict"] == "does not hold"
    # Of many arms one is likely to look better by chance: their intervals are wider (Bonferroni), and said to be.
    many = verdicts(ARMS, trials, arms, any_of=60)
    assert many[0]["loss_difference"] == rows[0]["loss_difference"]
    wider = (many[0]["high"] - many[0]["low"]) / (rows[0]["high"] - rows[0]["low"])
    # Student's t with 2 degrees of freedom has the quantile (2q - 1) / sqrt(2q(1 - q)).
    low, high = ((1 - 2 * p) / math.sqrt(2 * p * (1 - p)) for p in (0.025, 0.025 / 60))
    assert wider == pytest.approx(high / low, rel=1e-6)
    assert helps(many, "better") is NOT_SHOWN
    assert "loss difference, nats (95% for 60 arms at once)" in readable_verdicts(many)[0]
    assert "loss difference, nats (95%)" in readable_verdicts(rows)[0]
    lost = [*trials[:-1], trial("same", 2, None)]
    row = verdicts(ARMS, lost, arms)[-1]
    assert (row["verdict"], row["low"]) == ("a seed diverged: no verdict", None)
    for few in (1, 2):
        rows = verdicts(ARMS, [t for t in trials if t["seed"] < few], arms)
        assert helps(rows, "better") is None
        assert {(r["low"], r["verdict"]) for r in rows} == {(None, "no interval: no verdict")}


def test_a_claim_of_many_parts_is_as_good_as_its_worst_and_one_of_any_as_its_best():
    assert all_hold([True, True]) is True
    assert all_hold([True, NOT_SHOWN]) is NOT_SHOWN
    assert all_hold([True, NOT_SHOWN, None]) is NOT_SHOWN
    assert all_hold([True, None]) is None
    assert all_hold([True, NOT_SHOWN, None, False]) is False
    assert all_hold([]) is None
    assert any_holds([False, NOT_SHOWN, None, True]) is True
    assert any_holds([False, NOT_SHOWN, None]) is None
    assert any_holds([False, NOT_SHOWN]) is NOT_SHOWN
    assert any_holds([False, False]) is False


def test_states_are_those_before_the_first_block_and_after_each_also_of_a_block_used_twice():
    model, ids = plain(20).eval(), torch.randint(20, (3, 7))
    with recorded_states(model) as states:
        hidden = model.hidden(ids)
    assert len(states) == 3
    assert torch.equal(states[0], model.embedding(ids))
    assert torch.equal(model.norm(states[-1]), hidden)
    model.blocks[1] = model.blocks[0]
    with recorded_states(model) as states:
        model.hidden(ids)
    assert len(states) == 3
    assert torch.equal(states[2], model.blocks[0](states[1])[0])
    with recorded_states(gpt := GPT(GPTConfig(20, 8, 2, 2, 8)).eval()) as states:
        gpt.hidden(ids)
    assert [tuple(x.shape) for x in states] == [(3, 7, 8)] * 3


def test_a_placebo_reads_another_sequence_at_every_position():
    x = torch.arange(24.0).view(3, 4, 2)
    assert not (other_sequence(x) == x).any()
    assert not (other_sequence(x[:1]) == x[:1]).any()


def test_a_limited_term_adds_a_gradient_of_that_norm_in_every_state():
    model, ids = plain(20), torch.randint(20, (3, 7))

    def gradient(weight, limit):
        torch.manual_seed(0)
        wrapped = WithTerm(model, Predicts(8, 2), weight, limit=limit)
        wrapped.zero_grad()
        torch.manual_seed(1)
        with recorded_states(model) as states:
            loss = wrapped.loss(ids, ids)
        for x in states:
            x.retain_grad()
        loss.backward()
        return states[-1].grad

    without, free, limited = gradient(0.0, None), gradient(50.0, None), gradient(50.0, 1e-3)
    assert (free - without).norm() > 0.1
    assert (limited - without).norm() == pytest.approx(1e-3, rel=1e-2)


def test_bad_terms_are_refused_in_one_sentence():
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(
            ValueError, match=r"^weight: got .*; a term's weight is 0 or a positive, finite number\.$"
        ):
            WithTerm(plain(20), nn.Identity(), weight)
    with pytest.raises(ValueError, match=r"^limit: got 0; "):
        WithTerm(plain(20), nn.Identity(), 1.0, limit=0)
    with pytest.raises(TypeError, match=r"^block states: got a LSTM, which has no residual blocks; take "):
        WithTerm(LSTM(LSTMConfig(20, 8)), nn.Identity(), 1.0)


def test_a_wrapped_model_scores_streams_and_generates_as_the_model_does():
    model, ids = plain(20), torch.randint(20, (3, 7))
    wrapped = WithTerm(model, Predicts(8, 2), 1.0)
    assert without_term(wrapped) is model
    assert without_term(model) is model
    wrapped.eval()
    assert torch.equal(wrapped(ids), model(ids))
    assert torch.equal(wrapped.loss(ids, ids), model.loss(ids, ids))
    assert torch.equal(wrapped.generate(ids, 3, 0.0), model.generate(ids, 3, 0.0))
    assert wrapped.mixing_points() == model.mixing_points()
    wrapped.train()
    assert wrapped.loss(ids, ids) > model.eval().loss(ids, ids)


def test_exp_of_a_training_loss_with_a_further_term_is_no_perplexity():
    model, balanced = plain(9), ResNetBK(ResNetBKConfig(9, 8, 1, num_experts=2, balance=0.1))
    told = [model, balanced, Wrapped(model), Wrapped(balanced), RoundedModel(balanced, 8)]
    told += [WithTerm(model, Predicts(8, 2), 0.0), WithTerm(model, Predicts(8, 2), 0.1)]
    told += [RoundedModel(model, 8), RoundedModel(told[-1], 8)]
    assert [m.loss_is_likelihood for m in told] == [True, False, True, False, False, True, False, True, False]


def test_an_arm_that_ought_to_equal_another_and_ends_at_another_epoch_is_told_so():
    long = {**trial("none", 0, 9.0), "epochs": [{"val_loss": 2.5}, {"val_loss": 2.2}]}
    short = {**trial("same", 0, 12.0), "epochs": [{"val_loss": 2.5}]}
    (row,) = verdicts(ARMS, [long, short], {"none": Arm(plain), "same": Arm(plain, same_as="none")})
    assert row["verdict"] == "NOT identical, though it ought to be: another number of epochs"


def test_a_column_has_a_mean_only_where_every_seed_has_the_number():
    column = Column("gain", "gain", spread=True)
    whole = [{"gain": 1.0}, {"gain": 2.0}, {"gain": 3.0}]
    assert column.values(whole) == {"gain": 2.0, "gain_95": pytest.approx(2.4841, abs=1e-4)}
    for group in ([{"gain": None}, *whole], [{}, *whole], []):
        assert column.values(group) == {"gain": None, "gain_95": None}


def test_an_arm_that_must_equal_another_has_one_seed_and_is_compared_bit_by_bit(small_text, tmp_path):
    from bklm.studies.grad_blend.config import GradBlendConfig

    config = GradBlendConfig(
        profile="smoke", data_dir=str(small_text), output_dir=str(tmp_path), device="cpu", seeds=(0, 1), batch_size=8,
        seq_len=8, max_train_tokens=400, workers=1,
    )  # fmt: skip
    arms = {
        "none": Arm(plain, kept=False),
        "nothing": dataclasses.replace(with_term(0.0), against=(), kept=False, seeds=1, same_as="none"),
        "something": dataclasses.replace(with_term(1.0), against=(), kept=False, seeds=1, same_as="none"),
    }
    trials = run_study(
        config, lambda study: train_arms(study, arms, TrainingSettings(1)), lambda study, found: found,
        prepare=prepare_text,
    )  # fmt: skip
    assert [(t["arm"], t["seed"]) for t in trials] == [
        ("none", 0),
        ("none", 1),
        ("nothing", 0),
        ("something", 0),
    ]
    same, other = verdicts(ARMS, trials, arms)
    assert same["verdict"] == "identical by construction, every loss to the last bit"
    assert other["verdict"].startswith("NOT identical")
    assert same["loss_difference"] is same["low"] is None
