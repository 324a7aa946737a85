"""What the dialogue study reads: dialogues, the text before them, one vocabulary fixed before both, and count models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from bklm.data import SPLITS, Corpus, TokenizedCorpus, count_models, load_corpus, make_loader
from bklm.data.baselines import CannotEstimateError, KneserNey
from bklm.data.dialogue_tokens import DialogueVocabulary, EncodedDialogues
from bklm.data.dialogue_windows import Mixed, Rows, dialogue_rows
from bklm.data.dialogues import SYSTEM, USER, Dialogue, DialogueCorpus
from bklm.data.grammar import GrammarCorpus
from bklm.data.mixtures import mixed, mixing_weight
from bklm.harness.text import Baseline, StudyText, check_and_log
from bklm.studies.dialogue.config import DialogueConfig

FEWEST = 1000  # training dialogues from which on something can be concluded
MIXTURE = "Kneser-Ney of dialogues and text"


@dataclass(frozen=True, eq=False)
class ProseText(StudyText):
    """The text to pretrain on, in the pieces of the dialogues' vocabulary."""

    @property
    def vocabulary_sha256(self) -> str:
        return self.tokens.vocab.sha256


@dataclass(frozen=True, eq=False)
class DialogueText(ProseText):
    """Dialogues ready to train on: a row is a dialogue, its targets the replies. ``replay`` is the share of ``prose`` among
    the targets of a training; ``notes`` says what was left out."""

    prose: ProseText
    dialogues: dict[str, list[Dialogue]]
    encoded: dict[str, EncodedDialogues]
    rows: dict[str, Rows]
    notes: tuple[str, ...]
    replay: float = 0.0

    @property
    def vocabulary(self) -> DialogueVocabulary:
        return self.tokens.vocab

    @property
    def fingerprint(self) -> str:
        # Who says what, too: the corpus's own sum knows the words alone.
        said = json.dumps(self.dialogues)
        return hashlib.sha256(f"{self.corpus.sha256} {self.prose.corpus.sha256} {said}".encode()).hexdigest()

    @property
    def is_demonstration(self) -> bool:
        return super().is_demonstration or len(self.dialogues["train"]) < FEWEST

    @property
    def vocabulary_in_words(self) -> str:
        return f"vocabulary {self.vocab_size:,} pieces and marks, pretrained on {self.prose.corpus.name}"

    def with_replay(self, share: float) -> DialogueText:
        return dataclasses.replace(self, replay=share)

    def train_loader(self, seed: int) -> DataLoader | Mixed:
        loader = make_loader(self.rows["train"], self.batch_size, shuffle=True, seed=seed)
        windows = self.prose._windows(self.prose.tokens.train)
        return Mixed(loader, windows, self.replay, seed) if self.replay else loader

    def val_loader(self) -> DataLoader:
        return self._scored(self.rows["valid"])

    def test_loader(self) -> DataLoader:
        return self._scored(self.rows["test"])

    def _scored(self, rows: Rows) -> DataLoader:
        return make_loader(rows, min(self.batch_size, len(rows)))

    def all_tokens_loader(self) -> DataLoader:
        """Validation dialogues with every token after the first as a target."""
        own = self.vocabulary
        return self._scored(
            dialogue_rows(self.encoded["valid"], self.seq_len, own.pad_id, own.user_id, all_tokens=True)
        )


def prepare_text(config: DialogueConfig) -> DialogueText:
    """Dialogues and text of a resolved config, with count models scored on the replies.

    Raises:
        ValueError, OSError: see ``bklm.data.load_corpus``; a text without dialogues; too few for a batch.
    """
    most, held_out = config.max_dialogues or None, config.held_out_dialogues or None
    larger = most and held_out and max(most, held_out)
    corpus = load_corpus(config.dataset, config.data_dir, max_documents=larger)
    if not isinstance(corpus, DialogueCorpus):
        corpus.dialogues("train")  # says what is wrong
    corpus = corpus.first(most, held_out)
    dialogues = {split: corpus.dialogues(split) for split in SPLITS}
    if len(dialogues["valid"]) < 2:
        raise ValueError(
            f"held_out_dialogues: got {len(dialogues['valid'])} dialogue for validation; what earlier turns are worth is "
            "told by those of another dialogue: take two or more."
        )
    prose = load_corpus(config.pretraining, config.pretraining_dir)
    said = [text for dialogue in dialogues["train"] for _, text in dialogue]
    vocabulary = DialogueVocabulary.train([*said, *prose.train], config.vocab_size)
    before = _prose(config, prose, vocabulary)
    encoded = {split: vocabulary.encode_dialogues(found) for split, found in dialogues.items()}
    rows = {
        split: dialogue_rows(found, config.seq_len, vocabulary.pad_id, vocabulary.user_id)
        for split, found in encoded.items()
    }
    tokens = _tokens(corpus, vocabulary, {split: found.ids for split, found in encoded.items()})
    text = DialogueText(
        corpus, tokens, config.seq_len, config.batch_size, "dialogues", _baselines(corpus, encoded, before, vocabulary),
        prose=before, dialogues=dialogues, encoded=encoded, rows=rows, notes=_notes(corpus),
    )  # fmt: skip
    loaders = [before.train_loader(0), before.val_loader(), text.train_loader(0), text.val_loader()]
    check_and_log(text, [*loaders, text.test_loader()])
    return text


