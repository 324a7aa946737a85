"""A trained model with its tokeniser, ready to use.

trained = bklm.load("results/baseline.zip")
trained.generate("The game", 50)
trained.perplexity("some text, or the path of a file")
trained.features("The game was").figure("features.png")
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bklm.compression.coded_model import is_compressed
from bklm.compression.saving import is_compressed_file, load_compressed, save_compressed
from bklm.data.checks import require_whole
from bklm.data.loaders import make_loader, windows
from bklm.data.units import tidy
from bklm.files.atomic import replacing, write_json
from bklm.harness.bundle import PAGE
from bklm.models import LanguageModel
from bklm.trained.run import (
    MANIFEST,
    OLD_TOKENIZER,
    RECORD,
    TOKENIZER,
    WEIGHTS,
    SavedModel,
    SavedRun,
    make_own_folder,
    open_run,
)
from bklm.training.evaluation import evaluate
from bklm.training.weights import hash_of_tokenizer, require_vocabulary, save_weights

UNKNOWN = ("<unk>", "<UNK>")
# A text in one line that ends like this is taken for the name of a file.
TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens")
WINDOW = 128  # tokens, where neither model nor run names a length
BATCH = 16
FEWEST_TOKENS = 2


def load(path: str | os.PathLike[str], model: str | None = None) -> Trained:
    """A trained model of a finished run, on the CPU in evaluation mode; the run is only read.

    Args:
        path: the run's zip, its folder, or a folder that holds one run.
        model: one of its models, such as "gpt" in 03; the best one when empty.

    Raises:
        FileNotFoundError: there is no such path. ValueError: it is no finished run, or holds no such model.
    """
    run = open_run(path)
    return Trained(run, run.choose(model))


@dataclass(frozen=True)
class Score:
    """How a model scores a text. Perplexities are per token, over every token after the first."""

    perplexity: float
    perplexity_without_unk: float | None  # None where every target is unknown, or nothing can be
    accuracy: float
    tokens: int  # that were predicted
    unknown: float  # share of them that is the unknown token

    def __str__(self) -> str:
        known = (
            "" if self.perplexity_without_unk is None else f"; {self.perplexity_without_unk:.2f} without <unk>"
        )
        return (
            f"perplexity {self.perplexity:.2f} over {self.tokens:,} tokens{known}; {self.accuracy:.1%} of them foretold; "
            f"{self.unknown:.1%} unknown"
        )


class Trained:
    """A trained model: ``model`` (a ``LanguageModel``), ``tokenizer`` (of the tokenizers library), ``name``, ``record``,
    ``manifest``, ``summary`` (of the study), and ``models``, the names of all models of the run."""

    def __init__(self, run: SavedRun, saved: SavedModel) -> None:
        self._run, self._saved = run, saved
        self.name, self.record, self.manifest = saved.name, saved.record, run.manifest
        self.models = list(dict.fromkeys(m.name for m in run.models()))
        self.summary = run.summary()
        self.tokenizer = _read_tokenizer(run)
        weights = saved.folder / WEIGHTS
        try:
            if is_compressed_file(weights):
                self.model: LanguageModel = load_compressed(weights)
            else:
                self.model = saved.build()
                if (own := run.folder / TOKENIZER).exists():
                    require_vocabulary(weights, hash_of_tokenizer(own), unless_unnamed=True)
                load_model(self.model, str(weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{weights} does not hold the weights of a {saved.model_class} of these sizes "
                f"({str(error).splitlines()[0]}); take the run's zip, or run the study again."
            ) from error
        self.model.eval()

    def __repr__(self) -> str:
        return (
            f"<{self.name}: {type(self.model).__name__} of {self.model.num_parameters():,} parameters, {self._measured()} on "
            f"{self.text_name}, from {self._run.source}>"
        )

    def _measured(self) -> str:
        if (perplexity := self.record.get("val_ppl")) is not None:
            return f"validation PPL {perplexity:.1f}"
        before = self.record.get("changed_from", {}).get("val_ppl")
        return "not measured" + ("" if before is None else f", made from one of validation PPL {before:.1f}")

    @property
    def text_name(self) -> str:
        """What the text is called that it was trained on."""
        return (self.manifest.get("corpus") or {}).get("name", "an unnamed text")

    @property
    def sees_the_future(self) -> bool:
        return self.model.sees_future

    @property
    def unk_id(self) -> int | None:
        """The id of the unknown token; None where every text can be written."""
        return next((i for word in UNKNOWN if (i := self.tokenizer.token_to_id(word)) is not None), None)

    def encode(self, text: str) -> torch.Tensor:
        """The ids of a text, int64 (1, tokens)."""
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False).ids], dtype=torch.int64)

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def generate(self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.8, seed: int = 0) -> str:
        """``prompt`` and what the model writes after it; the same seed gives the same text.

        A model with so many positions and no more goes on, where they end, from the second half of what it has written.

        Raises:
            ValueError: a prompt without a token, a negative number of tokens or temperature.
        """
        wanted = require_whole("max_new_tokens", max_new_tokens, 0)
        ids = self.encode(prompt)
        if ids.shape[1] == 0:
            raise ValueError(f"prompt: got {prompt!r}, which holds no token; write at least one word.")
        generator = torch.Generator().manual_seed(require_whole("seed", seed, 0))
        longest = self.model.n_seq or ids.shape[1] + wanted
        begun, written = ids.shape[1], ids
        while (missing := begun + wanted - written.shape[1]) > 0:
            is_full = written.shape[1] >= longest
            context = written[:, -max(1, longest // 2) :] if is_full else written
            count = min(missing, max(1, longest - context.shape[1]))
            new = self.model.generate(context, count, temperature, generator)[:, context.shape[1] :]
            written = torch.cat([written, new], 1)
        # What was typed stays as it was typed.
        return self._joined(prompt, written[0, begun:].tolist())

    def _joined(self, prompt: str, ids: list[int]) -> str:
        if not ids:
            return prompt
        written = self.decode(ids)
        is_by_words = self.tokenizer.decoder is None
        return f"{prompt.rstrip()} {written}" if is_by_words else prompt + written

    def perplexity(self, text: str | os.PathLike[str]) -> float:
        """Perplexity per token of a text, or of the file of that name; see ``score``."""
        return self.score(text).perplexity

    def score(self, text: str | os.PathLike[str]) -> Score:
        """Score every token after the first, in windows as long as in training; of study 04's models, whose context runs
        through the whole text there, in windows of ``WINDOW`` from an empty context.

        Args:
            text: the text itself, or the path of a text file in UTF-8.

        Raises:
            ValueError: fewer than two tokens. OSError: a path that is no readable file.
        """
        words = _read_text(text)
        if self._kind != "documents":
            words = "\n".join(tidy(words.split("\n")))
        ids = self.encode(words)[0].numpy()
        if len(ids) < FEWEST_TOKENS:
            raise ValueError(
                f"text: got {len(ids)} token{'s' * (len(ids) != 1)}; a perplexity needs {FEWEST_TOKENS} at least, the first "
                "of which is only read."
            )
        length = self.model.n_seq or self.manifest["config"].get("seq_len") or WINDOW
        length = max(1, min(length, len(ids) - 1))
        data = windows(ids, length)
        loader = make_loader(data, min(BATCH, len(data)))
        unknown = 0.0 if self.unk_id is None else float((ids[1:] == self.unk_id).mean())
        found = evaluate(self.model, loader, self.unk_id if unknown < 1 else None)
        without = None if self.unk_id is None or unknown == 1 else found.perplexity_without_unk
        return Score(found.perplexity, without, found.accuracy, found.tokens, unknown)

    def features(self, text: str) -> Any:
        """Potential, Re G and Im G of every word and layer of a ResNetBK; see ``bklm.trained.features.Features``.

        Raises:
            ValueError: a model that has no potential, a text without a token, or one longer than its positions.
        """
        from bklm.trained.features import read_features

        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        words = [
            text[begin:end] or token
            for (begin, end), token in zip(encoding.offsets, encoding.tokens, strict=True)
        ]
        return read_features(self.model, encoding.ids, words, self.name)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write model, tokeniser and records into a folder that ``bklm.load`` reads; return it.

        Raises:
            ValueError: the folder holds something else.
        """
        folder = Path(path).expanduser()
        # A run's own folder has a page, which a saved model has not.
        is_ours = (
            all((folder / n).exists() for n in (MANIFEST, RECORD, WEIGHTS)) and not (folder / PAGE).exists()
        )
        make_own_folder(folder, is_ours, "save")
        with replacing(folder / TOKENIZER) as temporary:
            self.tokenizer.save(str(temporary))
        if is_compressed(self.model):
            save_compressed(self.model, folder / WEIGHTS)
        else:
            with replacing(folder / WEIGHTS) as temporary:
                save_weights(self.model, temporary, hash_of_tokenizer(folder / TOKENIZER))
        kind = getattr(self.model, "plain_class", type(self.model))
        write_json(folder / RECORD, {**self.record, "model_class": kind.__name__})
        write_json(folder / MANIFEST, dict(self.manifest))
        summary = self._run.folder / "summary.json"
        if summary.exists() and summary.parent.resolve() != folder.resolve():
            shutil.copyfile(summary, folder / summary.name)
        return folder

    @property
    def _kind(self) -> str:
        # Study 04 reads whole documents with their line ends; the others read lines.
        return "documents" if self.manifest.get("study") == "embedding_freeze" else "lines"


