"""The models of the dialogue study, where they start from, and what is measured of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bklm.data.grammar import GrammarCorpus
from bklm.files.atomic import replacing, write_json
from bklm.harness.arms import WEIGHTS
from bklm.harness.comparison import Trial
from bklm.harness.session import place_of
from bklm.models import GPT, LanguageModel, NewLLM, NewLLMConfig, ResNetBK
from bklm.models.by_name import built
from bklm.models.sizing import gpt_of_size, resnet_bk_of_size
from bklm.studies.dialogue.config import DialogueConfig
from bklm.studies.dialogue.text import DialogueText
from bklm.training.dialogues import (
    bits_per_byte,
    describe_replies,
    loss_by_context,
    recalled_facts,
    write_replies,
)
from bklm.training.evaluation import evaluate
from bklm.training.non_finite import NonFiniteError
from bklm.training.weights import hash_of_tokenizer, load_weights

PRETRAINING, TUNING, LONGER, REPLAY = ".pretraining", ".tuning", ".longer", ".replay"
"""Folders of the trials. Hidden ones stay out of the zip: it takes along one model of each kind, below ``KEPT``."""
KEPT, BEST = "models", "best_model.safetensors"
HEADS = {"ResNetBK": 4, "GPT": 2}
NAMES = {"newllm": "NewLLM", "resnet_bk": "ResNetBK", "gpt": "GPT"}
NEEDED = {
    "reply_ppl": float, "test_ppl": float, "text_loss": float, "contexts": dict, "facts": dict, "writing": dict,
    "replies": list,
}  # fmt: skip
SHOWN = 3  # replies of a trial that are kept to be read


def builders(config: DialogueConfig) -> dict[str, Callable[[int], LanguageModel]]:
    """Builders, which take the vocabulary, of a NewLLM of this width and of the others with as many parameters."""
    more = {"n_layers": config.n_layers, "dropout_p": config.dropout}

    def newllm(vocabulary: int) -> NewLLM:
        return NewLLM(NewLLMConfig(vocabulary, config.width, config.width, config.width, **more))

    def sized(model: type, of_size: Callable, vocabulary: int) -> LanguageModel:
        with torch.device("meta"):
            size = newllm(vocabulary).num_parameters()
        return model(of_size(size, vocabulary).config)

    solve = {"n_seq": None, "mixer": "solve", "num_experts": 1, "n_heads": HEADS["ResNetBK"]}
    gpt = functools.partial(gpt_of_size, n_seq=config.seq_len, n_heads=HEADS["GPT"], **more)
    made = {
        "NewLLM": newllm,
        "ResNetBK": functools.partial(sized, ResNetBK, functools.partial(resnet_bk_of_size, **solve, **more)),
        "GPT": functools.partial(sized, GPT, gpt),
    }
    return {name: made[name] for short, name in NAMES.items() if config.model in ("all", short)}


def pretrained(
    build: Callable[[int], LanguageModel], name: str, folder: Path, vocabulary_sha256: str
) -> Callable[[int], LanguageModel]:
    """A builder of the model of that name with the weights that the same seed's pretraining has left in a study's folder."""

    def made(vocabulary: int) -> LanguageModel:
        seed, model = torch.initial_seed(), build(vocabulary)
        weights = folder / PRETRAINING / place_of({"arm": name, "seed": seed}) / WEIGHTS
        # What cannot begin is lost as its pretraining is; the other seeds are worth reporting.
        if not weights.exists():
            raise NonFiniteError(f"{name}, seed {seed}: its pretraining diverged")
        load_weights(model, weights, vocabulary_sha256)
        return model

    return made


def measured(text: DialogueText, config: DialogueConfig) -> Callable[[LanguageModel], dict[str, Any]]:
    """What is recorded of a trained model, on validation dialogues and on the text of the pretraining."""
    valid, vocabulary = text.encoded["valid"], text.vocabulary
    few = text.dialogues["valid"][: config.sample_dialogues]
    asked = text.corpus.asked_at(config.facts_asked) if isinstance(text.corpus, GrammarCorpus) else []

    def found(model: LanguageModel) -> dict[str, Any]:
        replies = evaluate(model, text.val_loader(), text.unk_id)
        settings = {"temperature": config.temperature, "positions": config.seq_len}
        written = write_replies(model, vocabulary, few, config.reply_tokens, **settings)
        contexts = loss_by_context(model, valid, config.seq_len, vocabulary.pad_id, config.context_replies)
        return {
            "reply_ppl": replies.perplexity,
            "reply_ppl_without_unk": replies.perplexity_without_unk,
            "bits_per_byte": bits_per_byte(replies.nll, valid.reply_bytes),
            "test_ppl": evaluate(model, text.test_loader(), text.unk_id).perplexity,
            "all_tokens_loss": evaluate(model, text.all_tokens_loader(), text.unk_id).loss,
            "text_loss": evaluate(model, text.prose.val_loader(), text.unk_id).loss,
            "contexts": contexts,
            "other_context_loss": contexts["other"] - contexts["all"],
            "facts": recalled_facts(model, vocabulary, asked, config.seq_len) if asked else {},
            "writing": describe_replies(written),
            "replies": [reply.to_dict() for reply in written[:SHOWN]],
            # Of all parameters those that stand for words, at the input and at the output.
            "word_share": sum(p.numel() for p in model.parameters() if text.vocab_size in p.shape)
            / model.num_parameters(),
            "model_class": type(model).__name__,
            "model_config": dataclasses.asdict(model.config),
        }

    return found


def keep(folder: Path, trials: Sequence[Trial], places: Mapping[str, str]) -> list[Path]:
    """Copy each arm's model to where ``bklm.load`` finds it; ``places`` names the folders of these trials."""
    kept = []
    for trial in trials:
        place = folder / KEPT / trial["arm"].replace(" ", "_")
        with replacing(place / BEST) as temporary:
            temporary.write_bytes((folder / places[trial["arm"]] / WEIGHTS).read_bytes())
        write_json(place / "result.json", trial)
        kept += [place / BEST, place / "result.json"]
    return kept


def load_kept(folder: Path, arm: str) -> LanguageModel:
    """A model that ``keep`` has left; on the CPU, evaluating.

    Raises:
        FileNotFoundError: it was not kept; the message names those that were.
        OtherModelError: the folder's tokenizer.json is not the one that it was trained with.
    """
    place = Path(folder) / KEPT / arm.replace(" ", "_")
    if not (place / BEST).exists():
        held = sorted(p.name.replace("_", " ") for p in (Path(folder) / KEPT).glob("*"))
        raise FileNotFoundError(
            f"{folder} holds no model {arm!r}; it has {', '.join(map(repr, held)) or 'none'}."
        )
    record = json.loads((place / "result.json").read_text(encoding="utf-8"))
    model = built(record["model_class"], record["model_config"])
    load_weights(model, place / BEST, hash_of_tokenizer(Path(folder) / "tokenizer.json"))
    return model.eval()


def write_sample(
    result: Any, text: DialogueText, model: str = "", temperature: float = 0.8, seed: int = 0
) -> str:
    """What a kept model ("GPT tuned"; the best one when empty) replies to the first dialogues, each with its seed."""
    few = text.dialogues["valid"][:SHOWN]
    replies = write_replies(result.load(model or None), text.vocabulary, few, 40, temperature, seed)
    return "\n".join(
        f"seed {seed + n}\n  asked: {r.prompt}\n  replied there: {r.target}\n  the model: {r.written}"
        for n, r in enumerate(replies)
    )
