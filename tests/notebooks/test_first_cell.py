"""The first cell, executed as in an empty runtime: from git, from an uploaded zip, and as a no-op in a checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = 'cd "$(dirname "$0")"; echo "$BKLM_PYTHON" >set-up-for\n'


@pytest.fixture(scope="module")
def address():
    """scripts/address.py as a module."""
    spec = importlib.util.spec_from_file_location("address", ROOT / "scripts" / "address.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """An empty working folder; what the cell does to the interpreter is undone afterwards."""
    folder = tmp_path / "content"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # The package of this test cannot be imported there.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return folder


def test_a_package_that_can_be_imported_is_used_where_the_notebook_lies(
    address, runtime, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "x.py"))
    )
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: pytest.fail("git was called"))
    execute(address, "nowhere")
    assert Path.cwd() == runtime
    assert list(runtime.iterdir()) == []
    # A copy of the repository that lies beside is not asked either.
    shutil.copytree(git_folder(tmp_path / "origin"), runtime / "bklm")
    execute(address, "nowhere")
    assert Path.cwd() == runtime
    assert not (runtime / "bklm" / "set-up-for").exists()


def test_a_mere_folder_of_the_name_is_no_package(address, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    execute(address, git_repository(tmp_path / "origin"))
    assert Path.cwd() == runtime / "bklm"


def execute(address, repository: str) -> None:
    source = address.first_cell().replace(f'"{address.address()}"', repr(repository))
    assert repr(repository) in source
    exec(compile(source, "first cell", "exec"), {})


def files_of_the_repository(setup: str = SETUP) -> dict[str, str]:
    """What the first cell looks for there, and a file of the package."""
    script = (ROOT / "scripts" / "set_up.py").read_text()
    package = "a line of the repository\n" * 50
    return {"colab_setup.sh": setup, "scripts/set_up.py": script, "bklm/text.py": package}


def git_folder(folder: Path) -> Path:
    git_repository(folder)
    return folder


def git_repository(folder: Path, setup: str = SETUP) -> str:
    for name, text in files_of_the_repository(setup).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return f"file://{folder}"


def test_in_an_empty_runtime_it_clones_sets_this_python_up_and_goes_there(address, runtime, tmp_path):
    execute(address, git_repository(tmp_path / "origin"))
    assert Path.cwd() == runtime / "bklm"
    assert Path("set-up-for").read_text().strip() == sys.executable
    assert sys.path[0] == str(runtime / "bklm")
    Path("set-up-for").unlink()
    execute(address, "nowhere")  # a second time it is a checkout already
    assert not Path("set-up-for").exists()
    # In a kernel that was started anew, of another Python perhaps: nothing is fetched, but all is set up.
    os.chdir(runtime)
    execute(address, "nowhere")
    assert Path("set-up-for").exists()


def test_an_uploaded_zip_takes_the_place_of_the_network_and_cannot_leave_its_folder(address, runtime, tmp_path):
    zip_of_the_repository(runtime / "bklm-main.zip")
    with zipfile.ZipFile(runtime / "bklm-main.zip", "a") as archive:
        archive.writestr("../../escaped/colab_setup.sh", "exit 1\n")
        archive.writestr("/bklm-escaped", "x")
    execute(address, "nowhere")
    assert Path("set-up-for").exists()
    assert not (tmp_path / "escaped").exists()
    assert not Path("/bklm-escaped").exists()


def test_a_dead_address_asks_for_the_zip_also_where_another_zip_lies(address, runtime):
    for name in ("nothing", "bklm.zip"):
        with zipfile.ZipFile(runtime / name, "w") as archive:
            archive.writestr("poem.txt", "x")
        with pytest.raises(SystemExit, match=r"Could not fetch .*nowhere by git\. Upload its zip"):
            execute(address, f"file://{runtime}/nowhere")


def zip_of_the_repository(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files_of_the_repository().items():
            archive.writestr(f"bklm-main/{name}", text)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: whole.replace(b"a line of the", b"a lime of the", 1),
    ],
    ids=["half", "empty", "wrong checksum"],
)
def test_an_upload_that_is_not_finished_or_damaged_is_one_sentence_and_leaves_nothing(address, runtime, damage):
    path = runtime / "bklm-main.zip"
    path.write_bytes(damage(zip_of_the_repository(path)))
    with pytest.raises(
        SystemExit, match=r"bklm-main\.zip: not finished or damaged \(.+\); upload it"
    ) as caught:
        execute(address, "nowhere")
    assert "\n" not in str(caught.value)
    assert list(runtime.iterdir()) == [path]
    zip_of_the_repository(path)
    execute(address, "nowhere")
    assert Path("set-up-for").exists()


def test_the_zip_that_holds_the_repository_is_taken_whatever_others_and_leftovers_lie_beside_it(
    address, runtime
):
    for name in ("bklm-earlier.zip", "bklm_results.zip"):
        with zipfile.ZipFile(runtime / name, "w") as archive:
            archive.writestr("grad_blend/summary.json", "{}")
    zip_of_the_repository(runtime / "bklm-main.zip")
    leftover = runtime / "bklm-leftover" / "a"
    leftover.mkdir(parents=True)
    (leftover / "colab_setup.sh").write_text("exit 1\n")
    before = set(runtime.iterdir())
    execute(address, "nowhere")
    assert Path("bklm/text.py").exists()
    assert set(runtime.iterdir()) - before == {runtime / "bklm"}


def test_an_empty_folder_of_the_name_is_no_repository_and_another_one_is_named(address, runtime, tmp_path):
    (runtime / "bklm").mkdir()
    execute(address, git_repository(tmp_path / "origin"))
    assert Path("set-up-for").exists()
    os.chdir(runtime)
    (runtime / "bklm" / "colab_setup.sh").unlink()
    with pytest.raises(
        SystemExit, match=r"content/bklm is not the repository: it has no colab_setup\.sh\. Rename it"
    ):
        execute(address, "nowhere")


def test_without_git_the_zip_is_asked_for(address, runtime, monkeypatch):
    monkeypatch.setenv("PATH", str(runtime))
    with pytest.raises(SystemExit, match=r"Could not fetch nowhere by git\. Upload its zip"):
        execute(address, "nowhere")


def test_a_set_up_that_fails_stops_the_cell(address, runtime, tmp_path):
    with pytest.raises(SystemExit, match="set-up failed"):
        execute(address, git_repository(tmp_path / "origin", "exit 3\n"))


def test_in_a_checkout_it_runs_nothing(address, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("ran a command in a checkout"))
    execute(address, "nowhere")
    assert Path.cwd() == ROOT


def test_badges_first_cells_and_documents_carry_the_address_of_pyproject(address):
    assert address.address() in (ROOT / "pyproject.toml").read_text()
    wrong = [str(p) for p, text in address.wanted().items() if p.read_text(encoding="utf-8") != text]
    assert wrong == [], "run python scripts/address.py"


def test_a_new_address_reaches_every_file_that_names_the_old_one(address, monkeypatch):
    old = address.address()
    monkeypatch.setattr(address, "address", lambda: "https://github.com/someone/else")
    assert len(address.wanted()) > 3
    for path, text in address.wanted().items():
        assert f"colab.research.google.com/github/{old.removeprefix('https://github.com/')}" not in text, path
        assert path.suffix != ".ipynb" or "github/someone/else/blob/main/notebooks/" in text
        assert f'Path.cwd(), \\"{old}' not in text
        assert path.suffix != ".ipynb" or 'Path.cwd(), \\"https://github.com/someone/else\\"' in text


def test_the_first_cell_is_told_the_python_of_its_kernel_and_not_a_virtual_environment(tmp_path):
    """colab_setup.sh with BKLM_PYTHON installs there, keeping what is installed, and makes no .venv."""
    for name in ("scripts", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "colab_setup.sh").write_text((ROOT / "colab_setup.sh").read_text())
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/called-with"\n')
    python.chmod(0o755)
    environment = {**os.environ, "BKLM_PYTHON": str(python)}
    subprocess.run(["bash", "colab_setup.sh"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "called-with").read_text().strip() == "scripts/install.py --keep-installed"
    assert not (tmp_path / ".venv").exists()
