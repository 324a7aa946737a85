"""How the embedding-freeze study judges: effects over paired seeds, verdicts by the interval, sentences from the numbers."""

from __future__ import annotations

import itertools

import pytest

from bklm.studies.embedding_freeze.config import FACTORS, ORIGINAL_ARMS, Arm
from bklm.studies.embedding_freeze.figures import draw_arms
from bklm.studies.embedding_freeze.findings import (
    headline,
    state_baselines,
    state_context_gain,
    state_finding,
    state_limits,
    state_original,
    state_phase1,
    state_rule,
)
from bklm.studies.embedding_freeze.tables import (
    arm_table,
    best_trial,
    effect,
    effect_table,
    readable_arms,
    verdict,
)
from bklm.training.evaluation import LARGEST_PERPLEXITY

NOISE = {0: 1.00, 1: 1.10, 2: 0.95}  # a seed's own scatter, the same in all arms


def trial(arm: Arm, samples: int, seed: int, ppl: float, tokens_per_parameter: float = 1.0) -> dict:
    return {
        "arm": arm.name, "initialisation": arm.initialisation, "freezing": arm.freezing, "head": arm.head,
        "original": arm.original, "samples": samples, "seed": seed, "val_ppl": ppl, "val_ppl_without_unk": ppl,
        "val_accuracy": 0.2, "gap": 0.1, "best_epoch": 2, "seconds": 3.0, "train_tokens": 500 * samples, "parameters": 100,
        "trainable_parameters": 50, "tokens_per_parameter": tokens_per_parameter, "learning_rate": 2e-3,
    }  # fmt: skip


def study(
    seeds=(0, 1, 2), samples=(500, 1000), pretraining=1.0, freezing=1.0, tying=1.0, wobble=None
) -> list[dict]:
    """All controlled arms; each factor's first value multiplies PPL by what is given, whatever the seed."""
    trials = []
    for values in itertools.product(*FACTORS.values()):
        arm = Arm(*values)
        for size, seed in itertools.product(samples, seeds):
            ppl = 300 * NOISE[seed] * (500 / size) ** 0.2
            ppl *= pretraining if arm.initialisation == "pretrained" else 1
            ppl *= freezing if arm.freezing == "frozen" else 1
            ppl *= tying if arm.head == "tied" else 1
            if wobble and arm.freezing == "frozen":
                ppl *= wobble[seed]
            trials.append(trial(arm, size, seed, ppl))
    return trials


def test_a_perplexity_off_the_scale_gives_its_factors_no_verdict():
    trials = study(pretraining=0.8)
    for capped in [t for t in trials if t["freezing"] == "frozen" or t["seed"] == 0]:
        capped["val_ppl"] = LARGEST_PERPLEXITY
    assert verdict(effect(trials, "freezing")) == "no verdict"
    assert "no verdict, because a perplexity is too large to be recorded" in state_finding(trials).lower()
    assert "no difference" not in state_finding(trials)
    assert "made a difference" not in state_finding(trials)


def test_a_constant_ratio_is_found_exactly_although_the_seeds_scatter():
    trials = study(pretraining=0.8, freezing=1.25, tying=0.9)
    for factor, ratio in (("initialisation", 0.8), ("freezing", 1.25), ("head", 0.9)):
        found = effect(trials, factor)
        assert found.mean == pytest.approx(ratio)
        assert found.high - found.low < 1e-9


def test_an_effect_within_one_value_of_another_factor_is_that_of_those_cells_alone():
    trials = study()
    for t in trials:  # freezing harms where the embedding is random, and only there
        if t["initialisation"] == "random" and t["freezing"] == "frozen":
            t["val_ppl"] *= 2
    assert effect(trials, "freezing", {"initialisation": "random"}).mean == pytest.approx(2)
    assert effect(trials, "freezing", {"initialisation": "pretrained"}).mean == pytest.approx(1)
    assert effect(trials, "freezing").mean == pytest.approx(2**0.5)
    rows = {(r["factor"], r["where"]): r["verdict"] for r in effect_table(trials)}
    assert rows["freezing", "random embedding"] == "higher"
    assert rows["freezing", "pretrained embedding"] == "no difference"
    assert ("freezing", "500 samples") in rows


def test_a_difference_inside_its_interval_is_called_none_and_one_outside_by_its_side():
    assert verdict(effect(study(freezing=0.9), "freezing")) == "lower"
    assert verdict(effect(study(freezing=1.1), "freezing")) == "higher"
    assert verdict(effect(study(wobble={0: 0.8, 1: 1.2, 2: 1.05}), "freezing")) == "no difference"
    assert verdict(effect(study(seeds=(0,), freezing=0.5), "freezing")) == "no verdict"


