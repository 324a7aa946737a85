"""Training keeps the memory that its steps free, unless somebody has decided otherwise."""

import subprocess
import sys

import pytest

# Faults of the last of ten equal rounds that allocate, fill and free 24 MB in blocks of 8.
FAULTS = """
import resource, torch
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
    pages = 24 * 2**20 // 4096
    assert faults("assert keep_freed_memory()", monkeypatch) < pages / 50
    chosen = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    assert faults("assert not keep_freed_memory()", monkeypatch, **chosen) > pages / 2
