"""The Koopman study: the published trainer beside the mended one, and claims that hold only where they were measured."""

from __future__ import annotations

import json
import math

import pytest
from small import require_that_figures_say_what_the_model_sees, small

from bklm.studies import KoopmanConfig, run_koopman
from bklm.studies.koopman.claims import claims_table
from bklm.studies.koopman.models import arms_of
from bklm.studies.koopman.tables import (
    at_equal_seconds,
    linearised_rows,
    long_range,
    rate_in_words,
    readable_linearised,
    readable_speed,
    recall_rows,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory, small_text):
    """The published trainer on the published model, three epochs, a strong term from the second on."""
    given = {"protocol": "original", "weights": (5.0,), "epochs": 3, "start_epoch": 2}
    return run_koopman(small("koopman", tmp_path_factory.mktemp("koopman"), small_text, **given))


@pytest.fixture(scope="module")
def corrected(tmp_path_factory, small_text):
    given = {"weights": (1.0,), "distances": (8, 128), "learning_rates": (1e-3, 1e-2)}
    return run_koopman(small("koopman", tmp_path_factory.mktemp("koopman"), small_text, **given))


def test_every_figure_of_what_was_published_says_that_it_sees_the_future(original):
    require_that_figures_say_what_the_model_sees(original)


def row(result, arm):
    return next(r for r in result.table if r["arm"] == arm)


def test_the_published_arm_is_labelled_and_its_koopman_forward_hears_no_other_position(original):
    assert [r["arm"] for r in original.table] == ["none", "weight 0", "published", "placebo"]
    summary = json.loads((original.folder / "summary.json").read_text())
    assert summary["sees_the_future"] is True
    plan = KoopmanConfig(protocol="original").resolved()
    assert (plan.weights, plan.learning_rates) == ((0.05,), (1e-3,))
    claim = next(c for c in original.claims if c["announced"].startswith("the Koopman forward"))
    assert "a changed token moves 0 other positions" in claim["measured"]
    assert claim["verdict"] == "does not hold"
    assert row(original, "published")["koopman_ppl"] > row(original, "published")["val_ppl"]
    assert not (original.folder / "linearised.csv").exists()
    assert set(original.tables()) == {"arms", "verdicts", "claims"}


def test_the_term_changes_no_bit_at_weight_0_or_detached_and_something_otherwise(original, corrected):
    for result, same, other in (
        (original, ["weight 0"], "published"),
        (corrected, ["weight 0", "detached"], "mended 1"),
    ):
        plain, told = row(result, "none")["val_ppl"], {v["arm"]: v for v in result.verdicts}
        for arm in same:
            assert row(result, arm)["val_ppl"] == plain
            assert told[arm]["verdict"] == "identical by construction, every loss to the last bit"
            assert told[arm]["loss_difference"] is None
        assert abs(row(result, other)["val_ppl"] / plain - 1) > 1e-6


def test_every_arm_has_the_rate_that_is_best_for_the_plain_model_and_an_edge_is_said(corrected):
    rates = {json.loads(p.read_text())["learning_rate"] for p in corrected.folder.glob("t*/*/result.json")}
    assert rates == {1e-2}
    searched = [
        json.loads(p.read_text()) for p in corrected.folder.glob("internals/trials_search/*/result.json")
    ]
    assert {t["learning_rate"]: t["val_ppl"] for t in searched}[1e-2] == row(corrected, "none")["val_ppl"]
    assert (
        "learning rate 0.01 for all, the plain model's best of 0.001, 0.01, at the edge of these"
        in corrected.finding
    )
    assert "edge" not in rate_in_words([{"learning_rate": 1e-2}], (1e-3, 1e-2, 3e-2))


def test_the_gain_from_context_is_no_more_than_windows_of_one_token_leave(corrected):
    (place,) = corrected.folder.glob("trials/arm_none*/result.json")
    record = json.loads(place.read_text())
    windows = {int(n): ppl for n, ppl in record["windows"]["by_window"].items()}
    assert sorted(windows) == [1, 2, 4, 8]
    assert record["context_gain"] <= 1 - windows[8] / windows[1] + 1e-12


