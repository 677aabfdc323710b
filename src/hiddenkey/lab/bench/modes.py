"""The suite `modes`: LoRA steps with drops under torch.compile and with activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ... import attach
from .config import BenchConfig
from .measure import Work, interleave
from .memory import peak_memory
from .models import StepCase
from .providers import PLAIN, RATE, Step
from .record import Case, Row
from .step import about, work_of

ROUNDS = 11
RECIPE = f"hiddenkey-[:]@{RATE}"
MODES = {
    "checkpointed": (False, True),
    "compiled": (True, False),
    "compiled and checkpointed": (True, True),
}


def mode_cases(case: StepCase, config: BenchConfig, device: torch.device) -> Iterable[Case]:
    """Plain LoRA and hiddenkey- in all layers, one case for each mode: ratios are within a mode."""
    for name, (compiled, checkpointed) in MODES.items():
        works = {recipe: _work(case, recipe, compiled, checkpointed) for recipe in (PLAIN, RECIPE)}
        times = interleave(works, config.rounds_of(ROUNDS), config.seconds)
        # What a compiled model allocates is not seen operation by operation.
        counted = device.type == "cuda" or not compiled
        peaks = peak_memory(works, device) if counted else {}
        whats = {PLAIN: f"LoRA with every dropout off, {name}", RECIPE: f"ours: {RECIPE}, {name}"}
        rows = [Row(recipe, whats[recipe], times[recipe], peaks.get(recipe)) for recipe in works]
        yield Case(name, about(case, config), PLAIN, rows)
        torch.compiler.reset()


def _work(case: StepCase, recipe: str, compiled: bool, checkpointed: bool) -> Work:
    model = case.adapted()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe != PLAIN:
        attach(model, recipe)
    run: Any = torch.compile(model) if compiled else model

    def loss() -> Tensor:
        found: Tensor = run(**case.batch)["loss"]
        return found

    return work_of(Step(model, loss))
