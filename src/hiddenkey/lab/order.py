"""The order of the training rows where those of like length go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


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
