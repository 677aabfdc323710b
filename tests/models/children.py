"""One process per model: a crash, a hang or a leak ends one row, not the run."""

from __future__ import annotations

import logging
import os
import resource
import signal
import warnings
from dataclasses import asdict
from json import dumps, loads

import torch

from .examine import examine
from .kinds import class_name
from .record import Record

# Of a slow processor's time; of the clock's five times as much, since others may be at work.
SECONDS, BYTES = 120, 12 * 2**30


def examine_apart(kind: str) -> Record:
    """`examine` in a fork, which inherits the loaded libraries, with limits on time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(kind, writer)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if not text.endswith("}"):
        reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {status >> 8}"
        return Record(kind, class_name(kind), error=f"its process ended with {reason}; it takes too long or too much")
    return Record(**loads(text))


def _work(kind: str, writer: int) -> None:
    torch.set_num_threads(1)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(5 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with os.fdopen(writer, "w") as file:
        file.write(dumps(asdict(examine(kind))))
    os._exit(0)
