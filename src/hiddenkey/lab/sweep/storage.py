"""The database of a sweep: an SQLite file, or any database that SQLAlchemy reaches."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage, get_storage

from ..errors import ConfigError, LabError, RunError

T = TypeVar("T")

FILE = "sweep.db"
_WAIT_FOR_LOCK = 120
_DAMAGED = ("not a database", "malformed")
_MADE_AGAIN = f"The file is damaged. Move {FILE} away: it is made again from the records in runs/."

optuna.logging.set_verbosity(optuna.logging.ERROR)


def url_of(storage: str, folder: Path) -> str:
    """The URL asked for, or that of the file in the sweep's folder.

    Raises:
        ConfigError: that folder's name has letters that mean something else in a URL.
    """
    path = str(folder.resolve() / FILE)
    odd = [letter for letter in "{}?%" if letter in path]
    if odd and not storage:
        raise ConfigError(
            f"{folder} cannot hold the sweep's database: {' '.join(odd)} in its name mean something else in a URL. "
            "Give another folder with --out, or a --storage."
        )
    return storage or f"sqlite:///{path}"


def open_storage(url: str, grace: int) -> Any:
    """Optuna's storage at this URL; `grace`: seconds without a heartbeat after which a trial's worker counts as dead.

    Raises:
        ConfigError: not a URL, or one whose driver is not installed.
        RunError: the database cannot be reached, or was made by another version of Optuna.
    """
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        # Connections that begin no transactions themselves: `_immediate` does.
        options = {"connect_args": {"timeout": _WAIT_FOR_LOCK, "isolation_level": None}}
    try:
        interval = max(1, grace // 4)
        with no_warnings():
            storage = insist(
                lambda: RDBStorage(url, engine_kwargs=options, heartbeat_interval=interval, grace_period=grace),
                tries=3,
            )
    except LabError:
        raise
    except RuntimeError as error:  # Optuna's, of tables that another version of it made
        raise RunError(f"storage {url.split('://')[0]!r} cannot be used: {error}") from error
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError, LookupError) as error:
        raise ConfigError(
            f"storage {url.split('://')[0]!r} cannot be used: {error} Give a URL such as "
            "postgresql+psycopg://user@host/database, and install its driver: pip install 'psycopg[binary]' for "
            "PostgreSQL."
        ) from error
    if url.startswith("sqlite"):
        sqlalchemy.event.listen(storage.engine, "begin", _immediate)
    return get_storage(storage)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Optuna calls its heartbeats experimental every time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def insist(call: Callable[[], T], tries: int = 7) -> T:
    """Call, and again a little later where the database fails: it may be starting anew, or just be busy.

    Raises:
        RunError: it fails every time; seven tries take 16 to 32 seconds.
    """
    for attempt in range(tries):
        try:
            return call()
        except (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
            damaged = any(word in str(error.__cause__ or error) for word in _DAMAGED)
            if damaged or attempt == tries - 1:
                way = _MADE_AGAIN if damaged else "When it can, the same command continues."
                raise RunError(f"The storage cannot be reached: {error.__cause__ or error}\n{way}") from error
            time.sleep(2**attempt * random.uniform(0.25, 0.5))
    raise AssertionError


def _immediate(connection: Any) -> None:
    # SQLite has no SELECT … FOR UPDATE. With the write lock from the beginning, no two workers claim the same trial,
    # and a transaction waits for its turn where it would fail with "database is locked".
    connection.exec_driver_sql("BEGIN IMMEDIATE")
