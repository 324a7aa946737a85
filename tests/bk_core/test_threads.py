"""Work shared among threads: every part once, errors come out, scratch is one's own; by torch's team and by the pool."""

import threading
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


def test_several_callers_share_the_work_of_each(three_threads):
    with ThreadPoolExecutor(4) as callers:
        for parts in callers.map(parts_of, [50] * 12):
            assert [i for first, last in parts for i in range(first, last)] == list(range(50))
