"""What the suite `step` compares: each provider is a model and the loss of one training step on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ... import attach, consistency_step, parse
from ...errors import UserError
from ...hf.views import IGNORED
from ...registry import unknown
from ..errors import ConfigError
from .models import StepCase
from .textbook import DROPKEY, rdrop_loss

RATE = 0.1
CHUNK = 128


@dataclass(frozen=True)
class Step:
    """One provider at work: a model, and its loss in one training step; `trains` is False for a forward alone."""

    model: Any
    loss: Callable[[], Tensor]
    trains: bool = True


@dataclass(frozen=True)
class Provider:
    """A named way to take a step."""

    name: str
    what: str
    build: Callable[[StepCase], Step]
    tasks: tuple[str, ...] = ("classification", "causal-lm")


PROVIDERS: dict[str, Provider] = {}
PLAIN = "plain"
RECIPES = {
    "classification": ("hiddenkey-@0.1", "hiddenkey@0.1", "hidden[:]:column@0.2", "hiddenkey-@0.1 ~ kl-rdrop"),
    "causal-lm": (
        "hiddenkey-@0.1",
        "hiddenkey-[:]@0.1",
        "hiddenkey@0.1",
        "hidden[:]:column@0.2",
        "hiddenkey-@0.1 ~ kl-rdrop",
    ),
}

Build = Callable[[StepCase], Step]


def provider(name: str, what: str, *tasks: str) -> Callable[[Build], Build]:
    """Decorator: add a provider, for the given tasks or for all."""

    def add(build: Build) -> Build:
        PROVIDERS[name] = Provider(name, what, build, tasks or ("classification", "causal-lm"))
        return build

    return add


@provider(PLAIN, "LoRA with every dropout off, sdpa")
def plain(case: StepCase) -> Step:
    """The reference."""
    return _own_loss(case.adapted(), case)


@provider("own dropout, sdpa", "the model's own dropouts at 0.1, sdpa")
def own_sdpa(case: StepCase) -> Step:
    """What transformers offers, in its fast attention."""
    return _own_loss(case.adapted(own=RATE), case)


@provider("own dropout, eager", "the model's own dropouts at 0.1, eager attention")
def own_eager(case: StepCase) -> Step:
    """What transformers offers, in its plain attention."""
    return _own_loss(case.adapted(own=RATE, attention="eager"), case)


@provider("lora_dropout", "PEFT's lora_dropout at 0.1, sdpa")
def lora_dropout(case: StepCase) -> Step:
    """Dropout at the input of the adapters."""
    return _own_loss(case.adapted(lora_dropout=RATE), case)


@provider("textbook DropKey", "a mask of (B, H, Q, K) at 0.1 added to the logits of eager attention, all layers")
def textbook_dropkey(case: StepCase) -> Step:
    """DropKey as its paper prints it."""
    model = case.adapted(attention=DROPKEY)
    for module in model.modules():
        module.textbook_rate = RATE
    return _own_loss(model, case)


@provider("textbook R-Drop", "hiddenkey-@0.1 in two forwards, both with gradient, whole logits, dense KL")
def textbook_rdrop(case: StepCase) -> Step:
    """R-Drop as its paper prints it, over the drops of hiddenkey-."""
    model = case.adapted()
    attach(model, f"hiddenkey-@{RATE}")
    return Step(model, lambda: rdrop_loss(model, case))


@provider("forward alone", "one forward of plain without gradient and loss")
def forward_alone(case: StepCase) -> Step:
    """What a second view costs at least, computed whole."""
    model = case.adapted()
    inputs = {name: value for name, value in case.batch.items() if name != "labels"}

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs)["logits"]
        return logits

    return Step(model, forward, trains=False)


@provider("plain, loss in chunks", "plain, its loss over 128 tokens at a time", "causal-lm")
def plain_chunked(case: StepCase) -> Step:
    """Plain LoRA that never holds all logits, by torch's own checkpoint."""
    model = case.adapted()
    decoder, head = model.base_model.model.get_decoder(), model.get_output_embeddings()
    inputs = {name: value for name, value in case.batch.items() if name != "labels"}
    targets = case.batch["labels"][:, 1:]
    valid = targets != IGNORED

    def chunk_loss(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), labels, reduction="sum")

    def loss() -> Tensor:
        states = decoder(**inputs)[0][:, :-1][valid]
        chunks = zip(states.split(CHUNK), targets[valid].split(CHUNK), strict=True)
        sums = [checkpoint(chunk_loss, part, labels, use_reentrant=False) for part, labels in chunks]
        return torch.stack(sums).sum() / valid.sum()

    return Step(model, loss)


def choose(names: tuple[str, ...], task: str) -> list[Provider]:
    """The providers of these names or recipes, plain first; none given: all of the task and its usual recipes.

    Raises:
        ConfigError: a name that is neither.
    """
    usual = [entry.name for entry in PROVIDERS.values() if task in entry.tasks]
    asked = dict.fromkeys((PLAIN, *(names or (*usual, *RECIPES[task]))))
    found = [PROVIDERS[name] if name in PROVIDERS else recipe_provider(name) for name in asked]
    for entry in found:
        if task not in entry.tasks:
            raise ConfigError(f"the provider {entry.name!r} is for {' and '.join(entry.tasks)}, not for {task}.")
    return found


def recipe_provider(recipe: str) -> Provider:
    """A recipe of ours, attached to a copy of the model.

    Raises:
        ConfigError: it does not parse.
    """
    try:
        normal = str(parse(recipe))
    except UserError as error:
        names = unknown("provider", recipe, list(PROVIDERS))
        raise ConfigError(f"{names}; nor is it a recipe: {error}") from error

    def build(case: StepCase) -> Step:
        model = case.adapted()
        attach(model, recipe)
        return Step(model, lambda: consistency_step(model, case.batch).total)

    return Provider(recipe, f"ours: {normal}", build)


def _own_loss(model: Any, case: StepCase) -> Step:
    return Step(model, lambda: model(**case.batch)["loss"])
