"""Everything that is checked of one model type. The checks return what is wrong, in words."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hiddenkey
from hiddenkey.hf.code import uses_interface

from .exceptions import UNFIT
from .inputs import Inputs, candidates, tensors
from .kinds import class_name
from .record import BROKEN, PARTLY, REFUSED, SUPPORTED, Record
from .tiny import build
from .watch import Watch

LOGITS, HIDDEN = "logits[:]:column@{0}", "hidden[:]:element@{0}"
RATE, NEVER = 0.4, 1e-9
SEED = 5


class NotBuiltError(Exception):
    """The model type can't be built or run here; the message says why."""


def examine(kind: str) -> Record:
    """The row of one model type."""
    record = Record(kind, class_name(kind))
    try:
        if kind in UNFIT:
            raise NotBuiltError(UNFIT[kind])
        model = build(kind)
        inputs = working_inputs(kind, model)
    except NotBuiltError as error:
        record.error = str(error)
        return record
    except Exception as error:  # noqa: BLE001  (whatever a model raises is the reason)
        record.error = _said(error)
        return record
    recipes = [text for text in (LOGITS, HIDDEN) if _plans(model, text.format(RATE), record)]
    if not recipes:
        record.status = REFUSED
        return record
    subject = Subject(kind, model, inputs, " + ".join(recipes), record)
    try:
        subject.find()
    except Exception as error:  # noqa: BLE001
        record.problems.append(f"plan: {_said(error)}")
    for check in CHECKS if not record.problems else ():
        try:
            problem = check(subject)
        except Exception as error:  # noqa: BLE001
            problem = _said(error)
        if problem:
            record.problems.append(f"{check.__name__}: {problem}")
    _judge(record)
    return record


def _judge(record: Record) -> None:
    record.status = BROKEN if record.problems else PARTLY if record.missing else SUPPORTED


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _plans(model: Any, recipe: str, record: Record) -> bool:
    try:
        hiddenkey.plan(model, recipe)
    except hiddenkey.PlanError as error:
        record.error = record.error or str(error)
        record.missing.append(recipe.split("[")[0])
        return False
    return True


def working_inputs(kind: str, model: Any) -> Inputs:
    """The first inputs with which the model runs, in evaluation and in training."""
    said = []
    for inputs in candidates(kind, model):
        try:
            with torch.no_grad():
                outputs = tensors(model.eval()(**inputs))
                model.train()(**copy.copy(inputs))
        except Exception as error:  # noqa: BLE001
            said.append(f"{', '.join(inputs)}: {_said(error)}")
            continue
        if not outputs or not all(output.isfinite().all() for output in outputs):
            raise NotBuiltError("its outputs are not finite with random weights")
        return inputs
    raise NotBuiltError(said[0] if said else f"no rule makes inputs for {model.main_input_name!r}")


class Subject:
    """A model under examination."""

    def __init__(self, kind: str, model: Any, inputs: Inputs, recipe: str, record: Record) -> None:
        self.kind, self.model, self.inputs, self.recipe, self.record = kind, model, inputs, recipe, record

    def at(self, rate: float) -> str:
        return self.recipe.format(rate)

    def run(
        self, model: Any = None, inputs: Inputs | None = None, *, training: bool = True, seed_with: int = SEED
    ) -> list[Tensor]:
        """All outputs under one seed."""
        seed(seed_with)
        model = self.model if model is None else model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            outputs = tensors(model.train(training)(**(inputs or self.inputs)))
            for name, buffer in model.named_buffers():  # statistics of batch norms
                buffer.copy_(buffers[name])
        return outputs

    def state(self) -> dict[str, Any]:
        """What a detach must give back."""
        modules = dict(self.model.named_modules())
        return {
            "hooks": {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in modules.items()},
            "attributes": {path: sorted(vars(m)) for path, m in modules.items()},
            "implementations": {
                path: m.config._attn_implementation for path, m in modules.items() if hasattr(m, "config")
            },
        }

    def find(self) -> None:
        """Fill in what the plan finds, and what it does not."""
        record, plan = self.record, hiddenkey.plan(self.model, self.at(RATE))
        stacks = plan.structure.stacks
        self.sites = plan.sites
        record.layers = sum(len(stack.layers) for stack in stacks)
        record.attentions = sum(site.drop.position == "logits" for site in plan.sites)
        record.feed_forwards = sum(site.drop.position == "hidden" for site in plan.sites)
        record.causal = any(stack.latter_half for stack in stacks)
        with hiddenkey.attach(self.model, "baseline"), Watch(self.model) as watch:
            self.run()
        self.ran = watch.ran
        found = {path for stack in stacks for layer in stack.layers for path in layer.attentions}
        missed = [path for path in watch.attentions if not any(_related(path, known) for known in found)]
        inside = [path for path in missed if any(path.startswith(stack.path + ".") for stack in stacks)]
        if "logits" not in record.missing:
            record.missing += [f"attention of {path}" for path in _patterns(inside)]
        record.outside = _patterns([path for path in missed if path not in inside])
        without = sum(_lacks_feed_forwards(stack) for stack in stacks)
        if without and "hidden" not in record.missing:
            record.missing.append(f"feed-forward of {without} layers")