def test_every_weight_has_a_placebo_and_every_part_leaves_table_and_picture(corrected):
    arms = arms_of(KoopmanConfig(profile="smoke", weights=(0.1, 1.0)).resolved(), 10)
    for weight in ("0.1", "1"):
        assert arms[f"mended {weight}"].against == ("none", f"placebo {weight}")
        assert f"placebo {weight}" in arms
    assert (arms["weight 0"].seeds, arms["detached"].seeds) == (1, 1)
    judged = {(v["arm"], v["against"]) for v in corrected.verdicts}
    assert {("mended 1", "none"), ("mended 1", "placebo 1"), ("detached", "none")} <= judged
    for name in ("verdicts.csv", "equal_seconds.csv", "linearised.csv", "spectrum.csv", "recall.csv", "claims.csv",
                 "windows.csv", "arms.png", "linearised.png", "spectrum.png", "recall.png"):  # fmt: skip
        assert (corrected.folder / name).stat().st_size > 100, name
    assert set(corrected.tables()) == {
        "arms",
        "verdicts",
        "linearised",
        "speed",
        "spectrum",
        "recall",
        "claims",
    }
    # Each eigenvalue once, those that are the map's first; a conjugate pair is one.
    spectrum = corrected.tables()["spectrum"]()
    assert 0 < len(spectrum) <= 10
    residuals = [float(r["residual, held-out"]) for r in spectrum]
    assert residuals == sorted(residuals)
    assert residuals[0] == pytest.approx(min(r["residual"] for r in corrected.spectrum), abs=1e-3)
    assert "residual below 0.1 on held-out text" in corrected.finding
    assert f"(the first {corrected.config.score_tokens:,} validation tokens)" in corrected.finding
    assert len(corrected.tables()["linearised"]()) == 8
    blocks = {r["block"] for r in corrected.linearised}
    assert blocks == {"1", "2", "all"}
    operators = {r["replacement"] for r in corrected.linearised}
    assert {"skip", "mixer off", "affine", "affine, 2 positions", "EDMD", "MLP"} <= operators
    recall = {r["arm"]: r for r in corrected.recall}
    assert recall["GPT"]["accuracy_128"] is None
    assert 0 <= recall["NewLLM"]["accuracy_128"] <= 1
    assert list(recall) == ["NewLLM", "ResNetBK", "GPT", "LinearContext", "LRU"]
    assert len(corrected.claims) == 6
    assert all(r["residual"] > 1e-6 for r in corrected.spectrum)
    assert "of the parameters" in corrected.shares


