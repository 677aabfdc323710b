"""DistributedDataParallel, two gloo processes: what one process computes, and masks of its own in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import launch, scenarios


def assert_same_curve(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert len(one["losses"]) > 1
    for rank in ranks:
        assert set(rank["weights"]) == set(one["weights"])
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-9, atol=1e-10)
        for entry, wanted in zip(rank["losses"], one["losses"], strict=True):
            assert entry == pytest.approx(wanted, rel=1e-5, abs=1e-9)  # the log is kept in float32


def test_two_processes_are_one(tmp_path: Path):
    ranks = launch.run("ddp", tmp_path)
    same, drawn = [rank["same"] for rank in ranks], [rank["drawn"] for rank in ranks]
    assert {rank["wrapper"] for rank in same} == {"DistributedDataParallel"}
    assert_same_curve(scenarios.curve(tmp_path / "one", "llama", scenarios.same("kl"), 1), same)

    # The first step's second view is computed once more, from the same draws, to see that lower layers can be shared.
    assert len(drawn[0]["masks"]) == len(drawn[1]["masks"]) == 16 + 4
    assert not set(drawn[0]["masks"]) & set(drawn[1]["masks"])
    assert len(set(drawn[0]["masks"])) == 16
    for rank in drawn:
        assert all(0.2 < rate < 0.4 for rate in rank["rates"].values())

    for name in ("kl", "kl-rdrop"):
        one = scenarios.by_hand(name, ranks=1)["gradients"]
        for rank in ranks:
            found = rank["by hand"][name]
            assert found["exchanges"] == [0]
            assert set(found["gradients"]) == set(one)
            assert any(value.abs().max() > 0.01 for value in one.values())
            for key, value in one.items():
                torch.testing.assert_close(found["gradients"][key], value, rtol=1e-9, atol=1e-10)
    assert "use_reentrant=False" in ranks[0]["refused"]

    first, second = (rank["logged alone"] for rank in ranks)
    parts = {"loss", "task_loss", "consistency_loss"}
    assert [entry["loss"] for entry in first if set(entry) != parts] == [1.0, 2.0, 1.0, 2.0]
    assert [set(entry) for entry in second] == [parts, parts]
    for one, other in zip((entry for entry in first if set(entry) == parts), second, strict=True):
        assert one == pytest.approx(other)


@pytest.mark.full
def test_every_variant_is_one_process(tmp_path: Path):
    ranks = launch.run("ddp_variants", tmp_path)
    for name in scenarios.VARIANTS:
        assert_same_curve(scenarios.variant(tmp_path / "one" / name, name, 1), [rank[name] for rank in ranks])


@pytest.mark.full
def test_rate_zero_is_a_plain_trainer(tmp_path: Path):
    for ours, plain in launch.run("plain", tmp_path):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.full
def test_accelerate_launch(tmp_path: Path):
    ranks = launch.run("ddp", tmp_path, launcher=launch.ACCELERATE)
    assert_same_curve(
        scenarios.curve(tmp_path / "one", "llama", scenarios.same("kl"), 1), [rank["same"] for rank in ranks]
    )
    assert not set(ranks[0]["drawn"]["masks"]) & set(ranks[1]["drawn"]["masks"])


@pytest.mark.full
def test_drawn_masks_train_alike(tmp_path: Path):
    """With masks drawn, two processes and one are the same on the average over seeds."""
    ranks = launch.run("seeds", tmp_path)
    one = scenarios.final_losses(tmp_path / "one", 1)
    two = torch.tensor(ranks[0])
    assert ranks[0] == ranks[1]
    error = (one.var() / len(one) + two.var() / len(two)).sqrt()
    assert abs(one.mean() - two.mean()) < 3 * error
    assert one.std() > 0
