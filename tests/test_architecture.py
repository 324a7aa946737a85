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
    assert house.upward() == []


def test_foundations_import_nothing_else_of_bklm(house):
    assert house.foreign() == []


UPWARD = (
    "from bklm.training import train",
    "import bklm.training",
    "import json, bklm.training as t",
    "from bklm import training",
    "from bklm import __version__, training",
    "from ..training import train",
    "from .. import training",
    "def late():\n    from ..training import train",
    "if not TYPE_CHECKING:\n    from bklm import training",
    "if TYPE_CHECKING:\n    pass\nelse:\n    from bklm import training",
)
ALLOWED = (
    "from bklm import __version__",
    "from . import cache",
    "from .cache import load_or_build",
    "from bklm.data.cache import load_or_build",
    "import bklm",
    "import json\nfrom training import train",
    "if TYPE_CHECKING:\n    from bklm.training import train",
)


@pytest.fixture
def package(tmp_path):
    """package(name, words): a bklm of that file with those words, beside data/cache.py and training.py."""

    def make(name: str, words: str) -> Path:
        for path in ("__init__.py", "data/__init__.py", "data/cache.py", "training.py", "moe.py"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        (tmp_path / name).write_text(words, encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize("file", ["data/hub.py", "data/__init__.py"])
@pytest.mark.parametrize("words", UPWARD)
def test_an_import_from_above_is_found_however_it_is_written(house, package, file, words):
    place = package(file, words)
    name = file.removesuffix(".py").replace("/", ".")
    assert house.upward(place) == house.foreign(place) == [f"{name} imports training"]


@pytest.mark.parametrize("words", ["from .training import train", "from . import training"])
def test_one_dot_in_a_module_at_the_top_is_bklm_itself(house, package, words):
    assert house.upward(package("moe.py", words)) == ["moe imports training"]


@pytest.mark.parametrize("words", ALLOWED)
def test_an_import_from_beside_or_for_type_checkers_is_no_offence(house, package, words):
    place = package("data/hub.py", words)
    assert house.upward(place) == house.foreign(place) == []


def test_the_page_lists_the_modules_as_they_are(house):
    page = house.PAGE.read_text(encoding="utf-8")
    written = page.split(house.BEGIN)[1].split(house.END)[0].strip()
    assert written == house.table().strip(), "run: python scripts/architecture.py"


def test_every_module_says_what_it_holds(house):
    assert [name for name, path in house.modules().items() if not house.first_sentence(path)] == []
