"""A real PostgreSQL for the studies that share a grid, which only this machine can reach."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def programs() -> Path | None:
    """The folder of initdb and pg_ctl: Debian keeps them out of the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((f for f in reversed(folders) if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address prefix of a running server without TCP, owned by a user other than root, who may not run one."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed here (Debian: apt-get install postgresql)")
    place = Path(tempfile.mkdtemp(prefix="bklm-pg-"))
    owner = {}
    if os.getuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
        shutil.chown(place, user)
        owner = {"user": user, "env": {**os.environ, "HOME": str(place)}}
    data = place / "data"

    def call(*words: str) -> None:
        subprocess.run(words, check=True, cwd=place, stdout=subprocess.DEVNULL, **owner)

    try:
        call(str(folder / "initdb"), "-D", str(data), "-U", "bklm", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses='' -c fsync=off -c unix_socket_directories={place}"
        call(str(folder / "pg_ctl"), "-D", str(data), "-w", "-o", options, "-l", str(place / "log"), "start")
        yield f"postgresql://bklm@/{{}}?host={place}"
        call(str(folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """The address of a database of the test's own."""
    import psycopg

    name = f"test_{abs(hash(request.node.name))}"
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.format(name)
