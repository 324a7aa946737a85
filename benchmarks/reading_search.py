"""Which defaults of a model read best? One training per variant, for the tables in `bklm/models/resnet_bk_config.py` and
docs/benchmarks.md.

    python benchmarks/reading_search.py --data_dir FOLDER                         # every variant of each, one epoch of four
    python benchmarks/reading_search.py --data_dir FOLDER --model resnet_bk --rate 3e-3 --epochs 4 --only taken "4 heads"
    python benchmarks/reading_search.py --data_dir FOLDER --model gpt --parameters 2740000 --epochs 8 --schedule 8
    python benchmarks/reading_search.py --data_dir FOLDER --model lstm --rate 1e-2 --schedule 1
    python benchmarks/reading_search.py --quick                                   # embedded text, a tiny model, for CI

Validation perplexity on words in lower case (1,000 of them), windows of 64, batch 16; AdamW without decay, clip 1, a cosine
over ``--schedule`` epochs after 5% warm-up, of which ``--epochs`` are trained. The model that reads has 3 layers of width 128,
8 heads and a dense layer; GPT, 5 layers and 4 heads, and LSTM, 2 layers, have ``--parameters``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from _timing import print_table, where
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models import GPT, LSTM, GPTConfig, LanguageModel, ResNetBK, ResNetBKConfig, reading_settings
from bklm.models.gpt import GPTBlock
from bklm.models.normalised_gate import gated
from bklm.models.resnet_bk_mixers import SolveMixer
from bklm.models.sizing import gpt_of_size, lstm_of_size
from bklm.studies.baseline.config import BaselineConfig
from bklm.studies.baseline.run import prepare_text
from bklm.studies.baseline.text import BaselineText
from bklm.training.denormals import flushed_denormals
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings


class OpenMixer(SolveMixer):
    """Computes y by itself, so that what is made of it can be another thing."""

    def _is_fused(self, read: Tensor) -> bool:
        return False


class RealMixer(OpenMixer):
    """Of y, Re alone is handed on."""

    def _write(self, y: Tensor, gates: Tensor) -> Tensor:
        return super()._write(torch.complex(y.real, torch.zeros_like(y.real)), gates)


class LoudMixer(OpenMixer):
    """y as large as eta makes it."""

    def _write(self, y: Tensor, gates: Tensor) -> Tensor:
        parts = torch.stack([y.real, y.imag], -1).permute(0, 2, 4, 1, 3).flatten(3)
        return self.output(gated(parts, gates).flatten(2))


class DroppingBlock(GPTBlock):
    """Drops attention weights, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._heads(x)
        p = self.dropout_p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=p)
        return self._add(x, mixed), key, value


# As studies 03 and 09 take it for windows of 64.
OF_03 = {name: value for name, value in reading_settings(64).items() if name != "mixer"}
READERS: dict[str, dict[str, Any]] = {
    "taken": {},
    "as in 03": OF_03,
    "as in 03, edge_energy 0": OF_03 | {"edge_energy": 0.0},
    "as in 03, edge_energy -1.5": OF_03 | {"edge_energy": -1.5},
    "as in 03, potential_scale 1": OF_03 | {"potential_scale": 1.0},
    "as in 03, least_eta 0.2": OF_03 | {"least_eta": 0.2},
    "as in 03, hopping 0.9": OF_03 | {"hopping": 0.9},
    "as in 03, convolution 2": OF_03 | {"convolution": 2},
    "convolution 0": {"convolution": 0},
    "least_eta 0.1": {"least_eta": 0.1},
    "energy_span 1": {"energy_span": 1.0},
    "energy_span 1, least_eta 0.1": {"energy_span": 1.0, "least_eta": 0.1},
    "hopping 0.8": {"hopping": 0.8},
    "hopping 0.99": {"hopping": 0.99},
    "4 heads": {"n_heads": 4},
    "16 heads": {"n_heads": 16},
    "head of its own": {"tied": False},
    "Re y alone": {"mixer_class": RealMixer},
    "y not normalised": {"mixer_class": LoudMixer},
    "weight decay 0.01": {"weight_decay": 0.01},
    "weight decay 0.1": {"weight_decay": 0.1},
}
GPTS: dict[str, dict[str, Any]] = {
    "taken": {},
    "rate 0.0003": {"rate": 3e-4},
    "rate 0.0003, attention weights dropped": {"rate": 3e-4, "block": DroppingBlock},
    "attention weights dropped": {"block": DroppingBlock},
    "no warm-up": {"warmup": 0.0},
    "branches not scaled down": {"last_scale": True},
    "head of its own": {"untied": True},
    "embedding N(0, 1)": {"wide_start": True},
    "no dropout": {"dropout_p": 0.0},
    "dropout 0.2": {"dropout_p": 0.2},
    "8 heads": {"n_heads": 8},
    "3 layers": {"n_layers": 3},
    "8 layers": {"n_layers": 8},
}
LSTMS: dict[str, dict[str, Any]] = {
    "taken": {},
    "embedding N(0, 0.02)": {"start": 0.02},
    "embedding N(0, 0.1)": {"start": 0.1},
    "embedding N(0, 1)": {"start": 1.0},
    "head of its own": {"tied": False},
    "1 layer": {"n_layers": 1},
    "dropout 0.2": {"dropout_p": 0.2},
}


