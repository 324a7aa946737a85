"""The integration study: every switch does something, no arm sees the future, and what stays is read off the intervals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from small import small

from bklm.bk_core import backends, operator, solve_backends
from bklm.data import Portions, load_corpus, make_loader, set_epoch, tokenize_corpus, windows
from bklm.models import ResNetBK, future_leak
from bklm.studies import run_integration
from bklm.studies.integration import claims, judging, tables
from bklm.studies.integration.judging import known_as, left_out, portions_that_fit
from bklm.studies.integration.run import _arms, prepare_text
from bklm.studies.integration.switches import NEEDS, SWITCHES, Training, build, co_occurrences, together
from bklm.training.evaluation import evaluate

V = 60


@pytest.fixture(scope="module")
def config(small_text, tmp_path_factory):
    return small("integration", tmp_path_factory.mktemp("integration"), small_text, seq_len=16).resolved()


@pytest.fixture(scope="module")
def training():
    ids = np.random.default_rng(0).integers(0, V, 3000)
    return Training(co_occurrences(ids, V, 16), steps=4)


def made(config, names, training):
    torch.manual_seed(0)
    return build(config, names, training)(V)


def learned(model) -> tuple[float, set]:
    """The loss after two steps on the same ids, in 64 bits, and the solvers that computed it."""
    used, ids, model = set(), torch.arange(64).reshape(4, 16) % V, model.double().train()
    # What it keeps of a call before names no solver again.
    operator._known.cache_clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.MonkeyPatch.context() as patch:
        for module in (backends, solve_backends):
            select = module.select

            def seen(name, device, select=select):
                used.add(select(name, device).__name__)
                return select(name, device)

            patch.setattr(module, "select", seen)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(1)
            loss = model.loss(ids, ids.roll(-1, 1))
            loss.backward()
            optimizer.step()
    return model.eval().loss(ids, ids.roll(-1, 1)).item(), used


def require_a_difference(on, off, same_start=True) -> None:
    """Trained for two steps the models differ in loss, or in the kernel that computed it. With ``same_start`` from the same
    weights where both have them: a parameter that reaches no logit makes no difference then."""
    if same_start:
        given = on.state_dict()
        same = {
            k: v for k, v in given.items() if k in off.state_dict() and off.state_dict()[k].shape == v.shape
        }
        off.load_state_dict(off.state_dict() | same)
    (loss_on, used_on), (loss_off, used_off) = learned(on), learned(off)
    assert abs(loss_on - loss_off) > 1e-12 or used_on != used_off


@pytest.mark.parametrize("base", ["full", "alone"])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_what_is_computed(config, training, name, base):
    others = set(SWITCHES) - {name} if base == "full" else {NEEDS.get(name)} - {None}
    on, off = (made(config, names, training) for names in (others | {name}, others))
    # This one is another start.
    require_a_difference(on, off, same_start=name != "start")
    if name == "kernel":
        used_on, used_off = learned(on)[1], learned(off)[1]
        # Where the model reads, its own kernels compute and no solver is chosen.
        assert used_off
        assert not used_on & used_off


def test_a_switch_that_does_nothing_would_be_found(config, training):
    on, off = made(config, {"gradient", "none"}, training), made(config, {"gradient"}, training)
    on.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(AssertionError):
        require_a_difference(on, off)


def test_no_arm_sees_the_future_and_each_begins_at_a_uniform_guess(config, training):
    """On text, whose frequent words and neighbours a table of co-occurrences knows."""
    text = tokenize_corpus(load_corpus("embedded", None), 3000)
    size = text.vocab_size
    start = Training(co_occurrences(text.train, size, 64), steps=4)
    ids = torch.from_numpy(text.valid[: 8 * 65].astype(np.int64)).reshape(8, 65)
    wide = dataclasses.replace(config, d_model=64, seq_len=64)
    for name, arm in _arms(wide, start, kept=("gradient", "reading")).items():
        torch.manual_seed(0)
        model = arm.build(size).eval()
        with torch.no_grad():
            loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
        assert loss == pytest.approx(math.log(size), rel=0.02), name
    for name, arm in _arms(config, training, kept=("gradient", "reading")).items():
        torch.manual_seed(0)
        model = arm.build(V).double().eval()
        assert future_leak(model, torch.arange(16)[None] % V, 9).max() <= 1e-12, name


def test_every_arm_comes_back_as_the_plain_model_that_was_scored(small_text, tmp_path):
    result = run_integration(small("integration", tmp_path, small_text, budgets="steps"))
    # Two seeds judge nothing, so nothing is said to stay, nor to be the arm without any.
    assert "Those that stay" not in result.finding
    text = prepare_text(result.config)
    for row in result.table:
        model = result.load(row["arm"])
        assert isinstance(model, ResNetBK)
        assert evaluate(model, text.whole_val_loader(), text.unk_id).perplexity == pytest.approx(
            row["val_ppl"], rel=1e-4
        )
    zeros = [
        float((result.load(arm).blocks[0].dense.up.weight == 0).float().mean())
        for arm in ("full", "less pruning")
    ]
    assert zeros[0] > 0.2 > zeros[1] == 0
    with pytest.raises(ValueError, match="model: got 'fuller'; this study trained 'none', 'plain', 'full'"):
        result.load("fuller")


def test_the_design_is_all_each_left_out_and_none(config, training):
    arms = _arms(config, training)
    less = [f"less {name}" for name in SWITCHES]
    less[list(SWITCHES).index("reading")] = "less reading and convolution"
    assert list(arms) == ["none", "plain", "full", *less]
    assert together({"convolution"}) == frozenset()
    # What reading alone brings is seen where neither arm has a convolution.
    assert arms["less reading and convolution"].against == ("less convolution", "full")
    assert (arms["less kernel"].same_as, arms["less kernel"].seeds) == ("full", 1)
    others = {arm.against for name, arm in arms.items() if name in less and len(arm.against) == 1}
    assert others == {("full",)}
    pairs = left_out(SWITCHES)
    assert len(pairs) == len(SWITCHES) + 1
    assert pairs["reading and convolution"] == ("less reading and convolution", "full")


def test_portions_go_through_passes_in_their_order_whatever_they_hold():
    loader = make_loader(windows(np.arange(41), 4), 2, shuffle=True, seed=3)
    passes = []
    for epoch in (1, 2, 3):
        set_epoch(loader, epoch)
        passes += [batch[0].tolist() for batch in loader]
    portions = Portions(make_loader(windows(np.arange(41), 4), 2, shuffle=True, seed=3), 7)
    assert [batch[0].tolist() for _ in range(2) for batch in portions] == passes[:14]
    portions.set_epoch(2)
    assert [batch[0].tolist() for batch in portions] == passes[7:14]


def trials(losses):
    """Three seeds an arm, a little apart."""
    return [
        {"arm": arm, "seed": s, "val_ppl": math.exp(loss + 0.01 * s), "learning_rate": 1e-3, "parameters": 10, "seconds": 1.0,
         "context_gain": 0.1, "logit_parameters": 10, "bytes": 40,
         "epochs": [{"val_loss": loss + 0.5}, {"val_loss": loss + 0.01 * s}]}
        for arm, loss in losses.items() for s in (0, 1, 2)
    ]  # fmt: skip


def rows(loss, ms, timed=(), size=40, diverged=0):
    base = {"less a": {"loss_difference": loss, "low": loss - 0.1, "high": loss + 0.1}}
    steps = [{"arm": arm, "against": "full", **found} for arm, found in base.items()]
    time = [r | {"loss_difference": x, "low": x - 0.1, "high": x + 0.1} for x in timed for r in steps]
    table = [{"arm": arm, "parameters": 5, "bytes": 40, "diverged": 0} for arm in ("full", "less a")]
    table[1] |= {"bytes": size, "diverged": diverged}
    # The last round was disturbed.
    rounds, apart = (
        [10.0, 11.0, 10.5, 10.2, 10.8, 10.1, 10.4, 9.8, 900.0],
        (-0.2, -0.1, 0.1, 0.2, 0.1, -0.1, 0.2, 0.1),
    )
    milliseconds = {
        "full": rounds,
        "less a": [ms * (x + y) for x, y in zip(rounds, apart, strict=False)] + [8.0],
    }
    (row,) = judging.switch_rows({"a": SWITCHES["tying"]}, steps, time, milliseconds, table)
    return row["stays"], row["verdict"]


def test_a_switch_stays_where_its_removal_costs_loss_or_time_beyond_the_interval():
    assert rows(0.5, 1.0) == (True, "stays: without it more loss")
    assert rows(0.09, 2.0) == (True, "stays: without it more time")
    # By its interval the loss may be lower without it, by 5% of perplexity: what saves time alone is not kept for that.
    assert rows(0.05, 2.0) == (
        None,
        "no verdict: without it more time, and not shown that the loss is not lower",
    )
    assert rows(0.05, 1.0) == (False, "goes: no cost of its removal is shown")
    assert rows(-0.5, 0.5) == (False, "goes: without it less loss and time")
    assert rows(0.5, 0.5)[0] is None
    assert rows(0.5, 0.5, [0.3])[0] is True
    assert rows(0.5, 0.5, [0.05]) == (
        False,
        "goes: without it more loss, less time; at equal time no difference is shown",
    )
    assert rows(-0.5, 2.0, [0.3])[0] is True
    # Beyond the interval, and by less than two hundredths.
    assert rows(0.05, 1.015) == (False, "goes: no cost of its removal is shown")
    assert rows(0.09, 1.0, size=50) == (True, "stays: without it more bytes")
    assert rows(0.05, 1.0, size=50)[0] is None
    assert rows(-0.5, 1.0, [0.05], size=50)[0] is True
    assert rows(-0.5, 1.0, [-0.3], size=50)[0] is False


def test_a_losss_own_interval_decides_whether_bytes_are_bought_with_it():
    """Of nine intervals at once each is three times as wide as it would be alone."""
    found = {
        "arm": "less a",
        "against": "full",
        "loss_difference": 0.0,
        "low": -0.03,
        "high": 0.03,
        "any_of": 9,
    }
    table = [
        {"arm": arm, "parameters": 5, "bytes": 40, "diverged": 0, "seeds": 3} for arm in ("full", "less a")
    ]
    table[1] |= {"bytes": 50}
    times = {"full": [1.0] * 9, "less a": [1.0] * 9}
    for wide, stays in ((1.0, True), (3.0, None)):
        wider = found | {"low": wide * found["low"], "high": wide * found["high"]}
        (row,) = judging.switch_rows({"a": SWITCHES["tying"]}, [wider], [], times, table)
        assert row["stays"] is stays
        assert row["loss_low_alone"] == pytest.approx(wide * -0.03 / 3.1, rel=0.05)


def test_without_the_exact_gradient_a_step_leaves_the_fused_kernel_too_and_its_time_is_not_judged():
    table = [{"arm": arm, "parameters": 5, "bytes": 40, "diverged": 0} for arm in ("full", "less gradient")]
    found = {"arm": "less gradient", "against": "full", "loss_difference": 0.0, "low": -0.001, "high": 0.001}
    times = {"full": [1.0] * 9, "less gradient": [3.0] * 9}
    (row,) = judging.switch_rows({"gradient": SWITCHES["gradient"]}, [found], [], times, table)
    assert (row["stays"], row["ms_ratio"]) == (False, 3.0)
    assert (
        "3.000 (3.000 to 3.000), the kernel's as well"
        in tables.readable_switches([row], [])[0]["removed: time of a step"]
    )


def test_what_stays_takes_with_it_what_it_needs_and_a_pair_of_which_only_both_are_missed():
    def kept(**stays):
        return tables.kept_names(
            [{"switch": name.replace("_", " "), "stays": value} for name, value in stays.items()]
        )

    pair = {"reading_and_convolution": True}
    assert kept(reading=None, convolution=False, **pair) == {"reading", "convolution"}
    assert kept(reading=True, convolution=False, **pair) == {"reading"}
    assert kept(reading=False, convolution=True, **pair) == {"reading", "convolution"}
    assert kept(reading=False, convolution=False, tying=True) == {"tying"}
    verdicts = {
        "reading": "goes: without it less time",
        "koopman": "goes: without it more loss, less time; at equal time less loss",
        "energy": "goes: no cost of its removal is shown",
        "pruning": "no verdict",
        "convolution": "stays: without it more loss",
    }
    stays = {"s": True, "n": None, "g": False}
    rows = [{"switch": name, "stays": stays[v[0]], "verdict": v} for name, v in verdicts.items()]
    assert tables.kept_in_words(rows) == (
        "Stays: convolution, reading (as one of a pair). "
        "Goes: koopman (less loss at equal time), energy (no cost of its removal is shown). No verdict on: pruning."
    )


@pytest.mark.parametrize("fit", [1, 2, 5, 11, 13, 25, 31, 153, 348, 1000])
@pytest.mark.parametrize("scores", [1, 2, 12])
def test_a_training_at_equal_time_takes_the_steps_that_fit(fit, scores):
    batches, taken = portions_that_fit(fit, scores)
    assert 1 <= taken <= scores
    assert batches * taken == pytest.approx(fit, rel=0.021)


def test_what_stays_under_another_arms_name_is_called_by_it():
    assert known_as(set(SWITCHES)) == "full"
    assert known_as(set(SWITCHES) - {"tying"}) == "less tying"
    assert known_as(set(SWITCHES) - {"reading", "convolution"}) == "less reading and convolution"
    assert known_as({"gradient", "kernel"}) == "plain"
    assert known_as(set(SWITCHES) - {"tying", "start"}) is None


def test_a_switch_without_which_a_seed_diverges_stays():
    assert rows(0.05, 1.0, diverged=1) == (True, "stays: without it a seed diverged")


def test_a_term_that_is_no_better_than_its_placebo_goes():
    table = [{"arm": a, "parameters": 5, "bytes": 40, "diverged": 0} for a in ("full", "less koopman")]
    verdict = {"arm": "less koopman", "against": "full", "loss_difference": 0.5, "low": 0.4, "high": 0.6}
    placebo = {"arm": "placebo koopman", "against": "full", "loss_difference": 0.0, "low": -0.1, "high": 0.1}
    milliseconds = {"full": [1.0] * 9, "less koopman": [1.0] * 9}
    lost = placebo | {"low": None, "high": None}
    for found, stays in (
        ([], True),
        ([placebo], False),
        ([placebo | {"low": 0.1, "high": 0.2}], True),
        ([lost], None),
    ):
        switch = {"koopman": SWITCHES["koopman"]}
        (row,) = judging.switch_rows(switch, [verdict, *found], [], milliseconds, table)
        assert row["stays"] is stays


def test_no_verdict_where_neither_arm_is_below_unigram_and_more_arms_have_wider_intervals(config, training):
    arms = _arms(config, training)
    some = trials({"plain": 5.0, "full": 4.0, "less tying": 4.5})
    some = [t | {"val_ppl": t["val_ppl"] * (1 + 0.01 * t["seed"] * (t["arm"] != "full"))} for t in some]

    def found(unigram):
        return {(r["arm"], r["against"]): r for r in judging.judged(some, arms, unigram)}

    assert found(1000.0)["full", "plain"]["verdict"] == "lower loss"
    assert found(math.exp(4.2))["full", "plain"]["verdict"] == "lower loss"
    none = found(math.exp(3.9))["full", "plain"]
    assert (none["verdict"], none["low"]) == ("neither is below unigram: no verdict", None)
    one, many = found(1000.0)["full", "plain"], found(1000.0)["less tying", "full"]
    assert many["high"] - many["low"] > 2 * (one["high"] - one["low"])
    # The kernel is not judged by its loss; reading is twice, with and without the convolution.
    assert many["any_of"] == len(SWITCHES)
    assert ("less start", "full") not in found(1000.0)


def test_the_interaction_counts_each_change_once_and_not_what_plain_has_too():
    names = ("gradient", "reading", "convolution", "tying")
    losses = {"none": 9.0, "plain": 5.0, "full": 4.0, "less gradient": 9.0, "less reading and convolution": 4.5}
    losses |= {"less convolution": 4.3, "less tying": 4.2}
    found = tables.interaction(trials(losses), names)
    assert found["together"] == pytest.approx(1.0)
    assert found["sum"] == pytest.approx(0.7)
    assert found["interaction"] == pytest.approx(0.3)
    without = {arm: loss for arm, loss in losses.items() if arm != "less gradient"}
    assert tables.interaction(trials(without), names)["interaction"] == pytest.approx(0.3)
    assert tables.interaction(trials({"plain": 5.0, "full": 4.0, "less tying": 4.5}), names) is None


def test_seconds_to_the_plain_loss_are_steps_times_milliseconds_and_claims_are_read_off_them():
    milliseconds = {"plain": [10.0] * 6, "full": [20.0] * 6}
    first = {"plain": dict.fromkeys("012", 6.0), "full": dict.fromkeys("012", 6.0)}
    costs = tables.cost_rows(trials({"plain": 4.0, "full": 3.5}), milliseconds, 100, first)
    assert costs[0]["seconds"] == pytest.approx(2.0)
    # Its first score is at the plain arm's last: half the steps, of twice the time.
    assert costs[1]["seconds"] == pytest.approx(2.0, rel=0.02)
    assert costs[1]["ratio"] == pytest.approx(1.0, rel=0.02)
    # An arm that has one seed has not missed the goal with the others.
    one = [t for t in trials({"plain": 4.0, "full": 3.5}) if t["arm"] == "plain" or t["seed"] == 0]
    assert [r["seeds"] for r in tables.cost_rows(one, milliseconds, 100, first)] == [3, 1]
    assert tables.readable_costs(tables.cost_rows(one, milliseconds, 100, first))[1]["seeds there"] == "1 of 1"
    sizes = {"full": 100, "plain": 200}
    table = [{"arm": arm, "val_ppl": 30.0, "logit_parameters": count} for arm, count in sizes.items()]

    told = {}

    def verdicts(ratio, steps=(), wide=1.0):
        ends = {"low": ratio and ratio / wide, "high": ratio and ratio * wide}
        cost = [{"arm": "full", "ratio": ratio} | ends]
        found = claims.claims_table(steps, [], cost, table, 100.0)
        told.update({r["announced"].split(" (")[0]: r["measured"] for r in found})
        return {r["announced"].split(" (")[0]: r["verdict"] for r in found}

    assert verdicts(1 / 12)["10 times faster"] == "holds"
    assert verdicts(1 / 12)["17.5 times faster"] == "does not hold"
    assert verdicts(1 / 12, wide=1.7)["10 times faster"] == "not shown"
    assert verdicts(None)["10 times faster"] == "does not hold"
    full = {"arm": "full", "against": "plain", "loss_difference": -1.0, "low": -1.1, "high": -0.9}
    found = verdicts(1.0, [full, full | {"arm": "integrated"}])
    assert found["all optimisations together help, at equal steps"] == "holds"
    assert (
        "parameters that reach the logits 100 and 200"
        in told["all optimisations together help, at equal steps"]
    )
    unshown = full | {"low": -1.1, "high": 0.1}
    assert verdicts(1.0, [unshown])["all optimisations together help, at equal steps"] == "not shown"
    beside = verdicts(1.0, [full | {"against": "none", "low": 0.1, "high": 0.2}])
    assert beside["all optimisations together help, at equal steps, beside none of them"] == "does not hold"
    # What the same seeds chose and measured is not shown by them.
    assert found["those that stay together help, at equal steps"] == "no verdict"
    assert "same seeds" in told["those that stay together help, at equal steps"]
    assert found["better than a Transformer"] == "no verdict"