def test_the_plain_model_is_loaded_with_the_perplexity_that_the_table_says(corrected, small_text):
    from bklm.harness.text import prepare_text
    from bklm.training.evaluation import evaluate

    text = prepare_text(corrected.config)
    model = corrected.load()
    found = evaluate(model, text.val_loader(), text.unk_id).perplexity
    assert found == pytest.approx(row(corrected, "none")["val_ppl"], rel=1e-5)
    # "mixer off" takes every other position away: what the context gain kept is measured against.
    ids = text.first_batch(1)[0]
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % text.vocab_size
    with model.recording_mixing() as recorded:
        model(ids)
    with model.without_mixing(recorded.means()):
        moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [3]
    tied = corrected.load("tied")
    assert tied.blocks[0] is tied.blocks[1]
    with pytest.raises(
        ValueError, match=r"^model: got 'mended 1'; kept are 'none', the plain one, and 'tied'\.$"
    ):
        corrected.load("mended 1")
    assert not list(corrected.folder.glob("trials/arm_mended*/*.safetensors"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"score_tokens": 16}, r"^score_tokens: got 16; a window of seq_len 16 takes one more than that"),
        ({"weights": (-0.1,)}, r"^weights: got \(-0\.1,\); allowed is "),
        ({"rank": 1001}, r"^rank: got 1001, above the 1000 snapshots \(fit_positions\) or the 17 features of a state; take"),
        ({"n_layers": 0}, r"^n_layers: got 0; allowed is "),
        ({"protocol": "original", "parts": "linearise"}, r"^parts: got 'linearise' with protocol 'original', whose"),
        ({"protocol": "original", "start_epoch": 3}, r"^start_epoch: got 3 with 2 epochs, so the published term would never"),
        ({"distances": (16, 4096)}, r"^distances: got \(16, 4096\); allowed is "),
        ({"trained_distance": 8, "recall_pairs": 5, "distances": (16,)}, r"^trained_distance: got 8 with 5 pairs, which"),
        ({"distances": (2, 16)}, r"^distances: got 2 with 2 pairs, which are 4 tokens long themselves; take"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence_before_anything_is_done(given, words):
    with pytest.raises(ValueError, match=words):
        KoopmanConfig(profile="smoke", **given).resolved()


def test_the_published_term_begins_after_four_tenths_of_the_epochs_unless_told():
    plan = {"profile": "full", "protocol": "original"}
    assert {n: KoopmanConfig(epochs=n, **plan).resolved().start_epoch for n in (1, 2, 3, 5, 10)} == {
        1: 1,
        2: 1,
        3: 2,
        5: 2,
        10: 4,
    }
    assert KoopmanConfig(epochs=3, start_epoch=3, **plan).resolved().start_epoch == 3


def scores(kinds: dict[str, float], gain: float = 0.2, loss: float = 4.0):
    """Rows of one seed for all blocks: a replacement's loss above the original's."""
    rows = []
    for kind, more in {"original": 0.0, "mixer off": gain, **kinds}.items():
        kept = (gain - more) / gain if gain else None
        rows.append({"block": "all", "replacement": kind, "r2": 0.5, "val_loss": loss + more, "context_gain_nats": gain,
                     "context_gain_kept": kept})  # fmt: skip
    return rows


def faster(seeds, times):
    rows = linearised_rows(seeds, {"": times, "forward_": {**times, "all blocks": times["original"]}})
    claims = claims_table([], [], [], rows, [], {}, 100.0, 0.1)
    return rows, next(c for c in claims if "linear operators" in c["announced"])


TIMES = {"original": [0.010, 0.011, 0.010], "affine": [0.001, 0.0011, 0.001], "EDMD": [0.009, 0.0101, 0.0098]}


def test_a_speed_up_holds_only_where_one_operator_is_twice_as_fast_and_no_worse():
    good = [scores({"affine": x, "EDMD": 0.0}) for x in (0.001, -0.001, 0.0)]
    assert faster(good, TIMES)[1]["verdict"] == "holds"
    # Seeds that are far apart prove nothing: a wide interval is not "no worse".
    apart = [scores({"affine": x, "EDMD": 0.0}) for x in (0.03, -0.03, 0.0)]
    assert faster(apart, TIMES)[1]["verdict"] == "not shown"
    # The fast one is worse, and the one that is no worse is not fast.
    bad = [scores({"affine": x, "EDMD": 0.0}) for x in (0.11, 0.1, 0.12)]
    rows, claim = faster(bad, TIMES)
    assert claim["verdict"] == "does not hold"
    assert "context gain kept: 45 ± " in claim["measured"]
    assert next(r for r in rows if r["replacement"] == "EDMD")["times_faster_low"] < 2
    assert faster(bad[:1], TIMES)[1]["verdict"] == "no verdict"
    slow = {**TIMES, "affine": TIMES["EDMD"]}
    assert faster(good, slow)[1]["verdict"] == "does not hold"
    # About twice as fast: neither shown nor refuted.
    about = {**TIMES, "affine": [0.0049, 0.0058, 0.0048]}
    assert faster(good, about)[1]["verdict"] == "not shown"
    # Of two operators the better may be so by chance: each interval is wider than it would be alone.
    alone = linearised_rows([[r for r in s if r["replacement"] != "EDMD"] for s in bad], {})
    wide, narrow = (
        next(r for r in found if r["replacement"] == "affine")["ppl_ratio_high"] for found in (rows, alone)
    )
    assert wide > narrow
    # A model's times are one row a replacement, and say what they are of.
    assert [r["replacement"] for r in readable_speed(rows)] == ["original", "affine", "EDMD"]
    assert readable_speed(rows)[1]["one block, times faster (95% over rounds)"].startswith("10.0 (")


def test_blocks_are_not_linear_where_the_operator_keeps_none_of_the_gain_from_context():
    """Fast, and no worse that is shown; but no better than a model that reads nothing."""
    far_apart = [scores({"affine": x, "EDMD": 0.5}) for x in (0.9, -0.4, 0.2)]
    rows, claim = faster(far_apart, TIMES)
    affine = next(r for r in rows if r["replacement"] == "affine")
    assert affine["times_faster_low"] >= 2
    assert affine["ppl_ratio_low"] <= 1
    assert affine["context_gain_kept"] < 0
    assert claim["measured"].endswith("context gain kept: none shown")
    assert claim["verdict"] == "not shown"
    worse = faster([scores({"affine": x, "EDMD": 0.5}) for x in (0.9, 0.91, 0.92)], TIMES)[1]
    assert worse["measured"].endswith("context gain kept: none")
    assert worse["verdict"] == "does not hold"
    # Something is kept, by a mean whose interval holds 0.
    kept = faster([scores({"affine": x, "EDMD": 0.5}) for x in (0.6, -0.4, 0.2)], TIMES)[1]
    assert kept["verdict"] == "not shown"


def test_where_mixing_brings_nothing_there_is_nothing_to_linearise():
    for gains in ((0.0, 0.0, 0.0), (0.01, -0.02, 0.02)):
        rows, claim = faster([scores({"affine": 0.0, "EDMD": 0.0}, gain) for gain in gains], TIMES)
        assert claim["verdict"] == "no verdict"
        assert "nothing to linearise" in claim["measured"]
        assert {r["context gain kept, all blocks"] for r in readable_linearised(rows)} == {"nothing to keep"}
    worse = faster([scores({"affine": 15.0, "EDMD": 0.1}) for _ in range(3)], TIMES)[0]
    assert {r["replacement"]: r["context gain kept, all blocks"] for r in readable_linearised(worse)}[
        "affine"
    ] == "none"


def test_at_equal_seconds_a_dearer_step_is_compared_at_an_earlier_moment_of_its_run():
    def trial(arm, seed, losses):
        return {"arm": arm, "seed": seed, "val_ppl": 1.0, "epochs": [{"val_loss": loss} for loss in losses]}

    # A loss that falls with the logarithm of the steps, which is what is drawn between two passes.
    curve = [6 - math.log(k) for k in (1, 2, 3, 4)]
    trials = [trial("none", seed, curve) for seed in range(3)]
    trials += [trial("mended 1", seed, [x - 0.1 - 0.01 * seed for x in curve]) for seed in range(3)]
    (row,) = at_equal_seconds(trials, [1.6, 1.6, 1.6], 1)
    assert row["loss_difference"] == pytest.approx(math.log(1.6) - 0.11)
    assert row["low"] > 0
    assert row["step_ratio"] == pytest.approx(1.6)
    (cheap,) = at_equal_seconds(trials, [1.0, 1.0, 1.0], 1)
    assert cheap["loss_difference"] == pytest.approx(-0.11)
    (dear,) = at_equal_seconds(trials, [5.0, 5.0, 5.0], 1)
    assert (dear["loss_difference"], dear["low"]) == (None, None)

    def verdict(found):
        judged = [
            {
                "arm": "mended 1",
                "against": "none",
                "loss_difference": -0.1,
                "low": -0.2,
                "high": -0.1,
                "verdict": "",
            }
        ]
        return [c["verdict"] for c in claims_table(judged, found, [], [], [], {}, 100.0, 0.1)]

    assert verdict([row]) == ["holds", "does not hold"]
    assert verdict([cheap]) == ["holds", "holds"]
    assert verdict([dear]) == ["holds", "no verdict"]
    assert verdict([]) == ["holds"]


def recalled(accuracies: dict[str, list[float]], distances=("16", "128", "512")):
    return [
        {"arm": arm, "seed": seed, "val_ppl": 5.0, "learning_rate": 1e-3, "parameters": 100,
         "recall": {d: (None if arm == "GPT" and d == "512" else value) for d in distances}}
        for arm, values in accuracies.items() for seed, value in enumerate(values)
    ]  # fmt: skip


def test_long_range_holds_only_beyond_the_interval_over_paired_seeds():
    steps = {name: [0.01, 0.0101, 0.0099] for name in ("LRU", "ResNetBK")}

    def verdict(linear, other, chance=0.05, gated=None):
        trials = recalled(
            {"NewLLM": other, "LRU": linear, "ResNetBK": other, "GPT": other, "LinearContext": gated or linear}
        )
        far = claims_table([], [], [], [], trials, steps, 100.0, chance)[-2:]
        assert ["(LRU)" in far[0]["announced"], "gated recurrence (LinearContext)" in far[1]["announced"]] == [
            True
        ] * 2
        return far[gated is not None]["verdict"]

    assert verdict([0.9, 0.92, 0.91], [0.1, 0.12, 0.1]) == "holds"
    assert verdict([0.2, 0.18, 0.19], [0.15, 0.19, 0.21]) == "not shown"
    assert verdict([0.2, 0.18, 0.19], [0.55, 0.59, 0.51]) == "does not hold"
    assert verdict([0.9], [0.1]) == "no verdict"
    # A rival that never learned the task, not even at the shortest distance, says nothing about distance.
    assert verdict([0.9, 0.92, 0.91], [0.1, 0.12, 0.1], chance=0.1) == "no verdict"
    # Nor does a model that did not: it is not shown to remember less.
    assert verdict([0.05, 0.5, 0.01], [0.9, 0.92, 0.91]) == "no verdict"
    assert verdict([0.1, 0.1, 0.1], [0.2, 0.21, 0.19], gated=[0.9, 0.9, 0.91]) == "holds"
    assert long_range(recalled({"NewLLM": [0.1], "LRU": [0.9]}, ("16",))) is None
    lost = recalled({"NewLLM": [0.1, 0.1], "LRU": [0.9, 0.9], "GPT": [0.5, 0.5]})
    lost[3]["val_ppl"] = None
    del lost[3]["recall"]
    rows = {r["arm"]: r for r in recall_rows(lost)}
    assert (rows["LRU"]["seeds"], rows["LRU"]["diverged"]) == (1, 1)
    assert rows["GPT"]["accuracy_512"] is None
    assert long_range(lost) == (pytest.approx(0.8), None)
    for trial in lost:
        if trial["arm"] == "NewLLM":
            trial["val_ppl"] = None
    far = claims_table([], [], [], [], lost, steps, 100.0, 0.05)[-2]
    assert (far["measured"], far["verdict"]) == ("diverged with every seed: NewLLM", "no verdict")


def test_a_recurrence_about_twice_as_fast_is_not_refuted_and_one_seed_of_a_forward_is_no_verdict():
    trials = recalled({name: [0.9, 0.9, 0.9] for name in ("NewLLM", "LRU", "ResNetBK", "GPT", "LinearContext")})

    def verdict(*slower):
        steps = {"LRU": [0.01] * 3, "ResNetBK": [0.01 * x for x in slower]}
        claims = claims_table([], [], [], [], trials, steps, 100.0, 0.05)
        return next(c["verdict"] for c in claims if "trains 2 times faster" in c["announced"])

    assert [verdict(1.9, 2.0, 2.1), verdict(1.0, 1.1, 1.0)] == ["not shown", "does not hold"]

    def stands_in(*perplexities):
        lifting = [{"koopman_ppl": x, "koopman_moves": 3} for x in perplexities]
        found = [
            {"arm": "published", "seed": n, "val_ppl": 50.0, "lifting": one} for n, one in enumerate(lifting)
        ]
        claims = claims_table([], [], found, [], [], {}, 100.0, 0.1)
        return claims[0]["verdict"]

    assert [stands_in(60.0), stands_in(60.0, 61.0, 62.0), stands_in(20.0, 90.0, 99.0), stands_in(150.0, 151.0, 152.0)] == [
        "no verdict", "holds", "not shown", "does not hold"
    ]  # fmt: skip
