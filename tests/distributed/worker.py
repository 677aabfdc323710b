"""Run by torchrun: `worker SCENARIO OUT …` writes what the scenario returns to OUT/rankN.pt."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from tests.distributed import scenarios, sharded, zero


def main() -> None:
    """One rank."""
    scenario, out, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    room = next(room for room in (scenarios, sharded, zero) if hasattr(room, scenario))
    found = getattr(room, scenario)(Path(out), *arguments)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
