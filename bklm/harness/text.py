"""The text of a language-model study: corpus, tokens, loaders, and the baselines that any model must be judged against."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bklm.data import (
    Corpus,
    TokenizedCorpus,
    load_corpus,
    make_loader,
    tokenize_corpus,
    windows,
)
from bklm.data.baselines import score_count_models

log = logging.getLogger(__name__)


MUCH_UNKNOWN = 0.15  # of the validation targets


class Baseline(TypedDict):
    """What a count model reaches on the validation targets."""

    name: str
    val_ppl: float
    val_ppl_without_unk: float


@dataclass(frozen=True, eq=False)
class StudyText:
    """Text ready to train on. ``baselines`` are rows with name, val_ppl and val_ppl_without_unk of the same targets."""

    corpus: Corpus
    tokens: TokenizedCorpus
    seq_len: int
    batch_size: int
    layout: str  # "every-target-once", or the original's "disjoint" blocks
    baselines: list[Baseline]
    # Training batches in one of evaluation.
    scored_at_once: ClassVar[int] = 1

    @property
    def vocab_size(self) -> int:
        return self.tokens.vocab_size

    @property
    def unk_id(self) -> int:
        return self.tokens.unk_id

    @property
    def train_tokens(self) -> int:
        return len(self.tokens.train)

    def describe(self) -> str:
        """Name and sizes, for the small print of a figure."""
        return f"{self.corpus.name}, {self.train_tokens:,} training tokens, {self.vocabulary_in_words}"

    @property
    def vocabulary_in_words(self) -> str:
        """ "vocabulary 30,000", or "vocabulary 1,000 pieces of a BPE"."""
        kind = {"piece": " pieces of a BPE", "character": " characters"}.get(self.tokens.kind, "")
        return f"vocabulary {self.vocab_size:,}{kind}"

    @property
    def is_wikitext2(self) -> bool:
        """Whether what was reported for the words of WikiText-2 may stand beside this text's numbers."""
        return self.corpus.is_wikitext2 and self.tokens.kind == "word"

    @property
    def is_demonstration(self) -> bool:
        """Whether the text is too small or too artificial to support a claim."""
        return self.corpus.is_made_here

    def train_loader(self, seed: int) -> DataLoader:
        """Shuffled by (seed, epoch) alone: two models of one seed see identical batches."""
        return self._loader(self.tokens.train, shuffle=True, seed=seed)

    def val_loader(self) -> DataLoader:
        return self._loader(self.tokens.valid)

    def search_val_loader(self, tokens: int) -> DataLoader:
        """Validation windows over the first ``tokens`` tokens (0: all), for what need not be scored on the whole split."""
        return self._loader(self.tokens.valid[: tokens or None])

    def context_loader(self, length: int, tokens: int) -> DataLoader | None:
        """Validation windows of ``length`` tokens over the first ``tokens`` tokens (0: all): the same targets at every
        length, with up to that much context. None where the text is shorter than a window or has no such windows."""
        ids = self.tokens.valid[: tokens or None]
        if len(ids) <= length:
            return None
        data = windows(ids, length, pad_id=self.tokens.pad_id)
        rows = max(1, self.batch_size * self.seq_len // length)
        return make_loader(data, min(rows, len(data)))

    def test_loader(self) -> DataLoader:
        return self._loader(self.tokens.test)

    def first_batch(self, sequences: int) -> tuple[Tensor, Tensor]:
        """The first few training windows (x, y), always the same."""
        data = self._windows(self.tokens.train)
        return data[list(range(min(sequences, len(data))))]

    def prompt(self, words: int = 12) -> str:
        """The opening words of the first validation line that is prose, to let a model continue."""
        for line in self.corpus.valid:
            if len(line.split()) > 2 * words and not line.strip().startswith("="):
                return " ".join(line.split()[:words])
        return " ".join(self.tokens.decode(self.tokens.valid[:words].tolist()).split())

    def generate(
        self, model: Any, prompt: str, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Let ``model`` continue ``prompt``, at most to its last position; the same seed gives the same text."""
        ids = torch.from_numpy(self.tokens.encode(prompt).astype(np.int64))[None]
        if ids.shape[1] == 0:
            raise ValueError("prompt: got no word; write at least one.")
        if model.n_seq is not None:  # a word may be several pieces or characters
            ids = ids[:, : model.n_seq - 1]
            max_new_tokens = min(max_new_tokens, model.n_seq - ids.shape[1])
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        out = model.generate(ids.to(device), max_new_tokens, temperature, generator)
        return self.tokens.decode(out[0].tolist())

    def vocabulary_json(self) -> str:
        """The same under the name of earlier versions, for their readers."""
        return self.tokenizer_json()

    def tokenizer_json(self) -> str:
        """The tokeniser as the tokenizers library writes it: with it a text becomes the ids that the models know."""
        return self.tokens.vocab.tokenizer.to_str(pretty=False)

    @property
    def vocabulary_sha256(self) -> str:
        """The hash of tokenizer.json, by which weights say which vocabulary they belong to."""
        return hashlib.sha256(self.tokenizer_json().encode()).hexdigest()

    def _loader(self, ids: np.ndarray, shuffle: bool = False, seed: int = 0) -> DataLoader:
        data = self._windows(ids)
        # Scoring keeps no activations: larger batches are faster, and change no sum.
        batch_size = self.batch_size if shuffle else min(self.scored_at_once * self.batch_size, len(data))
        return make_loader(data, batch_size, shuffle=shuffle, seed=seed)

    def _windows(self, ids: np.ndarray) -> Dataset:
        return windows(ids, self.seq_len, self.layout, self.tokens.pad_id)


def prepare_text(config: Any) -> StudyText:
    """Load and tokenise the text of a resolved config, check that it is large enough, and score the baselines.

    Raises:
        ValueError, OSError: see ``bklm.data.load_corpus`` and ``bklm.data.make_loader``.
    """
    corpus = load_corpus(config.dataset, config.data_dir, max_tokens=config.max_train_tokens or None)
    tokens = tokenize_corpus(corpus, config.vocab_size, config.max_train_tokens or None, config.tokenizer)
    layout = "disjoint" if getattr(config, "protocol", "") == "original" else "every-target-once"
    baselines = ngram_baselines(corpus, tokens, config.seq_len, layout)
    text = StudyText(corpus, tokens, config.seq_len, config.batch_size, layout, baselines)
    check_and_log(text, (text.train_loader(0), text.val_loader(), text.test_loader()))
    return text


def check_and_log(text: StudyText, loaders: Iterable[DataLoader]) -> None:
    """Refuse sequences and batches that the text cannot fill, and say what it is.

    Raises:
        ValueError: see ``bklm.data.make_loader``.
    """
    for loader in loaders:
        len(loader)
    targets = f"{text.val_loader().dataset.num_targets:,} validation targets"
    log.info("Text: %s, %s, from %s", text.describe(), targets, text.corpus.source)
    scores = (f"{r['name']} {r['val_ppl']:.1f}" for r in text.baselines)
    log.info("Baselines: validation PPL %s", ", ".join(scores))
    if words := warn_of_unknown(text):
        log.warning("%s", words)


def warn_of_unknown(text: StudyText) -> str:
    """A sentence where so many validation targets are the unknown word that a low perplexity says little; else ""."""
    share = float(
        (text.tokens.valid == text.unk_id).sum() / max(1, (text.tokens.valid != text.tokens.pad_id).sum())
    )
    if share < MUCH_UNKNOWN or text.tokens.kind == "piece":
        return ""
    return (
        f"{share:.0%} of the validation {text.tokens.kind}s are unknown, which flatters the perplexity: take a larger "
        f"vocab_size than {text.vocab_size:,} or more text, or tokenizer 'bpe', to which no word is unknown."
    )


def ngram_baselines(
    corpus: Corpus, tokens: TokenizedCorpus, seq_len: int, layout: str = "every-target-once", with_test: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """Unigram, Kneser-Ney and, where it is known, the text's true law: rows as in ``StudyText.baselines``; of count models
    ``with_test`` also test_ppl.

    Count models read over the windows' edges, which a model does not. The law is restarted at each window of ``seq_len``
    inputs, as a model is, and scored on every target of the split; it has no row where <unk> is one.
    """
    is_target = windows(tokens.valid, seq_len, layout).is_target if layout == "disjoint" else None
    test = (tokens.test, None) if with_test and len(tokens.test) > 1 else None
    rows = score_count_models(tokens.train, tokens.valid, tokens.vocab_size, tokens.unk_id, is_target, test)
    floor = corpus.entropy_floor("valid", context=seq_len)
    if floor is None:
        return rows
    unknown = int((tokens.valid[1:] == tokens.unk_id).sum())
    if unknown:
        # The law is one of words: merged into <unk>, the rare ones are easier to foretell, and a model may go below it.
        log.info(
            "Baselines: the text's true law is left out, for it is no floor here: %s of %s validation targets are <unk>.",
            f"{unknown:,}", f"{len(tokens.valid) - 1:,}",
        )  # fmt: skip
        return rows
    name, perplexity = f"true law, {seq_len} tokens of context", math.exp(floor)
    # No <unk>: one number.
    return [*rows, {"name": name, "val_ppl": perplexity, "val_ppl_without_unk": perplexity}]


def as_ids(text: StudyText, length: int) -> Tensor:
    """``length`` validation ids, int64 (1, length), the text repeated where it is shorter: something to measure speed on."""
    ids = text.tokens.valid.reshape(-1).astype(np.int64)
    ids = ids[ids != text.tokens.pad_id]
    return torch.from_numpy(np.resize(ids, length))[None]


def drawn_baselines(rows: Sequence[Baseline]) -> list[Baseline]:
    """Those that a figure has room for: of the Kneser-Ney models the best one."""
    counted = [row for row in rows if row["name"].startswith("Kneser-Ney")]
    best = min(counted, key=lambda row: row["val_ppl"], default=None)
    return [row for row in rows if row not in counted or row is best]


def readable_baselines(rows: Sequence[Baseline]) -> list[dict[str, Any]]:
    """One row per n-gram model: its name and its perplexities as words."""
    return [
        {
            "baseline": r["name"],
            "val PPL": f"{r['val_ppl']:.1f}",
            "without <unk>": f"{r['val_ppl_without_unk']:.1f}",
        }
        for r in rows
    ]
