"""Rows of like length in one batch: which, and in which order; test_run.py tests that a killed run keeps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hiddenkey
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.preflight import check_run
from hiddenkey.lab.trainer_settings import ByLength

from .test_run import config  # noqa: F401

LENGTHS = torch.randint(5, 100, (203,), generator=torch.Generator().manual_seed(1)).tolist()
SIZE = 8


def batches(order: ByLength, epoch: int = 0) -> list[list[int]]:
    order.set_epoch(epoch)
    rows = list(order)
    return [rows[start : start + SIZE] for start in range(0, len(rows), SIZE)]


def padded(found: list[list[int]]) -> int:
    return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in found)


@pytest.mark.parametrize("count", (1, 7, 8, 9, 203))
def test_every_row_once_in_an_epoch(count: int):
    order = ByLength(LENGTHS[:count], SIZE, seed=3)
    for epoch in range(3):
        order.set_epoch(epoch)
        assert sorted(order) == list(range(count))
    assert len(order) == count


def test_less_padding():
    found = batches(ByLength(LENGTHS, SIZE, seed=3))
    rows = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[start : start + SIZE] for start in range(0, len(rows), SIZE)]
    waste, usual = (padded(order) - sum(LENGTHS) for order in (found, shuffled))
    assert waste < usual / 4
    assert [len(batch) for batch in found] == [SIZE] * 25 + [3]


def test_batches_do_not_go_from_long_to_short():
    """Over many seeds those of the first half of an epoch are as long as those of the second."""
    drawn = [batches(ByLength(LENGTHS, SIZE, seed))[:24] for seed in range(200)]
    longest = torch.tensor([[max(LENGTHS[row] for row in batch) for batch in order] for order in drawn]).double()
    first, second = longest.view(200, 2, 12).mean((0, 2))
    assert abs(first - second) < 4 * longest.std() * (2 / (200 * 12)) ** 0.5


def test_seed_and_epoch_alone_decide():
    drawn = [batches(ByLength(LENGTHS, SIZE, seed), epoch) for seed in (3, 4) for epoch in (0, 1)]
    assert all(drawn[i] != drawn[j] for i in range(4) for j in range(i))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert batches(ByLength(LENGTHS, SIZE, 4), 1) == drawn[3]
    assert torch.equal(torch.get_rng_state(), before)  # the drops' generator


def test_the_trainer_is_given_that_order(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    config = replace(config, group_by_length=True, batch_size=5, epochs=2, train_eval_size=0, seed=6)
    trained: list[list[list[int]]] = []
    real = run._Trainer.compute_loss

    def look(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(-1).tolist(), strict=True)
            trained.append([ids[:length] for ids, length in rows])
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(run._Trainer, "compute_loss", look)
    run.train(config)
    rows = check_run(config, hiddenkey.parse(config.recipe)).train["input_ids"][:]
    order, wanted = ByLength([len(ids) for ids in rows], 5, seed=6), []
    for epoch in range(2):
        order.set_epoch(epoch)
        numbers = list(order)
        wanted += [[rows[number] for number in numbers[start : start + 5]] for start in range(0, len(rows), 5)]
    assert trained == wanted
