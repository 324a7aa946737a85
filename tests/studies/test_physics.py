"""The physics study: its claims are read off its tables, its arms are what they say, bad settings are one sentence."""

import math

import pytest
import torch
from small import require_that_figures_say_what_the_model_sees, small

from bklm.harness.arms import Arm
from bklm.models import future_leak
from bklm.studies import PhysicsConfig, run_physics
from bklm.studies.physics import energies as of_energies
from bklm.studies.physics import figures, models, tables
from bklm.studies.physics.claims import MEMORY, claims_table
from bklm.studies.physics.run import PARTS_OF_RESULT, MemoryMeter
from bklm.training.auxiliary import WithTerm
from bklm.training.energy_drift import over_spread
from bklm.training.stability import largest_rate, steps_to_loss, with_spectral_norm


@pytest.fixture(scope="module")
def config(small_text, tmp_path_factory):
    return small("physics", tmp_path_factory.mktemp("physics"), small_text).resolved()


@pytest.fixture(scope="module")
def original(small_text, tmp_path_factory):
    """A finished run of the published protocol."""
    return run_physics(small("physics", tmp_path_factory.mktemp("original"), small_text, protocol="original"))


def test_as_published_it_sees_the_future_and_says_so(original):
    assert {row["arm"] for row in original.table} == {"plain", "published", "shuffled"}
    assert {row["learning_rate"] for row in original.table} == {3e-3}
    assert original.config.parts == "loss"
    model = original.load("published")
    assert future_leak(model, torch.arange(6)[None] % model.vocab_size, 5)[-1] > 1e-9
    assert "sees_the_future" in (original.folder / "manifest.json").read_text()
    assert '"sees_the_future": true' in (original.folder / "summary.json").read_text()
    announced = [row["announced"] for row in original.claims]
    assert announced[0] == "the energy term improves generalisation"
    assert not any("stable" in words or "memory" in words for words in announced)


def test_every_figure_of_what_was_published_says_that_it_sees_the_future(original):
    require_that_figures_say_what_the_model_sees(original)


def test_blocks_are_equal_in_parameters_and_no_corrected_arm_sees_the_future(config):
    ids, counts = torch.arange(8)[None] % 50, {}
    for name, arm in (models.block_arms(config) | models.loss_arms(config, 10)).items():
        torch.manual_seed(0)
        model = arm.build(300)
        if name in models.block_arms(config):
            counts[name] = model.num_parameters()
        assert future_leak(model, ids, 5).max() <= 1e-12, name
    assert max(counts.values()) / min(counts.values()) < 1.02
    assert len(counts) == 5


def test_arms_with_a_term_begin_with_the_plain_models_weights_and_clip_as_they_say(config):
    arms, built = models.loss_arms(config, 10), {}
    for name, arm in arms.items():
        torch.manual_seed(3)
        built[name] = arm.build(50)
    torch.manual_seed(3)
    built["detached"] = models.detached_arm(config, 10, False).build(50)
    plain = built.pop("plain").state_dict()
    for model in built.values():
        assert isinstance(model, WithTerm)
        assert all(torch.equal(v, plain[k]) for k, v in model.model.state_dict().items())
    together = [n for n, m in built.items() if not m.parameters_apart()]
    assert together == ["published", "shuffled"]
    assert (built["weight-0"].weight, built["detached"].detached) == (0.0, True)
    assert (arms["weight-0"].same_as, arms["weight-0"].seeds) == ("plain", 1)
    # At another rate than the plain model's it is that model trained otherwise.
    assert [models.detached_arm(config, 10, same).same_as for same in (True, False)] == ["plain", ""]
    assert built["published"].term.start == 4


def test_every_claim_has_its_controls(config):
    against = {n: a.against for n, a in (models.loss_arms(config, 1) | models.block_arms(config)).items()}
    # Each term is judged against a placebo that is clipped as it is.
    assert against["published"] == ("plain", "shuffled")
    assert against["apart"] == ("plain", "apart-shuffled")
    assert against["mended"] == ("plain", "mended-placebo")
    assert against["conservative"] == ("plain", "plain-unit", "free-force")


def trial(arm, seed, losses, **more):
    epochs = [{"val_loss": x, "gradient_norm_99": 1.0} for x in losses]
    return {"arm": arm, "seed": seed, "val_ppl": math.exp(losses[-1]), "epochs": epochs, **more}


