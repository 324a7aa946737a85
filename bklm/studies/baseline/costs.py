"""What the models of the baseline study cost: a training step's time and memory, and generating far into a text."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bklm.files.atomic import read_result, write_json
from bklm.harness.comparison import Trial
from bklm.harness.machine import machine_fingerprint
from bklm.harness.measure import Arm, MemoryMeter, median_and_quartiles, time_arms
from bklm.harness.text import as_ids
from bklm.models import LanguageModel
from bklm.studies.baseline.models import BYTES_PER_PARAMETER, TITLES, build_model
from bklm.studies.baseline.text import BaselineText
from bklm.training.processes import make_accelerator

log = logging.getLogger(__name__)

POSITIONS = (64, 1024, 16_384)
GPT_POSITIONS = 2048  # what GPT's position table is lengthened to for timing: 1,000 tokens from 1,024 on fit
STEP_ROUNDS, STEP_SECONDS = 5, 15.0  # per model
GENERATE_ROUNDS = 3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure_models(
    runs: Sequence[Trial], text: BaselineText, path: Path, device: str, precision: str, generate_tokens: int
) -> dict[str, dict[str, Any]]:
    """Cost of each model of some finished runs, by name; measured once on a machine, then read back from the file ``path``.

    What another machine or device measured there is measured anew: the tables say "on this machine". Models take turns, so
    that a busy moment of the machine hits all of them: their ratios are worth more than their values. Their weights are
    fresh: the cost does not depend on them.

    Returns:
        by model: tokens_per_second of a training step (median) with its quartiles, training_bytes (weights, Adam's moments
        and the peak of one step; None with memory_reason where it cannot be measured), and generation, a list by position
        of seconds (None where the model ends), reason and state_bytes.
    """
    device = make_accelerator(device, precision).device.type
    machine = machine_fingerprint(device)
    found = read_result(path)
    if found is not None:
        models = found.get("models")
        is_whole = isinstance(models, dict) and all(isinstance(models.get(r["model"]), dict) for r in runs)
        if is_whole and found.get("machine") == machine:
            return models
        log.info("The costs in %s are of %s, so they are measured anew.", path.name, _elsewhere(found, machine))
    log.info("Measuring each model's cost: the time of a training step ...")
    models = {run["model"]: run for run in runs}
    measured = _training_step(models, text, device, precision)
    for name, generation in _generation(models, text, device, generate_tokens).items():
        measured[name]["generation"] = generation
    write_json(path, {"machine": machine, "models": measured})
    return measured


def _elsewhere(found: dict[str, Any], machine: dict[str, Any]) -> str:
    """Why costs that were measured before do not hold here."""
    there = found.get("machine")
    if not isinstance(there, dict):
        return "a machine that an earlier version did not record"
    changed = [f"{k} {there.get(k)!r} then, {v!r} now" for k, v in machine.items() if there.get(k) != v]
    return f"another machine ({'; '.join(changed)})" if changed else "other models"


def step_arms(models: Mapping[str, Mapping[str, Any]], **on: Any) -> dict[str, Arm]:
    """One optimiser step of each model on (batch, seq_len) random tokens, gradients freed at its end."""
    return {name: _step_arm(build_model(name, settings), **on) for name, settings in models.items()}


def _step_arm(
    model: LanguageModel, vocab_size: int, batch: int, seq_len: int, device: str, precision: str
) -> Arm:
    # Not an Accelerator: in the process that measures memory it would look for the other processes of a launch.
    autocast = partial(torch.autocast, device, _DTYPES.get(precision), enabled=precision in _DTYPES)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    x = torch.randint(
        vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(device)

    def step() -> bool:
        with autocast():
            loss = model.loss(x, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return True

    return Arm(step)


def _training_step(
    runs: Mapping[str, Trial], text: BaselineText, device: str, precision: str
) -> dict[str, dict[str, Any]]:
    fields = {name: run["model_config"] for name, run in runs.items()}
    shape = {"vocab_size": text.vocab_size, "batch": text.batch_size, "seq_len": text.seq_len}
    settings = {"models": fields, **shape, "device": device, "precision": precision}
    taken = time_arms(step_arms(**settings), STEP_ROUNDS, STEP_SECONDS, device)
    tokens = text.batch_size * text.seq_len
    measured: dict[str, dict[str, Any]] = {}
    with MemoryMeter(device) as meter:
        for name, run in runs.items():
            log.info("... its peak memory, %s ...", TITLES[name])
            median, low, high = median_and_quartiles(taken[name]["total"])
            peak, reason = meter.measure(f"{__name__}:step_arms", settings, name)
            if peak is not None:
                peak += run["parameters"] * BYTES_PER_PARAMETER
            measured[name] = {
                "tokens_per_second": tokens / median,
                "tokens_per_second_quartiles": [tokens / high, tokens / low],
                "training_bytes": peak,
                "memory_reason": reason,
            }
    return measured


def _generation(
    runs: Mapping[str, Trial], text: BaselineText, device: str, count: int
) -> dict[str, list[dict[str, Any]]]:
    models = {}
    for name, run in runs.items():
        longer = {"n_seq": max(GPT_POSITIONS, run["model_config"]["n_seq"])} if name == "gpt" else {}
        models[name] = build_model(name, {**run["model_config"], **longer}).to(device).eval()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for position in POSITIONS:
        log.info("... writing %s words from position %s ...", f"{count:,}", f"{position:,}")
        ready = {}
        for name, model in models.items():
            row = {"position": position, "tokens": count, "seconds": None, "state_bytes": None, "reason": ""}
            if model.n_seq is not None and position + count > model.n_seq:
                row["reason"] = f"it ends at {model.n_seq:,} positions"
            else:
                row["state_bytes"] = model.state_bytes(position)
                ready[name] = model.prefill(as_ids(text, position).to(device))
            found[name].append(row)
        rounds = [
            {name: _seconds(models[name], *start, count) for name, start in ready.items()}
            for _ in range(GENERATE_ROUNDS)
        ]
        for name in ready:
            found[name][-1]["seconds"] = statistics.median(r[name] for r in rounds)
    return found


@torch.no_grad()
def _seconds(model: LanguageModel, logits: Tensor, state: Any, count: int) -> float:
    """Seconds to generate ``count`` tokens, greedily, from this state on."""
    if logits.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        logits, state = model.step(logits.argmax(-1), state)
    logits.argmax(-1).tolist()  # waits for a GPU
    return time.perf_counter() - started
