"""DeepSpeed's ZeRO stages, two gloo processes: what one process computes, and masks of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.distributed import launch, zero

pytestmark = pytest.mark.full
pytest.importorskip("deepspeed", reason="pip install deepspeed, which is no part of the development extra")


@pytest.mark.parametrize("stage", ("1", "2", "3"))
def test_two_processes_are_one(stage: str, tmp_path: Path):
    ranks = launch.run("zero_curves", tmp_path, stage)
    for name in zero.RECIPES:
        wanted = zero.one(tmp_path / "one" / name, name)["losses"]
        assert len(wanted) == 6
        for rank in ranks:
            assert rank[name]["wrapper"] == "DeepSpeedEngine"
            for entry, expected in zip(rank[name]["losses"], wanted, strict=True):
                parts = {part: value for part, value in expected.items() if part != "grad_norm"}
                assert {part: entry[part] for part in parts} == pytest.approx(parts, rel=1e-5)
    first, second = (rank["drawn"]["masks"] for rank in ranks)
    assert len(first) == len(second) == 16
    assert not set(first) & set(second)


@pytest.mark.parametrize("stage", ("2", "3"))
def test_killed_ranks_continue(stage: str, tmp_path: Path):
    whole = launch.run("zero_resumable", tmp_path, "whole", stage)
    line = launch.command("zero_resumable", tmp_path, "killed", stage)
    killed = subprocess.run(
        line, env=launch.environment(), cwd=launch.ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode != 0
    resumed = launch.run("zero_resumable", tmp_path, "resumed", stage)
    per_step = len(whole[0]["masks"]) // 9
    for before, after in zip(whole, resumed, strict=True):
        assert after["masks"] == before["masks"][4 * per_step :]
        assert after["losses"] == before["losses"]
