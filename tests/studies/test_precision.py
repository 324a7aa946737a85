"""The precision study, end to end on tiny sizes: resume, refusals, what is written, and the words it computes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bklm.harness.cli import parse
from bklm.studies.precision import cells as precision_cells
from bklm.studies.precision import figures as precision_figures
from bklm.studies.precision import parts as precision_parts
from bklm.studies.precision import run as precision
from bklm.studies.precision.cells import Bench, accuracy_rows
from bklm.studies.precision.claims import adaptive_finding, recommend, verdict
from bklm.studies.precision.config import PrecisionConfig
from bklm.studies.precision.grid import LEFT_RIGHT, PRECISIONS, THETA_PHI, THETA_PHI_LOOP
from bklm.studies.precision.run import estimated_minutes, run_precision
from bklm.studies.precision.tables import duration, errors_note, first_overflow, readable_compared


class NoMemory:
    """Stands in for the meter, whose helper process takes seconds to start."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def measure(self, part, settings, arm):
        return 2_000_000, ""

    def processor_seconds(self):
        return 0.0


def make_small(monkeypatch: pytest.MonkeyPatch, draw: bool) -> None:
    monkeypatch.setattr(precision_cells, "MOE_TOKENS", 32)
    monkeypatch.setattr(precision_cells, "ARCHITECTURE_N", 1024)
    monkeypatch.setattr(precision_cells, "ARCHITECTURE_BATCH", 1)
    monkeypatch.setattr(precision, "MemoryMeter", NoMemory)
    if not draw:
        for name in ("draw_errors", "draw_costs", "draw_batched", "draw_claims"):
            monkeypatch.setattr(precision_figures, name, write_nothing)


def write_nothing(path: Path, *arguments: object) -> Path:
    path.write_bytes(b"")
    return path


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    make_small(monkeypatch, draw=False)


def tiny(folder: Path) -> PrecisionConfig:
    """A study of a few seconds; its lengths lie on both sides of the overflow."""
    return PrecisionConfig(
        profile="smoke",
        output_dir=str(folder),
        device="cpu",
        sizes=(2000, 8),
        shifts=(1.0,),
        batch_sizes=(1, 3),
        batch_length=8,
        reference_n=16,
        seconds=0.01,
        model_batch=1,
        model_vocab=20,
    )


@pytest.fixture
def config(tmp_path) -> PrecisionConfig:
    return tiny(tmp_path / "results")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One study with its figures, for the tests that only look at it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch, draw=True)
        return run_precision(tiny(tmp_path_factory.mktemp("finished")))


def errors_of(result) -> list:
    keys = ("recursion", "precision", "n", "status", "value_error", "gradient_error")
    return [[r[k] for k in keys] for r in result.table]


@pytest.mark.slow
def test_the_zip_holds_tables_figures_cells_and_the_manifest_with_the_command(finished):
    result = finished
    with zipfile.ZipFile(result.bundle.path) as archive:
        names = {n.removeprefix("precision/") for n in archive.namelist()}
        manifest = json.loads(archive.read("precision/manifest.json"))
    assert {
        "grid.csv", "batched.csv", "backward.csv", "moe.csv", "total.csv", "architecture.csv", "model.csv", "claims.csv",
        "precision_errors.png", "precision_costs.png", "batched_gradients.png", "claims.png",
        "summary.json", "manifest.json", "run.log", "internals/cells/accuracy_N8_z1.json",
    } <= names  # fmt: skip
    assert manifest["corpus"] is None
    assert json.loads((result.folder / "config.json").read_text())["text_sha256"] is None
    assert parse(PrecisionConfig, manifest["command"].split()[3:]).sizes == (8, 2000)
    assert all(result.paths[n].stat().st_size > 10_000 for n in result.paths if n.endswith(".png"))


