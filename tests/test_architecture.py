"""Imports go down only, and the page that says who imports whom is the one that the code gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_module_imports_from_a_layer_above_its_own(house):
    upward = [
        f"{name} imports {other}"
        for name, path in house.modules().items()
        for other in house.imports(path)
        if house.layer_of(other) > house.layer_of(name)
    ]
    assert upward == []


def test_foundations_import_nothing_else_of_bklm(house):
    foreign = [
        f"{name} imports {other}"
        for name, path in house.modules().items()
        for other in house.imports(path)
        if name.split(".")[0] in house.ALONE and other.split(".")[0] != name.split(".")[0]
    ]
    assert foreign == []


def test_the_page_lists_the_modules_as_they_are(house):
    page = house.PAGE.read_text(encoding="utf-8")
    written = page.split(house.BEGIN)[1].split(house.END)[0].strip()
    assert written == house.table().strip(), "run: python scripts/architecture.py"


def test_every_module_says_what_it_holds(house):
    assert [name for name, path in house.modules().items() if not house.first_sentence(path)] == []
