"""Whether the operator is right on this machine and how long the studies take here, told in a minute or two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from bklm.bk_core import BKCore, available_backends, reference, resolvent_diagonal
from bklm.bk_core.ward import ward_residual
from bklm.harness.estimate import round_minutes
from bklm.harness.figures import colours, legend_below, save_figure
from bklm.harness.machine import environment, git_revision
from bklm.notebook.cells import mount_drive, show_picture, show_table, where
from bklm.notebook.form import is_headless
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.studies.grad_blend.run import estimated_minutes

TOLERANCE = 1e-6  # relative, complex64 against the dense inverse in complex128


class SelfTest:
    """The parts of notebook 00, each shown in its cell; ``namespace`` is the notebook's ``globals()``."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._headless = is_headless(namespace.get("headless"))
        config = GradBlendConfig(output_dir=namespace["output_dir"])
        mount_drive(config, self._headless)
        self._folder = Path(config.resolved().output_dir)

    def machine(self) -> None:
        """Show what this machine is."""
        show_table(machine(), self._headless)

    def operator(self) -> None:
        """Compare every backend with dense inversion.

        Raises:
            AssertionError: the operator is wrong here.
        """
        checks = check_operator()
        show_table(readable_checks(checks), self._headless)
        if not all(check["ok"] for check in checks):
            raise AssertionError("The operator is wrong on this machine; please report the table above.")

    def directions(self) -> None:
        """Draw G, and where each gradient rule points."""
        show_picture(draw_operator(self._folder / "operator.png"))

    def times(self) -> None:
        """Show how long each profile of notebook 01 takes here."""
        show_table(study_times(), self._headless)


def machine() -> list[dict[str, Any]]:
    """What this machine is, in rows of two columns."""
    found = environment()
    gpu = found["gpu"]
    rows = {
        "runs in": where(),
        "GPU": f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        if gpu
        else "none: everything runs on the CPU",
        "processor": f"{found['processor']}, {found['cores']} cores",
        "memory": f"{found['memory_bytes'] / 2**30:.0f} GiB",
        "Python": found["python"],
        **{name: version or "not installed" for name, version in found["packages"].items()},
        "BK-core backends": ", ".join(available_backends()),
        "bklm": f"{found['bklm']}, revision {git_revision()[:12]}",
    }
    return [{"what": name, "found": value} for name, value in rows.items()]


