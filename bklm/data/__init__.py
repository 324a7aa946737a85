"""Text, tokens, windows and baselines. Imports nothing else of bklm.

tokens = tokenize_corpus(load_corpus("embedded"), vocab_size_limit=5_000)
loader = make_loader(windows(tokens.train, seq_len=128), batch_size=32, shuffle=True, seed=0)
KneserNey(order=3).fit(tokens.train, tokens.vocab_size).perplexity(tokens.valid)
"""

from bklm.data.baselines import KneserNey, Unigram, count_models
from bklm.data.corpora import CORPUS_NAMES, load_corpus
from bklm.data.corpus import SPLITS, Corpus
from bklm.data.loaders import (
    IGNORED,
    Pieces,
    Portions,
    Windows,
    get_wikitext2_dataloaders,
    make_loader,
    set_epoch,
    windows,
)
from bklm.data.tokenized import TokenizedCorpus, tokenize_corpus
from bklm.data.tokens import Vocabulary

__all__ = [
    "CORPUS_NAMES",
    "IGNORED",
    "SPLITS",
    "Corpus",
    "KneserNey",
    "Pieces",
    "Portions",
    "TokenizedCorpus",
    "Unigram",
    "Vocabulary",
    "Windows",
    "count_models",
    "get_wikitext2_dataloaders",
    "load_corpus",
    "make_loader",
    "set_epoch",
    "tokenize_corpus",
    "windows",
]
