"""The rest of the model: one training step of ResNet-BK in fp32, tf32, bf16 and fp16, on whatever arithmetic is here.

The BK-core itself computes in complex64 in every one of them (16-bit potentials are widened first).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from llvmlite import binding
from torch import Tensor

from bklm.models import ResNetBK, ResNetBKConfig

FORMATS = ("fp32", "tf32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Names that LLVM gives to the instructions that multiply in a format.
_CPU_FEATURES = {"bf16": ("avx512bf16", "amx-bf16", "bf16"), "fp16": ("avx512fp16", "amx-fp16", "fullfp16")}


def support(name: str, device: str) -> tuple[str, str]:
    """("native", "emulated" or "not supported", why) for a number format on this machine."""
    if name == "fp32":
        return "native", "the format of the weights"
    return _on_gpu(name) if device == "cuda" else _on_cpu(name)


def _on_gpu(name: str) -> tuple[str, str]:
    gpu, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if name == "fp16":
        has = "tensor cores" if capability >= (7, 0) else "no tensor cores"
        return ("native" if capability >= (7, 0) else "emulated"), f"{gpu} has {has}"
    if capability >= (8, 0):
        return "native", f"{gpu} has tensor cores for it"
    if name == "tf32":
        return "not supported", f"{gpu} is older than the format (compute capability 8.0)"
    return "emulated", f"{gpu} has no {name} arithmetic: numbers are widened for every product"


def _on_cpu(name: str) -> tuple[str, str]:
    if name == "tf32":
        return "not supported", "a format of NVIDIA's tensor cores; this run is on a CPU"
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know how to ask this system
        return "emulated", f"whether this processor multiplies in {name} cannot be told; taken as no"
    found = [f for f in _CPU_FEATURES[name] if features.get(f)]
    if found:
        return "native", f"the processor has {', '.join(found)}"
    return "emulated", f"the processor has no {name} arithmetic: numbers are widened for every product"


class Trainer:
    """A ResNet-BK with AdamW on one fixed random batch; ``step`` trains once in a number format."""

    def __init__(self, name: str, batch: int, length: int, vocab: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.name, self.device, self.seed, self.steps = name, device, seed, 0
        self.model = ResNetBK(ResNetBKConfig(vocab, n_seq=length)).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler(device, enabled=name == "fp16")
        tokens = torch.randint(0, vocab, (batch, length + 1)).to(device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self) -> tuple[float, Tensor]:
        """One optimiser step: the loss before it and the gradient before clipping, all parameters in one vector.

        Noise and dropout masks are those of (seed, step), the same in every format.
        """
        torch.manual_seed(self.seed + self.steps)
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        with self._products():
            with self._autocast():
                loss = self.model.loss(self.x, self.y)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item(), gradient

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.name not in _DTYPES:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=_DTYPES[self.name])

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        """float32 matrix products, forward and backward, in TF32 where that is the format."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def measure(
    batch: int, length: int, vocab: int, seed: int, device: str, repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """One row per format, fp32 first: support, seconds of every timed step, the gradient's distance from fp32's in the
    first step (relative norm), and the losses. The formats take turns, so that a busy moment hits all of them.

    At least three steps each are timed, then up to ``repeats`` while ``seconds`` per format last. A format in which torch
    cannot run the step here gets a row that says so.
    """
    rows, trainers, wanted = {}, {}, None
    for name in FORMATS:
        kind, why = support(name, device)
        rows[name] = {"format": name, "support": kind, "why": why, "gradient_difference": None}
        rows[name] |= {"step_seconds": [], "losses": []}
        if kind == "not supported":
            continue
        trainer = Trainer(name, batch, length, vocab, seed, device)
        try:
            _, gradient = trainer.step()  # also warms up
        except (RuntimeError, NotImplementedError) as error:
            rows[name] |= {"support": "not supported", "why": f"torch refuses: {str(error).splitlines()[0]}"}
            continue
        wanted = gradient if wanted is None else wanted
        rows[name]["gradient_difference"] = float((gradient - wanted).norm() / wanted.norm())
        trainers[name] = trainer
    started = time.perf_counter()
    for i in range(repeats):
        if i >= 3 and time.perf_counter() - started > seconds * len(trainers):
            break
        for name, trainer in trainers.items():
            begun = time.perf_counter()
            loss, _ = trainer.step()  # reading the loss waits for a GPU
            rows[name]["losses"].append(loss)
            rows[name]["step_seconds"].append(time.perf_counter() - begun)
    return list(rows.values())
