"""Corpora from the Hugging Face hub: asked first whether it answers, so that a missing network is one quick sentence."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bklm.data.beginnings import corpus_of_beginnings
from bklm.data.corpus import Corpus
from bklm.data.local import Dialogues, corpus_from_dialogues, corpus_from_splits

PROBE_SECONDS = 8.0  # how long the hub may take to answer before it counts as unreachable
_ONE_AT_A_TIME = threading.Lock()
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class HubDataset:
    """A data set's repository, its configuration, and where the repository has more than we read, the splits wanted; with a
    revision, no other state of it. Without, the hub is asked once for its newest, and no other is then read."""

    repository: str
    configuration: str | None = None
    splits: tuple[str, ...] = ()
    revision: str | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.repository, self.configuration)))


_WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
DATASETS = {
    "wikitext-2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", revision=_WIKITEXT),
    # A Parquet copy: the classic id is a loading script, which datasets 4 and later refuse.
    "dailydialog": HubDataset("OpenRL/daily_dialog"),
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", splits=("train_sft", "test_sft")),
    "wikitext-103": HubDataset(
        "Salesforce/wikitext", "wikitext-103-raw-v1", ("train", "validation", "test"), _WIKITEXT
    ),
    "c4": HubDataset("allenai/c4", "en", ("train", "validation"), "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"),
}  # fmt: skip
STREAMED = ("wikitext-103", "c4")
"""Too large to be fetched whole without need: their beginning is read by ``bklm.data.beginnings``."""


def corpus_from_hub(name: str, max_documents: int | None = None, max_tokens: int | None = None) -> Corpus:
    """The corpus ``name`` through ``datasets.load_dataset``, from the hub or, where that cannot be reached, its local cache.

    Where a beginning can be fetched by itself, that of ``max_documents`` of each split is; the corpus may have more. Of one of
    ``STREAMED`` the first ``max_tokens`` training words are read, without which "c4" is refused: it has no end for a disk.

    Raises:
        ConnectionError: the hub cannot be reached and the cache does not hold the data set.
        OSError: the download cannot be stored.
    """
    import huggingface_hub

    dataset = DATASETS[name]
    if name == "c4" and max_tokens is None:
        raise ValueError(
            'corpus "c4" has 156 thousand million words: say how many to read, max_train_tokens in a study or max_tokens in '
            "load_corpus"
        )
    if Path(dataset.repository).is_dir():
        # load_dataset would take it for the data set and say nothing.
        raise OSError(
            f"the folder {dataset.repository!r} in the current directory has the hub data set's name and would be read "
            f"instead of it; give that folder as data_dir, or run from another directory"
        )
    failures = _failures()
    unreachable: BaseException | None = None
    revision = "unknown"
    try:
        # One request with a deadline: load_dataset itself repeats a failing one for some 20 seconds.
        info = huggingface_hub.HfApi().dataset_info(
            dataset.repository, revision=dataset.revision, timeout=PROBE_SECONDS
        )
        revision = (info.sha or revision)[:12]
        dataset = replace(dataset, revision=dataset.revision or info.sha)
    except failures as error:
        # 429 and above: it is there but busy, and load_dataset waits for it. Anything else is final.
        if getattr(getattr(error, "response", None), "status_code", 0) < 429:
            unreachable = error
    try:
        if name in STREAMED and max_tokens is not None:
            if unreachable:
                raise unreachable
            return corpus_of_beginnings(name, dataset, max_tokens)
        if unreachable:
            with _offline():
                splits = _download(dataset)
            return corpus_from_splits(name, f"Hugging Face {dataset}, from the local cache", splits)
        source = f"Hugging Face {dataset}, revision {revision}"
        if dataset.splits and max_documents is not None:
            return corpus_from_dialogues(name, source, *_first_dialogues(dataset, max_documents))
        return corpus_from_splits(name, source, _download(dataset))
    except failures as error:
        raise _in_one_sentence(name, dataset, unreachable or error) from (None if unreachable else error)


def _failures() -> tuple[type[BaseException], ...]:
    """What Hugging Face's libraries raise when a download fails; the HTTP library under them changes with the version, and
    its base class is among those of HfHubHTTPError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, DatasetsError, *HfHubHTTPError.__bases__)


def _download(dataset: HubDataset) -> dict[str, Any]:
    import datasets

    # Naming the files keeps it from fetching the other splits of the repository too.
    files = (
        None
        if dataset.configuration
        else {split: f"data/{split}-*.parquet" for split in dataset.splits} or None
    )
    return datasets.load_dataset(
        dataset.repository, dataset.configuration, data_files=files, revision=dataset.revision
    )


def _first_dialogues(dataset: HubDataset, number: int) -> list[Dialogues]:
    """The first dialogues of each split, ``number`` for each of ours, streamed: only the files' beginnings are fetched."""
    import datasets

    # One held-out split is shared by two of ours.
    most = {
        split: number * (2 if n and len(dataset.splits) == 2 else 1) for n, split in enumerate(dataset.splits)
    }

    streams = {
        split: datasets.load_dataset(dataset.repository, split=split, streaming=True, revision=dataset.revision)
        for split in dataset.splits
    }
    return [
        Dialogues(list(stream.take(most[split])), "messages", f"{split} split of {dataset}")
        for split, stream in streams.items()
    ]


@contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's offline mode. Its libraries read HF_HUB_OFFLINE once, when imported; later, only these can be set.

    They hold for the whole process, so one thread at a time is in such a block: else the last could keep them set for good.
    """
    import datasets.config
    import huggingface_hub.constants

    places = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    with _ONE_AT_A_TIME:
        before = [getattr(module, name) for module, name in places]
        try:
            for module, name in places:
                setattr(module, name, True)
            yield
        finally:
            for (module, name), value in zip(places, before, strict=True):
                setattr(module, name, value)


def _in_one_sentence(name: str, dataset: HubDataset, error: BaseException) -> OSError:
    from huggingface_hub.constants import ENDPOINT

    disk = isinstance(error, OSError) and error.errno in _DISK_TROUBLE
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    made, kind = ("grammar", "jsonl") if name == "dailydialog" else ("embedded", "txt")
    files = f"train.{kind}, valid.{kind} and test.{kind}"
    trouble = "could not be stored on disk" if disk else f"could not be fetched from {ENDPOINT}"
    return (OSError if disk else ConnectionError)(
        f'corpus "{name}" ({dataset}) {trouble} ({reason}); three ways on: connect this machine to the network and run '
        f"again, or give data_dir (or BKLM_DATA_DIR) a folder with {files}, or choose "
        f'dataset "{made}", which needs neither'
    )
