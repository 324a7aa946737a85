"""What must not stand in the code: the ways in which a file or a parameter could be executed."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from bklm.batch.plan import Outcome
from bklm.batch.summary import write_summary

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("bklm", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
EXECUTE_WHAT_THEY_READ = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file with the dotted name of what is called."""
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def only_an_exception(node: ast.ImportFrom) -> bool:
    """To catch what torch.load raises; nothing can be executed with it."""
    return (node.module, [a.name for a in node.names]) == ("pickle", ["UnpicklingError"])


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path):
    for name, call in calls(path):
        last = name.rsplit(".", 1)[-1]
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load"), name
        assert keyword(call, "shell") in (None, "False"), f"{name} with a shell"
        assert keyword(call, "trust_remote_code") in (None, "False"), f"{name} runs remote code"
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", "torch.load unpickles"
        if name == "np.load":
            assert keyword(call, "allow_pickle") == "False", "np.load may unpickle"
        if last in ("run", "Popen", "check_call", "check_output", "call") and "subprocess" in name:
            assert not isinstance(call.args[0], ast.JoinedStr | ast.BinOp), "a command built as one string"
    for node in ast.walk(ast.parse(code_of(path))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not only_an_exception(node):
            names.append(node.module or "")
        assert not {n.split(".")[0] for n in names} & EXECUTE_WHAT_THEY_READ


def test_a_word_with_shell_in_it_is_only_a_word_to_the_set_up_script(tmp_path):
    for word in ("$(touch executed)", "`touch executed`", "; touch executed", "* && touch executed"):
        command = ["bash", str(ROOT / "colab_setup.sh"), word]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "executed").exists()
    assert not re.search(r"\beval\b", (ROOT / "colab_setup.sh").read_text())


def test_what_a_notebook_says_or_is_given_is_text_in_the_summary_and_never_markup(tmp_path):
    bad = '<script>alert(1)</script>"&'
    (tmp_path / "a" / "study").mkdir(parents=True)
    (tmp_path / "a" / "study" / '"><img src=x>.png').touch()
    outcome = Outcome("a", "failed", bad + ".ipynb", {"text": bad}, 1.0, bad, "0")
    page = write_summary(tmp_path, [outcome]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<img") == 1
    assert "%22%3E%3Cimg%20src%3Dx%3E.png" in page
