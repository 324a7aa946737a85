"""What a model makes of dialogues: its loss on replies after contexts of choice, the facts that it recalls, what it writes."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bklm.data.dialogue_tokens import DialogueVocabulary, EncodedDialogues, pieces_of_word
from bklm.data.dialogue_windows import CONTEXTS, Rows, replies_in_context
from bklm.data.dialogues import Dialogue
from bklm.data.grammar import Asked
from bklm.data.loaders import make_loader
from bklm.models import LanguageModel
from bklm.models.modes import evaluating
from bklm.training.evaluation import evaluate

ROWS = 32  # an evaluation batch; its size changes no score
REPEATED = 0.5  # share of a reply's words in one run of the prompt from which on it repeats it


def bits_per_byte(nats: float, nbytes: int) -> float:
    """Bits that a byte of the replies costs, comparable across vocabularies; an end counts as a byte."""
    return nats / math.log(2) / nbytes


def loss_by_context(
    model: LanguageModel, encoded: EncodedDialogues, seq_len: int, pad_id: int, most: int = 0
) -> dict[str, float]:
    """Mean loss of the same reply tokens in nats behind each of ``CONTEXTS``."""
    found = {}
    for context in CONTEXTS:
        rows = replies_in_context(encoded, context, seq_len, pad_id, most)
        found[context] = evaluate(model, make_loader(rows, min(ROWS, len(rows))), None).loss
    return found


@torch.no_grad()
def recalled_facts(
    model: LanguageModel, vocabulary: DialogueVocabulary, asked_of: Asked, seq_len: int
) -> dict[str, list[int]]:
    """By turns back, as text: of how many facts every piece was the likeliest, and how many were asked for.

    A fact that a window does not reach back to is asked for all the same.
    """
    examples: list[tuple[np.ndarray, np.ndarray]] = []
    asked: list[list[tuple[list[int], int]]] = []  # of each example: places of the targets, and the distance
    for dialogue, own in asked_of:
        turns = vocabulary.encode_turns(dialogue)
        starts = np.cumsum([0, *map(len, turns)])
        ids = np.concatenate(turns)
        found = [
            (
                [int(starts[f.turn]) + p - 1 for p in pieces_of_word(vocabulary, dialogue[f.turn][1], f.word)],
                f.distance,
            )
            for f in own
        ]
        # One reading serves all facts of a dialogue that a window holds.
        for some in [found] if len(ids) <= seq_len + 1 else [[one] for one in found]:
            end = some[-1][0][-1] + 2
            begin = max(0, end - (seq_len + 1))
            target = np.zeros(end - begin, bool)
            places = [([p - begin for p in one], distance) for one, distance in some]
            target[[p + 1 for one, _ in places for p in one]] = True
            examples.append((ids[begin:end], target))
            asked.append(places)
    device = next(model.parameters()).device
    counts: dict[int, list[int]] = {}
    questions = iter(asked)
    with evaluating(model):
        for x, y in make_loader(Rows(examples, vocabulary.pad_id), min(ROWS, len(examples))):
            correct = model.token_losses(x.to(device), y.to(device)).correct.cpu()
            for row, some in zip(correct, questions, strict=False):
                for places, distance in some:
                    count = counts.setdefault(distance, [0, 0])
                    count[0] += bool(row[places].all())
                    count[1] += 1
    return {str(k): counts[k] for k in sorted(counts)}


@dataclass(frozen=True)
class Reply:
    """What a model writes where somebody else replied: ``prompt`` is the last turn before, ``target`` the reply there."""

    prompt: str
    target: str
    written: str
    ended: bool  # by itself, not by the limit

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def positions_read(n_seq: int, most: int) -> int:
    """Of a model's positions those that are left to read where a reply of ``most`` tokens is written: half of them or more."""
    return max(1, n_seq - min(most, n_seq // 2))


def reply_tokens(
    model: LanguageModel,
    vocabulary: Any,
    before: np.ndarray,
    most: int,
    temperature: float,
    generator: torch.Generator,
    positions: int | None = None,
) -> Iterator[int]:
    """The ids of a reply to ``before`` (ids of whole turns), token by token, its ``<end>`` among them, at most ``most``.

    A model that has so many positions and no more writes on half of them at most; of a context that leaves no room for that
    the beginning is left out. ``positions`` puts any model under that rule; without, one that has no limit reads all.
    ``vocabulary`` has ``system_id`` and ``end_id``.
    """
    ids = np.concatenate([before, [vocabulary.system_id]]).astype(np.int64)
    if room := min((n for n in (positions, model.n_seq) if n is not None), default=None):
        ids = ids[-positions_read(room, most) :]
        most = min(most, room - len(ids))
    device = next(model.parameters()).device
    prompt = torch.from_numpy(np.ascontiguousarray(ids))[None].to(device)
    for token in model.stream(prompt, most, temperature, generator):
        yield int(token)
        if int(token) == vocabulary.end_id:
            return


def write_replies(
    model: LanguageModel,
    vocabulary: DialogueVocabulary,
    dialogues: Sequence[Dialogue],
    most: int,
    temperature: float = 0.8,
    seed: int = 0,
    positions: int | None = None,
) -> list[Reply]:
    """A reply to the last turn before each dialogue's last reply; dialogue n is written with the seed ``seed + n``.

    With the same ``positions`` every model reads as much; see ``reply_tokens``.
    """
    found = []
    for number, dialogue in enumerate(dialogues):
        last = max(n for n, (speaker, _) in enumerate(dialogue) if speaker == "system" and n)
        turns = vocabulary.encode_turns(dialogue[:last])
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed + number)
        before = np.concatenate(turns)
        ids = list(reply_tokens(model, vocabulary, before, most, temperature, generator, positions))
        ended = bool(ids) and ids[-1] == vocabulary.end_id
        written = vocabulary.decode(ids[:-1] if ended else ids)
        found.append(Reply(dialogue[last - 1][1], dialogue[last][1], written, ended))
    return found


def describe_replies(replies: Sequence[Reply]) -> dict[str, float]:
    """Measures of what was written: shares of different words and pairs of words among all (Li et al. 2016), the share of
    replies that repeat their prompt, of those that end by themselves, and the mean number of words."""
    words = [reply.written.lower().split() for reply in replies]
    ones = [word for reply in words for word in reply]
    twos = [pair for reply in words for pair in itertools.pairwise(reply)]
    return {
        "distinct_1": len(set(ones)) / max(1, len(ones)),
        "distinct_2": len(set(twos)) / max(1, len(twos)),
        "repeats_prompt": sum(_repeats(r.prompt, r.written) for r in replies) / len(replies),
        "ended": sum(r.ended for r in replies) / len(replies),
        "words": len(ones) / len(replies),
    }


def _repeats(prompt: str, written: str) -> bool:
    """Whether at least half of what was written, and no single word, stands in one run in the prompt."""
    asked, said = prompt.lower().split(), written.lower().split()
    run = difflib.SequenceMatcher(None, asked, said, autojunk=False).find_longest_match().size
    return run > 1 and run >= REPEATED * len(said)
