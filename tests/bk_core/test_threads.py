"""Work shared among threads: every part once, errors come out, scratch is one's own; by torch's team and by the pool."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bklm.bk_core.cpu import threads


@pytest.fixture(params=["team", "pool"])
def three_threads(request, monkeypatch):
    if request.param == "team" and threads._openmp() is None:
        pytest.skip("this torch brings no libgomp")
    monkeypatch.setattr(threads, "_is_forked", request.param == "pool")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    # bklm's own pool has as many as there are cores.
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(threads, "_pool", pool)
        yield


def parts_of(n):
    found = []
    threads.split(lambda first, last: found.append((first, last)), n, True)
    return sorted(found)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_every_index_is_worked_on_once(n, three_threads):
    covered = [i for first, last in parts_of(n) for i in range(first, last)]
    assert covered == list(range(n))


def test_an_error_in_a_part_comes_out_and_leaves_the_threads_usable(three_threads):
    def broken(first, last):
        if last == 100:
            raise ValueError("the last part")

    with pytest.raises(ValueError, match="the last part"):
        threads.split(broken, 100, True)
    assert parts_of(100)[-1][1] == 100


def test_threads_at_work_together_have_a_scratch_buffer_each(three_threads):
    together, buffers = threading.Barrier(3), []

    def part(first, last):
        buffers.append(threads.scratch(8, np.float32))
        if len(buffers) <= 3:
            together.wait(timeout=60)

    threads.split(part, 3, True)
    assert len({id(buffer) for buffer in buffers}) == 3


def test_a_scratch_buffer_has_the_length_that_is_asked_for_whatever_was_asked_before():
    """Kernels write to it by address: into a shorter one they would write past its end."""
    few, many = threads.scratch(8, np.float32), threads.scratch(100, np.float32)
    assert (len(few), len(many)) == (8, 100)
    assert threads.scratch(8, np.float32) is few
    assert threads.scratch(100, np.float32) is many


def test_several_callers_share_the_work_of_each(three_threads):
    with ThreadPoolExecutor(4) as callers:
        for parts in callers.map(parts_of, [50] * 12):
            assert [i for first, last in parts for i in range(first, last)] == list(range(50))


class Pressed(BaseException):
    """In place of KeyboardInterrupt, which would end the whole run of tests if it came too late."""


@pytest.fixture
def pressed():
    def handler(*_):
        raise Pressed

    before = signal.signal(signal.SIGINT, handler)
    yield Pressed
    signal.signal(signal.SIGINT, before)


def in_the_caller():
    return threading.current_thread() is threading.main_thread()


def test_ctrl_c_in_the_callers_part_comes_out_before_another_threads_error(three_threads, pressed):
    together = threading.Barrier(2)

    def part(first, last):
        together.wait(timeout=60)
        if in_the_caller():
            time.sleep(0.02)
            signal.raise_signal(signal.SIGINT)
        raise ValueError("of another thread")

    with pytest.raises(pressed):
        threads.split(part, 2, True)
    assert parts_of(100)[-1][1] == 100


@pytest.mark.parametrize("presses", [1, 3])
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread")
def test_ctrl_c_while_the_pool_is_waited_for_leaves_no_helper_at_work(monkeypatch, pressed, presses):
    """They write through addresses to tensors that the caller may free once it is out."""
    monkeypatch.setattr(threads, "_is_forked", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun, ended, main = threading.Event(), [], threading.main_thread().ident

    def part(first, last):
        if in_the_caller():
            begun.wait(timeout=60)
            return
        begun.set()
        for _ in range(presses):
            time.sleep(0.05)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        ended.append((first, last))

    with pytest.raises(pressed):
        threads.split(part, 2, True)
    assert len(ended) == 1


def test_ctrl_c_between_two_submissions_leaves_no_helper_at_work(monkeypatch):
    monkeypatch.setattr(threads, "_is_forked", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    submit, at_work, ended = threads._executor().submit, threading.Event(), []

    class Interrupted:
        def submit(self, work):
            if at_work.is_set():
                raise KeyboardInterrupt
            submit(work)
            at_work.wait(timeout=60)
            # What submit returns is lost, as on its way to the caller.

    def part(first, last):
        at_work.set()
        time.sleep(0.05)
        ended.append(first)

    monkeypatch.setattr(threads, "_executor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.split(part, 100, True)
    found = len(ended)
    assert found >= 1
    time.sleep(0.1)
    assert len(ended) == found


def test_ctrl_c_that_ctypes_forgets_is_raised_again(monkeypatch):
    """It prints and drops what a callback raises on its way into Python; the caller's part would be missing without a word."""
    if threads._openmp() is None:
        pytest.skip("this torch brings no libgomp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_openmp", lambda: lambda function, *_: None)
    with pytest.raises(KeyboardInterrupt):
        parts_of(100)


def test_parts_of_a_member_that_never_came_are_worked_on_by_the_caller(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_openmp", lambda: lambda function, *_: function(None))
    assert [i for first, last in parts_of(100) for i in range(first, last)] == list(range(100))