def test_steps_are_read_off_the_curve_and_paired_with_each_control(config):
    records = [{"val_loss": x} for x in (5.0, 4.0, 4.5, 3.0)]
    assert steps_to_loss(records, 5.5, 6.0) == pytest.approx(0.5)
    assert steps_to_loss(records, 4.25, 6.0) == pytest.approx(1.75)
    assert steps_to_loss(records, 3.0, 6.0) == pytest.approx(4.0)
    assert steps_to_loss(records, 2.9, 6.0) is None
    assert steps_to_loss(records, 7.0, 6.0) == 0
    arms = models.block_arms(config)
    curves = {
        "plain": (5.0, 4.0),
        "plain-unit": (5.0, 4.0),
        "conservative": (4.0, 3.0),
        "free-force": (5.0, 3.9),
        "every-second": (5.0, 4.5),
    }
    trials = [trial(arm, s, [x - 0.1 * s for x in losses]) for arm, losses in curves.items() for s in (0, 1, 2)]
    times = {arm: [1.0] * 8 + [50.0] for arm in arms} | {"conservative": [3.0] * 8 + [150.0]}
    rows = {(r["arm"], r["against"]): r for r in tables.step_rows(trials, arms, 10, 6.0, times)}
    assert rows["plain", "-"]["steps"] == pytest.approx(20)
    assert rows["conservative", "plain"]["ratio"] == pytest.approx(0.5, rel=0.05)
    assert rows["conservative", "plain"]["high"] < 1
    # Half the steps, of three times the length.
    assert rows["conservative", "plain"]["seconds_ratio"] == pytest.approx(1.5, rel=0.05)
    assert rows["conservative", "plain"]["seconds_ratio_low"] > 1
    assert rows["plain", "-"]["seconds_to_loss"] == pytest.approx(0.02)
    assert rows["conservative", "free-force"]["ratio"] < 0.6
    assert rows["every-second", "plain"]["ratio"] is None
    assert rows["every-second", "plain"]["reached"] == 0
    # Steps before a term sets in are the plain model's.
    late = {"conservative": 5}
    rows = {(r["arm"], r["against"]): r for r in tables.step_rows(trials, arms, 10, 6.0, times, late)}
    n = rows["conservative", "plain"]["steps"]
    assert rows["conservative", "plain"]["seconds_to_loss"] == pytest.approx(1e-3 * (5 + 3 * (n - 5)))
    assert rows["conservative", "plain"]["seconds_ratio"] == pytest.approx((5 + 3 * (n - 5)) / 20, rel=0.05)
    assert rows["plain", "-"]["seconds_to_loss"] == pytest.approx(0.02)
    # A seed that diverged leaves no ratio.
    rows = tables.step_rows(
        [t for t in trials if (t["arm"], t["seed"]) != ("conservative", 1)], arms, 10, 6.0, times
    )
    assert next(r for r in rows if r["arm"] == "conservative")["ratio"] is None


NONE = {name: [] for name in PARTS_OF_RESULT}


def claims(gains=None, **parts):
    return {row["announced"]: row["verdict"] for row in claims_table(NONE | parts, gains or {})}


def test_faster_needs_fewer_steps_and_fewer_seconds_than_the_plain_model_and_the_placebo():
    row = {"arm": "conservative", "reached": 3, "seeds": 3, "steps": 5.0, "ratio": 0.8, "low": 0.7, "high": 0.9}
    row |= {"seconds_ratio": 0.8, "seconds_ratio_low": 0.7, "seconds_ratio_high": 0.9}
    both = [row | {"against": "plain"}, row | {"against": "free-force"}]
    name = "faster convergence, steps and seconds: conservative"
    assert claims(steps=both)[name] == "holds"
    assert claims(steps=[both[0], both[1] | {"high": 1.1}])[name] == "not shown"
    assert claims(steps=[both[0], both[1] | {"seconds_ratio_high": 3.5}])[name] == "not shown"
    slower = {"seconds_ratio_low": 1.2, "seconds_ratio_high": 3.5}
    assert claims(steps=[both[0], both[1] | slower])[name] == "does not hold"
    assert claims(steps=[both[0], both[1] | {"low": None, "high": None}])[name] == "no verdict"
    nowhere = dict.fromkeys(
        ("ratio", "low", "high", "seconds_ratio", "seconds_ratio_low", "seconds_ratio_high")
    )
    assert claims(steps=[row | {"against": "plain", "reached": 2} | nowhere])[name] == "does not hold"
    assert claims(steps=[row | {"against": "plain", "reached": 1, "seeds": 2} | nowhere])[name] == "no verdict"
    # The placebo does not get there in every seed: no ratio, no verdict.
    placebo = {"arm": "free-force", "against": "plain", "reached": 1, "seeds": 3, "steps": None} | nowhere
    steps = [both[0], both[1] | nowhere, placebo]
    assert claims(steps=steps)[name] == "no verdict"
    told = claims_table(NONE | {"steps": steps}, {})[0]["measured"]
    assert "over free-force's no ratio, it gets there in 3 of 3 seeds, that in 1 of 3" in told


