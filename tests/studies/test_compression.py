"""The compression study: what is compared with what, what is recommended, and when an announced number holds."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from small import run_of, small

from bklm.compression import load_compressed
from bklm.harness.arms import Arm
from bklm.harness.text import prepare_text
from bklm.studies.compression import claims, figures, methods, models, run, speed, tables
from bklm.training.evaluation import evaluate


@pytest.fixture(scope="module")
def result(tmp_path_factory, small_text):
    return run_of("compression")(small("compression", tmp_path_factory.mktemp("run"), small_text, models="all"))


def trials(*rows):
    """Trials of three seeds: (arm, perplexity, bytes); a seed's perplexities are a few percent apart."""
    return [
        {
            "arm": arm, "seed": seed, "val_ppl": ppl * (1 + 0.03 * seed) * (1 + noise * seed), "file_bytes": size,
            "packed_file_bytes": size, "parameters": size // 4, "val_ppl_without_unk": ppl, "seconds": 1.0, "epochs": [],
        }
        for arm, ppl, size, *more in rows
        for noise in (more or [0.0005])
        for seed in range(3)
    ]  # fmt: skip


def test_every_method_starts_from_the_trained_model_and_every_file_has_its_size(result):
    rows = {r["arm"]: r for r in result.table}
    for family in ("ResNetBK", "NewLLM"):
        assert rows[f"{family}: float16"]["val_ppl"] == pytest.approx(rows[family]["val_ppl"], rel=1e-2)
        assert rows[f"{family}: int8"]["file_bytes"] < rows[family]["file_bytes"]
        assert rows[f"{family}, width 0.5"]["parameters"] < rows[family]["parameters"]
        for how in ("per tensor", "per token", "SmoothQuant", "outlier columns", "torch.ao"):
            assert rows[f"{family}: int8 products, {how}"]["val_ppl"] == pytest.approx(
                rows[family]["val_ppl"], rel=0.05
            )
    assert (
        rows["ResNetBK with experts: 2 experts left, int8"]["parameters"]
        < rows["ResNetBK with experts"]["parameters"]
    )
    assert any("block skipped" in arm for arm in rows)


def test_a_recommended_file_is_kept_and_scores_as_its_row_says(result, small_text):
    text = prepare_text(result.config)
    row = next(r for r in result.recommended if r["family"] == "ResNetBK")
    model = load_compressed(models.place_of(result.folder, row["arm"]))
    assert models.place_of(result.folder, row["arm"]).stat().st_size == row["file_bytes"]
    assert evaluate(model, text.val_loader(), text.unk_id).perplexity == pytest.approx(row["val_ppl"], rel=1e-5)
    assert torch.equal(
        model(torch.zeros(1, 4, dtype=torch.int64)),
        result.load(row["arm"])(torch.zeros(1, 4, dtype=torch.int64)),
    )
    with pytest.raises(
        ValueError, match=r"model: got 'x'; kept are 'ResNetBK', 'ResNetBK, width 0\.5'.*: int8'"
    ):
        result.load("x")


def test_int8_is_kept_whatever_is_recommended_and_a_file_of_another_kind_is_passed_over(result):
    study = SimpleNamespace(config=result.config, folder=result.folder, text=prepare_text(result.config))
    run._keep_recommended(study, [{"arm": f"NewLLM: {methods.TORCH_AO}"}])
    assert not models.place_of(result.folder, f"NewLLM: {methods.TORCH_AO}").exists()
    for family in models.families(result.config):
        assert type(result.load(f"{family}: int8")) is type(result.load(family))


def test_a_width_that_diverged_is_not_timed_and_the_others_are(result):
    study = SimpleNamespace(config=result.config, folder=result.folder, text=prepare_text(result.config))
    lost = [
        {"arm": "NewLLM", "seed": 0, "val_ppl": 9.0},
        {"arm": "NewLLM, width 0.5", "seed": 0, "val_ppl": None},
    ]
    timed = speed.speeds(study, lost)["models"]["NewLLM"]["scored"]
    assert speed.FLOAT in timed
    assert "width 0.5" not in timed


def test_of_three_experts_two_are_left_because_fewer_are_another_kind_of_model(result):
    few = dataclasses.replace(result.config, num_experts=3)
    assert list(methods.methods_of(few, models.EXPERTS)) == ["int8", "2 experts left, int8"]


def test_retrained_arms_go_on_from_their_seeds_model_and_students_begin_as_their_controls(result):
    config, folder = result.config, result.folder
    vocabulary = json.loads(next(folder.glob("trials/*/result.json")).read_text())["vocabulary"]
    base = models.load_model(folder, config, "NewLLM", 0)
    for name, arm in models.retrained_arms(config, folder, 10).items():
        torch.manual_seed(0)
        made = arm.build(vocabulary)
        inside = getattr(made, "model", made)
        if name.startswith("NewLLM"):
            assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), base.parameters(), strict=True))
    student_arm = models.student_arms(config, folder)["NewLLM, student at T 2"]
    torch.manual_seed(0)
    student = student_arm.build(vocabulary).model
    torch.manual_seed(0)
    control = models.first_arms(config)[student_arm.against[0]].build(vocabulary)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), control.parameters(), strict=True))


