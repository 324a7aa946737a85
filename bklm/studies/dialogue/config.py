"""Settings of the dialogue study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bklm.harness.config import WITHOUT_FOLDER, TextStudyConfig, setting

SMALLEST_VOCABULARY = 261  # 256 bytes, <unk>, one merge and three marks


@dataclass(frozen=True, kw_only=True)
class DialogueConfig(TextStudyConfig):
    """Settings of the study: a text to pretrain on, dialogues to tune on, one vocabulary for both."""

    study: ClassVar[str] = "dialogue"
    notebook: ClassVar[str] = "08_dialogue"
    basic: ClassVar[tuple[str, ...]] = (
        "profile", "dataset", "data_dir", "pretraining", "pretraining_dir", "output_dir", "device", "model", "seeds", "epochs",
    )  # fmt: skip
    circumstances: ClassVar[frozenset[str]] = TextStudyConfig.circumstances | {"pretraining_dir"}
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "pretraining": "embedded", "seeds": (0,), "epochs": 1, "pretraining_epochs": 1, "learning_rates": (3e-3,),
            "max_dialogues": 48, "held_out_dialogues": 16, "max_pretraining_tokens": 2000, "vocab_size": 400, "seq_len": 64,
            "width": 16, "n_layers": 1, "context_replies": 10, "facts_asked": 5, "sample_dialogues": 2, "reply_tokens": 8,
        },
        "quick": {
            "pretraining": "embedded", "seeds": (0,), "epochs": 1, "pretraining_epochs": 1, "learning_rates": (4e-3,),
            "max_dialogues": 16_000, "held_out_dialogues": 200, "max_pretraining_tokens": 30_000, "vocab_size": 768,
            "seq_len": 96, "width": 44, "n_layers": 2, "context_replies": 100, "facts_asked": 50, "sample_dialogues": 8,
            "reply_tokens": 24,
        },
        "full": {
            "pretraining": "wikitext-2", "seeds": (0, 1, 2), "epochs": 2, "pretraining_epochs": 3,
            "learning_rates": (3e-4, 1e-3, 4e-3, 1e-2), "max_dialogues": 20_000, "held_out_dialogues": 0,
            "max_pretraining_tokens": 300_000, "vocab_size": 768, "seq_len": 128, "width": 44, "n_layers": 2,
            "context_replies": 1000, "facts_asked": 300, "sample_dialogues": 20, "reply_tokens": 40,
        },
    }  # fmt: skip

    dataset: Literal["grammar", "dailydialog", "ultrachat"] = setting(
        "grammar", help="dialogues; grammar is drawn from seeds and needs no network"
    )
    pretraining: Literal["wikitext-2", "embedded", "hmm"] | None = setting(
        None, help="text to pretrain on; embedded needs no network"
    )
    pretraining_dir: str | None = setting(
        None, is_path=True, help="your own text to pretrain on, used instead of the network"
    )
    model: Literal["all", "newllm", "resnet_bk", "gpt"] = setting("all", help="one model, or all of equal size")
    batch_size: int = setting(
        8, low=2, high=512, step=2, help="dialogues, or windows of text, per optimiser step"
    )
    seq_len: int | None = setting(None, low=8, high=65536, help="tokens that a model reads at once")
    vocab_size: int | None = setting(
        None, low=SMALLEST_VOCABULARY, high=1_000_000, help="largest vocabulary: pieces of a BPE, and the marks"
    )
    max_dialogues: int | None = setting(None, low=0, high=10**9, help="training dialogues; 0: all")
    held_out_dialogues: int | None = setting(
        None, low=0, high=10**9, help="dialogues of the validation and of the test split; 0: all"
    )
    max_pretraining_tokens: int | None = setting(None, low=0, high=10**12, help="of the text; 0: all")
    width: int | None = setting(None, low=8, high=8192, help="width of NewLLM; the others have its size")
    n_layers: int | None = setting(None, low=1, high=256, help="blocks")
    pretraining_epochs: int | None = setting(None, low=1, high=1000, help="passes over the text")
    epochs: int | None = setting(None, low=1, high=1000, help="passes over the training dialogues")
    learning_rates: tuple[float, ...] | None = setting(
        None, above=0, high=10, help="several: every arm is searched over all with the first seed"
    )
    replay: float = setting(
        0.1, above=0, high=0.9, help="share of the text among the targets of the arm with replay"
    )
    dropout: float = setting(0.0, low=0, high=0.99, help="share of units dropped in training")
    weight_decay: float = setting(0.01, low=0, high=10, help="AdamW weight decay")
    clip: float = setting(1.0, above=0, high=1e6, help="largest gradient norm")
    schedule: Literal["constant", "cosine"] = setting("cosine", help="learning rate over a run")
    context_replies: int | None = setting(
        None, low=0, high=10**9, help="replies that are scored behind each context; 0: all"
    )
    facts_asked: int | None = setting(
        None, low=1, high=10**6, help="facts of the grammar asked for at each distance"
    )
    sample_dialogues: int | None = setting(
        None, low=1, high=10_000, help="dialogues that every model replies to"
    )
    reply_tokens: int | None = setting(None, low=1, high=10_000, help="most tokens of a reply that is written")
    temperature: float = setting(
        0.8, low=0, high=10, help="of the replies that are written; 0: the likeliest token"
    )

    def resolved(self) -> DialogueConfig:
        config = super().resolved()
        if config.pretraining_dir and config.pretraining in WITHOUT_FOLDER:
            raise ValueError(
                f"pretraining_dir: got a folder with pretraining {config.pretraining!r}, which reads none; take pretraining "
                "'wikitext-2' to read that folder, or leave pretraining_dir empty."
            )
        return config
