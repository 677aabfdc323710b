"""Start a script of this folder in several processes, as a user would, and read what its ranks left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module")
# `--multi_gpu` is how it starts several processes on one machine; the trainer puts them on the CPU.
ACCELERATE = (
    *("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module"),
)


def command(scenario: str, out: Path, *arguments: str, launcher: tuple[str, ...] = TORCHRUN) -> list[str]:
    """The command line that runs `scenario` in two processes."""
    return [sys.executable, "-m", *launcher, "tests.distributed.worker", scenario, str(out), *arguments]


def environment() -> dict[str, str]:
    """One thread a process, gloo on the loopback, no hub; imports from this tree."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(scenario: str, out: Path, *arguments: str, launcher: tuple[str, ...] = TORCHRUN) -> list[dict[str, Any]]:
    """What each rank returned from the scenario."""
    line = command(scenario, out, *arguments, launcher=launcher)
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
