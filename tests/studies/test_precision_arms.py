"""What the precision study compares really computes the same thing, and is measured as it says."""

from __future__ import annotations

import functools
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bklm.bk_core import reference
from bklm.harness import measure
from bklm.harness.measure import Arm
from bklm.studies.precision import kernels
from bklm.studies.precision import model as precision_model
from bklm.studies.precision import parts as precision_parts
from bklm.studies.precision.cells import GRID
from bklm.studies.precision.grid import (
    LEFT_RIGHT,
    PRECISIONS,
    SMALL_GRADIENT,
    THETA_PHI,
    THETA_PHI_LOOP,
    Problem,
    arms,
    errors,
    truth,
)

VALUE = {"complex64": 1e-5, "complex128": 1e-12, "mixed": 1e-12, "adaptive": 1e-12}
GRADIENT = {"complex64": 1e-5, "complex128": 1e-12, "mixed": 1e-5, "adaptive": 1e-5}


def inputs(n: int, seed: int = 0, dtype=np.complex128):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(2, n)) - 2
    k = 0.5 + rng.random(n - 1)
    gbar = rng.normal(size=(2, n)) + 1j * rng.normal(size=(2, n))
    return a, k.astype(dtype(0).real.dtype), (a - 1j).astype(dtype), gbar.astype(dtype)


def autograd_through(recursion, a, k, gbar):
    leaf = torch.from_numpy(a).requires_grad_()
    out = recursion(leaf, torch.from_numpy(k), torch.ones(len(k), dtype=torch.float64), 1j)
    return out.detach().numpy(), torch.autograd.grad(out, leaf, torch.from_numpy(gbar))[0].numpy()


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 24), seed=st.integers(0, 99))
def test_fifty_digits_are_the_dense_inverse_and_its_derivative(n, seed):
    a, k, _, gbar = inputs(n, seed)
    value, gradient = kernels.fifty_digits(a, k, 1j, gbar)
    wanted, slope = autograd_through(reference.dense, a, k, gbar)
    assert np.abs(value - wanted).max() < 1e-13
    assert np.abs(gradient - slope).max() < 1e-12 * max(1, np.abs(slope).max())


@pytest.mark.parametrize("n", [1, 2, 3, 47])
def test_compiled_theta_phi_and_its_gradient_are_those_of_the_published_loop(n):
    a, k, d, gbar = inputs(n)
    G, theta, phi = kernels.products(d, k)
    left, right = kernels.ratios(theta, phi, np.complex128)
    wanted, slope = autograd_through(reference.theta_phi, a, k, gbar)
    assert np.abs(G - wanted).max() < 1e-13
    assert np.abs(kernels.adjoint(gbar, G, k, left, right) - slope).max() < 1e-12 * np.abs(slope).max()


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_compiled_theta_phi_overflows_where_the_published_loop_does(dtype):
    name = {np.complex64: torch.complex64, np.complex128: torch.complex128}[dtype]
    for n in (40, 400, 4000):
        a, k, d, _ = inputs(n, dtype=dtype)
        real = torch.from_numpy(a).to(torch.float32 if dtype is np.complex64 else torch.float64)
        loop = reference.theta_phi(real, torch.from_numpy(k), torch.ones(n - 1), 1j, name)
        assert np.isfinite(kernels.products(d, k)[0]).all() == torch.isfinite(torch.view_as_real(loop)).all()


def test_the_compiled_kernels_stay_in_the_precision_they_were_given():
    _, k, d, gbar = inputs(20, dtype=np.complex64)
    G, theta, phi = kernels.products(d, k)
    assert (G.dtype, theta.dtype, phi.dtype) == (np.complex64,) * 3
    assert kernels.left_right(d, k, gbar)[1].dtype == np.float32


def test_sequential_left_right_agrees_with_fifty_digits():
    a, k, d, gbar = inputs(300)
    for found, wanted in zip(kernels.left_right(d, k, gbar), kernels.fifty_digits(a, k, 1j, gbar), strict=True):
        assert np.abs(found - wanted).max() < 1e-14 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("im_z", [1.0, 0.1])
def test_every_arm_of_the_grid_is_right_to_its_precision(im_z):
    problem = Problem.make(4, 40, im_z, seed=3)
    exact = truth(problem, 40)
    for (recursion, precision), arm in arms(problem).items():
        found = errors(*arm(), exact)
        assert found["status"] == "finite"
        assert found["value_error"] < VALUE[precision]
        if recursion != THETA_PHI_LOOP:  # which has the diagonal term alone as its gradient
            assert found["gradient_error"] < GRADIENT[precision]
            if precision == "adaptive":
                assert found["gradient_error_small_rows"] < 1e-12 < found["gradient_error"]