def _prose(config: DialogueConfig, corpus: Corpus, vocabulary: DialogueVocabulary) -> ProseText:
    """The text with its paragraphs as turns: who was pretrained has seen the marks, and tuning need not teach them."""
    ids = {}
    for split in SPLITS:
        lines = [line.strip() for line in corpus.split(split) if line.strip()]
        turns = tuple(((USER, SYSTEM)[n % 2], line) for n, line in enumerate(lines))
        ids[split] = vocabulary.encode_dialogues([turns]).ids
    ids["train"] = ids["train"][: config.max_pretraining_tokens or None]
    if config.max_pretraining_tokens:
        ids["valid"] = ids["valid"][: max(config.seq_len + 1, config.max_pretraining_tokens // 4)]
    return ProseText(
        corpus, _tokens(corpus, vocabulary, ids), config.seq_len, config.batch_size, "every-target-once", []
    )


def _tokens(corpus: Corpus, vocabulary: DialogueVocabulary, ids: dict[str, np.ndarray]) -> TokenizedCorpus:
    return TokenizedCorpus(**ids, vocab=vocabulary, name=corpus.name, sha256=corpus.sha256)


def _notes(corpus: DialogueCorpus) -> tuple[str, ...]:
    notes = [f"Licence of the dialogues: {corpus.licence}."]
    if silent := sum(corpus.left_out.values()):
        notes.append(f"Left out: {silent} dialogue{'s' * (silent > 1)} in which nobody replies.")
    if copies := len(corpus.removed):
        notes.append(f"Left out of training: {copies} that nearly repeat a held-out dialogue.")
    return tuple(notes)


def describe_text(text: DialogueText) -> list[str]:
    """Where dialogues and text come from, and their sizes."""
    counts = " / ".join(f"{len(text.dialogues[split]):,}" for split in SPLITS)
    own, prose = text.encoded["valid"], text.prose
    return [
        f"{text.corpus.name}, from {text.corpus.source}: {counts} dialogues to train on, to validate and to test",
        *text.notes,
        f"{text.rows['train'].num_targets:,} reply tokens to train on; {text.rows['valid'].num_targets:,} to validate, which "
        f"are {own.reply_bytes:,} bytes",
        f"Before that {prose.corpus.name}, from {prose.corpus.source}: {prose.train_tokens:,} tokens",
        f"One vocabulary of {text.vocab_size:,} pieces and marks for both, SHA-256 {text.vocabulary_sha256:.16}...",
    ]


def _baselines(
    corpus: DialogueCorpus,
    encoded: dict[str, EncodedDialogues],
    prose: ProseText,
    vocabulary: DialogueVocabulary,
) -> list[Baseline]:
    """Count models of the dialogues, the best one mixed with one of the text, and the grammar's own law: on the replies.

    What is chosen, order and weight, is chosen on validation; ``test_ppl`` is that of the test split's replies.
    """
    held_out, size = {split: encoded[split] for split in ("valid", "test")}, len(vocabulary)
    asked = {split: own.target[1:] for split, own in held_out.items()}
    known = held_out["valid"].ids[1:] != vocabulary.unk_id

    def log_probs(model: Any) -> dict[str, np.ndarray]:
        return {split: model.log_probs(own.ids) for split, own in held_out.items()}

    def row(name: str, scores: dict[str, np.ndarray]) -> Baseline:
        kept = {"val_ppl": ("valid", asked["valid"]), "val_ppl_without_unk": ("valid", asked["valid"] & known)}
        kept["test_ppl"] = "test", asked["test"]
        ppls = {key: math.exp(-float(scores[s][where].mean())) for key, (s, where) in kept.items()}
        return {"name": name, **ppls}

    scores = {name: log_probs(model) for name, model in count_models(encoded["train"].ids, size).items()}
    rows = [row(name, found) for name, found in scores.items()]
    best = min((r for r in rows if r["name"] != "unigram"), key=lambda r: r["val_ppl"])["name"]
    order = int(best.split("-gram")[0].split()[-1])
    try:
        other = KneserNey(order, "modified").fit(prose.tokens.train, size)
    except CannotEstimateError:
        other = KneserNey(order).fit(prose.tokens.train, size)
    own, before = scores[best], log_probs(other)
    weight = mixing_weight(own["valid"][asked["valid"]], before["valid"][asked["valid"]])
    both = {split: mixed(own[split], before[split], weight) for split in own}
    rows.append(row(f"{MIXTURE}, {order}-gram, weight {weight:.2f}", both))
    if isinstance(corpus, GrammarCorpus):
        exact = [
            math.exp(corpus.reply_nats(s).sum() / held_out[s].target.sum()) for s in ("valid", "valid", "test")
        ]
        keys = ("val_ppl", "val_ppl_without_unk", "test_ppl")
        rows.append({"name": "true law, all turns", **dict(zip(keys, exact, strict=True))})
    return rows


def sizes(config: DialogueConfig) -> dict[str, float]:
    """About how many tokens a resolved config's dialogues have, and how many ``rows`` its training ones are, without fetching
    them; see ``PER_DIALOGUE``."""
    known = None if config.data_dir else PER_DIALOGUE.get(config.dataset)
    if known:
        (train, held_out), tokens = known
    else:
        corpus: Any = load_corpus(config.dataset, config.data_dir)
        train, held_out = len(corpus.train), len(corpus.valid)
        tokens = sum(map(len, corpus.train[:100])) / min(100, train) / CHARACTERS
    rows = min(train, config.max_dialogues or train)
    return {
        "rows": rows,
        "train": rows * tokens,
        "valid": min(held_out, config.held_out_dialogues or held_out) * tokens,
    }


CHARACTERS = 3.5  # a piece, of English text
# Dialogues of the training and of the validation split, and tokens of one: as published.
PER_DIALOGUE = {
    "grammar": ((24_000, 500), 70),
    "dailydialog": ((11_118, 1000), 150),
    "ultrachat": ((207_865, 11_555), 1400),
}
