"""Training keeps the memory that its steps free, unless somebody has decided otherwise, and leaves nothing behind."""

import gc
import resource
import subprocess
import sys
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from every_model import MODELS, V

from bklm.training import allocator
from bklm.training.loop import train
from bklm.training.schedules import TrainingSettings

# Faults of the last of ten equal rounds that allocate, fill and free 24 MB in blocks of 8.
FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault in place of hundreds
import torch
from bklm.training.allocator import keep_freed_memory
{call}
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**21) for _ in range(3)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call, monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_used_again_without_page_faults_unless_the_environment_says_otherwise(monkeypatch):
    pages = 24 * 2**20 // resource.getpagesize()
    if faults("", monkeypatch) < pages / 2:
        pytest.skip("this system counts no page faults, or its C library keeps freed memory by itself")
    assert faults("assert keep_freed_memory()", monkeypatch) < pages / 50
    chosen = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    assert faults("assert not keep_freed_memory()", monkeypatch, **chosen) > pages / 2


class Knot:
    """An object in a cycle, which only a garbage collection frees."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize(("ago", "is_collected"), [(1.0, False), (11.0, True)])
def test_the_end_of_a_training_collects_garbage_at_most_every_ten_seconds(ago, is_collected, monkeypatch):
    monkeypatch.setattr(allocator, "_collected", time.monotonic() - ago)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    optimizer, knot = weakref.ref(prepared.optimizer), weakref.ref(Knot())
    del prepared
    gc.disable()
    try:
        allocator.forget_training(accelerator)
        assert optimizer() is None
        assert (knot() is None) == is_collected
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_and_its_optimiser_are_gone_without_a_garbage_collection(name, monkeypatch):
    seen, real = [], torch.optim.AdamW
    real([torch.zeros(1)])  # torch keeps the frames of a process's first one in a cycle
    monkeypatch.setattr(allocator, "_collected", time.monotonic())

    class Seen(real):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(weakref.ref(self))

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    accelerator, ids = Accelerator(cpu=True), torch.randint(V, (3, 6))
    model = MODELS[name]()
    gc.disable()
    try:
        train(
            model, [(ids, ids)], [(ids, ids)], TrainingSettings(1, learning_rate=1e-3), accelerator=accelerator
        )
        seen.append(weakref.ref(model))
        del model
        assert [r() for r in seen] == [None, None]
    finally:
        gc.enable()