def test_both_precisions_are_given_the_same_numbers():
    problem = Problem.make(2, 100, 0.001, seed=0)
    assert torch.equal(problem.a["complex64"].double(), problem.a["complex128"])
    assert torch.equal(problem.gbar["complex64"].to(torch.complex128), problem.gbar["complex128"])
    assert torch.tensor(problem.z).to(torch.complex64).item() == problem.z


def test_adaptive_takes_double_precision_for_the_rows_of_small_gradient_alone():
    problem = Problem.make(4, 10, 1.0, seed=0)
    assert float(problem.gbar["complex64"][1].abs().max()) < 100 * SMALL_GRADIENT
    parts = {name: rows.tolist() for rows, name in problem.gradient_parts("adaptive")}
    assert parts == {"complex128": [1, 3], "complex64": [0, 2]}


def test_what_has_overflowed_is_called_not_finite_and_zeros_are_called_zero():
    problem = Problem.make(2, 1500, 1.0, seed=0)
    exact = truth(problem, 0)
    found = {key: errors(*arm(), exact)["status"] for key, arm in arms(problem, loops=False).items()}
    assert {found[THETA_PHI, p] for p in PRECISIONS} == {"not finite"}
    assert {found[LEFT_RIGHT, p] for p in PRECISIONS} == {"finite"}
    nothing = torch.zeros(2, 1500, dtype=torch.complex128)
    assert errors(nothing, nothing.real, exact)["status"] == "zero"


@pytest.mark.parametrize("part", [precision_parts.batched, precision_parts.backward, precision_parts.total])
def test_all_ways_to_take_a_batchs_gradients_agree(part):
    found = dict(precision_parts.differences(part(batch=11, length=12, seed=0, device="cpu")))
    assert max(found.values()) < 1e-4
    assert all(
        v < 1e-11 for name, v in found.items() if "complex64" not in name and not name.startswith("bklm")
    )


def test_the_analytic_mixture_computes_what_autograd_computes_and_the_selected_one_differs_in_the_router():
    found = dict(precision_parts.differences(precision_parts.moe(tokens=64, experts=4, seed=0, device="cpu")))
    assert found[precision_parts.EXACT] < 1e-4 < found[precision_parts.SELECTED]


def test_both_blocks_of_the_architecture_comparison_see_no_future():
    for name, arm in precision_parts.architecture(batch=1, length=9, seed=0, device="cpu").items():
        out = arm.forward()
        upstream = torch.zeros_like(out)
        upstream[:, 4] = 1
        x = next(t for t in _leaves(out) if t.shape == out.shape)
        (grad,) = torch.autograd.grad(out, x, upstream)
        assert grad[:, :5].abs().max() > 0, name
        assert grad[:, 5:].abs().max() == 0, name