def test_theta_phi_is_marked_not_finite_where_it_overflows_and_no_row_is_dropped(finished):
    result = finished
    places = {(r["recursion"], r["precision"], r["n"]) for r in result.table}
    assert len(places) == len(result.table) == 3 * 4 * 2
    for precision_ in PRECISIONS:
        assert first_overflow(result.table, THETA_PHI, precision_) == 2000
        assert first_overflow(result.table, THETA_PHI_LOOP, precision_) == 2000
        assert first_overflow(result.table, LEFT_RIGHT, precision_) is None
    assert all("not finite" in row for row in result.tables()["summary"]())


def test_a_loop_that_would_take_too_long_is_not_run_and_says_how_long_it_would_take(finished):
    rows = finished.table
    loops = {r["n"]: r for r in rows if r["recursion"] == THETA_PHI_LOOP and r["precision"] == "complex128"}
    assert loops[8]["ms"] > 0
    assert loops[2000]["ms"] is None
    assert loops[2000]["note"].startswith("not measured: one call would take about")


def test_every_claim_has_a_measurement_and_a_verdict_beside_it(finished):
    claims = finished.claims
    named = {r["claim"] for r in claims}
    assert named == {
        "mixed precision", "batched gradient", "analytic MoE backward", "total backward", "architecture at N = 2048",
        "mixed precision, relative error",
    }  # fmt: skip
    assert all(r["measured"] > 0 and r["verdict"] and r["compared"] for r in claims)
    (architecture,) = (r for r in claims if r["claim"].startswith("architecture"))
    assert "recursion is not finite at this length" in architecture["compared"]


def test_the_total_backward_names_the_precisions_of_both_sides_and_compares_like_with_like_too(finished):
    totals = [r["compared"] for r in finished.claims if r["claim"] == "total backward"]
    assert [t.split("; ")[1] for t in totals] == 2 * [
        "core in complex128 / complex64, mixture in float32"
    ] + 2 * ["core in complex128 / complex128, mixture in float32"]
    assert [t.split(", (")[0] for t in totals[2:]] == [
        "plain, sample by sample / bklm, complex128", "plain, whole batch / bklm, complex128",
    ]  # fmt: skip


def test_a_kept_cell_without_the_like_for_like_arm_still_gives_its_claims(config):
    first = run_precision(config)
    path = first.folder / "internals" / "cells" / "total.json"
    cell = json.loads(path.read_text())
    cell["rows"] = [r for r in cell["rows"] if r["arm"] != precision_parts.ALL_ANALYTIC_DOUBLE]
    path.write_text(json.dumps(cell))
    assert len([r for r in run_precision(config).claims if r["claim"] == "total backward"]) == 2


def test_the_small_print_says_over_how_many_rows_an_error_is_the_worst():
    def cells(*sizes):
        return {str(n): {"part": "accuracy", "settings": {"n": n, "rows": accuracy_rows(n)}} for n in sizes}

    assert "worst of 32 rows;" in errors_note(cells(128, 2048), 16, "cpu")
    longer = errors_note(cells(128, 32_768, 131_072), 16, "cpu")
    assert "worst of 32 rows up to N = 32,768, of fewer beyond (8 at N = 131,072);" in longer


def test_a_finished_study_is_read_back_and_measures_nothing(config, monkeypatch):
    first = run_precision(config)
    monkeypatch.setattr(Bench, "_measured", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr(Bench, "_accuracy", lambda *a, **k: pytest.fail("measured again"))
    second = run_precision(config)
    assert second.table == first.table
    assert second.claims == first.claims
    assert second.recommendation == first.recommendation


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda text: text[:50], lambda text: "{}"])
def test_a_damaged_cell_is_set_aside_and_only_that_cell_is_measured_again(config, monkeypatch, damage):
    first = run_precision(config)
    path = first.folder / "internals" / "cells" / "batched_B3.json"
    path.write_text(damage(path.read_text()))
    measured = []
    real = Bench._measured
    monkeypatch.setattr(
        Bench,
        "_measured",
        lambda self, part, *a, **k: measured.append(part.split(":")[1]) or real(self, part, *a, **k),
    )
    second = run_precision(config)
    assert measured == ["batched"]
    assert second.table == first.table
    assert path.with_name("batched_B3.json.damaged-1").exists()


