"""Sums of CPU kernels: the same numbers give the same bits, wherever memory was found for them.

LLVM compiles a loop that reads one array and writes another twice: in vector registers, and one number after the other where
the arrays lie closer together than a step of the first is long. A sum in such a loop has two orders, and the addresses choose.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

import bklm
from bklm.bk_core.cpu import solve_adjoint
from bklm.bk_core.cpu.jit import SUMS
from bklm.bk_core.solve import resolvent_solve
from bklm.models import gate_kernels, loss_kernels, new_llm_kernels, solve_features_kernels
from bklm.models.new_llm import NewLLM, NewLLMConfig
from bklm.models.normalised_gate import normalised_gate
from bklm.models.solve_features import solve_features


def summing_loops(code: str) -> tuple[int, int]:
    """Of optimised LLVM code: loops that add up in vector registers, and how many of them also write."""
    blocks = re.split(r"\n(?=[\w.\"]+:)", code)
    loops = [b for b in blocks if re.match(r"(vector\.body|vec\.epilog\.vector\.body)[\w.]*:", b)]
    # Several numbers at once also where they are no vector: LLVM then calls the loop the same.
    sums = [b for b in loops if re.search(r" = phi (<(vscale x )?\d+ x )?(float|double)\b", b)]
    writes = re.compile(r"^\s+(store |.*@llvm\.masked\.(store|scatter))", re.MULTILINE)
    return len(sums), sum(writes.search(b) is not None for b in sums)


def code_of(kernel) -> str:
    """Compiled anew for the signatures that it was called with: what comes from the disk has no code to read."""
    options = {name: value for name, value in kernel.targetoptions.items() if name != "nopython"}
    fresh = njit(**options)(kernel.py_func)
    for signature in kernel.signatures:
        fresh.compile(signature)
    return "".join(fresh.inspect_llvm().values())


def use_new_llm() -> None:
    model = NewLLM(NewLLMConfig(vocab_size=5, embed_dim=4, hidden_dim=8, context_dim=8, n_layers=1))
    model.loss(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)).backward()


def use_solve_features() -> None:
    read = torch.randn(2, 3, 2 * 8 + 2 * 2, requires_grad=True)
    solve_features(read, torch.zeros(2, requires_grad=True))[0].sum().backward()


def use_gate() -> None:
    y = torch.randn(2, 2, 3, 4, dtype=torch.complex64, requires_grad=True)
    normalised_gate(y, torch.randn(2, 3, 8)).sum().backward()


def use_adjoint() -> None:
    x, a = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    resolvent_solve(x, a, 0.5, 0.5, 1j).real.sum().backward()


KERNELS = [
    (new_llm_kernels, "contexts_of", use_new_llm),
    (new_llm_kernels, "gate_gradients", use_new_llm),
    (solve_features_kernels, "_forward", use_solve_features),
    (solve_features_kernels, "_backward", use_solve_features),
    (gate_kernels, "_forward", use_gate),
    (gate_kernels, "_backward", use_gate),
    (solve_adjoint, "adjoint_columns", use_adjoint),
]


@pytest.mark.parametrize(("module", "name", "use"), KERNELS, ids=lambda x: getattr(x, "__name__", x))
def test_a_sum_in_vector_registers_is_in_a_loop_that_only_reads(module, name, use):
    kernel = getattr(module, name)
    if not kernel.signatures:
        use()
    sums, writing = summing_loops(code_of(kernel))
    assert sums > 0, "no sum of this kernel is added in vector registers any more"
    assert writing == 0


def test_no_module_with_such_sums_is_left_out():
    # The sum of loss_kernels writes where it reads, which needs no check.
    looked_at = {Path(module.__file__) for module in (loss_kernels, *(module for module, _, _ in KERNELS))}
    words = re.compile(r"^from bklm.bk_core.cpu.jit import .*\b(SUMS|summing)\b|reassoc", re.MULTILINE)
    found = {p for p in Path(bklm.__file__).parent.rglob("*.py") if words.search(p.read_text(encoding="utf-8"))}
    assert found - looked_at == {Path(bklm.__file__).parent / "bk_core" / "cpu" / "jit.py"}
    assert looked_at <= found


def test_a_loop_that_adds_up_and_writes_is_found():
    @njit(fastmath=SUMS)
    def squares(x, out):
        total = x.dtype.type(0)
        for i in range(len(x)):
            out[i] = x[i] * x[i]
            total += out[i]
        return total

    squares(np.ones(3, np.float32), np.ones(3, np.float32))
    sums, writing = summing_loops("".join(squares.inspect_llvm().values()))
    assert 0 < writing == sums