def check_operator(n: int = 48, batch: int = 8) -> list[dict[str, Any]]:
    """Every usable backend against the dense inverse and autograd through it, in single precision.

    Returns:
        rows with backend, mode, error (forward, relative), gradient_error (relative, of the exact gradient of a),
        ward_error (residual of Im G_ii = Im z sum_j |G_ij|^2, relative; no reference is needed for it), first_call_seconds
        (compiling included), call_microseconds and ok.
    """
    generator = torch.Generator().manual_seed(0)
    a = -2 + torch.randn(batch, n, generator=generator, device="cpu")
    b, c = (
        1 + 0.3 * torch.rand(n - 1, generator=generator, device="cpu"),
        1 + 0.3 * torch.rand(n - 1, generator=generator, device="cpu"),
    )
    target = torch.randn(batch, n, dtype=torch.complex64, generator=generator, device="cpu")
    rows = []
    cases = [(backend, causal) for backend in available_backends() for causal in (True, False)]
    with tqdm(cases, desc="compiling and checking", unit="case", leave=False) as bar:
        for backend, causal in bar:
            wanted, wanted_grad = _dense(a, b, c, target, causal)
            x = a.clone().requires_grad_(True)
            started = time.perf_counter()
            value = resolvent_diagonal(x, b, c, 1j, causal=causal, backend=backend)
            (grad,) = torch.autograd.grad((value * target).real.sum(), x)
            first = time.perf_counter() - started
            calls = []
            for _ in range(20):
                started = time.perf_counter()
                again = resolvent_diagonal(x, b, c, 1j, causal=causal, backend=backend)
                torch.autograd.grad((again * target).real.sum(), x)
                calls.append(time.perf_counter() - started)
            error = float((value.detach() - wanted).abs().max() / wanted.abs().max())
            gradient_error = float((grad - wanted_grad).abs().max() / wanted_grad.abs().max())
            ward_error = float(
                ward_residual(a, (b * c).sqrt(), 1j, causal=causal, backend=backend).abs().max()
                / wanted.imag.abs().max()
            )
            rows.append(
                {
                    "backend": backend,
                    "mode": "causal" if causal else "bidirectional",
                    "error": error,
                    "gradient_error": gradient_error,
                    "ward_error": ward_error,
                    "first_call_seconds": first,
                    "call_microseconds": sorted(calls)[len(calls) // 2] * 1e6,
                    "ok": error < TOLERANCE and gradient_error < 10 * TOLERANCE and ward_error < 10 * TOLERANCE,
                }
            )
    return rows


def _dense(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, target: torch.Tensor, causal: bool) -> tuple:
    """The diagonal by dense inversion in complex128 (the causal one from leading blocks), and its gradient."""
    x = a.double().requires_grad_(True)
    inverse = reference.dense_causal if causal else reference.dense
    value = inverse(x, b.double(), c.double(), 1j)
    (grad,) = torch.autograd.grad((value * target).real.sum(), x)
    return value.detach(), grad


def readable_checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per backend and mode: errors and times as words, and whether the results are right."""
    return [
        {
            "backend": r["backend"],
            "mode": r["mode"],
            "error": f"{r['error']:.1e}",
            "gradient error": f"{r['gradient_error']:.1e}",
            "Ward identity": f"{r['ward_error']:.1e}",
            "first call, s": f"{r['first_call_seconds']:.3f}",
            "later calls, µs": f"{r['call_microseconds']:,.0f}",
            "verdict": "right" if r["ok"] else "WRONG",
        }
        for r in rows
    ]


def draw_operator(path: Path, n: int = 64) -> Path:
    """G for a random potential, causal and bidirectional, and where each gradient rule points."""
    torch.manual_seed(1)
    potential = torch.randn(16, n, 1)
    names = {
        "exact": ("exact", 0.0),
        "diagonal term": ("local", 0.0),
        "hypothesis-7": ("exact", 1.0),
        "original, alpha 0": ("original", 0.0),
        "original, alpha 1": ("original", 1.0),
    }
    cosines = {}
    for mode, causal in (("causal", True), ("bidirectional", False)):
        upstream = torch.randn(16, n, 2, generator=torch.Generator().manual_seed(2), device="cpu")
        grads = {}
        for name, (rule, alpha) in names.items():
            v = potential.clone().requires_grad_(True)
            (grads[name],) = torch.autograd.grad(
                BKCore(causal=causal, gradient=rule, grad_blend=alpha)(v), v, upstream
            )
        exact = grads["exact"].flatten()
        cosines[mode] = [float(torch.cosine_similarity(g.flatten(), exact, dim=0)) for g in grads.values()]

    def draw(figure: Figure) -> None:
        values, directions = figure.subplots(2, 1)
        for mode, causal, colour in (("causal", True, colours(2)[0]), ("bidirectional", False, colours(2)[1])):
            features = BKCore(causal=causal)(potential)[0]
            values.plot(features[:, 0], color=colour, label=f"Re G, {mode}")
            values.plot(features[:, 1], color=colour, linestyle="--", label=f"Im G, {mode}")
        values.set(
            title="The resolvent's diagonal for a random potential", xlabel="position", ylabel="G (no unit)"
        )
        legend_below(values, ncols=2, fontsize=10)
        places = torch.arange(len(names))
        for shift, (mode, heights), colour in zip((-0.2, 0.2), cosines.items(), colours(2), strict=True):
            directions.bar(places + shift, heights, width=0.38, color=colour, label=mode)
        directions.set_xticks(places, [name.replace(" ", "\n", 1) for name in names], fontsize=10)
        directions.axhline(0, color="black", linewidth=1)
        directions.set(
            title="Direction of each gradient rule", ylabel="cosine with the exact one", ylim=(-1.05, 1.05)
        )
        legend_below(directions, ncols=2, fontsize=10)

    title = f"Hypothesis-7 points against the exact gradient (cosine {cosines['causal'][2]:+.2f} in the causal core)"
    note = "White-noise potential and upstream gradient, z = i; in a trained model the angles differ: see notebook 01."
    return save_figure(path, draw, title=title, note=note, size=(7.2, 8.0))


def study_times() -> list[dict[str, Any]]:
    """Estimated minutes of notebook 01 on this machine, from a few timed steps of each profile's own model."""
    rows = []
    profiles = [
        ("smoke", "embedded"),
        ("quick", "embedded"),
        ("quick", "wikitext-2"),
        ("full", "wikitext-2"),
    ]
    for profile, corpus in tqdm(profiles, desc="compiling and timing", unit="profile", leave=False):
        config = GradBlendConfig(profile=profile, dataset=corpus).resolved()
        minutes = round_minutes(estimated_minutes(config))
        rows.append({"notebook": "01 GRAD_BLEND sweep", "profile": profile, "text": corpus, "minutes": minutes})
    return rows
