"""What a forward pass is for, seen at the model's door: learning as the recipe says, missing it, or a reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from ..recipe import Drop, Recipe
from .attachment import Attachment, PassWatch, module_at
from .attention_backend import PREFIX, SITE
from .preserve import Modes
from .sites import AttentionSite, DropSwitch


def problems(attachment: Attachment) -> Iterator[str]:
    """What took us off the model since attach: another attention function, modules put around ours or in their place,
    hooks removed, rates changed. One sentence each, with the way out.
    """
    recipe = attachment.recipe
    for path, module in attachment.hooked.items():
        yield from _place(attachment, path, module)
    for path, site in attachment.sites:
        if isinstance(site, AttentionSite):
            yield from _attention(attachment, path, site)
    for path, handle in attachment.handles:
        hooks = handle.hooks_dict_ref()
        if hooks is None or handle.id not in hooks:
            yield (
                f"a hook of '{recipe}' was removed from {path or 'the model'}; take off your own hooks one by one "
                "by their handles, then detach and attach again"
            )
    for switch in attachment.switches:
        if switch.p not in (0, switch.drop.p):
            yield (
                f"the rate of '{switch.drop}' was set to {switch.p}: 0 switches it off, {switch.drop.p} on; for "
                "another rate detach and attach another recipe, so that it is written down"
            )


def replicated(module: nn.Module, recipe: Recipe) -> str | None:
    """What to say of a copy that nn.DataParallel made of a module for one forward pass, None of any other module."""
    if not vars(module).get("_is_replica"):
        return None
    return (
        f"nn.DataParallel runs copies of this model in threads of one process, which would share the drops of "
        f"'{recipe}'; train with one process per GPU (torchrun or accelerate launch), or on one GPU "
        "(CUDA_VISIBLE_DEVICES=0)"
    )


def warn_of_switches(attachment: Attachment) -> None:
    """Warn where a drop is switched off."""
    off = [switch for switch in attachment.switches if not switch.is_on]
    if off:
        warnings.warn(switched_off(off), stacklevel=2)


def warn_of_silence(attachment: Attachment, silent: list[str]) -> None:
    """Warn of the sites that drew nothing, after a training forward in which they should have."""
    warnings.warn(
        f"{some(silent)} drew nothing in a training forward, so '{attachment.recipe}' is not whole: something "
        "bypasses these modules, or put them in evaluation mode; hiddenkey.doctor(model) tells more",
        stacklevel=2,
    )


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def switched_off(switches: list[DropSwitch]) -> str:
    """What to say of drops whose switches stand at 0."""
    return (
        f"switched off: {' + '.join(str(switch.drop) for switch in switches)}: p was set to 0, as TRL's "
        "disable_dropout does with every dropout of a model; train with disable_dropout=False to keep it"
    )


def silent_sites(attachment: Attachment, drew: Iterable[bool]) -> list[str]:
    """The sites that are switched on and did not draw though their stack was run, as "position module.path".

    drew: for each of `attachment.draws`.
    """
    pairs = zip(attachment.draws, drew, strict=True)
    return [d.name for d, done in pairs if d.switch.is_on and not done and not attachment.is_unused(d.path)]


def _attention(attachment: Attachment, path: str, site: AttentionSite) -> Iterator[str]:
    module: Any = module_at(attachment.model, path)
    recipe = attachment.recipe
    if module is None or vars(module).get(SITE) is not site:
        now = "gone" if module is None else "another module than at attach"
        yield f"{path} is {now}, so '{recipe}' would miss it; detach, change the model, and attach again"
        return
    name = module.config._attn_implementation if site.by_interface else PREFIX
    if not (name or "").startswith(PREFIX):
        yield (
            f"the attention implementation was changed to {name!r} after attach, so '{recipe}' would be ignored; "
            "detach, change it, and attach again"
        )


def _place(attachment: Attachment, path: str, module: nn.Module) -> Iterator[str]:
    current, recipe = module_at(attachment.model, path), attachment.recipe
    if current is module:
        return
    if module in (getattr(current, "base_layer", None), getattr(current, "original_module", None)):
        yield (
            f"an adapter was put around {path} after attach, so '{recipe}' would miss its part; "
            "call get_peft_model first and attach to its result"
        )
    else:
        now = "gone" if current is None else f"another module now, a {type(current).__name__}"
        yield f"{path} is {now}, so '{recipe}' would miss it; detach, change the model, and attach again"


class Watch(PassWatch):
    """The hooks on an attached model, and on the transformers model inside, which may be called by itself.

    What took us off the model is an error of the next training forward. A reference pass (without gradient, under
    another adapter than the one that learns, or under none) is made in evaluation mode. A loss that is trained
    without what the recipe says is an error of its backward pass, not of the forward: looking at the outputs of a
    model in training mode is no mistake.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self._places = places(attachment)
        self.learning = active_adapters(attachment.model)
        self._in_step = self._aside = self._drawn = self._warned = False
        self._modes: dict[int, Modes] = {}
        self._looked_back = False

    def hooks_around(self, module: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on a module that is called with a batch: the model, or the one inside of it."""
        return [
            module.register_forward_pre_hook(self.verify),
            module.register_forward_hook(self.look_back),
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def hooks_inside(self, module: nn.Module) -> list[RemovableHandle]:
        """The same on what holds the layers: PEFT 0.19 calls the model's forward without its hooks."""
        return [module.register_forward_pre_hook(self.verify), module.register_forward_hook(self.inside)]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward passes of a step that computes the recipe's consistency.

        Raises UserError where the model is in evaluation mode.
        """
        if self.in_evaluation() and not self._aside:
            raise UserError(f"a training step of '{self.attachment.recipe}' {EVALUATION}")
        self._in_step, before = True, self._in_step
        try:
            yield
        finally:
            self._in_step = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around passes that nobody learns from, as a doctor makes them: nothing is an error in them."""
        before = self._aside, self._looked_back
        self._aside = self._looked_back = True
        try:
            yield
        finally:
            self._aside, self._looked_back = before

    def verify(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: an error where something took us off the model, a warning of drops switched off."""
        if module.training:
            problem = replicated(module, self.attachment.recipe) or self._problem()
            if problem is not None:
                self._stop(problem)

    def look_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: after the first training forward, warn where a site drew nothing in it."""
        if module.training and not self._looked_back and not self.in_evaluation():
            self._looked_back = True
            drew = [draw.tally.counts is not None for draw in self.attachment.draws]
            silent = silent_sites(self.attachment, drew)
            if silent:
                self._warn_of_silence(silent)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        if self._modes:  # a compiled forward that failed calls no hook after it, nor does one that Ctrl-C ended
            self._end_reference(module, lost=True)
        if not torch.compiler.is_compiling():
            self.attachment.end_softmaxes()
        if not module.training:
            return
        if torch.is_grad_enabled():
            self.learning = active_adapters(self.attachment.model)
        elif not self._aside and active_adapters(self.attachment.model) != self.learning:
            self._begin_reference(module)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that is called after an error too."""
        if self._modes:
            self._end_reference(module)
        if self._places and not self._aside and torch.is_grad_enabled() and self._is_wrong():
            self._tell(output)

    def inside(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a part of the model, after which other parts may draw."""
        if self._places and not self._aside and torch.is_grad_enabled() and self._misses():
            self._tell(output)

    def _misses(self) -> bool:
        """Whether nothing can be drawn, or the consistency is not computed."""
        return self.in_evaluation() or (self.attachment.recipe.consistency is not None and not self._in_step)

    def _is_wrong(self) -> bool:
        """Whether a backward pass from here would not teach what the recipe says."""
        if self._misses():
            return True
        self._drawn = self._drawn or self._undrawn() is None
        return not self._drawn

    @torch.compiler.assume_constant_result
    def _problem(self) -> str | None:
        """The first of `problems`. A compiled model asks when it is compiled, as it is again after each of them."""
        problem = next(problems(self.attachment), None)
        if problem is None:
            warn_of_switches(self.attachment)
        return problem

    # A compiled model runs what follows outside of its graph: rare cases may cost a break in it.

    @torch.compiler.disable(reason="something took hiddenkey off the model since attach")
    def _stop(self, problem: str) -> None:
        raise RuntimeError(problem)

    @torch.compiler.disable(reason="some sites of hiddenkey drew nothing")
    def _warn_of_silence(self, silent: list[str]) -> None:
        warn_of_silence(self.attachment, silent)

    @torch.compiler.disable(reason="a pass of a reference goes into evaluation mode")
    def _begin_reference(self, module: nn.Module) -> None:
        self._modes[id(module)] = Modes(module)
        module.eval()

    @torch.compiler.disable(reason="a pass of a reference goes into evaluation mode")
    def _end_reference(self, module: nn.Module, lost: bool = False) -> None:
        """lost: without its hooks. Then a pass that learns gets the modes back; before another there may have been a
        `model.eval()`, which stays.
        """
        modes = self._modes.pop(id(module), None)
        if modes is not None and (not lost or torch.is_grad_enabled()):
            modes.restore()

    @torch.compiler.disable(reason="a backward pass from here would not teach what the recipe of hiddenkey says")
    def _tell(self, output: Any) -> None:
        action = self._action()
        for tensor in learned(output):
            tensor.register_hook(action)

    def _action(self) -> partial[None]:
        """What to do when this forward pass is learned from."""
        recipe = self.attachment.recipe
        if self.in_evaluation():
            message = f"a backward pass of a model with the recipe '{recipe}' {EVALUATION}"
            return partial(self._fail if self.attachment.model.training else self._warn, message)
        if self._misses():
            plain = str(recipe).partition(" ~ ")[0]
            return partial(self._fail, MISSED.format(recipe=recipe, plain=plain))
        drop = self._undrawn()
        path = next(path for path, site in self.attachment.sites if drop in site.drops)
        return partial(self._fail, UNREACHED.format(drop=drop, path=path))

    def in_evaluation(self) -> bool:
        """Whether there is something to drop, but the model, or each place for it, is in evaluation mode."""
        if self.attachment.switches and not any(switch.training for switch in self.attachment.switches):
            return True
        modules = (module_at(self.attachment.model, path) for path in self._places)
        return len(self._places) > 0 and not any(module is None or module.training for module in modules)

    def _undrawn(self) -> Drop | None:
        """A drop that is switched on and was never drawn, or None."""
        drawn = {draw.drop for draw in self.attachment.draws if draw.tally.counts is not None}
        undrawn = (switch.drop for switch in self.attachment.switches if switch.is_on and switch.drop not in drawn)
        return next(undrawn, None)

    def _fail(self, message: str, gradient: Tensor) -> None:
        raise UserError(message)

    def _warn(self, message: str, gradient: Tensor) -> None:
        if not self._warned:
            warnings.warn(message, stacklevel=2)
        self._warned = True


EVALUATION = (
    "drops nothing, because the model is in evaluation mode, as from_pretrained leaves it; call model.train() before "
    "training, and model(**batch).loss to evaluate"
)
MISSED = (
    "'{recipe}' has a consistency, but this loss was computed without it: use hiddenkey.DropTrainer, or put "
    "hiddenkey.ConsistencyMixin before the class of your trainer, or call hiddenkey.consistency_step in your own "
    "loop; to train without it, attach '{plain}'"
)
UNREACHED = (
    "'{drop}' dropped nothing in a forward pass in training mode: {path} is never called as a module. TRL's "
    "trainers, for one, multiply with the head's weight themselves; leave this drop out, or use another trainer"
)


def places(attachment: Attachment) -> tuple[str, ...]:
    """The modules where a recipe draws: its sites; where it has none, a consistency is one of what adapters drop."""
    sites = tuple(path for path, _ in attachment.sites)
    if sites or attachment.recipe.consistency is None:
        return sites
    return tuple(own.path for own in attachment.plan.adapter_dropouts)


def active_adapters(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the adapters at work in a PEFT model; empty where they are disabled, None without any.

    Prompts and prefixes have no layers in the model, so PEFT's model around it is asked.
    """
    around: PeftModel | None = None
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return () if module.disable_adapters else tuple(module.active_adapters)
        if isinstance(module, PeftModel):
            around = module
    if around is None:
        return None
    return () if getattr(around, "_adapters_disabled", False) else (around.active_adapter,)


def learned(output: Any) -> Iterator[Tensor]:
    """The tensors with gradient that a model computed, also those in tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        if output.requires_grad and not output.is_leaf:
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from learned(part)
    elif isinstance(output, Mapping) or is_dataclass(output):
        yield from learned(list((output if isinstance(output, Mapping) else vars(output)).values()))