def test_one_of_several_terms_that_helps_is_enough_and_blocks_are_told_with_what_they_read():
    row = {"low": -0.3, "high": -0.1, "loss_difference": -0.2, "against": "plain"}
    worse = row | {"high": 0.1}
    name = "the energy term improves generalisation"
    assert claims(verdicts=[row | {"arm": "mended"}, worse | {"arm": "published"}])[name] == "holds"
    assert claims(verdicts=[worse | {"arm": "mended"}, worse | {"arm": "published"}])[name] == "not shown"
    higher = row | {"low": 0.1, "high": 0.3}
    assert claims(verdicts=[higher | {"arm": "mended"}, higher | {"arm": "published"}])[name] == "does not hold"
    assert claims(verdicts=[row | {"arm": "published", "low": None}])[name] == "no verdict"
    (told,) = claims_table(
        NONE | {"block_verdicts": [row | {"arm": "conservative"}]}, {"conservative": 0.001, "plain": 0.2}
    )
    assert told["announced"] == "conservative blocks reach a lower perplexity"
    assert "gain from context 0.10%: a bigram model, plain's 20.0%" in told["measured"]


def energies(**arms):
    """Rows for arms with (drift, spread) of each of some seeds."""
    trials = []
    for arm, values in arms.items():
        for seed, (drift, spread) in enumerate(values):
            energy = {"drift": drift, "spread": spread, "ratio": over_spread(drift, spread)}
            trials.append(trial(arm.replace("_", "-"), seed, [3.0], energy=energy))
    first = {t["arm"]: {"spread": 1.0, "ratio": 1.0} for t in trials}
    rows = of_energies.energy_rows([*trials, trial("plain", 0, [3.0], energy={})], first)
    assert len(of_energies.readable_energies(rows)) == len(rows)
    return rows


def test_conserved_means_little_drift_no_collapse_and_less_drift_than_where_nothing_was_asked_of_the_model():
    low, same = [(0.02, 1.0), (0.022, 1.0), (0.021, 1.0)], [(0.021, 1.0), (0.02, 1.0), (0.022, 1.0)]
    high = [(0.3, 1.0), (0.31, 1.0), (0.29, 1.0)]

    def found(**arms):
        return {r["arm"]: r["conserves"] for r in energies(**arms)}

    rest = {"mended_placebo": high}
    assert found(mended=low, detached=high, **rest) == {
        "mended": "yes", "detached": "a control", "mended-placebo": "a control",
    }  # fmt: skip
    straddles = found(mended=low, detached=same, **rest)["mended"]
    assert straddles == "not shown to drift less than detached"
    less = [(0.01, 1.0), (0.011, 1.0), (0.009, 1.0)]
    assert found(mended=low, detached=less, **rest)["mended"] == "no: detached drifts no more"
    # A spread far above that of untrained nets, and far below that of nets which no model hears of.
    wide = [(3.0, 20.0)] * 3
    assert found(mended=low, detached=wide, **rest)["mended"] == "no: collapsed"
    told = {r["arm"]: r for r in of_energies.readable_energies(energies(mended=low, detached=wide, **rest))}
    assert told["mended"]["spread at the end"] == "100% of the first, 5% of detached's"
    assert found(mended=high, detached=high, **rest)["mended"] == "no: it drifts"
    near = [(0.06, 1.0), (0.09, 1.0), (0.14, 1.0)]
    words = "not shown to drift by less than 10% of its spread"
    assert found(mended=near, detached=high, **rest)["mended"] == words
    assert found(mended=low[:2], detached=high[:2], mended_placebo=high[:2])["mended"] == "no verdict"
    # A control that lost a seed.
    assert found(mended=low, detached=high[:2], **rest)["mended"] == "no verdict"
    assert found(conservative=low)["conservative"] == "yes"
    collapsed = energies(published=[(1e-6, 0.01)] * 3, shuffled=[(0.0, 0.0)] * 3)
    assert [r["conserves"] for r in collapsed] == ["no: collapsed", "a control"]
    assert energies(published=[(1e-6, 0.01)])[0]["conserves"] == "no verdict"
    # One number for every state: no ratio, and no division by zero.
    assert energies(published=[(0.0, 0.0)] * 3, shuffled=low)[0]["conserves"] == "no: collapsed"
    for other, verdict in ((less, "does not hold"), (same, "not shown")):
        assert claims(energies=energies(mended=low, detached=other, **rest)) == {
            "energy is conserved: mended": verdict
        }
    words = [of_energies.kept_in_words(x) for x in (0.421, 1.0, 5.44, 56.9, None)]
    assert words == ["42% of the first", "100% of the first", "5.4 times the first", "57 times the first", "-"]


