"""Does the verdict on freezing depend on what the pretrained table was? An SVD's never was the output of a language model,
GPT-2's was: its head is tied.

    python benchmarks/freeze_lm_embedding.py --data_dir FOLDER      documents that begin with ` = Title = `
    python benchmarks/freeze_lm_embedding.py --quick                embedded text, small models: does it run?

A tied ContextTokenLM is trained, embedding included, on documents that the study keeps apart; then the study
`bklm.studies.embedding_freeze` compares frozen with trained for that table and for the SVD's, both with a tied head, on the
same tokens, validation documents and seeds. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bklm.files.atomic import read_result, replacing, write_json
from bklm.harness.report import as_text, write_csv
from bklm.harness.statistics import Perplexity
from bklm.models import ContextTokenConfig, ContextTokenLM
from bklm.studies.embedding_freeze.config import EmbeddingFreezeConfig
from bklm.studies.embedding_freeze.phase2 import train_phase2
from bklm.studies.embedding_freeze.run import prepare_text, run_embedding_freeze
from bklm.studies.embedding_freeze.text import FreezeText
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings
from bklm.training.two_phase.phase1 import FixedPointSettings, train_context

CONTEXT_TOKENS = 100_000  # of which phase 1 learns; more change little
HELD_OUT = 20_000  # tokens of the documents kept apart that the table's own training is scored on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--output_dir", type=Path, default=Path("results/freeze_lm_embedding"))
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens that the table is trained on")
    parser.add_argument("--epochs", type=int, default=4, help="passes of the table's training")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        size = {"profile": "smoke", "dataset": "embedded"}
    else:
        size = {
            "profile": "quick", "dataset": "wikitext-2", "samples": (80,), "val_documents": 30, "document_tokens": 512,
            "pretraining_documents": 400, "vocab_size": 2048, "epochs": 10, "learning_rates": (1e-3, 4e-3),
        }  # fmt: skip
    common = EmbeddingFreezeConfig(
        **size, data_dir=arguments.data_dir, device="cpu", initialisation="pretrained", head="tied",
        original_comparison=False, output_dir=str(arguments.output_dir / "svd"),
    )  # fmt: skip
    path = arguments.output_dir / "embedding.npy"
    resolved = common.resolved()
    text = prepare_text(resolved)
    asked = {"--tokens": arguments.tokens, "--epochs": arguments.epochs}  # the study has epochs of its own
    claim_table(path, asked | settings_of(resolved, text))
    if not path.exists():
        table, score = trained_table(resolved, text, arguments.tokens, arguments.epochs)
        with replacing(path) as temporary:
            np.save(temporary, table)
        print(f"the table's own model reached PPL {score:.1f} on held-out tokens of its documents")
    own = dataclasses.replace(
        common, embedding_file=str(path), output_dir=str(arguments.output_dir / "language_model")
    )
    rows = []
    for name, config in (("an SVD's", common), ("a tied language model's", own)):
        rows += measured(name, run_embedding_freeze(config))
    print(as_text(rows))
    write_csv(arguments.output_dir / "table.csv", rows)


def settings_of(config: EmbeddingFreezeConfig, text: FreezeText) -> dict[str, Any]:
    """What the table depends on besides the tokens and epochs of its own training."""
    computed = {name: value for name, value in config.to_dict().items() if name not in config.circumstances}
    return {**computed, "text": text.fingerprint}


def claim_table(path: Path, settings: dict[str, Any]) -> None:
    """Record beside ``path`` what its table is trained with, before it is; exit where one of other settings was begun."""
    record = path.with_suffix(".json")
    recorded = read_result(record)
    if recorded is None:
        if path.exists():
            raise SystemExit(
                f"{path} is a table without a record of how it was trained; delete it or choose another --output_dir."
            )
        write_json(record, settings)
        return
    different = [
        f"{name} ({recorded.get(name)!r} there, {settings.get(name)!r} now)"
        for name in sorted({*recorded, *settings})
        if recorded.get(name) != settings.get(name)
    ]
    if different:
        raise SystemExit(
            f"{path.parent} holds a table trained with other settings: {'; '.join(different)}. Choose another --output_dir, "
            "or the same settings to go on with it; nothing was changed."
        )


def trained_table(
    config: EmbeddingFreezeConfig, text: FreezeText, tokens: int, epochs: int
) -> tuple[np.ndarray, float]:
    """The embedding of a tied model after both phases on documents that the study keeps apart, and its held-out PPL."""
    stream = np.concatenate(text.bpe.encode_documents(text.split.spare)).astype(np.int64)
    held_out = min(HELD_OUT, len(stream) // 5)
    train, valid = stream[:-held_out][:tokens], stream[-held_out:]
    accelerator = make_accelerator(config.device, config.precision)
    model = ContextTokenLM(
        ContextTokenConfig(text.vocab_size, config.embed_dim, config.context_dim, config.n_layers, tied=True)
    ).to(accelerator.device)
    torch.manual_seed(12345)  # none of the study's seeds
    model.reset_parameters()
    train_context(model, train[:CONTEXT_TOKENS], FixedPointSettings(iterations=config.iterations))
    settings = TrainingSettings(
        epochs, learning_rate=2e-3, weight_decay=0.0, clip=config.clip, patience=config.patience
    )
    trained = train_phase2(
        model, train, valid, settings, batch_tokens=config.batch_tokens, recompute_contexts=config.recompute_contexts,
        accelerator=accelerator, unk_id=text.unk_id, folder=Path(config.output_dir).parent / "checkpoints",
        label="the table's own model",
    )  # fmt: skip
    return model.embedding.weight.detach().cpu().numpy(), trained["val_ppl"]


def measured(name: str, result: Any) -> list[dict[str, str]]:
    """A row per arm, the paired ratio of freezing beside the frozen one."""
    ratio = next(e for e in result.effects if (e["factor"], e["where"]) == ("freezing", "all"))
    rows = []
    for row in result.table:
        frozen = ", frozen," in row["arm"]
        words = f"x{Perplexity(ratio['ratio'], ratio['ratio_low'], ratio['ratio_high'])}: {ratio['verdict']}"
        rows.append(
            {
                "pretrained embedding": name,
                "in phase 2": "frozen" if frozen else "trained",
                "samples": f"{row['samples']}",
                "val PPL (95%)": str(Perplexity(row["val_ppl"], row["val_ppl_low"], row["val_ppl_high"])),
                "trained parameters": f"{row['trainable_parameters']:,}",
                "frozen instead of trained, paired": words if frozen else "",
            }
        )
    return rows


if __name__ == "__main__":
    main()
