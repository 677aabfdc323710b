"""Seeds of processes that train one model together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hiddenkey.hf.distributed import RankSeed, everywhere, rank_seed


def first_draw(process: int, *, tp_size: int, processes: int = 4, seed: int = 0) -> float:
    """What a process draws first in training, all having begun with one seed."""
    torch.manual_seed(seed)
    args: Any = SimpleNamespace(
        world_size=processes,
        process_index=process,
        seed=seed,
        device=torch.device("cpu"),
        local_process_index=process,
    )
    RankSeed(lambda: tp_size).on_train_begin(args, None, None)  # type: ignore[arg-type]
    return torch.rand(()).item()


def test_data_parallel_processes_draw_apart():
    assert len({first_draw(process, tp_size=1) for process in range(4)}) == 4


def test_tensor_parallel_peers_draw_alike():
    draws = [first_draw(process, tp_size=2) for process in range(4)]
    assert draws[0] == draws[1] != draws[2] == draws[3]


def test_one_process_is_left_alone():
    torch.manual_seed(5)
    untouched = torch.rand(()).item()
    assert first_draw(0, tp_size=1, processes=1, seed=5) == untouched


def test_neighbouring_seeds_do_not_meet():
    assert len({rank_seed(seed, rank) for seed in range(50) for rank in range(50)}) == 2500
    assert rank_seed(1, 23) != rank_seed(12, 3)


@pytest.mark.parametrize("answer", (True, False))
def test_one_process_asks_nobody(answer: bool):
    assert everywhere(torch.nn.Linear(2, 2), answer) is answer
