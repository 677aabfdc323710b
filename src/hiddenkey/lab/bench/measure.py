"""The clock: providers that take turns, and the machine they ran on."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..provenance import processor

Work = Callable[[], Any]

TIME = (
    "Providers take turns in one process, each once a round, in an order that changes from round to round (a "
    "Williams square); one untimed round before. Garbage is collected between turns and not during them. Ratios are "
    "those of the medians; `paired` is the median of the ratios within a round."
)


def order(count: int, turn: int) -> list[int]:
    """Who comes when in round `turn`: a row of a Williams square.

    Every one follows every other one equally often, in `count` rounds of an even count and twice as many of an odd.
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    row = [(step + turn) % count for step in zigzag]
    return row[::-1] if count % 2 and turn % 2 else row


def interleave(works: Mapping[str, Work], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of every work in every round. seconds: no new round after this time, once there are three; 0: all."""
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for work in works.values():
        work()
    gc.collect()
    gc.freeze()  # what lives on is not looked through again after every turn
    try:
        start = time.perf_counter()
        for turn in range(rounds):
            if seconds and turn >= 3 and time.perf_counter() - start > seconds:
                break
            for index in order(len(names), turn):
                times[names[index]].append(clock(works[names[index]]))
    finally:
        gc.unfreeze()
    return times


def clock(work: Work) -> float:
    """Seconds of one call, without garbage collection in it."""
    gc.collect()
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        return time.perf_counter() - start
    finally:
        gc.enable()


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: processor, cores, threads, load, memory, and the GPU where there is one."""
    found: dict[str, Any] = {
        "device": device.type,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {})


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
