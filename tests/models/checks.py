"""Everything that is checked of one model. Each check returns what is wrong, in words, or None."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hiddenkey
from hiddenkey.hf.source_reading import uses_interface

from .inputs import tensors
from .subject import LOGITS, NEVER, RATE, SEED, Subject, patterns, same, seed
from .tiny import build


def evaluation_is_the_plain_models(subject: Subject) -> str | None:
    plain = subject.run(training=False)
    with hiddenkey.attach(subject.model, subject.at(RATE)):
        unchanged = same(plain, subject.run(training=False))
    return None if unchanged else "an attached model evaluates to something else"


def rate_zero_is_the_plain_model(subject: Subject) -> str | None:
    with hiddenkey.attach(subject.model, "baseline"):
        plain = subject.run()
    with hiddenkey.attach(subject.model, subject.at(0.0)):
        unchanged = same(plain, subject.run())
    return None if unchanged else "p = 0 differs from the plain model in training"


def masks_that_keep_everything_change_nothing(subject: Subject) -> str | None:
    """With drops so rare that none happens, the paths of the drops compute what the plain model does."""
    with hiddenkey.attach(subject.model, "baseline"):
        plain = subject.run()
        other = subject.run(seed_with=SEED + 1)
    if not same(plain, other):
        return None  # It draws by itself, so nothing can be compared.
    with hiddenkey.attach(subject.model, subject.at(NEVER)):
        unchanged = same(plain, subject.run(), exact=False)
    return None if unchanged else "drops that keep everything change the output"


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
        subject.record.unreached += patterns(idle)
    if ignored:
        return f"ran without a draw: {', '.join(patterns(ignored))}"
    if len(idle) == len(rates):
        return "no site was reached"
    return "the output is that of the plain model" if same(plain, dropped) else None


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
    return None if same(plain, subject.run(training=False)) else "a detached model computes something else"


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
        return f"ran without a draw: {', '.join(patterns(sorted(wanted - drawn)))}"
    return "the output is that of the plain model" if same(plain, dropped) else None


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


def spans_across_examples_are_refused(subject: Subject) -> str | None:
    """Where a layer puts out (tokens, batch, features)."""
    names = [name for name in ("input_ids", "decoder_input_ids") if name in subject.inputs]
    swapped = {tuple(reversed(subject.inputs[name].shape)) for name in names}
    across: list[str] = []

    def look(path: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.dim() == 3 and first.shape[0] > 2 and tuple(first.shape[:2]) in swapped:
            across.append(path)

    paths = [site.path for site in subject.sites if site.side == "output"]
    with hiddenkey.attach(subject.model, "baseline"), contextlib.ExitStack() as stack:
        for path in paths:
            module = subject.model.get_submodule(path)
            hook = module.register_forward_hook(lambda module, args, output, path=path: look(path, output))
            stack.callback(hook.remove)
        subject.run()
    if not across:
        return None
    try:
        hiddenkey.plan(subject.model, "hidden[:]:span@0.1")
    except hiddenkey.PlanError:
        return None
    return f"a span runs across the examples of a batch: {', '.join(patterns(across))}"


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
    spans_across_examples_are_refused,
)
