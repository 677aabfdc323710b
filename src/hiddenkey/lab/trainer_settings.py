"""From our configuration to the arguments of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..errors import RunError
from .config import TrainConfig
from .model import require_dtype
from .run_folder import CHECKPOINTS
from .tasks import Task

_CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def training_arguments(config: TrainConfig, task: Task, metric: str) -> TrainingArguments:
    """The Trainer's arguments; what is not named here keeps the Trainer's default.

    Raises:
        ConfigError: a type that this machine cannot train in.
    """
    require_dtype(config.dtype)
    return TrainingArguments(
        output_dir=str(Path(config.out) / CHECKPOINTS),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type="constant_with_warmup" if config.scheduler == "constant" else config.scheduler,
        max_grad_norm=config.max_grad_norm,
        label_smoothing_factor=config.label_smoothing,
        neftune_noise_alpha=config.neftune_alpha or None,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # said outright, or bfloat16 is refused there
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,  # the best, the newest, and the one before: a kill may cut the newest short
        metric_for_best_model=f"eval_validation_{metric}",
        greater_is_better=metric not in task.lower_is_better,
        load_best_model_at_end=config.keep == "best",
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # a NaN must be seen
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **(_CHECKPOINTING if config.gradient_checkpointing else {}),
    )


def require_one_device() -> None:
    """Raises RunError where this process sees several GPUs: the Trainer would spread each batch over all of them."""
    count = torch.cuda.device_count()
    if count > 1:
        raise RunError(
            f"This process sees {count} GPUs, and a run is made on one. Give it one of them, for instance with "
            f"CUDA_VISIBLE_DEVICES=0 before the command; hiddenkey sweep --workers {count} gives one to each worker."
        )


class ByLength(Sampler[int]):
    """Batches of rows of like length, the batches in random order; every row once in an epoch.

    Rows are grouped as transformers groups them. Its own sampler goes from long batches to short ones, and draws from
    the generator of the drops, so a run that continues would get another order; here seed and epoch alone decide.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A hash of both: else neighbouring seeds would share the orders of neighbouring epochs.
        (drawn,) = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(drawn))
        rows = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        rest = [] if len(batches[-1]) == self.batch_size else batches.pop()  # a short batch must stay the last
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from rest
