"""The notebooks: clean in the repository, their forms equal to the schema, and run headless by papermill."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from bklm.batch.plan import known_parameters
from bklm.notebook.form import FORMS, config_from, form_cells, write_forms

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def parameters(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_in_the_repository_is_clean_valid_and_has_what_colab_needs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)
    assert not any(c.id.isalnum() and len(c.id) == 8 and not c.id.isalpha() for c in notebook.cells), (
        "random ids"
    )
    metadata = notebook.metadata
    assert "widgets" not in metadata
    assert metadata.accelerator == "GPU"
    folded = {"collapsed_sections": ["more-settings"]} if has_study(notebook) else {}
    assert metadata.colab == {"provenance": [], "gpuType": "T4", "include_colab_link": True} | folded
    assert metadata.kernelspec == {"name": "python3", "display_name": "Python 3"}
    assert metadata.language_info == {"name": "python"}
    (form,) = parameters(notebook)
    assert form.metadata["cellView"] == "form"
    assert f"/notebooks/{path.name}" in notebook.cells[0].source


def has_study(notebook: nbformat.NotebookNode) -> bool:
    return any(c.id == "settings" for c in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_hold_the_story_and_not_the_logic(path):
    for cell in read(path).cells:
        if cell.cell_type != "code" or cell.id in ("settings", "parameters"):
            continue
        assert len(cell.source.splitlines()) <= (25 if cell.id == "set-up" else 10), cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_import_the_handle_and_nothing_from_inside_and_hand_no_headless_on(path):
    imported = []
    for cell in read(path).cells:
        if cell.cell_type != "code" or cell.id in ("set-up", "settings", "parameters"):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            assert not (isinstance(node, ast.Name) and node.id == "headless"), cell.id
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported.append(ast.unparse(node))
    assert imported == ["from bklm import notebook"]


@pytest.mark.parametrize("name", FORMS)
def test_the_form_cells_are_the_ones_that_the_schema_gives(name):
    notebook = read(ROOT / name)
    basic, more = (c for c in notebook.cells if c.id in ("settings", "parameters"))
    assert (basic.source, more.source) == form_cells(FORMS[name])
    assert [more] == parameters(notebook)
    titles = [cell.source.splitlines()[0] for cell in (basic, more)]
    assert titles == [f'# @title {title} {{ display-mode: "form" }}' for title in ("Settings", "More settings")]
    assert len(basic.source.splitlines()) <= 1 + 10
    assert more.metadata["jupyter"] == {"source_hidden": True}


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_values_are_the_configs_own(name):
    config_class, values = FORMS[name], {}
    for source in form_cells(config_class):
        exec(source, values)
    assert list(values)[1:] == [*config_class.names(), "headless"]
    assert config_from(config_class, values) == config_class()


@pytest.mark.parametrize("name", FORMS)
def test_the_section_that_colab_folds_away_holds_the_second_form_and_nothing_else(name):
    cells = read(ROOT / name).cells
    (heading,) = (i for i, cell in enumerate(cells) if cell.id == "more-settings")
    assert cells[heading].metadata["id"] == "more-settings"
    assert [cell.id for cell in cells[heading : heading + 2]] == ["more-settings", "parameters"]
    levels = [len(cells[i].source.split()[0]) for i in (heading, heading + 2)]
    assert all(cells[i].source.startswith("#") for i in (heading, heading + 2))
    assert levels[0] >= levels[1]


@pytest.mark.parametrize("name", FORMS)
def test_every_field_of_both_forms_is_a_parameter_of_a_batch(name):
    assert known_parameters(ROOT / name) == [*FORMS[name].names(), "headless"]


def test_both_form_cells_are_written_anew_and_nothing_else(tmp_path, capsys):
    for name in FORMS:
        notebook = read(ROOT / name)
        for cell in notebook.cells:
            if cell.id in ("settings", "parameters"):
                cell.source = "x = 1"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / name)
    write_forms(tmp_path)
    for name in FORMS:
        assert read(tmp_path / name) == read(ROOT / name)


@pytest.mark.parametrize("name", FORMS)
def test_what_papermill_injects_wins_over_both_form_cells(name):
    """A basic field too, although papermill looks for parameters in the second cell alone."""
    values = {"profile": "smoke", "headless": True}
    notebook = papermill.parameterize.parameterize_notebook(
        papermill.iorw.load_notebook_node(str(ROOT / name)), values
    )
    namespace = {}
    for cell in notebook.cells:
        is_form = cell.id in ("settings", "parameters")
        if is_form or "injected-parameters" in cell.metadata.get("tags", []):
            exec(cell.source, namespace)
    config = config_from(FORMS[name], namespace)
    assert (config.profile, namespace["headless"]) == ("smoke", True)
    assert FORMS[name]().profile != "smoke"


def test_the_first_cells_of_all_notebooks_are_the_same():
    assert len({next(c.source for c in read(p).cells if c.id == "set-up") for p in NOTEBOOKS}) == 1


def run(path: Path, folder: Path, **values) -> str:
    """Execute a notebook headless; returns everything it printed."""
    executed = papermill.execute_notebook(
        path, folder / path.name, {"headless": True, "output_dir": str(folder / "results"), **values},
        cwd=ROOT, progress_bar=False, kernel_name="python3",
    )  # fmt: skip
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
def test_00_setup_runs_headless_and_finds_the_operator_right(tmp_path):
    printed = run(ROOT / "notebooks" / "00_setup.ipynb", tmp_path)
    assert "WRONG" not in printed
    assert "right" in printed
    assert (tmp_path / "results" / "operator.png").stat().st_size > 10_000


@pytest.mark.slow
def test_01_grad_blend_sweep_smoke_runs_headless_and_prints_table_finding_and_hash(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded"}
    printed = run(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb", tmp_path, **values)
    assert "Lowest validation PPL at alpha" in printed
    assert "never sees the future" in printed
    assert "int8, products in float32" in printed
    assert "planned for NewLLM" not in printed  # that is of the study that measures NewLLM
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "grad_blend.zip").exists()
    # Run again in the same folder: everything is read back, and the table is the same.
    again = run(ROOT / "notebooks" / "01_grad_blend_sweep.ipynb", tmp_path, **values)
    assert again.count("epoch 1/") == 0
    finding = next(line for line in printed.splitlines() if line.startswith("Lowest"))
    assert finding in again


@pytest.mark.slow
def test_02_precision_benchmark_smoke_runs_headless_and_ends_with_claims_and_one_recommendation(tmp_path):
    printed = run(ROOT / "notebooks" / "02_precision_benchmark.ipynb", tmp_path, profile="smoke", device="cpu")
    assert "never" in printed
    assert "at N = 128" in printed  # where theta/phi in complex64 is lost
    assert "analytic MoE backward" in printed
    assert printed.count("Use left/right in") == 1
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "precision.zip").exists()


@pytest.mark.slow
def test_04_embedding_freeze_study_smoke_runs_headless_and_ends_with_what_made_the_difference(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded", "head": "tied", "original_comparison": False}
    printed = run(ROOT / "notebooks" / "04_embedding_freeze_study.ipynb", tmp_path, **values)
    assert "Kneser-Ney 3-gram" in printed
    assert "near-duplicates" in printed
    assert "instead of" in printed
    assert "Tokens per trained parameter" in printed
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "embedding_freeze.zip").exists()


@pytest.mark.slow
def test_05_koopman_smoke_runs_headless_and_sets_the_announced_beside_the_measured(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded", "seeds": "0"}
    printed = run(ROOT / "notebooks" / "05_koopman.ipynb", tmp_path, **values)
    for words in (
        "Kneser-Ney 3-gram",
        "placebo 0.1",
        "nothing to keep",
        "of the parameters",
        "LinearContext",
        "announced",
    ):
        assert words in printed
    assert "better long-range dependence" in printed
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "koopman.zip").exists()


@pytest.mark.slow
def test_03_baseline_training_smoke_runs_headless_and_compares_the_three_models(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded", "seeds": "0"}
    printed = run(ROOT / "notebooks" / "03_baseline_training.ipynb", tmp_path, **values)
    assert "Lowest validation PPL: " in printed
    assert "reported by the original" not in printed  # it stands beside WikiText-2 only
    assert "not possible" in printed  # GPT, beyond its positions
    assert "planned for NewLLM by its original: int8" in printed
    assert "epoch_0002_ppl_" in printed  # the list of checkpoints
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "baseline.zip").exists()


@pytest.mark.slow
def test_06_physics_informed_smoke_runs_headless_and_ends_with_claims(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded", "seeds": "0"}
    printed = run(ROOT / "notebooks" / "06_physics_informed.ipynb", tmp_path, **values)
    assert "Kneser-Ney 3-gram" in printed
    assert "the energy term improves generalisation" in printed
    assert "memory does not grow with depth" in printed
    assert "drift / spread" in printed
    assert "largest stable rate" in printed
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "physics.zip").exists()


@pytest.mark.slow
def test_07_compression_smoke_runs_headless_and_recommends_no_file_of_a_model_that_reads_nothing(tmp_path):
    values = {"profile": "smoke", "dataset": "embedded", "models": "resnet_bk"}
    printed = run(ROOT / "notebooks" / "07_compression.ipynb", tmp_path, **values)
    for words in (
        "Kneser-Ney 3-gram",
        "of the parameters",
        "No better than counting single words",
        "No file is recommended",
        "student at T 2",
        "scored tokens/s",
        "announced",
    ):
        assert words in printed
    assert "100 times smaller for less than 15% of perplexity" in printed
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "compression.zip").exists()


@pytest.mark.slow
def test_08_dialogue_smoke_runs_headless_and_talks_at_its_end(tmp_path):
    printed = run(ROOT / "notebooks" / "08_dialogue.ipynb", tmp_path, profile="smoke", model="gpt")
    assert "true law, all turns" in printed
    assert "Kneser-Ney of dialogues and text" in printed
    assert "GPT: pretraining helps dialogue" in printed
    assert "another dialogue's" in printed
    assert re.search(
        r"(?s)GPT tuned: .*\n\(saw \d+ tokens: <user>take red \. which colour<end><system>\)", printed
    )
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "dialogue.zip").exists()


@pytest.mark.slow
def test_09_integration_smoke_runs_headless_and_ends_with_claims(tmp_path):
    printed = run(
        ROOT / "notebooks" / "09_integration.ipynb", tmp_path, profile="smoke", dataset="embedded", seeds="0"
    )
    for words in (
        "Kneser-Ney 3-gram",
        "less koopman",
        "at equal time",
        "of a training step",
        "the interaction is",
    ):
        assert words in printed
    assert "17.5 times faster (step 7)" in printed
    assert "SHA-256" in printed
    assert (tmp_path / "results" / "integration.zip").exists()
