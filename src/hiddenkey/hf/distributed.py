"""Training in several processes: which draw the same masks, what is refused there, and what all must agree on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..consistency import Consistency
from ..errors import UserError


class RankSeed(TrainerCallback):
    """Seeds the generator that masks are drawn from, apart for every process that sees other data.

    transformers gives all processes one seed, and with it the same masks. Tensor-parallel peers, who compute one
    batch together, go on sharing theirs. Resuming restores each process's own state later than this.
    """

    def __init__(self, tp_size: Callable[[], int]) -> None:
        self.tp_size = tp_size

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seeds, where there are several processes."""
        if args.world_size > 1:
            seed_device(args.device, rank_seed(args.seed, args.process_index // self.tp_size()))


def rank_seed(seed: int, rank: int) -> int:
    """A seed for one data-parallel rank, unlike that of any other rank or of a neighbouring seed."""
    return random.Random(f"{seed} {rank}").getrandbits(32)  # torch reads no more bits on the CPU


def seed_device(device: torch.device, seed: int) -> None:
    """Seed torch's default generator of the device. An accelerator's alone: samplers draw from that of the CPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def check_wrapper(model: nn.Module, consistency: Consistency) -> None:
    """Refuse what DistributedDataParallel would get wrong, sometimes without a word: gradient from two forwards
    through reentrant checkpoints, each of which tells it that the gradients are ready.

    Raises UserError.
    """
    if not consistency.both or not isinstance(model, DistributedDataParallel):
        return
    if has_reentrant_checkpoints(model):
        raise UserError(
            f"the consistency {consistency.name!r} takes gradient from two forwards, which DistributedDataParallel "
            "does not add up under reentrant activation checkpointing; enable checkpointing with "
            "use_reentrant=False, or use 'kl'"
        )


def has_reentrant_checkpoints(model: nn.Module) -> bool:
    """Whether activation checkpointing is on in the way that hides a layer's own graph."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def everywhere(model: nn.Module, answer: bool) -> bool:
    """Whether all processes that train this model together say so: if they parted ways they would wait forever."""
    parameters = list(model.parameters())
    together = isinstance(model, DistributedDataParallel) or any(hasattr(p, "full_tensor") for p in parameters)
    if not together or not distributed.is_initialized():
        return answer
    verdict = torch.tensor(answer, dtype=torch.int32, device=parameters[0].device)
    distributed.all_reduce(verdict, distributed.ReduceOp.MIN)
    return bool(verdict)
