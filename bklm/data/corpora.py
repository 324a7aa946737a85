"""Where text comes from: one ``Corpus`` with three splits, whatever lies behind it."""

from __future__ import annotations

import os
from pathlib import Path

from bklm.data.checks import require_whole
from bklm.data.corpus import MADE_HERE, Corpus

CORPUS_NAMES = ("wikitext-2", "wikitext-103", "c4", "dailydialog", "ultrachat", *MADE_HERE)


def load_corpus(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    max_documents: int | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """Load a corpus by name.

    Args:
        name: "wikitext-2" (Hugging Face Salesforce/wikitext, wikitext-2-raw-v1), "wikitext-103" (the same repository,
            wikitext-103-raw-v1) and "c4" (allenai/c4, en), both by an exact revision, "dailydialog" (OpenRL/daily_dialog, a
            Parquet copy; CC BY-NC-SA 4.0, not for commercial use), "ultrachat" (HuggingFaceH4/ultrachat_200k, MIT),
            "embedded" (the language reference that comes with Python; for demonstrations), "hmm" (drawn from a hidden
            Markov model: the best possible perplexity is known) or "grammar" (dialogues of known entropy). Dialogues are
            read by ``corpus.dialogues(split)``, lists of turns (speaker, text); see ``bklm.data.dialogues``.
        data_dir: a folder or file to read instead of the network: train.txt, valid.txt and test.txt, or
            wiki.{train,valid,test}.{raw,tokens}, or a saved Hugging Face data set; or a text of one's own, a file or a
            folder of files, which is split 80/10/10 by paragraphs (``bklm.data.own_text``). The environment variable
            BKLM_DATA_DIR stands in where it is not given (and does not touch "embedded", "hmm" and "grammar", which
            need no folder). The corpus is then named after the folder: what it holds is the caller's word.
        max_documents: of dialogues, whatever they come from, no more than the first so many rows of each of the three splits
            (and of UltraChat no more are fetched); text that holds no dialogues is always whole.
        max_tokens: of "wikitext-103" and "c4" from the hub, training words to stream, whole lines; no more is fetched. "c4"
            needs it, and its validation split's first and next 200,000 words are held out. Other text is always whole.

    Raises:
        ValueError: unknown name; data_dir with a corpus made on the spot; text that is not UTF-8; an empty split.
        OSError: FileNotFoundError, NotADirectoryError or PermissionError for a folder that cannot be read;
            ConnectionError where the network is needed and cannot be reached.
    """
    if name not in CORPUS_NAMES:
        raise ValueError(f"corpus {name!r} is unknown; choose one of {', '.join(map(repr, CORPUS_NAMES))}")
    if max_documents is not None:
        max_documents = require_whole("max_documents", max_documents, 1, ", or None for all")
    if max_tokens is not None:
        max_tokens = require_whole("max_tokens", max_tokens, 1, ", or None for all")
    corpus = _corpus(name, data_dir, max_documents, max_tokens)
    if max_documents is None:
        return corpus
    from bklm.data.dialogues import DialogueCorpus

    return corpus.first(max_documents, max_documents) if isinstance(corpus, DialogueCorpus) else corpus


def _corpus(
    name: str, data_dir: str | os.PathLike[str] | None, max_documents: int | None, max_tokens: int | None
) -> Corpus:
    if name in MADE_HERE:
        if data_dir is not None and str(data_dir):
            raise ValueError(
                f'corpus "{name}" is made on the spot and reads no folder, but data_dir is {str(data_dir)!r}; '
                f'leave data_dir out, or name the corpus "wikitext-2" to read that folder'
            )
        if name == "embedded":
            from bklm.data.embedded import embedded_corpus

            return embedded_corpus()
        if name == "grammar":
            from bklm.data.grammar import grammar_corpus

            return grammar_corpus(most=max_documents)
        from bklm.data.hmm import hmm_corpus

        return hmm_corpus()
    ambient = os.environ.get("BKLM_DATA_DIR", "").strip()
    if folder := str(data_dir or "").strip() or ambient:
        from bklm.data.local import corpus_from_folder

        # A study's config has taken the variable into its data_dir; who set it looks for its name in an error.
        called = "BKLM_DATA_DIR" if ambient and _place(folder) == _place(ambient) else "data_dir"
        return corpus_from_folder(Path(folder).expanduser(), called)
    from bklm.data.hub import corpus_from_hub

    return corpus_from_hub(name, max_documents, max_tokens)


def _place(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder))  # noqa: PTH100, PTH111
