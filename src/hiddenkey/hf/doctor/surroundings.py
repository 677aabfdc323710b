"""What is around the drops: hooks and modes, other dropouts, saved keys, other processes, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

from ...errors import UserError
from ..attachment import module_at
from ..checks import problems, some
from ..model_dropouts import OwnDropout, adapter_dropouts, own_dropouts
from ..peft_layers import restless
from ..training_step import consistency_step
from .findings import Finding
from .model_under_test import SEED, ModelUnderTest, clear_gradients, loss_of, main_output, seed_all

ROUNDS = 5


def check_attached(tested: ModelUnderTest) -> Iterator[Finding]:
    """The recipe sits on the model as it did after attach."""
    attachment = tested.attachment
    found = list(dict.fromkeys(problems(attachment)))
    for problem in found:
        yield Finding("attached", "wrong", problem)
    if not found:
        count = sum(len(site.drops) for _, site in attachment.sites)
        yield Finding("attached", "ok", f"{count} sites, every hook and name in its place")


def check_mode(tested: ModelUnderTest) -> Iterator[Finding]:
    """The model is in training mode, and so is every module that drops."""
    if not tested.trains:
        reason = "the model is in evaluation mode, in which nothing is dropped: call model.train()"
        yield Finding("training mode", "wrong", reason)
        return
    model = tested.attachment.model
    sites = [(path, module_at(model, path)) for path, _ in tested.attachment.sites]
    still = [path for path, module in sites if module is not None and not module.training]
    if still:
        yield Finding("training mode", "wrong", f"in evaluation mode: {some(still)}; call model.train()")
    else:
        yield Finding("training mode", "ok", "the model and every module that drops")


def check_other_dropouts(tested: ModelUnderTest) -> Iterator[Finding]:
    """The model's own dropouts are off; the adapter's are the user's choice."""
    own = list(own_dropouts(tested.attachment.model))
    silenced = len(tested.attachment.plan.own_dropouts)
    if own:
        yield Finding("own dropouts", "wrong", f"turned on again after attach: {_list(own)}; set them to 0")
    else:
        reason = f"{silenced} set to 0 by attach, none on" if silenced else "the model has none"
        yield Finding("own dropouts", "ok", reason)
    adapter = list(adapter_dropouts(tested.attachment.model))
    if adapter:
        yield Finding("adapter", "note", f"{len(adapter)} dropouts of the adapter are on: {_list(adapter)}")
    for besides in restless(tested.attachment.model):
        yield Finding("adapter", "note", f"{besides} in training, by itself")


def check_keys(tested: ModelUnderTest) -> Iterator[Finding]:
    """What is saved has the names it has without us."""
    models: tuple[Any, Any] = (tested.attachment.model, tested.twin)
    ours, plain = (list(model.state_dict()) for model in models)
    same = ours == plain
    reason = f"{len(ours)} keys, those of the plain model"
    if not same:
        reason = f"other keys than the plain model's: {some(sorted(set(ours) ^ set(plain)))}"
    yield Finding("saved keys", "ok" if same else "wrong", reason)
    if hasattr(tested.attachment.model, "peft_config"):
        from peft import get_peft_model_state_dict

        ours, plain = (
            [key for name in model.peft_config for key in get_peft_model_state_dict(model, adapter_name=name)]
            for model in models
        )
        same = ours == plain
        reason = f"{len(ours)} keys of a plain PEFT adapter" if same else "keys that plain PEFT does not write"
        yield Finding("adapter keys", "ok" if same else "wrong", reason)


def check_ranks(tested: ModelUnderTest) -> Iterator[Finding]:
    """Processes that share the data draw different masks."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield Finding("ranks", "skipped", "one process: torch.distributed is not initialised")
        return
    tested.random_state.restore()
    with torch.no_grad():
        output = main_output(tested.model(**tested.batch)).double()
    tested.random_state.restore()
    # Of other data the outputs differ under the same masks too, so the generator itself is asked as well.
    number = torch.rand((), dtype=torch.float64, device=next(tested.model.parameters()).device)
    seen: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(seen, (float(number), float(output.square().sum())))
    draws = min(len(set(column)) for column in zip(*seen, strict=True))
    same = draws < len(seen)
    reason = f"{draws} different draws in {len(seen)} processes"
    if same:
        reason += (
            ": give every data-parallel rank its own seed, torch.manual_seed(seed + rank) once the model is built, "
            "on an accelerator for its own generator alone; DropTrainer does so when training begins"
        )
    yield Finding("ranks", "wrong" if same else "ok", reason)


def check_cost(tested: ModelUnderTest) -> Iterator[Finding]:
    """The time of a step against a plain one: medians of interleaved rounds. Never red."""
    if not tested.is_trainable:
        yield Finding("cost", "skipped", "no parameter is trainable")
        return
    try:
        times = [(_time(tested, _plain_loss), _time(tested, _our_loss)) for _ in range(ROUNDS + 1)]
    except UserError:
        yield Finding("cost", "skipped", "the recipe's step can't be made with these batches")
        return
    plain, ours = (median(column) for column in zip(*times[1:], strict=True))
    ratio = ours / plain
    reason = f"a step takes {ratio:.2f} of a plain one, {ours * 1e3:.0f} ms, with batches as small as these"
    yield Finding("cost", "note", reason, values={"ratio": ratio, "seconds": ours})


def _plain_loss(tested: ModelUnderTest) -> Tensor:
    return loss_of(tested.twin(**tested.batch))


def _our_loss(tested: ModelUnderTest) -> Tensor:
    if tested.attachment.recipe.consistency is None or tested.batch.get("labels") is None:
        return loss_of(tested.model(**tested.batch))
    return consistency_step(tested.model, tested.batch).total


def _time(tested: ModelUnderTest, loss: Callable[[ModelUnderTest], Tensor]) -> float:
    """Seconds of a forward and its backward."""
    seed_all(SEED)
    start = time.perf_counter()
    loss(tested).backward()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    taken = time.perf_counter() - start
    clear_gradients(tested.model)
    return taken


def _list(dropouts: list[OwnDropout]) -> str:
    return some([f"{own.path}.{own.name} {own.p:g}" for own in dropouts])
