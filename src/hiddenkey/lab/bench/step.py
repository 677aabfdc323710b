"""The suite `step`: LoRA training steps of several providers on one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .config import BenchConfig
from .measure import Work, interleave
from .memory import peak_memory
from .models import StepCase, shape_of
from .providers import PLAIN, Provider, Step, choose
from .record import Case, Row

ROUNDS = 15
LEARNING_RATE = 1e-4


def step_cases(case: StepCase, config: BenchConfig, device: torch.device) -> Iterable[Case]:
    """Time and memory of one training step by every provider on one model.

    Raises:
        ConfigError: an unknown provider.
    """
    providers = choose(config.providers, case.task)
    works = build_works(case, providers)
    times = interleave(works, config.rounds_of(ROUNDS), config.seconds)
    peaks = peak_memory(works, device)
    rows = [Row(entry.name, entry.what, times[entry.name], peaks[entry.name]) for entry in providers]
    yield Case(case.name, about(case, config), PLAIN, rows)


def build_works(case: StepCase, providers: Sequence[Provider]) -> dict[str, Work]:
    """One step of every provider, each on a copy of its own."""
    return {entry.name: work_of(entry.build(case)) for entry in providers}


def work_of(step: Step) -> Work:
    """Forward, backward, optimizer and zeroed gradients; or the forward alone."""
    if not step.trains:
        return step.loss
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def work() -> None:
        step.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def about(case: StepCase, config: BenchConfig) -> dict[str, object]:
    """What a step is made of."""
    size, length, _ = shape_of(case.task, config)
    mask, labels = case.batch["attention_mask"], case.batch["labels"]
    facts: dict[str, object] = {
        "task": case.task,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "shape": [size, length],
        "padding": round(1 - float(mask.float().mean()), 3),
        "dtype": config.dtype,
        "lora": f"r = 8 on query and value{'' if case.task == 'causal-lm' else ', the head whole'}, AdamW",
    }
    return facts | ({"labels": int((labels >= 0).sum())} if case.task == "causal-lm" else {})
