"""Ctrl-C and SIGTERM, heeded where nothing can swallow them.

Python raises KeyboardInterrupt wherever the main thread happens to be. Within a finaliser, such as those that a
garbage collection runs, it is printed and forgotten, and the program goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]

_waiting: dict[int, _Handler] = {}


@contextmanager
def postponed() -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM waits for `heed`, or for the end; one more is acted on at once.

    An error that ends it goes first: what waited then waits on, for the next `heed` of whoever catches the error.

    Signals that are ignored, or left to the system, stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    earlier = {number: handler for number, handler in handlers.items() if callable(handler)}

    def wait(number: int, frame: FrameType | None) -> None:
        if number in _waiting:
            earlier[number](number, frame)
        _waiting[number] = earlier[number]

    for number in earlier:
        signal.signal(number, wait)
    try:
        yield
    except KeyboardInterrupt:
        _waiting.clear()
        raise
    finally:
        for number, handler in earlier.items():
            if signal.getsignal(number) is wait:
                signal.signal(number, handler)
    heed()


def heed() -> None:
    """Act now on what was postponed.

    Raises:
        KeyboardInterrupt: Ctrl-C waited, or SIGTERM in a worker of a sweep.
    """
    while _waiting:
        number, handler = _waiting.popitem()
        handler(number, None)
