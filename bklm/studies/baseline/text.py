"""The text of the baseline study: contiguous windows in which every token is a target once, or the original's line windows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from bklm.data import Corpus, TokenizedCorpus, tokenize_corpus
from bklm.data.baselines import score_count_models
from bklm.data.line_windows import PAD_ID, LineVocabulary, LineWindows, line_windows
from bklm.data.units import with_lower_case
from bklm.harness.estimate import KNOWN
from bklm.harness.text import StudyText, check_and_log, ngram_baselines


@dataclass(frozen=True, eq=False)
class BaselineText(StudyText):
    """Contiguous windows. ``tokens.valid`` holds what is scored as validation, which may be two splits of the corpus."""

    scored_at_once = 4
    lowercase: bool
    validation: str

    def describe(self) -> str:
        return (
            f"{self.corpus.name}, {self.train_targets:,} training targets an epoch, {self.vocabulary_in_words}"
        )

    @property
    def train_targets(self) -> int:
        """Targets in one epoch."""
        return self.train_loader(0).dataset.num_targets

    @property
    def val_targets(self) -> int:
        return self.val_loader().dataset.num_targets

    @property
    def has_test_split(self) -> bool:
        """Whether a split is left that no choice has looked at."""
        return self.validation == "valid"

    @property
    def is_whole_wikitext2(self) -> bool:
        """Whether it is no sample: within a thousandth of the official number of training words."""
        return self.is_wikitext2 and abs(self.train_tokens - OFFICIAL_WORDS) <= OFFICIAL_WORDS / 1000

    @property
    def is_the_originals(self) -> bool:
        """Whether what the original reported may stand beside this text's numbers: WikiText-2 in lower case."""
        return self.is_wikitext2 and self.lowercase

    @property
    def vocabulary_name(self) -> str:
        """What a checkpoint says of the vocabulary it was trained with: its words in the order of their ids."""
        digest = hashlib.sha256("\n".join(self.tokens.vocab.words).encode()).hexdigest()
        return f"{self.vocab_size} {self.tokens.kind}s, SHA-256 {digest[:8]}"

    def search_loader(self, seed: int, tokens: int) -> DataLoader:
        """Training windows over the first ``tokens`` tokens (0: all), for the learning-rate search."""
        return self._loader(self._first(self.tokens.train, tokens), shuffle=True, seed=seed)

    def search_val_loader(self, tokens: int) -> DataLoader:
        """Validation windows that the search is judged by: of no more tokens than it trains on."""
        return self._loader(self._first(self.tokens.valid, tokens))

    def generate(
        self, model: Any, prompt: str, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
    ) -> str:
        prompt = prompt.lower() if self.lowercase else prompt
        return super().generate(model, prompt, max_new_tokens, temperature, seed)

    def vocabulary_json(self) -> str:
        return json.dumps(self.tokens.vocab.ids, ensure_ascii=False)

    def tokenizer_json(self) -> str:
        tokenizer = self.tokens.vocab.tokenizer
        return (with_lower_case(tokenizer) if self.lowercase else tokenizer).to_str(pretty=False)

    def _first(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return ids[: tokens or None]


def describe_text(text: BaselineText) -> list[str]:
    """Where a text comes from, its sizes, and how much of it is the unknown word, in sentences for a notebook."""
    unknown = sum(int((y == text.unk_id).sum()) for _, y in text.val_loader()) / text.val_targets
    sizes = f"{text.train_targets:,} training and {text.val_targets:,} validation targets, {text.vocabulary_in_words}"
    share = f"{unknown:.0%} of the validation targets are the unknown word"
    return [f"{text.corpus.name}, from {text.corpus.source}", f"{sizes}; {share}"]


OFFICIAL_WORDS = KNOWN["wikitext-2"][1]
LINES = "lines"


class LineText(BaselineText):
    """The original's windows: ``tokens`` holds rows of ids (windows, 64)."""

    @property
    def train_tokens(self) -> int:
        return self.train_targets

    def context_loader(self, length: int, tokens: int) -> None:
        return None

    def _first(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        return _first_rows(ids, tokens)

    def _windows(self, ids: np.ndarray) -> Dataset:
        return LineWindows(ids)


def make_text(
    corpus: Corpus, *, lowercase: bool, validation: str, vocab_size: int, max_train_tokens: int,
    seq_len: int, batch_size: int, search_tokens: int | None, tokenizer: str,
) -> BaselineText:  # fmt: skip
    """Lower-case and cut a corpus, check that it is large enough, and score the n-gram baselines.

    Args:
        tokenizer: "word", "bpe" or "char"; "lines" for the words of the original's windows.
        validation: "valid", or "valid+test" to score both splits as one.
        search_tokens: of each trial of the learning-rate search (0: all); None where there is no search.

    Raises:
        ValueError: see ``bklm.data.make_loader``.
    """
    splits = {name: list(corpus.split(name)) for name in ("train", "valid", "test")}
    if lowercase:
        splits = {name: [line.lower() for line in lines] for name, lines in splits.items()}
    if validation == "valid+test":
        splits["valid"] += splits["test"]
    if tokenizer == LINES:
        vocabulary = LineVocabulary.train(splits["train"], vocab_size)
        rows = {split: line_windows(lines, vocabulary).rows for split, lines in splits.items()}
        rows["train"] = _first_rows(rows["train"], max_train_tokens)
        tokens = TokenizedCorpus(**rows, vocab=vocabulary, name=corpus.name, sha256=corpus.sha256)
        baselines = _line_baselines(tokens, with_test=validation == "valid")
    else:
        cased = Corpus(corpus.name, corpus.source, **splits)
        tokens = tokenize_corpus(cased, vocab_size, max_train_tokens or None, tokenizer)
        # The true law of an artificial text is no floor here: rare words are merged into <unk>, which makes the text easier.
        baselines = ngram_baselines(cased, tokens, seq_len, with_test=validation == "valid")
    kind, layout = (LineText, "lines") if tokenizer == LINES else (BaselineText, "every-target-once")
    text = kind(corpus, tokens, seq_len, batch_size, layout, baselines, lowercase, validation)
    loaders = [text.train_loader(0), text.val_loader()]
    if search_tokens is not None:
        loaders += [text.search_loader(0, search_tokens), text.search_val_loader(search_tokens)]
    if text.has_test_split:
        loaders.append(text.test_loader())
    check_and_log(text, loaders)
    return text


def _first_rows(rows: np.ndarray, targets: int) -> np.ndarray:
    """As many of the first windows as hold no more than ``targets`` targets, one at least; 0: all."""
    if not targets:
        return rows
    counted = (rows[:, 1:] != PAD_ID).sum(1).cumsum()
    return rows[: max(1, int(np.searchsorted(counted, targets, "right")))]


def _line_baselines(tokens: TokenizedCorpus, with_test: bool) -> list[dict[str, Any]]:
    """Unigram and Kneser-Ney over the windows laid end to end; a window's first token is no target, as for the models.

    The second words of a window see the last ones of the window before: context that no model has.
    """
    train = tokens.train[tokens.train != PAD_ID]
    test = _laid_out(tokens.test) if with_test and len(tokens.test) else None
    valid, is_target = _laid_out(tokens.valid)
    return score_count_models(train, valid, tokens.vocab_size, tokens.unk_id, is_target, test)


def _laid_out(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows of ids (windows, length) as one text (tokens,), and which tokens after its first are targets."""
    is_text = rows != PAD_ID
    is_first = np.zeros_like(is_text)
    is_first[:, 0] = True
    return rows[is_text], ~is_first[is_text][1:]