def _read_text(text: str | os.PathLike[str]) -> str:
    """The text of a file where ``text`` names one, else ``text`` itself."""
    if isinstance(text, str):
        try:
            path = Path(text.strip()).expanduser()
            is_file = bool(text.strip()) and "\n" not in text and path.exists()
        # Too long for a name, or "~" before no user: a text.
        except (OSError, ValueError, RuntimeError):
            return text
        if not is_file:
            if "\n" not in text and path.suffix.lower() in TEXT_SUFFIXES:
                raise FileNotFoundError(
                    f"text: there is no file {text!r}; give one that exists, or the text itself."
                )
            return text
    else:
        path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 (offset {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise OSError(f"text: {path} cannot be read ({error.strerror}); give a text file.") from error


def _read_tokenizer(run: SavedRun) -> Tokenizer:
    """The run's tokeniser; of runs of earlier versions the words of vocabulary.json.

    Raises:
        ValueError: the run has none, or a damaged one.
    """
    path = next((p for n in (TOKENIZER, OLD_TOKENIZER) if (p := run.folder / n).exists()), None)
    if path is None:
        raise ValueError(f"{run.source} holds no {TOKENIZER}; take the zip that the study made.")
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if "model" in found and isinstance(found["model"], dict):
            return Tokenizer.from_str(text)
        unknown = next(word for word in UNKNOWN if word in found)
        made = Tokenizer(models.WordLevel(found, unk_token=unknown))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"{path} is damaged ({error}); take the run's zip.") from error
    if run.manifest.get("config", {}).get("lowercase"):
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made
