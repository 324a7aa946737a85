"""Which defaults of the mixer "solve" read best? One training per variant, the table in `bklm/models/resnet_bk_config.py`.

    python benchmarks/reading_search.py --data_dir FOLDER                         # every variant at 1e-3, one epoch each
    python benchmarks/reading_search.py --data_dir FOLDER --rate 3e-3 --epochs 4 --only taken "4 heads"
    python benchmarks/reading_search.py --quick                                   # embedded text, a tiny model, for CI

Validation perplexity on words in lower case (1,000 of them), windows of 64, batch 16, 3 layers of width 128, 8 heads, a dense
layer; AdamW without decay, clip 1, a cosine over ``--schedule`` epochs after 5% warm-up, of which ``--epochs`` are trained.
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from _timing import print_table

from bklm.harness.text import prepare_text
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.studies.baseline.config import BaselineConfig
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings

VARIANTS = {
    "taken": {},
    "convolution 0": {"convolution": 0},
    "least_eta 0.1": {"least_eta": 0.1},
    "energy_span 1": {"energy_span": 1.0},
    "energy_span 1, least_eta 0.1": {"energy_span": 1.0, "least_eta": 0.1},
    "hopping 0.8": {"hopping": 0.8},
    "hopping 0.99": {"hopping": 0.99},
    "4 heads": {"n_heads": 4},
    "16 heads": {"n_heads": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--schedule", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    source = {"dataset": "embedded"} if given.data_dir is None else {"data_dir": given.data_dir}
    small = {"profile": "smoke"} if given.quick else {"profile": "full", "seq_len": 64, "vocab_size": 1000}
    text = prepare_text(BaselineConfig(**source, **small, batch_size=16).resolved())
    sizes = {"d_model": 128, "n_layers": 3} if not given.quick else {"d_model": 16, "n_layers": 1}
    settings = TrainingSettings(
        max(given.schedule, given.epochs), learning_rate=given.rate, weight_decay=0.0, clip=1.0, schedule="cosine", warmup=0.05
    )  # fmt: skip
    rows = []
    for name in given.only:
        row = {"variant": name}
        for seed in given.seeds:
            torch.manual_seed(seed)
            options = {"n_heads": 8, "num_experts": 1, **VARIANTS[name]}
            model = ResNetBK(ResNetBKConfig(text.vocab_size, **sizes, mixer="solve", **options))
            row |= {
                "parameters": f"{model.num_parameters():,}",
                f"seed {seed}": _perplexity(model, text, settings, seed, given),
            }
        rows.append(row)
    last = f"after epoch {given.epochs} of {settings.epochs}, rate {given.rate:g}"
    print_table(f"Validation perplexity {last}, {text.corpus.name}", rows)


class _Enough(Exception):
    """The epochs that were asked for are over."""


def _perplexity(model: ResNetBK, text, settings: TrainingSettings, seed: int, given: argparse.Namespace) -> str:
    found = []

    def after(record) -> None:
        found.append(record.val_perplexity)
        if record.epoch == given.epochs:
            raise _Enough

    with contextlib.suppress(_Enough):
        train(
            model, text.train_loader(seed), text.val_loader(), settings, accelerator=make_accelerator("cpu", "fp32"),
            unk_id=text.unk_id, on_epoch=after,
        )  # fmt: skip
    return f"{found[-1]:.2f}"


if __name__ == "__main__":
    main()