def _leaves(out: torch.Tensor) -> list[torch.Tensor]:
    found, todo, seen = [], [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [n for n, _ in node.next_functions]
    return found


@pytest.fixture
def clock(monkeypatch):
    """The measurements' clock, which stands still but for what a test adds to it."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return now


def test_arms_take_turns_and_one_that_would_take_too_long_is_not_called(clock):
    calls = []
    made = {name: Arm(lambda name=name: calls.append(name)) for name in ("a", "b", "slow")}
    taken = measure.time_arms(made, repeats=4, seconds=1.0, device="cpu", predicted={"slow": 0.5})
    turn = measure.WARMING_CALLS + 1  # short ones are warmed up again in every turn
    assert calls[:4] == ["a", "b", "a", "b"]
    rounds = [calls[4 + i : 4 + i + 2 * turn] for i in range(0, 8 * turn, 2 * turn)]
    assert len(calls) == 4 + 8 * turn
    assert all(r in (["a"] * turn + ["b"] * turn, ["b"] * turn + ["a"] * turn) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 2  # no arm always follows the other
    assert len(taken["a"]["total"]) == len(taken["a"]["forward"]) == 4
    assert (taken["slow"]["total"], taken["slow"]["would_take"]) == ([], 0.5)


def test_an_arm_that_compiles_at_its_first_call_is_warmed_like_the_others(clock):
    calls = {"compiled": 0, "ready": 0}

    def call(name):
        calls[name] += 1
        if name == "compiled" and calls[name] == 1:
            clock[0] += 2 * measure.WARMED_AGAIN

    made = {name: Arm(functools.partial(call, name)) for name in calls}
    measure.time_arms(made, repeats=5, seconds=1.0, device="cpu")
    assert calls["compiled"] == calls["ready"] == 2 + 5 * (measure.WARMING_CALLS + 1)


def test_an_arm_that_uses_up_its_time_is_still_called_three_times(clock):
    def call():
        clock[0] += 1.0

    taken = measure.time_arms({"a": Arm(call)}, repeats=50, seconds=0.5, device="cpu")
    assert len(taken["a"]["total"]) == 3


def test_a_speed_up_is_the_median_of_paired_calls():
    # The machine was busy in the last round: both arms took ten times as long, and the ratio is what it was.
    assert measure.paired_ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == (2.0, 2.0, 2.0)


def test_memory_is_not_measured_where_the_system_keeps_no_counter(monkeypatch):
    monkeypatch.setattr(measure.Path, "exists", lambda self: False)
    with measure.MemoryMeter("cpu") as meter:
        found, why = meter.measure(GRID, {}, "anything")
    assert found is None
    assert "no peak-memory counter" in why


def test_who_is_stopped_does_not_wait_for_what_is_being_measured():
    meter = measure.MemoryMeter("cpu")
    if meter.reason:
        pytest.skip(meter.reason)
    helper = meter._running()
    meter.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert helper.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_peak_memory_is_what_the_arrays_of_an_arm_take_and_a_failure_is_reported():
    with measure.MemoryMeter("cpu") as meter:
        if meter.reason:
            pytest.skip(meter.reason)
        settings_ = {"rows": 2, "n": 1_000_000, "im_z": 1.0, "seed": 0}
        single, _ = meter.measure(GRID, settings_, "left/right complex64")
        double, _ = meter.measure(GRID, settings_, "left/right complex128")
        failed, why = meter.measure(GRID, {**settings_, "rows": -1}, "left/right complex64")
    # At least the value and the gradient, 12 and 24 bytes per position, less the megabyte to which the system keeps its
    # counter, and another one for every 32 processors, as each has a part of it; and at most what the operator promises.
    positions, grain = 2_000_000, 2**20 * (1 + os.cpu_count() // 32)
    assert 12 * positions - grain <= single < 120 * positions
    assert 24 * positions - grain <= double < 120 * positions
    assert failed is None
    assert why


def test_every_format_gets_a_row_and_one_that_is_not_there_says_why():
    rows = precision_model.measure(1, 8, 20, seed=0, device="cpu", repeats=3, seconds=0.01)
    assert [r["format"] for r in rows] == list(precision_model.FORMATS)
    by_name = {r["format"]: r for r in rows}
    assert by_name["tf32"]["support"] == "not supported"
    assert "NVIDIA" in by_name["tf32"]["why"]
    assert by_name["fp32"]["gradient_difference"] == 0
    assert len(by_name["fp32"]["step_seconds"]) == 3
    assert by_name["bf16"]["support"] in ("native", "emulated")
    assert 0 < by_name["bf16"]["gradient_difference"] < 0.5
    assert all(r["why"] for r in rows)


def test_a_format_in_which_torch_refuses_the_step_gets_a_row_instead_of_an_error(monkeypatch):
    real = precision_model.Trainer.step

    def step(self):
        if self.name == "fp16":
            raise RuntimeError("no kernel for Half\nlong story")
        return real(self)

    monkeypatch.setattr(precision_model.Trainer, "step", step)
    rows = precision_model.measure(1, 8, 20, seed=0, device="cpu", repeats=3, seconds=0.01)
    (half,) = (r for r in rows if r["format"] == "fp16")
    assert (half["support"], half["why"]) == ("not supported", "torch refuses: no kernel for Half")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), {"fp32": "native", "tf32": "not supported", "bf16": "emulated", "fp16": "native"}),
        ((8, 0), {"fp32": "native", "tf32": "native", "bf16": "native", "fp16": "native"}),
        ((6, 0), {"fp32": "native", "tf32": "not supported", "bf16": "emulated", "fp16": "emulated"}),
    ],
)
def test_a_gpus_formats_follow_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert {f: precision_model.support(f, "cuda")[0] for f in precision_model.FORMATS} == expected


def test_the_chosen_tf32_does_not_outlast_the_step():
    before = torch.get_float32_matmul_precision()
    trainer = precision_model.Trainer("tf32", 1, 4, 10, 0, "cpu")
    trainer.step()
    assert torch.get_float32_matmul_precision() == before
