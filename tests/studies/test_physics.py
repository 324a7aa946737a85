"""The physics study: its claims are read off its tables, its arms are what they say, bad settings are one sentence."""

import math

import pytest
import torch
from small import small

from bklm.models import future_leak
from bklm.studies import PhysicsConfig, run_physics
from bklm.studies.physics import models, tables
from bklm.studies.physics.run import MemoryMeter
from bklm.training.auxiliary import WithTerm
from bklm.training.stability import largest_rate, steps_to_loss, with_spectral_norm


@pytest.fixture(scope="module")
def config(small_text, tmp_path_factory):
    return small("physics", tmp_path_factory.mktemp("physics"), small_text).resolved()


@pytest.fixture(scope="module")
def original(small_text, tmp_path_factory):
    """A finished run of the published protocol."""
    return run_physics(small("physics", tmp_path_factory.mktemp("original"), small_text, protocol="original"))


def test_as_published_it_sees_the_future_and_says_so(original):
    assert {row["arm"] for row in original.table} == {"none", "published", "shuffled"}
    assert original.config.parts == "loss"
    model = original.load("published")
    assert future_leak(model, torch.arange(6)[None] % model.vocab_size, 5)[-1] > 1e-9
    assert "sees_the_future" in (original.folder / "manifest.json").read_text()
    assert '"sees_the_future": true' in (original.folder / "summary.json").read_text()
    announced = [row["announced"] for row in original.claims]
    assert announced[0] == "the energy term improves generalisation"
    assert not any("stable" in words or "memory" in words for words in announced)


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
    plain = built.pop("none").state_dict()
    for model in built.values():
        assert isinstance(model, WithTerm)
        assert all(torch.equal(v, plain[k]) for k, v in model.model.state_dict().items())
    assert [n for n, m in built.items() if m.parameters_apart()] == ["apart", "mended", "mended-placebo"]
    assert built["published"].term.start == 4


def test_every_claim_has_its_controls(config):
    against = {n: a.against for n, a in (models.loss_arms(config, 1) | models.block_arms(config)).items()}
    assert against["published"] == against["apart"] == ("none", "shuffled")
    assert against["mended"] == ("none", "mended-placebo")
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
    rows = {(r["arm"], r["against"]): r for r in tables.step_rows(trials, arms, 10, 6.0)}
    assert rows["plain", "-"]["steps"] == pytest.approx(20)
    assert rows["conservative", "plain"]["ratio"] == pytest.approx(0.5, rel=0.05)
    assert rows["conservative", "plain"]["high"] < 1
    assert rows["conservative", "free-force"]["ratio"] < 0.6
    assert rows["every-second", "plain"]["ratio"] is None
    assert rows["every-second", "plain"]["reached"] == 0
    # A seed that diverged leaves no ratio.
    rows = tables.step_rows([t for t in trials if (t["arm"], t["seed"]) != ("conservative", 1)], arms, 10, 6.0)
    assert next(r for r in rows if r["arm"] == "conservative")["ratio"] is None


def claims(**parts):
    found = tables.claims_table(
        {"verdicts": [], "energies": [], "steps": [], "stability": [], "memory": []} | parts
    )
    return {row["announced"]: row["verdict"] for row in found}


def test_faster_needs_an_interval_below_one_against_the_plain_model_and_the_placebo():
    row = {"arm": "conservative", "reached": 3, "seeds": 3, "steps": 5.0, "ratio": 0.8, "low": 0.7, "high": 0.9}
    both = [row | {"against": "plain"}, row | {"against": "free-force"}]
    name = "faster convergence: conservative"
    assert claims(steps=both)[name] == "holds"
    assert claims(steps=[both[0], both[1] | {"high": 1.1}])[name] == "does not hold"
    assert claims(steps=[both[0], both[1] | {"low": None, "high": None}])[name] == "no verdict"
    nowhere = {"ratio": None, "low": None, "high": None}
    assert claims(steps=[row | {"against": "plain", "reached": 2} | nowhere])[name] == "does not hold"
    # The placebo does not get there in every seed: no ratio, no verdict.
    placebo = {"arm": "free-force", "against": "plain", "reached": 1, "seeds": 3, "steps": None} | nowhere
    steps = [both[0], both[1] | nowhere, placebo]
    assert claims(steps=steps)[name] == "no verdict"
    rest = {"verdicts": [], "energies": [], "stability": [], "memory": []}
    told = tables.claims_table(rest | {"steps": steps})[0]["measured"]
    assert "over free-force's no ratio, it gets there in 3 of 3 seeds, that in 1 of 3" in told


def test_conserved_means_little_drift_and_no_collapse():
    def energy(arm, seed, drift, spread):
        return trial(arm, seed, [3.0], energy={"drift": drift, "spread": spread, "ratio": drift / spread})

    first = {arm: {"spread": 1.0} for arm in ("published", "mended", "conservative")}
    trials = [
        energy("published", 0, 1e-4, 0.01),
        energy("mended", 0, 0.3, 1.0),
        energy("conservative", 0, 0.02, 0.8),
    ]
    rows = tables.energy_rows([*trials, trial("none", 0, [3.0], energy={})], first)
    assert {r["arm"]: r["conserves"] for r in rows} == {
        "published": False,
        "mended": False,
        "conservative": True,
    }
    assert [tables.kept_in_words(x) for x in (0.421, 1.0, 5.44, 56.9)] == [
        "42%",
        "100%",
        "5.4 times",
        "57 times",
    ]
    assert [r["conserves"] for r in tables.readable_energies(rows)] == ["no: collapsed", "no", "yes"]
    assert claims(energies=rows) == {
        "energy is conserved: published": "does not hold",
        "energy is conserved: mended": "does not hold",
        "energy is conserved: conservative": "holds",
    }


def test_more_stable_needs_a_higher_rate_than_every_plain_model():
    assert largest_rate({0.1: [None, 5.0], 0.01: [5.0, 6.0], 0.001: [5.0, 9.0]}, 8.0) == (
        0.01,
        {0.001: 1, 0.01: 2, 0.1: 1},
    )
    assert largest_rate({0.1: [None]}, 8.0)[0] is None

    def run(**stands):
        trials = [
            {"arm": arm, "learning_rate": rate, "val_ppl": 5.0 if rate <= most else None}
            for arm, most in ({"plain": 1, "plain-spectral": 1, "conservative": 1} | stands).items()
            for rate in (1, 2, 3)
            for _ in range(2)
        ]
        rows = tables.stability_rows(trials, 8.0)
        return claims(stability=rows)["more stable than the plain model, clipped or not"]

    found = [(1, 1, "holds"), (2, 1, "does not hold"), (1, 3, "does not hold")]
    for clipped, unit, verdict in found:
        stands = {"plain-clipped": clipped, "plain-unit-clipped": unit, "conservative-clipped": 2}
        assert run(**stands) == verdict


@pytest.mark.slow
def test_memory_grows_with_depth_but_for_the_reversible_blocks():
    with MemoryMeter("cpu") as meter:
        if meter.reason:
            pytest.skip(meter.reason)

        def peak(way, layers):
            settings = {"layers": layers, "width": 32, "batch": 8, "length": 128}
            return meter.measure("bklm.studies.physics.models:memory_arms", settings, way)[0]

        found = {
            way: tables.growth({n: peak(way, n) for n in (2, 16)})
            for way in ("residual", "leapfrog, reversible")
        }
    assert found["leapfrog, reversible"] < tables.MEMORY + 0.2
    assert found["residual"] > 3
    assert tables.growth({4: 10, 32: None}) is None


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
