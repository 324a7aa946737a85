"""A real PostgreSQL for the studies that share a grid, which only this machine can reach."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).resolve().parents[2] / "benchmarks" / "_postgresql.py"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A running server without TCP (``benchmarks/_postgresql.py``)."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    spec = importlib.util.spec_from_file_location("_postgresql", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        server = module.Server("fsync=off")
    except module.NotInstalledError as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def database(server: Any, request: pytest.FixtureRequest) -> str:
    """The address of a database of the test's own."""
    return server.create(f"test_{abs(hash(request.node.name))}")
