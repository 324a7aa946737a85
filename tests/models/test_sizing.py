"""Models of a wanted size: near it, really of the count they report, and refused where there is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.models import GPT, LSTM, LinearContext, ResNetBK
from bklm.models.sizing import gpt_of_size, linear_context_of_size, lstm_of_size, resnet_bk_of_size

NEW_LLM = 2_739_432  # the published baseline, with 1,000 words


@pytest.mark.parametrize("n_seq", [63, 128, 1024])
def test_competitors_of_the_published_baseline_are_within_one_percent_of_it(n_seq):
    for sized, model in (
        (gpt_of_size(NEW_LLM, 1000, n_seq), GPT),
        (resnet_bk_of_size(NEW_LLM, 1000, n_seq), ResNetBK),
        (resnet_bk_of_size(NEW_LLM, 1000, None), ResNetBK),
        (resnet_bk_of_size(NEW_LLM, 1000, None, mixer="solve", n_heads=8, num_experts=1), ResNetBK),
        (lstm_of_size(NEW_LLM, 1000), LSTM),
        (linear_context_of_size(NEW_LLM, 1000), LinearContext),
        (linear_context_of_size(NEW_LLM, 1000, recurrence="lru"), LinearContext),
    ):
        assert abs(sized.difference) < 0.01
        assert model(sized.config).num_parameters() == sized.parameters


@given(st.integers(20_000, 2_000_000), st.integers(10, 3000), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_no_neighbouring_width_is_nearer(wanted, vocabulary, heads):
    try:
        sized = gpt_of_size(wanted, vocabulary, 16, n_layers=1, n_heads=heads)
    except ValueError:
        return
    d = sized.config.d_model

    def count(d):  # GPT-2's, written out
        return vocabulary * d + 16 * d + 12 * d**2 + 13 * d + 2 * d

    assert count(d) == sized.parameters
    for neighbour in (d - heads, d + heads):
        assert abs(count(neighbour) - wanted) >= abs(sized.parameters - wanted)


def test_the_other_settings_are_kept():
    config = resnet_bk_of_size(50_000, 100, 32, n_layers=2, num_experts=2, dropout_p=0.0).config
    assert (config.n_layers, config.num_experts, config.dropout_p) == (2, 2, 0.0)
    config = resnet_bk_of_size(50_000, 100, None, mixer="solve", n_heads=4, num_experts=1).config
    assert (config.mixer, config.n_heads, config.d_model % 4) == ("solve", 4, 0)
    config = lstm_of_size(50_000, 100, n_layers=3, dropout_p=0.0, tied=False).config
    assert (config.n_layers, config.dropout_p, config.tied) == (3, 0.0, False)
    config = linear_context_of_size(50_000, 100, n_layers=3, dropout_p=0.0, tied=False).config
    assert (config.n_layers, config.dropout_p, config.tied) == (3, 0.0, False)
    config = gpt_of_size(50_000, 100, 32, n_layers=2, n_heads=2, dropout_p=0.0).config
    assert (config.n_layers, config.n_heads, config.dropout_p, config.n_seq) == (2, 2, 0.0, 32)


def test_a_count_below_the_smallest_model_is_refused():
    with pytest.raises(ValueError, match="parameters: got 500, but the smallest GPT"):
        gpt_of_size(500, 1000, 64)
    with pytest.raises(ValueError, match="parameters: got 0"):
        resnet_bk_of_size(0, 1000, 64)
