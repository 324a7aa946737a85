"""Byte-level BPE: GPT-2's own, from the hub or a folder, or one trained on a text.

Byte-level means that every text can be written: there is no word outside the vocabulary. A literal ``<unk>``, which
WikiText's v1 text has for rare words, is one token in a trained BPE; in GPT-2's it falls into pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bklm.data.checks import require_whole
from bklm.data.tokens import UNK, dtype_of_ids

GPT2_FILES = ("vocab.json", "merges.txt")
GPT2_SIZE = 50_257
SMALLEST = 258  # the 256 bytes, <unk>, and one merge
WORDS_AT_ONCE = 10_000


class Bpe:
    """A byte-level BPE. ``unk_id`` is the token of a literal ``<unk>``, None where it is not one token."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        self.tokenizer, self.source = tokenizer, source
        special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
        self.unk_id: int | None = special.get(UNK)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __repr__(self) -> str:
        return f"Bpe({len(self):,} tokens, {self.source})"

    @property
    def dtype(self) -> np.dtype:
        """The smaller of uint16 and int32 that holds every id."""
        return dtype_of_ids(len(self))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over vocabulary and merges (hex), for keys and manifests."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (tokens,)."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """The ids of each text, (tokens,), cut after ``max_tokens``; no token is added between or around them."""
        if max_tokens is not None:
            max_tokens = require_whole("max_tokens", max_tokens, 1, ", or None for whole texts")
        encoded: list[np.ndarray] = []
        for begin in range(0, len(texts), 256):  # an encoding is some 50 times as large as its ids
            batch = self.tokenizer.encode_batch_fast(list(texts[begin : begin + 256]))
            encoded += [np.asarray(one.ids[:max_tokens], self.dtype) for one in batch]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that make no character become U+FFFD."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def gpt2_bpe(folder: str | os.PathLike[str] | None = None) -> Bpe:
    """GPT-2's BPE, 50,257 tokens, from a folder with vocab.json and merges.txt, or without one from the hub.

    Raises:
        OSError: the folder lacks a file (FileNotFoundError), or the hub cannot be reached (ConnectionError).
        ValueError: the files are no BPE, or one of another size.
    """
    if folder is None or not str(folder):
        from bklm.data.hub_models import GPT2, fetch_file

        way_on = "give gpt2_dir a folder with vocab.json and merges.txt, or choose tokenizer 'corpus'"
        files = [fetch_file(GPT2, name, way_on) for name in GPT2_FILES]
        source = f"Hugging Face {GPT2}"
    else:
        files = [Path(folder).expanduser() / name for name in GPT2_FILES]
        source = f"vocab.json and merges.txt in {folder}"
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"gpt2_dir {str(folder)!r} lacks {' and '.join(missing)}; give a folder with GPT-2's vocab.json and "
                f"merges.txt, or leave it empty to fetch them from the hub"
            )
    try:
        tokenizer = _byte_level(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library's own errors have no common type
        raise ValueError(
            f"{source} are no BPE that can be read ({error}); fetch GPT-2's files again"
        ) from error
    if tokenizer.get_vocab_size() != GPT2_SIZE:
        raise ValueError(
            f"{source} hold {tokenizer.get_vocab_size():,} tokens, but GPT-2 has {GPT2_SIZE:,}; give GPT-2's own files"
        )
    return Bpe(tokenizer, f"GPT-2 BPE, {source}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """A byte-level BPE of at most ``vocab_size`` tokens from ``texts``; the same texts give the same BPE.

    Pairs that occur once are not merged, so that a small text gives a smaller vocabulary.

    Raises:
        ValueError: ``vocab_size`` below 258, or texts without a character.
    """
    vocab_size = require_whole("vocab_size", vocab_size, SMALLEST, f": 256 bytes, {UNK} and one merge")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[UNK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    if tokenizer.get_vocab_size() <= 257:
        raise ValueError("the texts hold no pair of characters twice; a BPE cannot be trained on them")
    return Bpe(tokenizer, f"BPE of {tokenizer.get_vocab_size():,} tokens trained on the text")


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Lines, without ``<unk>`` and cut to a bounded length: the trainer keeps many times a line's length in memory."""
    for text in texts:
        for line in text.split("\n"):
            words = line.replace(UNK, " ").split(" ")
            for begin in range(0, len(words), WORDS_AT_ONCE):
                yield " ".join(words[begin : begin + WORDS_AT_ONCE])