class UntiedGPT(GPT):
    """GPT whose output head is not its embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.output.weight, std=0.02)

    def head(self) -> tuple[Tensor, None]:
        return self.output.weight, None


def build_reader(
    vocabulary: int, given: argparse.Namespace, *, mixer_class: type[SolveMixer] = SolveMixer, **options: Any
) -> ResNetBK:
    size = {"d_model": 16, "n_layers": 1} if given.quick else {"d_model": 128, "n_layers": 3}
    fields = {"n_heads": 8, "num_experts": 1, **options}
    model = ResNetBK(ResNetBKConfig(vocabulary, **size, mixer="solve", **fields))
    for block in model.blocks:
        # The same weights, read in another way.
        block.mixer.__class__ = mixer_class
    return model


@torch.no_grad()
def build_gpt(
    vocabulary: int, given: argparse.Namespace, *, last_scale: bool = False, untied: bool = False,
    wide_start: bool = False, block: type[GPTBlock] = GPTBlock, **options: Any,
) -> GPT:  # fmt: skip
    config = gpt_of_size(given.parameters, vocabulary, given.seq_len, **options).config
    if untied:
        # What its own head has is taken from the blocks: the size stays.
        size = given.parameters - vocabulary * config.d_model
        config = gpt_of_size(size, vocabulary, given.seq_len, **options).config
    model = (UntiedGPT if untied else GPT)(config)
    for one in model.blocks:
        one.__class__ = block
    if last_scale:
        for one in model.blocks:
            for layer in (one.attention_output, one.down):
                layer.weight.mul_(math.sqrt(2 * config.n_layers))
    if wide_start:
        nn.init.normal_(model.embedding.weight)
    return model


@torch.no_grad()
def build_lstm(
    vocabulary: int, given: argparse.Namespace, *, start: float | None = None, **options: Any
) -> LSTM:
    model = LSTM(lstm_of_size(given.parameters, vocabulary, **options).config)
    if start is not None:
        nn.init.normal_(model.embedding.weight, std=start)
    return model


# Of those that the search of study 03 tries, one that suits the model.
RATES = {"resnet_bk": 3e-3, "gpt": 1e-3, "lstm": 1e-2}
MODELS: dict[str, tuple[dict[str, dict[str, Any]], Callable[..., LanguageModel]]] = {
    "resnet_bk": (READERS, build_reader),
    "gpt": (GPTS, build_gpt),
    "lstm": (LSTMS, build_lstm),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--model", choices=MODELS, help="one alone")
    parser.add_argument("--only", nargs="+", help="names of variants, of one model")
    parser.add_argument("--parameters", type=int, default=2_740_000, help="of GPT and LSTM")
    parser.add_argument("--rate", type=float, help="learning rate; each model's own where none is given")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--schedule", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.only and given.model is None:
        parser.error("--only: name the --model that these are variants of.")
    known = MODELS[given.model][0] if given.model else {}
    if unknown := [name for name in given.only or () if name not in known]:
        parser.error(f"--only: got {', '.join(unknown)}; {given.model} has {', '.join(known)}.")
    source = {"dataset": "embedded"} if given.data_dir is None else {"data_dir": given.data_dir}
    small = {"profile": "smoke"} if given.quick else {"profile": "full", "seq_len": 64, "vocab_size": 1000}
    config = BaselineConfig(**source, **small, batch_size=16).resolved()
    given.seq_len = config.seq_len
    given.parameters = 20_000 if given.quick else given.parameters
    text = prepare_text(config)
    print(where())
    for model in [given.model] if given.model else MODELS:
        search(model, given.rate or RATES[model], text, given)


def search(name_of_model: str, rate: float, text: BaselineText, given: argparse.Namespace) -> None:
    """Print a model's table, a row a variant."""
    variants, build = MODELS[name_of_model]
    rows = []
    for name in given.only or variants:
        options = dict(variants[name])
        settings = TrainingSettings(
            max(given.schedule, given.epochs), learning_rate=options.pop("rate", rate), clip=1.0, schedule="cosine",
            warmup=options.pop("warmup", 0.05), weight_decay=options.pop("weight_decay", 0.0),
        )  # fmt: skip
        row = {"variant": name}
        for seed in given.seeds:
            torch.manual_seed(seed)
            model = build(text.vocab_size, given, **options)
            row |= {
                "parameters": f"{model.num_parameters():,}",
                f"seed {seed}": _perplexity(model, text, settings, seed, given),
            }
            print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
        rows.append(row)
    last = f"after epoch {given.epochs} of {settings.epochs}, rate {rate:g}"
    print_table(f"Validation perplexity {last}, {name_of_model}, {text.corpus.name}", rows)


class _Enough(Exception):
    """The epochs that were asked for are over."""


def _perplexity(
    model: LanguageModel, text, settings: TrainingSettings, seed: int, given: argparse.Namespace
) -> str:
    """The lowest up to the last epoch, and where it was."""
    found = []

    def after(record) -> None:
        found.append(record.val_perplexity)
        if record.epoch == given.epochs:
            raise _Enough

    with contextlib.suppress(_Enough), flushed_denormals():
        train(
            model, text.train_loader(seed), text.val_loader(), settings, accelerator=make_accelerator("cpu", "fp32"),
            unk_id=text.unk_id, on_epoch=after,
        )  # fmt: skip
    return f"{min(found):.2f} (epoch {1 + found.index(min(found))})"


if __name__ == "__main__":
    main()
