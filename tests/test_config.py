"""The schema: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bklm.data import CORPUS_NAMES, load_corpus
from bklm.harness.cli import parse
from bklm.harness.config import WITHOUT_FOLDER
from bklm.harness.estimate import text_size
from bklm.notebook.form import FORMS
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig
from bklm.studies.grad_blend.config import FULL_GRID, GradBlendConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alphas", (0.0, 1.5)),
        ("alphas", (-0.1,)),
        ("alphas", (math.nan,)),
        ("alphas", ()),
        ("alphas", "all"),
        ("alphas", (0.5, 0.5)),
        ("seeds", (-1,)),
        ("seeds", (0.5,)),
        ("batch_size", 0),
        ("batch_size", True),
        ("batch_size", "many"),
        ("vocab_size", 2),
        ("learning_rates", 0),
        ("learning_rates", math.inf),
        ("dataset", "wikitext-3"),
        ("profile", "fast"),
        ("causal", "perhaps"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_that_names_field_value_and_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*; allowed is .*\.$") as caught:
        GradBlendConfig(**{field: value})
    assert "\n" not in str(caught.value)


FREE_TEXT_OTHER_THAN_PATHS = {"storage", "clip"}  # a database's address; norms by epoch


@pytest.mark.parametrize("config", FORMS.values(), ids=lambda config: config.study)
def test_every_field_of_free_text_that_names_a_file_or_folder_says_so(config):
    free = {s.name for s in config.specs() if s.base is str and not s.is_tuple and not s.choices}
    assert {s.name for s in config.specs() if s.is_path} == free - FREE_TEXT_OTHER_THAN_PATHS


def test_an_empty_field_takes_the_profiles_value_and_a_given_one_wins():
    assert GradBlendConfig(profile="smoke", d_model=None).resolved().d_model == 16
    assert GradBlendConfig(profile="smoke", d_model=48).resolved().d_model == 48
    assert GradBlendConfig(profile="smoke", alphas="").resolved().alphas == (0.0, 0.5)


@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
def test_every_profile_fills_every_field(profile):
    config = GradBlendConfig(profile=profile).resolved()
    assert [n for n, v in config.to_dict().items() if v is None] == ["data_dir", "storage"]


def test_the_word_grid_means_all_eleven_alphas():
    assert GradBlendConfig(alphas="grid").resolved().alphas == FULL_GRID
    assert len(FULL_GRID) == 11
    assert FULL_GRID[0] == 0
    assert FULL_GRID[-1] == 1


def test_the_original_protocol_turns_the_corrections_off_unless_a_field_was_given():
    original = GradBlendConfig(protocol="original").resolved()
    assert (original.causal, original.gradient) == (False, "original")
    assert GradBlendConfig(protocol="original", causal=True).resolved().causal is True
    assert GradBlendConfig().resolved().causal is True


def test_the_sweep_takes_the_model_that_reads_wherever_its_settings_allow_it():
    assert GradBlendConfig().resolved().mixer == "solve"
    for change in ({"protocol": "original"}, {"gradient": "local"}, {"causal": False}):
        assert GradBlendConfig(**change).resolved().mixer == "diagonal"
    assert GradBlendConfig(mixer="diagonal").resolved().mixer == "diagonal"


def test_more_experts_per_token_than_experts_is_refused():
    with pytest.raises(ValueError, match="top_k: got 5 with num_experts 4"):
        GradBlendConfig(profile="full", top_k=5).resolved()


def test_resolving_twice_changes_nothing():
    config = GradBlendConfig(alphas="grid", protocol="original").resolved()
    assert config.resolved() == config


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8, unique_by="{:g}".format))
def test_a_list_typed_into_the_form_reads_as_the_same_numbers(alphas):
    typed = ", ".join(repr(a) for a in alphas)
    assert GradBlendConfig(alphas=typed).alphas == GradBlendConfig(alphas=tuple(alphas)).alphas
    assert GradBlendConfig(alphas=typed).alphas == pytest.approx(tuple(alphas), rel=1e-14, abs=0)


@given(st.text(), st.sampled_from(GradBlendConfig.names()))
def test_any_text_in_any_field_is_taken_or_refused_with_a_sentence(text, field):
    refusal = None
    try:
        GradBlendConfig(**{field: text})
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith(f"{field}: got ")


def test_the_command_line_has_every_field_under_its_own_name():
    words = [
        "--profile",
        "smoke",
        "--alphas",
        "0",
        "0.3",
        "--seeds",
        "4",
        "--causal",
        "False",
        "--output_dir",
        "there",
    ]
    config = parse(GradBlendConfig, words)
    assert config == GradBlendConfig(
        profile="smoke", alphas=(0, 0.3), seeds=(4,), causal=False, output_dir="there"
    )
    assert parse(GradBlendConfig, ["--alphas", "grid"]).alphas == "grid"
    assert parse(GradBlendConfig, []) == GradBlendConfig()


def test_differences_name_what_computes_something_else_and_forgive_where_and_how_it_runs():
    recorded = GradBlendConfig(profile="smoke").resolved().to_dict()
    same = GradBlendConfig(profile="smoke", output_dir="elsewhere", device="cpu").resolved()
    assert same.differences(recorded) == []
    other = GradBlendConfig(profile="smoke", clip=1.0).resolved()
    assert other.differences(recorded) == ["clip (0.5 there, 1.0 now)"]


@pytest.mark.parametrize("study", [GradBlendConfig, BaselineConfig, EmbeddingFreezeConfig])
def test_a_folder_named_by_the_environment_is_recorded_in_the_resolved_config(study, monkeypatch):
    monkeypatch.setenv("BKLM_DATA_DIR", "/ambient")
    assert study(dataset="wikitext-2").resolved().data_dir == "/ambient"
    assert study(dataset="wikitext-2", data_dir="/given").resolved().data_dir == "/given"
    assert study(dataset="embedded").resolved().data_dir is None
    resolved = study(dataset="wikitext-2").resolved()
    assert resolved.resolved() == resolved
    monkeypatch.delenv("BKLM_DATA_DIR")
    before = study(dataset="wikitext-2").resolved()
    assert before.data_dir is None
    assert resolved.differences(before.to_dict()) == []  # a folder that was claimed before can be gone on with


@pytest.mark.parametrize("name", CORPUS_NAMES)
def test_the_environments_folder_counts_for_the_texts_that_are_read_from_it(name, monkeypatch, tmp_path):
    monkeypatch.setenv("BKLM_DATA_DIR", str(tmp_path / "nowhere"))
    if name in WITHOUT_FOLDER:
        assert load_corpus(name).name == name
    else:
        with pytest.raises(FileNotFoundError, match=r"^BKLM_DATA_DIR "):
            load_corpus(name)
        with pytest.raises(FileNotFoundError, match=r"^BKLM_DATA_DIR "):  # as a resolved config hands it on
            load_corpus(name, str(tmp_path / "nowhere"))


def test_the_estimate_is_of_the_text_that_the_environment_names(small_text, monkeypatch):
    monkeypatch.setenv("BKLM_DATA_DIR", str(small_text))
    config = GradBlendConfig(profile="full").resolved()
    vocabulary, train_tokens, _ = text_size(config.dataset, config.data_dir, config.vocab_size)
    assert vocabulary < 100
    assert train_tokens < 2000


def test_the_estimate_counts_what_the_tokenizer_makes_of_the_words():
    words, pieces, letters = (text_size("wikitext-103", None, 8000, unit) for unit in ("word", "bpe", "char"))
    assert words[0] == pieces[0] == 8000 > letters[0]
    assert words[1] < pieces[1] < 2 * words[1] < 4 * words[1] < letters[1] < 6 * words[1]


def test_a_path_is_expanded_stripped_and_anchored_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = BaselineConfig(
        profile="smoke", output_dir=" ~/out ", data_dir=Path("text"), checkpoint_dir="../c", resume_from="None"
    )
    assert config.output_dir == str(tmp_path / "home" / "out")
    resolved = config.resolved()
    assert (resolved.data_dir, resolved.checkpoint_dir) == (str(tmp_path / "text"), str(tmp_path.parent / "c"))
    assert resolved.resume_from is None
    assert resolved.resolved() == resolved


@pytest.mark.parametrize("empty", ["", "  ", "None", None])
def test_an_empty_path_is_the_default_to_every_reader(empty):
    assert GradBlendConfig(output_dir=empty).output_dir == "results"
    assert GradBlendConfig(data_dir=empty, precision=empty).to_dict() == GradBlendConfig().to_dict()


def test_a_folder_that_is_called_like_a_home_can_be_named():
    assert GradBlendConfig(output_dir="./~").output_dir == "./~"
    with pytest.raises(
        ValueError, match=r"output_dir: got '~nobody-here/x'; this machine has no home folder .*"
    ):
        GradBlendConfig(output_dir="~nobody-here/x")
    with pytest.raises(ValueError, match=r"output_dir: got 5; allowed is the path"):
        GradBlendConfig(output_dir=5)


def test_numbers_of_array_libraries_are_numbers():
    config = GradBlendConfig(
        alphas=np.linspace(0, 1, 11), seeds=np.arange(3), batch_size=np.int64(8), learning_rates=np.float32(0.1),
        dropout=np.array(0.2), top_k=torch.tensor(1), causal=np.True_,
    )  # fmt: skip
    assert config.alphas == FULL_GRID
    assert (config.seeds, config.batch_size, config.learning_rates) == ((0, 1, 2), 8, (0.1,))
    assert (config.dropout, config.top_k, config.causal) == (0.2, 1, True)
    assert GradBlendConfig(alphas=np.float64(0.5), seeds=torch.tensor(4)) == GradBlendConfig(
        alphas=(0.5,), seeds=(4,)
    )
    assert all(type(v) in (int, float, bool, str, tuple, type(None)) for v in vars(config).values())
    for field, value in (
        ("batch_size", np.True_),
        ("batch_size", np.array([8])),
        ("batch_size", np.float64(8.5)),
    ):
        with pytest.raises(ValueError, match="batch_size: got"):
            GradBlendConfig(**{field: value})


def test_rates_that_would_share_a_file_are_refused():
    with pytest.raises(ValueError, match=r"learning_rates: got .* within six digits"):
        BaselineConfig(learning_rates=(1e-3, 1.0000001e-3))
