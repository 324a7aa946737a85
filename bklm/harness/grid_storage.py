"""Where a sweep's trials are written down: a journal file of one machine, or a PostgreSQL database that many share."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from bklm.files.atomic import set_aside

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15  # a worker says so often that its trial is alive
GRACE_SECONDS = 60  # one that was silent for so long is taken for dead, and its trial is given to another
CONNECT_SECONDS = 10
DRIVERS = ("psycopg", "psycopg2")  # the second is what Colab has
# What an address may say after "?": of libpq's settings those that hold no secret and that a sweep can need.
SETTINGS = (
    "host", "hostaddr", "port", "sslmode", "sslrootcert", "application_name", "connect_timeout", "target_session_attrs",
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count",
)  # fmt: skip


def check_address(address: str) -> None:
    """Refuse what is no address of a PostgreSQL database, or one with a password or another secret in it.

    Raises:
        ValueError: one sentence. A secret would end in the log and the manifest; libpq reads it from elsewhere. The
            sentence repeats nothing that may be one.
    """
    try:
        url = sqlalchemy.make_url(address)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        url = None
    if url is None or url.drivername != "postgresql" or not url.database:
        given = "another form of address" if set(address) & set("@=?") else repr(address)
        raise ValueError(
            f"storage: got {given}; allowed is postgresql://user@host/database, or nothing for a file in output_dir."
        )
    is_in_user = url.password is not None or ":" in (url.username or "")  # me%3Asecret@ is a user to the parser
    if is_in_user or "password" in url.query:
        raise ValueError(
            "storage: got an address with a password, which would end in the log and the manifest; leave it out and put "
            "it into the environment variable PGPASSWORD or the file ~/.pgpass."
        )
    for name in url.query:
        if name not in SETTINGS:
            raise ValueError(
                f"storage: got an address with the setting {name!r}; allowed after the ? are {', '.join(SETTINGS)}; put "
                "others into libpq's environment variables, such as PGPASSFILE, or into ~/.pg_service.conf."
            )


class _FolderIsLocked:
    """The journal's lock, which does nothing: the study folder's keeps every other process out.

    Optuna's default is a symbolic link beside the journal, which a mounted Google Drive refuses (EOPNOTSUPP), and which
    a killed process leaves behind.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def journal(path: Path) -> BaseStorage:
    """The journal file of a study whose folder is locked by the caller; a damaged one is set aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of versions that locked the journal, too; nothing waits for it any more, but it would go into the zip.
    for leftover in path.parent.glob(f"{path.name}.lock*"):
        leftover.unlink()
    damage = _damage(path)
    if damage:
        set_aside(path, damage)
        log.warning("The sweep goes on with a new journal; finished trials are read from their folders.")
    return _open_journal(path)


def _open_journal(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_FolderIsLocked()))


@contextmanager
def postgresql(address: str) -> Iterator[BaseStorage]:
    """The tables of a PostgreSQL database, made if they are missing; inside the block no other worker sets up its own.

    Raises:
        ValueError: see `check_address`.
        ConnectionError: the database does not answer, or no driver for it is installed.
    """
    check_address(address)
    driver = next((d for d in DRIVERS if importlib.util.find_spec(d)), None)
    if driver is None:
        raise ConnectionError(
            "storage: PostgreSQL needs the package psycopg, which is not installed; pip install 'psycopg[binary]'."
        )
    url = sqlalchemy.make_url(address).set(drivername=f"postgresql+{driver}")
    seconds = url.query.get("connect_timeout", CONNECT_SECONDS)
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": seconds}}
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, **options)
    try:
        connection = engine.connect()
    except sqlalchemy.exc.DBAPIError as error:  # nobody there, or a setting that the driver refuses
        raise ConnectionError(
            f"storage: {address} does not answer ({' '.join(str(error.orig).split())}); start the database, mend the "
            "address, or leave storage empty to work alone."
        ) from None
    with connection:
        # Workers that start together would make the same tables, and the same study, at once. The lock ends with the
        # connection, whatever becomes of this process.
        number = zlib.crc32(b"bklm sweep set-up")
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:number)"), {"number": number})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat is called so since 2021
            storage = RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        yield storage


def _damage(path: Path) -> str | None:
    """Why a journal cannot be gone on with: its last write was cut short, or it holds something else."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        return "its last line is cut short"
    try:
        for line in content.splitlines():
            json.loads(line)
        storage = _open_journal(path)
        for study in storage.get_all_studies():
            storage.get_all_trials(study._study_id)
    except (MemoryError, OSError):  # the machine's trouble, not the journal's
        raise
    except Exception as error:  # replaying lines that are not Optuna's raises whatever it trips over
        return f"not a journal of trials: {type(error).__name__}"
    return None