def _lacks_feed_forwards(stack: Any) -> int:
    """How many layers with attention have none, where layers aren't of one kind each (Nemotron-H)."""
    if any(layer.feed_forwards and not layer.attentions for layer in stack.layers):
        return 0
    return sum(not layer.feed_forwards for layer in stack.layers if layer.attentions)


def seed(number: int) -> None:
    """numpy too: speech models mask their input with it."""
    torch.manual_seed(number)
    np.random.seed(number)


def _related(path: str, known: str) -> bool:
    return path == known or path.startswith(known + ".") or known.startswith(path + ".")


def _patterns(paths: list[str]) -> list[str]:
    return list(
        dict.fromkeys(".".join("#" if part.isdigit() else part for part in path.split(".")) for path in paths)
    )


def _same(first: list[Tensor], second: list[Tensor], *, exact: bool = True) -> bool:
    if len(first) != len(second):
        return False
    pairs = list(zip(first, second, strict=True))
    if exact:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)


def evaluation_is_the_plain_models(subject: Subject) -> str | None:
    plain = subject.run(training=False)
    with hiddenkey.attach(subject.model, subject.at(RATE)):
        same = _same(plain, subject.run(training=False))
    return None if same else "an attached model evaluates to something else"


def rate_zero_is_the_plain_model(subject: Subject) -> str | None:
    with hiddenkey.attach(subject.model, "baseline"):
        plain = subject.run()
    with hiddenkey.attach(subject.model, subject.at(0.0)):
        same = _same(plain, subject.run())
    return None if same else "p = 0 differs from the plain model in training"


def masks_that_keep_everything_change_nothing(subject: Subject) -> str | None:
    """With drops so rare that none happens, the paths of the drops compute what the plain model does."""
    with hiddenkey.attach(subject.model, "baseline"):
        plain = subject.run()
        other = subject.run(seed_with=SEED + 1)
    if not _same(plain, other):
        return None  # It draws by itself, so nothing can be compared.
    with hiddenkey.attach(subject.model, subject.at(NEVER)):
        same = _same(plain, subject.run(), exact=False)
    return None if same else "drops that keep everything change the output"


def every_site_drops(subject: Subject) -> str | None:
    with hiddenkey.attach(subject.model, "baseline"):
        plain = subject.run()
    with hiddenkey.attach(subject.model, subject.at(RATE)) as attachment:
        dropped = subject.run()
        rates = attachment.rates()
    silent = [name for name, rate in rates.items() if rate != rate]
    idle = [name for name in silent if name.split(" ", 1)[1] not in subject.ran]
    ignored = [name for name in silent if name not in idle]
    if idle:
        subject.record.unreached += _patterns(idle)
    if ignored:
        return f"ran without a draw: {', '.join(_patterns(ignored))}"
    if len(idle) == len(rates):
        return "no site was reached"
    return "the output is that of the plain model" if _same(plain, dropped) else None


def gradients_are_finite_and_those_of_checkpointing(subject: Subject) -> str | None:
    model = subject.model
    checkpoints = model.supports_gradient_checkpointing and _checkpoints_by_itself(subject)
    with hiddenkey.attach(model, subject.at(RATE)):
        wanted = _gradients(subject)
        if not wanted:
            return "no parameter gets a gradient"
        if not all(gradient.isfinite().all() for gradient in wanted.values()):
            return "a gradient is not finite"
        if not checkpoints:
            return None
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            found = _gradients(subject)
        finally:
            model.gradient_checkpointing_disable()
    subject.record.checks.append("checkpointing")
    return None if _close(wanted, found) else "gradients with activation checkpointing are others"


def _checkpoints_by_itself(subject: Subject) -> bool:
    """Whether the plain model has the same gradients with activation checkpointing: not all of them do."""
    with hiddenkey.attach(copy.deepcopy(subject.model), "baseline") as attachment:
        plain = Subject(subject.kind, attachment.model, subject.inputs, subject.recipe, subject.record)
        wanted = _gradients(plain)
        try:
            plain.model.gradient_checkpointing_enable({"use_reentrant": False})
            found = _gradients(plain)
        except Exception:  # noqa: BLE001
            return False
    return _close(wanted, found)