def test_what_was_trained_further_is_compared_with_the_model_after_as_many_steps_more():
    found = trials(("NewLLM", 100.0, 4000), ("NewLLM, more steps", 80.0, 4000), ("NewLLM, 4 bits in training", 82.0, 600),
                   ("NewLLM: int4", 101.0, 600))  # fmt: skip
    rows = {r["arm"]: r for r in tables.file_rows(found)}
    assert rows["NewLLM, 4 bits in training"]["ppl_ratio"] == pytest.approx(82 / 80)
    assert rows["NewLLM: int4"]["ppl_ratio"] == pytest.approx(1.01)
    assert rows["NewLLM: int4"]["times_smaller"] == pytest.approx(4000 / 600)


def test_recommended_is_the_smallest_file_whose_upper_end_is_within_the_bound():
    found = trials(("NewLLM", 100.0, 4000, 0.0), ("NewLLM: int8", 100.1, 1000, 0.0), ("NewLLM: int4", 102.0, 500, 0.01),
                   ("NewLLM: int3", 110.0, 400, 0.0))  # fmt: skip
    told = {r["within"]: r["arm"] for r in tables.recommended(tables.file_rows(found))}
    # int4's mean is within 3.1%, and its interval is not within 3%.
    assert told == {0.01: "NewLLM: int8", 0.03: "NewLLM: int8", 0.15: "NewLLM: int3"}
    assert "no verdict" not in tables.recommended_in_words(tables.recommended(tables.file_rows(found)))
    one = [t for t in found if t["seed"] == 0]
    assert "no verdict" in tables.recommended_in_words(tables.recommended(tables.file_rows(one)))


def verdict_of(found, words, arms=None, shares=()):
    rows = tables.file_rows(found)
    table = claims.claims_table(rows, claims.judged(found, arms or {}), shares)
    return next(r["verdict"] for r in table if words in r["announced"])


def test_four_times_by_int8_must_be_small_and_near_in_the_same_file():
    float32 = ("NewLLM", 100.0, 4000, 0.0)
    assert verdict_of(trials(float32, ("NewLLM: int8", 100.2, 1010, 0.0)), "4 times smaller") == "holds"
    apart = trials(
        float32, ("NewLLM: int8", 104.0, 1010, 0.0), ("NewLLM: int8 products, per token", 100.0, 2000, 0.0)
    )
    assert verdict_of(apart, "4 times smaller") == "does not hold"
    seedless = [t for t in trials(float32, ("NewLLM: int8", 100.2, 1010, 0.0)) if t["seed"] == 0]
    assert verdict_of(seedless, "4 times smaller") == "no verdict"


def test_a_hundred_times_is_judged_by_the_largest_ratio_within_fifteen_percent():
    float32 = ("NewLLM", 100.0, 400_000, 0.0)
    near, far = ("NewLLM: int3", 112.0, 40_000, 0.0), ("NewLLM: int2", 300.0, 3000, 0.0)
    assert verdict_of(trials(float32, near, far), "100 times smaller") == "does not hold"
    assert verdict_of(trials(float32, ("NewLLM: int2", 112.0, 3000, 0.0)), "100 times smaller") == "holds"


def test_a_student_must_beat_the_same_student_from_the_text_alone():
    arms = {"NewLLM, student at T 2": Arm(None, ("NewLLM, width 0.5",))}
    base = (("NewLLM", 100.0, 4000, 0.0), ("NewLLM, width 0.5", 120.0, 2000, 0.0))
    for ppl, verdict in ((110.0, "holds"), (130.0, "does not hold")):
        found = trials(*base, ("NewLLM, student at T 2", ppl, 2000, 0.0002))
        assert verdict_of(found, "better student", arms) == verdict


def test_zeros_are_judged_against_chance_and_against_a_dense_model_of_no_more_bytes():
    found = trials(
        ("NewLLM", 100.0, 4000, 0.0), ("NewLLM, width 0.5", 120.0, 1800, 0.0), ("NewLLM, width 0.5: int8", 120.0, 450, 0.0),
        ("NewLLM: 50% zeros, magnitude, int8", 105.0, 600, 0.0001), ("NewLLM: 50% zeros, random, int8", 150.0, 600, 0.0),
    )  # fmt: skip
    rows = claims.judged(found, {})
    against = [r["against"] for r in rows if "magnitude" in r["arm"]]
    assert against == ["NewLLM: 50% zeros, random, int8", "NewLLM, width 0.5: int8"]
    assert verdict_of(found, "zeros beat a smaller dense model") == "holds"
    # One whose file is larger than the pruned one's is no control at equal bytes.
    larger = [{**t, "file_bytes": 700} if t["arm"].endswith("0.5: int8") else t for t in found]
    assert not any("width" in r["against"] for r in claims.judged(larger, {}))


@pytest.mark.parametrize(("share", "verdict"), [(0.05, "does not hold"), (0.6, "holds"), (1.0, "no verdict")])
def test_a_sparse_core_is_bounded_by_the_cores_share_of_the_time(share, verdict):
    found = trials(("ResNetBK", 100.0, 4000))
    shares = [{"family": "ResNetBK", "core_time_share": share, "outer_parameter_share": 0.5}]
    assert verdict_of(found, "a sparse core", shares=shares) == verdict


def test_the_figure_is_drawn_without_kneser_ney_in_sight_and_not_at_all_without_a_model(tmp_path):
    rows = tables.file_rows(trials(("NewLLM", 100.0, 4000), ("NewLLM: int8", 100.2, 1010)))
    far = [{"arm": "Kneser-Ney 2-gram", "val_ppl": 1e4, "file_bytes": 10}]
    assert figures.draw_files(tmp_path / "a.png", rows, far, "title", "note").exists()
    assert figures.draw_files(tmp_path / "b.png", [], far, "title", "note") is None
