"""What every benchmark shares: its flags, the clock, peak memory and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, Timer

from hiddenkey.lab.provenance import commit, versions

Work = Callable[[], Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark takes; a script adds its own."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    found.add_argument("--rounds", type=positive, default=10, help="how often every variant has its turn")
    found.add_argument("--seconds", type=float, default=0.5, help="shortest time a variant is measured in each round")
    found.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads of torch")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; exits with a message before anything is measured where a value cannot be used."""
    found = flags.parse_args()
    if found.out.suffix != ".json":
        flags.error(f"--out {found.out}: the results are a JSON file; give a name that ends in .json.")
    if found.device == "cuda" and not torch.cuda.is_available():
        flags.error("--device cuda: torch finds no GPU here; give --device cpu.")
    found.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(found.threads)
    return found


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it is a whole number of at least 1")
    return number


def measure(
    case: str, works: Mapping[str, Work], flags: argparse.Namespace, *, memory: bool = True
) -> dict[str, Any]:
    """Time and peak memory of every variant; ratios are to the first one.

    The variants take turns in a new random order each round, so a machine that gets slower slows all of them. A turn
    begins with untimed calls.
    """
    timers = {
        name: Timer("work()", globals={"work": work}, label=case, sub_label=name, num_threads=flags.threads)
        for name, work in works.items()
    }
    turns: dict[str, list[Measurement]] = {name: [] for name in works}
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(flags.rounds):
        shuffle(order)
        for name in order:
            turns[name].append(timers[name].blocked_autorange(min_run_time=flags.seconds))
    times = {name: Measurement.merge(turns[name])[0] for name in works}
    peaks = {name: peak_bytes(work, flags.device) if memory else None for name, work in works.items()}
    first = next(iter(works))
    print(case)
    rows = []
    for name, time in times.items():
        ratio, peak = time.median / times[first].median, peaks[name]
        about = {"variant": name, "median_s": time.median, "iqr_s": time.iqr, "ratio": ratio, "peak_bytes": peak}
        rows.append(about | {"turns_s": [turn.median for turn in turns[name]]})
        held = "" if peak is None else f"{peak / 2**20:10.1f} MiB"
        print(f"  {name:32} {time.median * 1e3:10.3f} ms ± {time.iqr * 1e3:8.3f} {ratio:8.3f}{held}")
    return {"case": case, "reference": first, "rows": rows}


def peak_bytes(work: Work, device: str) -> int:
    """The most bytes of tensors that one call holds at a time, above what was held before it.

    On a CPU, torch's allocator is followed; what NumPy or a kernel allocates by itself is not counted.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in steps), initial=0))


def write(flags: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """Write the results, and what they were measured with."""
    result = {
        "benchmark": Path(sys.argv[0]).stem,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
        "cases": cases,
    }
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(flags.out)