def test_the_closing_sentence_names_what_made_the_difference_largest_first_and_calls_the_rest_none():
    sentence = state_finding(study(pretraining=0.7, tying=1.1, wobble={0: 0.9, 1: 1.1, 2: 1.0}))
    assert sentence.startswith(
        "Pretraining and tying made a difference over 3 paired seeds: a pretrained instead of a random"
    )
    assert "not told apart by the 95% interval: freezing the embedding instead of training it" in sentence
    assert "gives a lower PPL, x0.700" in sentence
    assert "gives a higher PPL, x1.100" in sentence
    nothing = state_finding(study(wobble={0: 0.9, 1: 1.1, 2: 1.0}))
    assert "made a difference" not in nothing
    assert "no verdict" in state_finding(study(seeds=(0,)))
    assert "No factor was varied" in state_finding(
        [t for t in study() if t["arm"] == "pretrained, frozen, tied"]
    )
    assert "freezing x1.200 (higher)" in headline(study(freezing=1.2))


def test_the_originals_unequal_arms_do_not_enter_the_effects():
    trials = study(freezing=0.9)
    unequal = [trial(arm, 500, seed, 10.0) for arm in ORIGINAL_ARMS for seed in (0, 1, 2)]
    assert effect(trials + unequal, "freezing") == effect(trials, "freezing")


def test_what_the_original_reported_stands_beside_the_arms_that_it_is_about():
    trials = study() + [trial(arm, 500, seed, 300.0) for arm in ORIGINAL_ARMS for seed in (0, 1, 2)]
    reported = {(r["arm"], r["samples"]): r["original_val_ppl"] for r in arm_table(trials)}
    assert reported["pretrained, frozen, tied", 500] == 334.31
    assert reported["pretrained, frozen, tied", 1000] == 280.27
    assert reported["original comparison: trained", 500] == 1189.15
    assert reported["pretrained, trained, tied", 500] is None  # the original never trained the embedding
    shown = {
        r["arm"]: r["PPL reported by the original"]
        for r in readable_arms(arm_table(trials))
        if r["samples"] == 500
    }
    assert shown["original comparison: frozen"] == "334.3"
    assert shown["random, frozen, tied"] == "-"


def test_the_unequal_comparison_is_said_to_be_lower_or_higher_beside_the_reported_claim():
    frozen, other = ORIGINAL_ARMS
    trials = [
        trial(frozen, 500, 0, 80.0),
        trial(other, 500, 0, 100.0),
        trial(frozen, 1000, 0, 110.0),
        trial(other, 1000, 0, 100.0),
    ]
    sentence = state_original(trials)
    assert "20% lower with 500 samples and 10% higher with 1000 samples" in sentence
    assert "72% lower with 500" in sentence
    assert state_original(study()) == ""


def test_the_rule_of_20_tokens_is_counted_and_its_two_predictions_are_measured():
    trials = study()
    for i, t in enumerate(sorted(trials, key=lambda t: t["arm"])):
        t["tokens_per_parameter"] = 1.0 + i // 6
        t["gap"], t["val_ppl"] = -t["tokens_per_parameter"], 100 + t["tokens_per_parameter"]
    sentence = state_rule(trials)
    assert "so no arm meets it" in sentence
    assert "+1.00 with validation PPL and -1.00 with the train-validation gap" in sentence
    trials[0]["tokens_per_parameter"] = 25.0
    assert "1 of 16 arms meet it" in state_rule(trials)


def test_intervals_of_one_seed_are_unknown_and_not_zero():
    row = arm_table(study(seeds=(0,), samples=(500,)))[0]
    assert (row["val_ppl_low"], row["accuracy_95"], row["gap_95"]) == (None, None, None)
    assert "±" not in readable_arms([row])[0]["accuracy %"]


def test_a_phase_1_that_freezing_had_changed_would_be_counted():
    rows = [{"converged": 0.9, "effective_rank": 0.7, "effective_rank_centred": 0.8, "iteration": 7}]
    runs = [
        {"initialisation": "pretrained", "rows": rows, "converged": True, "unaffected": u}
        for u in (True, False, None)
    ]
    assert "in 1 of 2 cases" in state_phase1(runs)


def test_phase_1_says_how_many_runs_met_the_rule_and_where_the_others_ended():
    def run(converged, fraction, iteration):
        last = {
            "converged": fraction,
            "effective_rank": 0.7,
            "effective_rank_centred": 0.8,
            "iteration": iteration,
        }
        return {"initialisation": "random", "rows": [last], "converged": converged, "unaffected": None}

    said = state_phase1([run(True, 0.97, 3), run(True, 0.96, 5), run(False, 0.41, 10)])
    assert "2 of 3 runs met the rule at iteration 3 to 5, the rest ended with 41.0% of tokens" in said


