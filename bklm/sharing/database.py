"""The PostgreSQL database in which several machines share a grid: its address checked, its tables opened, and waited for."""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15  # a worker says so often that its trial is alive
GRACE_SECONDS = 60  # one that was silent for so long is taken for dead, and its trial is given to another
CONNECT_SECONDS = 10
PATIENCE_SECONDS = 600  # a database that does not answer any more is waited for so long
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


@contextmanager
def postgresql(address: str) -> Iterator[RDBStorage]:
    """The tables of a PostgreSQL database, made if they are missing; inside the block no other worker sets up its own.

    Raises:
        ValueError: see ``check_address``.
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
    options = {"connect_args": {"connect_timeout": seconds}}
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, **options)
    try:
        connection = engine.connect()
    except (sqlalchemy.exc.DBAPIError, ValueError) as error:  # nobody there, or a setting that is refused
        why = " ".join(str(getattr(error, "orig", error)).split())
        raise ConnectionError(
            f"storage: {address} does not answer ({why}); start the database, mend the address, or leave storage empty."
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
                engine_kwargs=options | {"pool_size": 1},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        yield storage


Answer = TypeVar("Answer")


def patiently(call: Callable[..., Answer], *words: Any) -> Answer:
    """``call(*words)``, again and again while the database does not answer: it may be about to start anew."""
    deadline, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return call(*words)
        except (StorageInternalError, sqlalchemy.exc.DBAPIError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            is_away = isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
            if not is_away or time.monotonic() > deadline:
                raise
            if not told:
                why = " ".join(str(getattr(cause, "orig", cause)).split())
                log.warning("The database does not answer (%s); waiting for it.", why)
            told = True
        time.sleep(1)
