"""Models that two gloo processes hold in parts train as in one process, the head of a language model included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import launch, scenarios, sharded
from tests.distributed.test_ddp import assert_same_curve
from tests.hf.tiny import make

pytestmark = pytest.mark.full


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama").save_pretrained(tmp_path / "model")
    return tmp_path


def assert_same_step(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert not one["dense"]
    assert any(value.abs().max() > 0.01 for value in one["gradients"].values())
    for rank in ranks:
        assert not rank["dense"]
        assert set(rank["gradients"]) == set(one["gradients"])
        for name, value in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], value, rtol=1e-9, atol=1e-10)


def test_fsdp2(tmp_path: Path):
    ranks = launch.run("fsdp2", tmp_path)
    for case in sharded.SHARDED:
        assert_same_step(sharded.fully_sharded(*case, ranks=1), [rank[str(case)] for rank in ranks])


def test_tensor_parallel(folder: Path):
    ranks = launch.run("tensor_parallel", folder)
    for whole in (False, True):
        assert_same_step(sharded.tensor_parallel_step(folder, whole), [rank[str(whole)] for rank in ranks])


def test_fsdp2_by_transformers_in_the_trainer(folder: Path):
    ranks = launch.run("fsdp_trainer", folder)
    model = sharded.loaded(folder / "model", False)
    one = scenarios.curve(folder / "one", "llama", scenarios.same("kl"), 1, model=model, max_grad_norm=0.0)
    assert_same_curve(one, [rank["same"] for rank in ranks])
    first, second = (rank["drawn"]["masks"] for rank in ranks)
    assert not set(first) & set(second)