def test_effects_that_differ_beyond_their_intervals_are_both_given_and_equal_ones_are_not():
    trials = study(freezing=1.2)
    assert "it depends" not in state_finding(trials)
    for t in trials:
        if (t["freezing"], t["head"]) == ("frozen", "tied"):
            t["val_ppl"] *= 3
    said = state_finding(trials)
    assert "x3.600 (3.600 to 3.600) with a tied head and x1.200 (1.200 to 1.200) with an untied head" in said
    assert "the output matrix is frozen too" in said


def test_arms_are_counted_against_the_count_models_of_their_own_sample():
    trials = study(samples=(500,), freezing=3.0)  # about 304 trained, 912 frozen
    counts = [
        {"samples": 500, "name": n, "val_ppl": v} for n, v in (("unigram", 500.0), ("Kneser-Ney 3-gram", 310.0))
    ]
    assert state_baselines(trials, counts).startswith("4 of 8 arms (each sample size counted) beat Kneser-Ney")
    assert "4 are worse than the unigram" in state_baselines(trials, counts)


def test_trials_at_the_epoch_limit_and_rates_at_the_edge_of_the_search_are_counted():
    trials = [t | {"epochs": [{}] * (10 if t["seed"] == 0 else 7)} for t in study(samples=(500,))]
    trials = [t | {"learning_rate": 4e-3 if t["head"] == "tied" else 2e-3} for t in trials]
    said = state_limits(trials, 10, (1e-3, 2e-3, 4e-3))
    assert said.startswith("8 of 24 trials ended at the limit of 10 epochs; ")
    assert "edge of the search in 4 of 8 arms" in said


def test_any_number_of_sample_sizes_can_be_drawn(tmp_path):
    """There are fewer markers than sizes may be asked for."""
    table = arm_table(study(seeds=(0,), samples=tuple(range(100, 1100, 100))))
    assert draw_arms(tmp_path / "arms.png", table, [], "title", "note").stat().st_size > 10_000


def test_a_cell_that_lost_a_seed_enters_no_effect_and_its_arm_is_no_candidate_for_the_best():
    trials = study(freezing=0.9, tying=0.8)
    for t in trials:
        if (t["arm"], t["samples"]) == ("random, frozen, tied", 1000):
            # It would be the best arm, and the mean effect of freezing another, if what is left of it counted.
            t["val_ppl"] = 10.0 if t["seed"] else None
    assert effect(trials, "freezing").mean == pytest.approx(0.9)
    assert effect(trials, "freezing", {"head": "tied"}).low == pytest.approx(0.9)
    best = best_trial(trials)
    assert (best["arm"], best["samples"], best["seed"]) == ("pretrained, frozen, tied", 1000, 0)
    row = next(r for r in arm_table(trials) if (r["arm"], r["samples"]) == ("random, frozen, tied", 1000))
    assert (row["seeds"], row["diverged"]) == (2, 1)
    said = state_finding(trials)
    assert "over 3 paired seeds" in said
    assert "Diverged, and in none of these numbers: random, frozen, tied, 1000 samples, seed 0." in said
    assert "diverged: random, frozen, tied, 1000 samples (1 seed)" in headline(trials)


def test_seeds_that_every_cell_lost_leave_the_effects_to_the_others():
    trials = [t | {"val_ppl": None} if t["seed"] == 1 else t for t in study(freezing=0.9)]
    assert effect(trials, "freezing").mean == pytest.approx(0.9)
    assert verdict(effect(trials, "freezing")) == "no verdict"
    assert "two seeds, so ranges, no interval and no verdict" in state_finding(trials)


def test_the_originals_arm_that_is_scored_on_other_documents_is_never_the_best():
    unequal = [trial(ORIGINAL_ARMS[1], 500, seed, 10.0) for seed in (0, 1, 2)]
    assert best_trial(study() + unequal)["original"] == ""
    lost = [t | {"val_ppl": None} for t in study()]
    assert best_trial(lost + unequal)["original"] == "trained"


def test_the_gain_from_context_is_told_over_arms_and_who_gains_nothing():
    trials = study()
    # A run of an earlier version did not measure it.
    assert state_context_gain(trials) == ""
    for i, t in enumerate(trials):
        t["context_gain"] = (
            0.001 if t["head"] == "tied" and t["freezing"] == "frozen" else 0.05 + 0.001 * (i % 3)
        )
    said = state_context_gain(trials)
    assert said.startswith(
        "Context lowers the perplexity by 0.1% to 5.1% (arms and sample sizes); 4 of 16 are bigram"
    )
    assert {row["context gain"] for row in readable_arms(arm_table(trials))} == {
        "0.10%: a bigram model",
        "5.1%",
    }
