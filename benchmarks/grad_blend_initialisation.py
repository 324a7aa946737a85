"""Does the sweep's verdict on alpha depend on how the potential's weights start?

    python benchmarks/grad_blend_initialisation.py --data_dir FOLDER --output docs/results/potential_initialisation.csv

ResNet-BK draws the weights of its potential wide, so that G differs between tokens from the start. This trains the same
model with torch's default for a linear layer instead (as the original had it), 3 epochs each, corrected protocol, and
writes one row per model as it goes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bklm.harness.report import as_text, write_csv
from bklm.harness.text import prepare_text
from bklm.models import ResNetBK
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.train import model_config
from bklm.training.loop import train
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/potential_initialisation.csv"))
    arguments = parser.parse_args()
    config = GradBlendConfig(profile="full", mixer="diagonal", data_dir=arguments.data_dir).resolved()
    text = prepare_text(config)
    rows = []
    for seed in arguments.seeds:
        for alpha in arguments.alphas:
            torch.manual_seed(seed)
            model = ResNetBK(model_config(config, text.vocab_size, alpha))
            for block in model.blocks:
                block.potential.reset_parameters()
            records = train(
                model,
                text.train_loader(seed),
                text.val_loader(),
                TrainingSettings(epochs=3, seed=seed),
                accelerator=make_accelerator("cpu", "fp32"),
                unk_id=text.unk_id,
            )
            rows.append({"alpha": alpha, "seed": seed, "val_ppl": records[-1].val_perplexity})
            write_csv(arguments.output, rows)
            print(as_text(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
