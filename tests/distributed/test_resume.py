"""A training of two processes, killed without warning, continues to the same bits."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.distributed import launch

pytestmark = pytest.mark.full


def test_killed_ranks_continue_bit_for_bit(tmp_path: Path):
    whole = launch.run("resumable", tmp_path, "whole")
    line = launch.command("resumable", tmp_path, "killed")
    killed = subprocess.run(
        line, env=launch.environment(), cwd=launch.ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode != 0
    assert "Signal 9" in killed.stderr or "SIGKILL" in killed.stderr
    checkpoints = {path.name for path in (tmp_path / "cut").iterdir()}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in (tmp_path / "cut" / "checkpoint-4").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    resumed = launch.run("resumable", tmp_path, "resumed")
    per_step = len(whole[0]["masks"]) // 9
    for before, after in zip(whole, resumed, strict=True):
        assert after["masks"] == before["masks"][4 * per_step :]
        assert after["losses"] == before["losses"]
        assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
    assert not set(resumed[0]["masks"]) & set(resumed[1]["masks"])
