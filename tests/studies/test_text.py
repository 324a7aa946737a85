"""The baselines that a study's text comes with."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from bklm.data import count_models, tokenize_corpus, windows
from bklm.data.hmm import WORDS_A_LINE, hmm_corpus
from bklm.harness.text import drawn_baselines, ngram_baselines

LINES = 80


@pytest.fixture(scope="module")
def corpus():
    """The hmm corpus with a short validation split."""
    whole = hmm_corpus()
    ids = {**whole.ids, "valid": whole.ids["valid"][: LINES * WORDS_A_LINE]}
    return dataclasses.replace(whole, valid=whole.valid[:LINES], ids=ids)


@pytest.mark.parametrize("seq_len", [8, 64])
def test_the_true_law_has_as_much_context_as_its_label_says(corpus, seq_len):
    tokens = tokenize_corpus(corpus)
    row = ngram_baselines(corpus, tokens, seq_len)[-1]
    losses = []
    for begin in range(0, len(tokens.valid) - 1, seq_len):
        window = corpus.ids["valid"][begin : begin + seq_len + 1]
        losses.extend(-corpus.model.log_probs(window)[1:])
    assert row["name"] == f"true law, {seq_len} tokens of context"
    assert row["val_ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-10)
    assert row["val_ppl"] > math.exp(corpus.entropy_floor("valid"))
    assert row["val_ppl_without_unk"] == row["val_ppl"]  # no target is <unk>


def test_in_disjoint_blocks_count_models_are_scored_on_the_targets_of_the_models(corpus):
    tokens = tokenize_corpus(corpus)
    row = ngram_baselines(corpus, tokens, 8, "disjoint")[1]
    model = count_models(tokens.train, tokens.vocab_size)[row["name"]]
    data = windows(np.arange(len(tokens.valid)), 8, "disjoint")
    targets = torch.cat([y for _, y in data]).numpy()  # their places
    assert len(targets) == data.num_targets == data.is_target.sum() < len(tokens.valid) - 1
    losses = -model.log_probs(tokens.valid)[targets - 1]
    assert row["val_ppl"] == pytest.approx(math.exp(losses.mean()), rel=1e-12)
    assert row["val_ppl"] != ngram_baselines(corpus, tokens, 8)[1]["val_ppl"]


def test_the_true_law_is_left_out_with_a_reason_where_targets_are_unknown_words(corpus, caplog):
    tokens = tokenize_corpus(corpus, 500)
    assert (tokens.valid[1:] == tokens.unk_id).any()
    with caplog.at_level(logging.INFO, logger="bklm.harness.text"):
        rows = ngram_baselines(corpus, tokens, 8)
    assert [r["name"].split(",")[0] for r in rows] == [
        "unigram",
        *(f"Kneser-Ney {n}-gram" for n in (2, 3, 4, 5)),
    ]
    assert "true law is left out, for it is no floor here: " in caplog.text
    assert "validation targets are <unk>" in caplog.text


def test_a_figure_draws_the_best_kneser_ney_model_alone(corpus):
    rows = ngram_baselines(corpus, tokenize_corpus(corpus, 500), 8)
    drawn = drawn_baselines(rows)
    assert [r["name"].split()[0] for r in drawn] == ["unigram", "Kneser-Ney"]
    assert drawn[1]["val_ppl"] == min(r["val_ppl"] for r in rows[1:])
