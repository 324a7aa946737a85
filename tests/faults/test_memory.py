"""Memory that runs short: batches in more parts with the same steps, or one sentence."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch

from bklm.data import make_loader, windows
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training import loop
from bklm.training.auxiliary import WithTerm
from bklm.training.loop import train
from bklm.training.memory import OutOfMemoryError
from bklm.training.processes import make_accelerator
from bklm.training.schedules import TrainingSettings

VOCABULARY = 20


class SmallMemory(ResNetBK):
    """A model whose machine runs short when more than ``fits`` sequences are worked on at once, before or after the
    backward pass has begun."""

    fits = 99
    fails_at = 0  # training forward passes that succeed first

    def loss(self, x, y, *, reduction="mean"):
        value = super().loss(x, y, reduction=reduction)
        self.fails_at -= 1
        if self.training and len(x) > self.fits and self.fails_at < 0:
            torch.rand(3)  # draws that an undisturbed run would not have made
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return value


def small_model(*, draws: bool = True, **memory: int) -> SmallMemory:
    """``draws``: with dropout and a router whose noise depends on the parts of a batch."""
    torch.manual_seed(0)
    mixture = {"num_experts": 2, "dropout_p": 0.1} if draws else {"num_experts": 1, "dropout_p": 0.0}
    model = SmallMemory(ResNetBKConfig(VOCABULARY, d_model=8, n_layers=1, n_seq=6, **mixture))
    for name, value in memory.items():
        setattr(model, name, value)
    return model


def run(model, folder=None, **settings):
    ids = torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(1)).numpy()
    loader = make_loader(windows(ids, 6), 8, shuffle=True, seed=3)
    return train(
        model, loader, make_loader(windows(ids, 6), 8), TrainingSettings(**{"epochs": 2, **settings}),
        accelerator=make_accelerator("cpu", "fp32"), folder=folder, label="alpha 0",
    )  # fmt: skip


def curve(records):
    return [(r.train_loss, r.val_loss, r.gradient_norm_mean, r.expert_counts) for r in records]


@pytest.mark.parametrize(("fits", "parts"), [(4, 2), (1, 8)])
def test_a_batch_that_does_not_fit_is_worked_through_in_parts_as_if_so_told_from_the_start(fits, parts, caplog):
    with caplog.at_level(logging.WARNING):
        records = run(small_model(fits=fits))
    assert curve(records) == curve(run(small_model(), accumulate=parts))
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); each batch of 8" in caplog.text
    assert f"is now worked through in {parts} parts: slower, the same steps but for random draws" in caplog.text


def test_without_random_draws_the_numbers_are_those_of_a_machine_with_enough_memory():
    enough = run(small_model(draws=False))
    short = run(small_model(draws=False, fits=3, fails_at=2))  # in the middle of the first epoch
    assert [r.batch_parts for r in short] == [4, 4]
    for a, b in zip(enough, short, strict=True):
        assert b.val_loss == pytest.approx(a.val_loss, rel=1e-5)
        assert b.gradient_norm_mean == pytest.approx(a.gradient_norm_mean, rel=1e-4)


def test_a_run_that_was_stopped_after_it_ran_short_goes_on_with_the_parts_that_fitted(tmp_path):
    undisturbed = run(small_model(fits=4))
    run(small_model(fits=4), tmp_path, epochs=1)
    continued = run(small_model(), tmp_path)  # memory enough by now, and yet the same numbers
    assert curve(continued) == curve(undisturbed)


class Counting(torch.nn.Module):
    """A term that counts its calls."""

    keeps_state = True
    calls = 0

    def forward(self, states):
        self.calls += 1
        return 0.0 * states[-1].mean()


def test_a_term_that_counts_steps_ends_a_batch_that_does_not_fit_for_parts_would_be_steps_too(tmp_path):
    term = Counting()

    class Short(WithTerm):
        def loss(self, x, y, *, reduction="mean"):
            value = super().loss(x, y, reduction=reduction)
            if self.training and len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return value

    with pytest.raises(OutOfMemoryError, match=r"Counting keeps numbers .*smaller batch_size"):
        run(Short(small_model(), term, 0.1))
    assert term.calls == 1


def test_a_run_that_goes_on_in_parts_refuses_a_term_that_counts_steps(tmp_path, monkeypatch):
    run(WithTerm(small_model(), Counting(), 0.1), tmp_path, epochs=1)
    found = loop.restore

    def in_parts(*given, **options):
        return [dataclasses.replace(r, batch_parts=2) for r in found(*given, **options)]

    monkeypatch.setattr(loop, "restore", in_parts)
    with pytest.raises(ValueError, match=r"Counting: this term keeps numbers.* in 2 part\(s\)"):
        run(WithTerm(small_model(), Counting(), 0.1), tmp_path, epochs=2)


def test_when_one_sequence_is_too_much_there_is_one_sentence(tmp_path):
    with pytest.raises(
        OutOfMemoryError, match=r"alpha 0: out of memory even with one sequence.*smaller"
    ) as caught:
        run(small_model(fits=0))
    assert "\n" not in str(caught.value)


def test_a_shortage_in_the_optimiser_is_one_sentence_too(monkeypatch):
    def step(self, *a, **k):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 5 GB"
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfMemoryError, match=r"alpha 0: out of memory \(.*5 GB\); take a smaller batch_size"):
        run(small_model())


def test_another_error_of_the_model_is_not_taken_for_a_shortage(monkeypatch):
    def loss(self, *a, **k):
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(SmallMemory, "loss", loss)
    with pytest.raises(RuntimeError, match=r"^shapes do not agree$"):
        run(small_model())


REAL = """
import logging, resource, sys
import numpy as np, psutil
from bklm.data import make_loader, windows
from bklm.models import ResNetBK, ResNetBKConfig
from bklm.training import OutOfMemoryError, TrainingSettings, make_accelerator, train
logging.basicConfig(stream=sys.stdout, format="%(message)s")
def run(rows, length):
    model = ResNetBK(ResNetBKConfig(50, d_model=32, n_layers=2, n_seq=length, num_experts=2))
    loader = make_loader(windows(np.arange(rows * length + 1) % 50, length), rows)
    settings = TrainingSettings(epochs=1)
    return train(model, loader, loader, settings, accelerator=make_accelerator("cpu", "fp32"))[0]
run(2, 64)  # compiles, and starts its threads, before the limit is set
now = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]) * 2**20,) * 2)
try:
    print("parts", run(64, 2048).batch_parts)
except OutOfMemoryError as error:
    print("sentence", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [3000, 150, 40])
def test_a_real_limit_on_memory_gives_parts_or_one_sentence(megabytes):
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(megabytes)], capture_output=True, text=True, timeout=400
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stderr[-2000:]
    if megabytes == 3000:
        assert last == "parts 1"
    elif megabytes == 40:
        assert last.startswith("sentence training: out of memory")
    else:
        assert last.startswith("sentence training: out of memory") or int(last.split()[1]) > 1