@pytest.mark.slow
def test_a_study_killed_with_signal_9_goes_on_after_the_cells_it_has_measured(config):
    words = [sys.executable, "-m", "bklm.studies.precision"]
    for name, value in config.to_dict().items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = Path(config.output_dir) / "precision" / "internals" / "cells"
    # A cell that is being written has a hidden name, and what is left of it is cleared away.
    finished = "[!.]*.json"
    deadline = time.monotonic() + 300
    while len(list(cells.glob(finished))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {p: p.read_bytes() for p in cells.glob(finished)}
    result = run_precision(config)
    assert len(before) >= 3
    assert {p: p.read_bytes() for p in before} == before
    assert len(result.table) == 3 * 4 * 2


@pytest.mark.slow
def test_cells_of_another_machine_are_measured_again_and_the_difference_is_named(config, capsys):
    first = run_precision(config)
    path = first.folder / "internals" / "cells" / "mixed.json"
    cell = json.loads(path.read_text())
    cell["machine"]["processor"] = "another one"
    path.write_text(json.dumps(cell))
    run_precision(config)
    assert "processor 'another one' then" in capsys.readouterr().out
    assert json.loads(path.read_text())["machine"]["processor"] != "another one"


@pytest.mark.slow
def test_two_fresh_runs_give_the_same_errors(config, tmp_path):
    first = run_precision(config)
    second = run_precision(dataclasses.replace(config, output_dir=str(tmp_path / "second")))
    assert errors_of(first) == errors_of(second)


def test_the_figure_is_handed_over_after_each_accuracy_cell(config):
    seen = []
    run_precision(config, on_figure=lambda path: seen.append(path.name))
    assert seen == ["precision_errors.png"] * 2


def test_nothing_is_drawn_before_the_end_where_nobody_watches(config, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        precision_figures, "draw_errors", lambda path, *a: drawn.append(path.name) or write_nothing(path)
    )
    run_precision(config)
    assert drawn == ["precision_errors.png"]


def test_a_process_beside_the_main_one_measures_nothing(config, tmp_path):
    steps = []
    study = SimpleNamespace(
        config=config.resolved(),
        accelerator=SimpleNamespace(device=SimpleNamespace(type="cpu")),
        folder=tmp_path,
        is_main=False,
        expect=lambda steps_, unit: steps.append(steps_),
    )
    assert precision._measure(study) == {}
    assert steps == [0]
    assert list(tmp_path.iterdir()) == []


def test_the_result_has_every_table_for_people_and_a_command_line_shows_two(finished, capsys):
    tables = {name: make() for name, make in finished.tables().items()}
    assert list(tables) == ["summary", "claims", "costs", "batched", "backward", "moe", "model"]
    assert all(tables.values())
    assert (finished.best_precision, finished.recommendation) == (finished.best, finished.finding)
    finished.show()
    shown = capsys.readouterr().out
    assert [word in shown for word in ("not finite", "what was compared", "differs by", "because")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert finished.recommendation in shown
    assert str(finished.bundle.path) in shown


def test_the_estimate_adds_up_the_cells_and_leaves_out_what_would_not_be_called(config, monkeypatch):
    speed = {(LEFT_RIGHT, "complex64"): 1e-3, (THETA_PHI_LOOP, "complex64"): 0.05}
    monkeypatch.setattr(precision, "_speed", lambda device: (1e-4, speed))
    one = dataclasses.replace(config, sizes=(256,), batch_sizes=(1,), seconds=0.1, reference_n=256).resolved()
    # 50 digits for 32 rows, both ways on 32 rows instead of 2, four calls of left/right; the loop's three would not fit.
    grid_seconds = 256 * 32 * 1e-4 + 16 * (1e-3 + 0.05) + 4 * 1e-3
    # Two cells of batches, five that claims are judged by with four times the time, one with ten times: four ways each.
    assert estimated_minutes(one) == pytest.approx((grid_seconds + 4 * 0.1 * (2 + 5 * 4 + 10)) / 60)


def test_a_length_that_does_not_fit_into_memory_is_refused_with_the_size_needed(config, monkeypatch):
    too_long = dataclasses.replace(config, sizes=(8, 2**26))
    monkeypatch.setattr(precision.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(
        ValueError, match=r"sizes: N = 67,108,864 needs about 53.7 GB of memory and 1.0 GB are free"
    ):
        run_precision(too_long)
    assert not (Path(config.output_dir) / "precision").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizes", (1,)), ("sizes", ()), ("shifts", (0.0,)), ("shifts", (-1.0,)), ("batch_sizes", (0,)),
        ("batch_length", 1000), ("repeats", 2), ("seconds", 0), ("tolerance", 2), ("device", "tpu"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_naming_field_value_and_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*; allowed is .*\.$"):
        PrecisionConfig(**{field: value})


def test_a_gpu_that_is_not_there_is_refused(config, monkeypatch):
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        run_precision(dataclasses.replace(config, device="cuda"))


@pytest.mark.parametrize(
    ("asked", "published"), [((1, 3), 3), ((1, 64), 1), ((64, 128), 64), ((16, 32, 64), 32)]
)
def test_claims_are_checked_at_a_batch_that_is_measured(asked, published):
    assert PrecisionConfig(profile="smoke", batch_sizes=asked).resolved().published_batch == published


@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
def test_every_profile_fills_every_field_and_full_ends_at_a_million(profile):
    resolved = PrecisionConfig(profile=profile).resolved()
    assert None not in resolved.to_dict().values()
    if profile != "smoke":
        assert resolved.sizes[0] == 16
        assert resolved.sizes[-1] == 1_000_000
        assert resolved.shifts == (1.0, 0.1, 0.001)
        assert (min(resolved.batch_sizes), max(resolved.batch_sizes)) == (1, 64)


@pytest.mark.parametrize(
    ("measured", "low", "high", "word"),
    [
        (3.0, 2.6, 3.4, "exceeded"),
        (2.1, 1.9, 2.2, "reached"),
        (1.6, 1.5, 1.7, "not reached"),
        (1.1, 0.95, 1.2, "no effect"),
        (1.03, 1.01, 1.04, "no effect"),
        (1.1, 0.6, 1.6, "too noisy to tell"),
        (2.1, 0.5, 30, "too noisy to tell"),
        (0.5, 0.4, 0.6, "slower"),
    ],
)
def test_a_measured_speed_up_gets_the_word_that_its_numbers_allow(measured, low, high, word):
    assert verdict(measured, low, high, 2.0, 2.5) == word


@pytest.mark.slow
def test_claims_are_not_judged_on_a_machine_that_others_kept_busy(config):
    first = run_precision(config)
    assert all(
        json.loads(p.read_text())["other_cores"] >= 0 for p in first.folder.glob("internals/cells/*.json")
    )
    for path in first.folder.glob("internals/cells/*.json"):
        cell = json.loads(path.read_text())
        path.write_text(json.dumps({**cell, "other_cores": cell["machine"]["cores"] + 1.0}))
    again = run_precision(config)
    speeds = [r for r in again.claims if r["low"] is not None]
    assert {r["verdict"] for r in speeds} == {"too noisy to tell"}
    assert "OTHER PROCESSES USED" in again.machine_note


def grid_row(precision_: str, ms: float, error: float, mb: float, **changes) -> dict:
    row = {
        "recursion": LEFT_RIGHT, "precision": precision_, "n": 100, "im_z": 1.0, "status": "finite", "ms": ms,
        "ms_low": 0.9 * ms, "ms_high": 1.1 * ms, "value_error": error, "gradient_error": error,
        "gradient_error_small_rows": error, "peak_mb": mb,
    }  # fmt: skip
    return {**row, **changes}


def grid(single_error: float, single_ms: float = 1.0) -> list[dict]:
    return [
        grid_row("complex64", single_ms, single_error, 1.0),
        grid_row("complex128", 2.0, 1e-14, 2.0),
        grid_row("mixed", 3.0, single_error, 3.0),
        grid_row("adaptive", 4.0, single_error, 4.0, gradient_error_small_rows=1e-14),
        *(grid_row(p, 1.0, 1e-14, 1.0, recursion=THETA_PHI, status="not finite") for p in PRECISIONS),
    ]


NO_MODELS = [{"format": "fp32", "support": "native", "ms": 1.0, "times_faster": 1.0, "times_faster_low": 1.0}]


def test_the_fastest_precision_within_the_tolerance_is_recommended():
    best, sentence = recommend(grid(single_error=1e-6), NO_MODELS, tolerance=1e-4)
    assert best == "complex64"
    assert re.search(r"complex128 takes 2 \([\d.]+ to [\d.]+\) times as long", sentence)
    assert "theta/phi is not finite from N = 100 in complex64" in sentence


def test_a_precision_outside_the_tolerance_is_not_recommended_however_fast():
    assert recommend(grid(single_error=1e-3), NO_MODELS, tolerance=1e-4)[0] == "complex128"


def test_complex64_is_named_for_the_shifts_where_it_is_accurate_enough():
    small_shift = [{**row, "im_z": 0.001} for row in grid(single_error=1e-3)]
    best, sentence = recommend([*grid(single_error=1e-6), *small_shift], NO_MODELS, tolerance=1e-4)
    assert best == "complex128"
    said = r"for Im z of 1 or more complex64 is enough \(worst gradient error 1e-06\) at 0\.5 \([\d.]+ to [\d.]+\) of the time"
    assert re.search(said, sentence)


def test_of_two_whose_times_cannot_be_told_apart_the_one_with_less_memory_is_recommended():
    assert recommend(grid(single_error=1e-6, single_ms=2.1), NO_MODELS, tolerance=1e-4)[0] == "complex64"


def test_where_nothing_is_within_the_tolerance_the_recommendation_says_so():
    best, sentence = recommend(grid(single_error=1e-3), NO_MODELS, tolerance=1e-16)
    assert best == "complex128"
    assert "which exceeds the 1e-16 asked for" in sentence


def test_a_faster_emulated_format_is_not_recommended_but_a_native_one_is():
    bf16 = {"format": "bf16", "support": "native", "ms": 0.5, "times_faster": 2.0, "times_faster_low": 1.8}
    assert "rest of the model in bf16" in recommend(grid(1e-6), [*NO_MODELS, bf16], 1e-4)[1]
    emulated = {**bf16, "support": "emulated"}
    assert "leave the rest of the model in fp32" in recommend(grid(1e-6), [*NO_MODELS, emulated], 1e-4)[1]


def test_the_adaptive_finding_gives_both_errors_of_the_small_rows():
    sentence = adaptive_finding(grid(single_error=2e-6))
    assert "2e-06 in complex64 and 1e-14 when" in sentence


def test_durations_read_well():
    assert [duration(s) for s in (0.000052, 0.0381, 0.412, 4.13, 720)] == [
        "0.052 ms",
        "38 ms",
        "412 ms",
        "4.1 s",
        "12 min",
    ]


def test_the_command_line_has_the_configs_fields():
    words = ["--profile", "smoke", "--sizes", "16", "32", "--tolerance", "0.01"]
    assert parse(PrecisionConfig, words) == PrecisionConfig(profile="smoke", sizes=(16, 32), tolerance=0.01)


def test_quartiles_repeat_the_unit_only_where_it_changes_and_no_difference_is_0():
    row = {"tokens": 4096, "arm": "fused", "times_faster": 1.0, "peak_mb": 2.0, "difference": 0.0}
    rows = [{**row, "ms": 2.0, "ms_low": 1.5, "ms_high": high} for high in (3.0, 3000.0)]
    first, second = readable_compared(rows)
    assert (first["tokens"], first["time"], first["differs by"]) == ("4,096", "2 ms (1.5 to 3)", "0")
    assert second["time"] == "2 ms (1.5 ms to 3 s)"
