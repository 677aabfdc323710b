"""One process at a time in a folder. The operating system releases the lock of a process that ends in any way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from .errors import BusyError
from .say import say

_LOCK = ".lock"


@contextmanager
def hold(folder: Path, console: Console, doing: str = "training") -> Iterator[None]:
    """Keep other processes out of an existing folder.

    Raises:
        BusyError: another process is in it, `doing` the same.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"Another process is {doing} in {folder}. Wait until it ends, or give another folder with --out."
        ) from None
    except NotImplementedError:
        say(console, f"The file system of {folder} has no locks; do not start this run twice.")
    try:
        yield
    finally:
        lock.release()