def _close(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    return set(wanted) == set(found) and all(
        torch.allclose(wanted[name], found[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max() + 1))
        for name in wanted
    )


def _gradients(subject: Subject) -> dict[str, Tensor]:
    model = subject.model
    model.zero_grad()
    seed(SEED)
    outputs = [output for output in tensors(model.train()(**subject.inputs)) if output.requires_grad]
    sum((output.float().square().mean() for output in outputs), torch.zeros(())).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def a_later_token_reaches_no_earlier_output(subject: Subject) -> str | None:
    name = next((n for n in ("decoder_input_ids", "input_ids") if n in subject.inputs), None)
    stacks = hiddenkey.plan(subject.model, subject.at(RATE)).structure.stacks
    if name is None or not any(stack.causal for stack in stacks):
        return None
    ids = subject.inputs[name]
    other = ids.clone()
    other[:, -3:] = ids[:, -3:].flip(1).roll(1, 0) + 1
    changed = {**subject.inputs, name: other}

    def leaks() -> bool | None:
        before, after = (subject.run(inputs=inputs)[0] for inputs in (subject.inputs, changed))
        if before.dim() != 3 or before.shape[1] != ids.shape[1]:
            return None
        return not torch.allclose(before[:, :-3], after[:, :-3], rtol=1e-4, atol=1e-4)

    with hiddenkey.attach(subject.model, "baseline"):
        if leaks() is not False:
            return None  # Not causal by itself with these inputs.
    subject.record.checks.append("causality")
    with hiddenkey.attach(subject.model, subject.at(RATE)):
        return "a later token changes an earlier output" if leaks() else None


def detach_gives_everything_back(subject: Subject) -> str | None:
    plain, before = subject.run(training=False), subject.state()
    attachment = hiddenkey.attach(subject.model, subject.at(RATE))
    subject.run()
    attachment.detach()
    if subject.state() != before:
        return "something is left on the model"
    return None if _same(plain, subject.run(training=False)) else "a detached model computes something else"


def the_eager_backend_drops_too(subject: Subject) -> str | None:
    if not _interface_sites(subject, subject.model):
        return None
    implementations = {m.config._attn_implementation for m in _interface_sites(subject, subject.model)}
    if "sdpa" in implementations:
        subject.record.checks.append("sdpa")
    try:
        eager = build(subject.kind, attn_implementation="eager")
        with hiddenkey.attach(eager, "baseline"):
            plain = subject.run(eager)
    except Exception:  # noqa: BLE001
        return None  # The plain model has no eager attention that runs.
    with hiddenkey.attach(eager, subject.at(RATE)) as attachment:
        dropped = subject.run(eager)
        drawn = {name for name, rate in attachment.rates().items() if rate == rate}
    subject.record.checks.append("eager")
    wanted = {f"{site.drop.position} {site.path}" for site in subject.sites if site.path in subject.ran}
    if not wanted <= drawn:
        return f"ran without a draw: {', '.join(_patterns(sorted(wanted - drawn)))}"
    return "the output is that of the plain model" if _same(plain, dropped) else None


def other_backends_are_refused(subject: Subject) -> str | None:
    modules = _interface_sites(subject, subject.model)
    for name in ("flash_attention_2", "flex_attention") if modules else ():
        with _renamed(modules, name):
            try:
                hiddenkey.plan(subject.model, LOGITS.format(RATE))
            except hiddenkey.PlanError as error:
                if name in str(error) and "sdpa" in str(error):
                    continue
            return f"{name} is not refused with the way out"
    return None


def _interface_sites(subject: Subject, model: Any) -> list[Any]:
    paths = [site.path for site in subject.sites if site.side == "attention"]
    return [module for module in map(model.get_submodule, paths) if uses_interface(module)]


@contextlib.contextmanager
def _renamed(modules: list[Any], name: str) -> Iterator[None]:
    configs = {id(module.config): module.config for module in modules}.values()
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


CHECKS: tuple[Callable[[Subject], str | None], ...] = (
    evaluation_is_the_plain_models,
    rate_zero_is_the_plain_model,
    masks_that_keep_everything_change_nothing,
    every_site_drops,
    gradients_are_finite_and_those_of_checkpointing,
    a_later_token_reaches_no_earlier_output,
    detach_gives_everything_back,
    the_eager_backend_drops_too,
    other_backends_are_refused,
)
