"""One process at a time in a folder, whatever its mount offers."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from bklm.files.locks import lock

HOLD = """
import fcntl, sys
def refuse(*arguments): raise OSError({errno}, "refused")
if {errno}: fcntl.flock = refuse
from pathlib import Path
from bklm.files.locks import lock
held = lock(Path(sys.argv[1]), "busy")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=[None, errno.EOPNOTSUPP, errno.ENOLCK], ids=["flock", "EOPNOTSUPP", "ENOLCK"])
def mount(request, monkeypatch):
    """The errno that flock answers on this mount; None where it works."""

    def refuse(*arguments):
        raise OSError(request.param, "refused")

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


@pytest.fixture
def holder(tmp_path, mount):
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(errno=mount), str(tmp_path / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_of_a_left_over_file_only_where_there_can_be_one(
    tmp_path, mount, holder
):
    with pytest.raises(RuntimeError, match=r"^busy") as caught:
        lock(tmp_path / ".lock", "busy")
    assert ("delete that file" in str(caught.value)) == (mount is not None)
    assert str(caught.value).endswith(".")


def test_the_lock_of_a_process_killed_with_signal_9_does_not_block(tmp_path, holder):
    holder.kill()
    holder.wait()
    lock(tmp_path / ".lock", "busy").release()


def test_a_released_lock_can_be_taken_again(tmp_path, mount):
    lock(tmp_path / ".lock", "busy").release()
    lock(tmp_path / ".lock", "busy").release()
    assert not (tmp_path / ".lock.soft").exists()


def test_an_error_that_says_nothing_of_flock_is_passed_on(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"):
        lock(tmp_path / ".lock", "busy")