def test_seeds_that_differ_by_all_bounds_give_no_ratio():
    """One placebo whose energy collapsed, and another that kept it: their mean would be 0.000 (0.000 to 292.9)."""
    low, placebo = [(0.05, 1.0)] * 3, [(0.2, 1.0), (0.1, 1.0), (1e9, 1.0)]
    rows = energies(mended=low, mended_placebo=placebo, detached=[(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)])
    told = {r["arm"]: r for r in of_energies.readable_energies(rows)}
    assert told["mended"]["over its control's (95%)"] == "no ratio, mended-placebo"
    assert told["mended-placebo"]["at the end (95%)"] == "no ratio"
    assert told["detached"]["at the end (95%)"].startswith("0.182 (0.0")
    (claim,) = claims_table(NONE | {"energies": rows}, {})
    assert claim["measured"].endswith("; over mended-placebo's no ratio")
    assert claim["verdict"] == "not shown"


def test_a_collapsed_energy_is_drawn_without_its_ratio(tmp_path):
    row = {"step": 0.0, "drift": 0.1, "spread": 1.0, "spread_of_v": 1.0, "weight": 1.0}
    trace = [row, row | {"step": 1.0, "spread": 0.0, "drift": 0.0}]
    logged = {"published": {"trace": trace, "shares": [{"step": 0.0, "gradient_share": 0.5}]}}
    told = [{"arm": "published", "conserves": "no: collapsed"}]
    assert figures.draw_energies(tmp_path / "e.png", logged, told, "note") is not None


def test_more_stable_needs_a_higher_rate_than_every_plain_model():
    # Finite and not above the untrained model's loss; an unbroken run of rates from the smallest.
    assert largest_rate({0.1: [(None, 6.0), (5.0, 6.0)], 0.01: [(5.0, 6.0), (6.0, 6.0)]}) == (
        0.01,
        {0.01: 2, 0.1: 1},
    )
    assert largest_rate({0.1: [(5.0, 6.0)], 0.03: [(6.1, 6.0)], 0.01: [(5.9, 6.0)]})[0] == 0.01
    assert largest_rate({0.1: [(math.nan, 6.0)], 1.0: [(5.0, 6.0)]})[0] is None

    def run(seeds=3, **stands):
        trials = [
            trial(arm, seed, [3.0 if rate <= most else 9.0], learning_rate=rate)
            for arm, most in ({"plain": 1, "plain-unit": 1, "plain-spectral": 1} | stands).items()
            for rate in (1, 2, 3)
            for seed in range(seeds)
        ]
        rows = tables.stability_rows(trials, {t["arm"]: {str(s): 6.0 for s in range(3)} for t in trials})
        return claims(stability=rows)["more stable than the plain model, all clipped"]

    assert run(conservative=2) == "holds"
    assert run(conservative=2, seeds=2) == "no verdict"
    assert run(conservative=1) == "does not hold"
    # Both stable at the largest rate that was tried: which breaks first was not seen.
    assert run(conservative=3, **{"plain-unit": 3}) == "no verdict"
    assert run(conservative=2, **{"plain-unit": 3}) == "does not hold"


def test_a_lower_perplexity_is_also_asked_for_in_as_many_seconds_and_edges_of_searches_are_named():
    curve = [6 - math.log(k) for k in (1, 2, 3, 4)]
    trials = [trial("plain", seed, curve) for seed in range(3)]
    trials += [trial("conservative", seed, [x - 0.1 - 0.001 * seed for x in curve]) for seed in range(3)]
    arms = {"plain": Arm(None), "conservative": Arm(None, ("plain",))}
    times = {"plain": [10.0, 10.0, 10.0], "conservative": [16.0, 16.0, 16.0]}
    rows = tables.equal_seconds_rows(trials, arms, times, "constant")
    assert rows[0]["loss_difference"] == pytest.approx(math.log(1.6) - 0.101)
    assert tables.equal_seconds_rows(trials, arms, times, "cosine") == []
    row = {"arm": "conservative", "against": "plain", "loss_difference": -0.1, "low": -0.11, "high": -0.09}
    gains = {"plain": 0.2, "conservative": 0.2}
    told = claims_table(NONE | {"block_verdicts": [row], "equal_seconds": rows}, gains, {"plain"})
    assert [r["verdict"] for r in told] == ["holds", "does not hold"]
    assert told[0]["measured"].endswith("; best rate at the edge of those tried: plain")
    assert told[1]["measured"].startswith("a step takes 1.600 (1.600 to 1.600) times as long as plain's")


