"""A PostgreSQL server of one's own, without TCP, gone when it is closed: for benchmarks and tests of shared sweeps."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil


class NotInstalledError(RuntimeError):
    """No server can be started here; the message says why."""


def programs() -> Path:
    """The folder of initdb and pg_ctl: Debian keeps them out of the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for folder in reversed(folders):
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise NotInstalledError("PostgreSQL is not installed here (Debian: apt-get install postgresql)")


class Server:
    """Started with ``settings`` ("fsync=off"), owned by a user other than root, who may not run one; a context manager."""

    def __init__(self, *settings: str) -> None:
        self.programs = programs()
        self.place = Path(tempfile.mkdtemp(prefix="bklm-pg-"))
        self._owner = {}
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = next((name for name in ("postgres", "nobody") if name in names), None)
            if user is None:
                raise NotInstalledError(
                    "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
                )
            shutil.chown(self.place, user)
            self._owner = {"user": user, "env": {**os.environ, "HOME": str(self.place)}}
        given = ("listen_addresses=''", f"unix_socket_directories={self.place}", *settings)
        self._options = " ".join(f"-c {setting}" for setting in given)

    def __enter__(self) -> Server:
        try:
            self._call("initdb", "-D", str(self.place / "data"), "-U", "bklm", "-A", "trust", "--no-sync")
            self.start()
        except BaseException:
            shutil.rmtree(self.place, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.place, ignore_errors=True)

    def address(self, database: str) -> str:
        return f"postgresql://bklm@/{database}?host={self.place}"

    def create(self, database: str) -> str:
        """A new database; its address."""
        import psycopg

        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
        return self.address(database)

    def start(self) -> None:
        self._control("-o", self._options, "-l", str(self.place / "log"), "start")

    def stop(self) -> None:
        """As if it crashed: without a word to those connected."""
        self._control("-m", "immediate", "stop")

    def cpu_seconds(self) -> float:
        """Processor time of the running server and of all connections that it has served since it started."""
        number = int((self.place / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        postmaster = psutil.Process(number)
        spent = [postmaster.cpu_times()]
        ended = spent[0].children_user + spent[0].children_system
        for child in postmaster.children():
            try:
                spent.append(child.cpu_times())
            except psutil.NoSuchProcess:
                continue
        return ended + sum(times.user + times.system for times in spent)

    def _control(self, *words: str) -> None:
        self._call("pg_ctl", "-D", str(self.place / "data"), "-w", *words)

    def _call(self, program: str, *words: str) -> None:
        subprocess.run(
            [str(self.programs / program), *words],
            check=True,
            cwd=self.place,
            stdout=subprocess.DEVNULL,
            **self._owner,
        )
