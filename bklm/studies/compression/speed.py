"""Time and shares: scored and generated tokens a second, in turns in one run; what head, embedding and core are of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bklm.compression.calibration import first_batches
from bklm.compression.coded_model import outer_names
from bklm.compression.counting import count_model_sizes
from bklm.compression.torchao_products import with_torchao_products
from bklm.data.baselines import KneserNey, count_models
from bklm.harness import measure as timing
from bklm.harness.session import Session
from bklm.models import LanguageModel
from bklm.models.resnet_bk_mixers import SolveCore
from bklm.studies.compression.methods import products_of
from bklm.studies.compression.models import EXPERTS, families, kept_seed, load_model, smaller
from bklm.training.evaluation import evaluate

SECONDS = 10.0  # of timing, an arm at most
SEQUENCES = 16
WRITTEN = 32  # tokens
FLOAT, HIDDEN, CORE, TORCHAO = "float32", "blocks alone", "core alone", "int8 products, torchao, head in float"
PER_TOKEN = "int8 products, per token"


def speeds(study: Session, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of each call on the CPU, by model and arm, of one seed's models; and the shares of parameters."""
    found = {}
    for family in (f for f in families(study.config) if f != EXPERTS):
        seed = kept_seed(study.folder, study.config, family)
        trained = {t["arm"] for t in trials if t["seed"] == seed and t["val_ppl"] is not None}
        if family in trained:
            found[family] = _speed(study, family, trained, seed)
    return {"models": found}


def _speed(study: Session, family: str, trained: set[str], seed: int) -> dict[str, Any]:
    config, text = study.config, study.text
    model = load_model(study.folder, config, family, seed)
    x, y = text.first_batch(min(SEQUENCES, text.batch_size))
    batches = first_batches(text.train_loader(seed=0), config.calibration_tokens)
    made = {FLOAT: model} | {name: method(model, batches) for name, method in products_of(config).items()}
    for name in (n for n in smaller(config, family) if f"{family}, {n}" in trained):
        made[name] = load_model(study.folder, config, f"{family}, {name}", seed)
    reached = {}
    if config.torchao:
        made[TORCHAO] = with_torchao_products(model)
        reached[TORCHAO] = evaluate(made[TORCHAO], text.val_loader(), text.unk_id).perplexity
    scored = {name: timing.Arm(_score(m, x, y)) for name, m in made.items()}
    scored[HIDDEN] = timing.Arm(_hidden(model, x))
    if (core := _core(model, x)) is not None:
        scored[CORE] = timing.Arm(core)
    written = {name: timing.Arm(_write(m)) for name, m in made.items()}
    outer = outer_names(model)
    share = sum(p.numel() for n, p in model.named_parameters() if n in outer) / model.num_parameters()
    return {
        "scored": _seconds(scored, config.repeats), "generated": _seconds(written, config.repeats), "tokens": x.numel(),
        "written": WRITTEN, "outer_share": share, "val_ppl": reached,
    }  # fmt: skip


def _score(model: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    return lambda: model.token_losses(x, y) and None


def _hidden(model: LanguageModel, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model.hidden(x)

    return call


def _write(model: LanguageModel) -> Callable[[], None]:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    return lambda: model.generate(prompt, WRITTEN, temperature=0.0) is None and None


@torch.no_grad()
def _core(model: LanguageModel, x: torch.Tensor) -> Callable[[], None] | None:
    """The recursions of all blocks on what they are given, and nothing else; None for a model without."""
    given: list[tuple[SolveCore, tuple[torch.Tensor, ...]]] = []
    cores = [m for m in model.modules() if isinstance(m, SolveCore)]
    hooks = [m.register_forward_pre_hook(lambda module, values: given.append((module, values))) for m in cores]
    model.hidden(x)
    for hook in hooks:
        hook.remove()

    def call() -> None:
        with torch.no_grad():
            for core, values in given:
                core(*values)

    return call if given else None


def _seconds(arms: dict[str, timing.Arm], repeats: int) -> dict[str, list[float]]:
    return {name: cell["total"] for name, cell in timing.time_arms(arms, repeats, SECONDS, "cpu").items()}


def counted(study: Session) -> dict[str, Any]:
    """The Kneser-Ney models of the same tokens: perplexity and size."""
    tokens, scored = study.text.tokens, {r["name"]: r["val_ppl"] for r in study.text.baselines}
    rows = []
    for name, model in count_models(tokens.train, tokens.vocab_size).items():
        if isinstance(model, KneserNey):
            whole, packed = count_model_sizes(model)
            rows.append(
                {"arm": name, "val_ppl": scored[name], "file_bytes": whole, "packed_file_bytes": packed}
            )
    return {"rows": rows}