def test_the_embedding_of_a_term_stands_beside_that_of_the_nearest_weight_decay():
    def sized(arm, size, seeds=3):
        return [trial(arm, seed, [3.0], embedding_norm=size, energy={}) for seed in range(seeds)]

    trials = [*sized("plain", 0.5), *sized("published", 0.1), *sized("decay-1", 0.3, 1), *sized("decay-3", 0.2)]
    told = tables.size_in_words(trials, (1.0, 3.0))
    assert "size 0.100, a weight decay of 3 one of 0.200, the largest tried, and plain has 0.500." in told
    assert "the largest tried" not in tables.size_in_words(trials, (1.0, 3.0, 9.0))
    assert tables.size_in_words(sized("plain", 0.5), (1.0,)) == ""


@pytest.mark.slow
def test_memory_grows_with_depth_but_for_the_reversible_blocks():
    with MemoryMeter("cpu") as meter:
        if meter.reason:
            pytest.skip(meter.reason)

        def peak(way, layers):
            settings = {"layers": layers, "width": 32, "batch": 8, "length": 512}
            return meter.measure("bklm.studies.physics.models:memory_arms", settings, way)[0]

        found = {
            way: tables.growth({n: peak(way, n) for n in (2, 16)})
            for way in ("residual", "leapfrog, reversible")
        }
    assert found["leapfrog, reversible"] < MEMORY + 0.2
    assert found["residual"] > 3
    assert tables.growth({4: 10, 32: None}) is tables.growth({4: 10}) is None


def test_spectral_norm_bounds_every_linear_map_of_the_blocks(config):
    torch.manual_seed(0)
    model = with_spectral_norm(models.plain(config)(50)).train()
    for _ in range(30):
        model(torch.arange(8)[None])
    for block in model.blocks:
        for linear in (block.dense.up, block.dense.down, block.mixer.inputs, block.mixer.output):
            assert torch.linalg.matrix_norm(linear.weight.detach(), 2) == pytest.approx(1.0, rel=0.05)


def test_the_decay_that_gives_the_published_size_is_found_by_ratio():
    trials = [
        {"decay": d, "seed": s, "val_ppl": 5.0, "embedding_norm": size * (1 + 0.01 * s)}
        for d, size in ((0.1, 2.0), (0.3, 1.0), (1.0, 0.4))
        for s in (0, 1)
    ]
    assert tables.nearest_decay(trials, 0.9) == 0.3
    assert tables.nearest_decay(trials, 0.1) == 1.0
    assert tables.nearest_decay([], 1.0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"step": 4.5},
            r"step: got 4\.5; leapfrog is unstable from 4 on with the first weights: take a smaller one\.",
        ),
        ({"step": 0}, r"step: got 0; allowed is a number in \(0, 1000\]\."),
        ({"weight": -0.1}, r"weight: got -0\.1; allowed is a number in \[0, 10\]\."),
        ({"mended_weight": -1}, r"mended_weight: got -1; allowed is a number in \[0, 1000000\]\."),
        ({"n_layers": 1}, r"n_layers: got 1; an energy that blocks conserve needs 2 blocks or more\."),
        (
            {"score_tokens": 32},
            r"score_tokens: got 32; a window of seq_len 32 takes one more than that: take more, or 0 for all\.",
        ),
        ({"d_model": 9}, r"d_model: got 9; half of it are positions: take an even width\."),
        (
            {"protocol": "original", "parts": "all"},
            r"parts: got 'all' with protocol 'original', .* take 'loss', or .*\.",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        PhysicsConfig(profile="smoke", **settings).resolved()


def test_more_pieces_than_batches_are_refused_before_anything_is_trained(small_text, tmp_path):
    with pytest.raises(ValueError, match=r"^pieces: got 99, but a pass has \d+ batches; "):
        run_physics(small("physics", tmp_path, small_text, pieces=99))
    assert not list(tmp_path.rglob("result.json"))
