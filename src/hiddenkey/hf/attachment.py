"""What is attached to a model: the plan, its sites, hooks and switches, and how all of it comes off again.

PEFT copies modules (`modules_to_save`), and a copy carries our hooks and sites, which no handle takes off, and own
dropouts at 0, which nobody gives back. Both are taken off here too.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..masks import Tally
from ..recipe import Drop, Recipe
from .attention_backend import SITE, restore_backend
from .attention_softmax import OwnSoftmax
from .document_bounds import Documents
from .model_dropouts import ZeroedRates, restore_rates
from .plan import Plan
from .sites import SWITCHES, AttentionSite, DropSwitch, StackEntry, StreamSite, generate_without_drops
from .structure import find_transformer, require_model

MARK = "hiddenkey_attachment"
ATTACHED: weakref.WeakSet[Attachment] = weakref.WeakSet()
OURS = (AttentionSite, StreamSite, StackEntry, Documents, OwnSoftmax)
Hook = tuple[int, int]
Copy = tuple[nn.Module, nn.Module]


class Draw(NamedTuple):
    """One drop at one site: the module's path, the drop's switch, and what was drawn there since attach."""

    path: str
    switch: DropSwitch
    tally: Tally

    @property
    def drop(self) -> Drop:
        return self.switch.drop

    @property
    def name(self) -> str:
        """As `Attachment.rates` calls it."""
        return f"{self.drop.position} {self.path}"


class PassWatch(ABC):
    """Sees what each forward pass of the model is for; `checks.Watch` is the one there is."""

    @abstractmethod
    def step(self) -> AbstractContextManager[None]:
        """Around the passes of a step that computes the recipe's consistency."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Around passes that nobody learns from."""


class Attachment:
    """A recipe at work on a model.

    plan: what was attached. `rates()`: realised drop rates. `detach()`: gives everything back.
    sites: (module path, site) of every place that drops. hooked: the modules of the stream sites, by path.
    entries: whether a stack was run, by its path; empty where there is one stack, which always is.
    renamed: the configurations whose attention implementation has our name.
    drop_switches: one module per drop, found in the model as `hiddenkey_drops`; its `p` set to 0 switches it off.
    watch: verifies that what is trained is what the recipe says.
    """

    watch: PassWatch

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.sites: list[tuple[str, AttentionSite | StreamSite]] = []
        self.handles: list[tuple[str, RemovableHandle]] = []
        self.hooked: dict[str, nn.Module] = {}
        self.entries: dict[str, StackEntry] = {}
        self.renamed: list[Any] = []
        self.softmaxes: list[OwnSoftmax] = []
        self.zeroed: ZeroedRates = ()
        self.copies: list[nn.Module] = []
        live = dict.fromkeys(site.drop for site in plan.sites if site.drop.p > 0)
        self.drop_switches = {drop: DropSwitch(drop) for drop in live}

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def switches(self) -> tuple[DropSwitch, ...]:
        """One per drop with a rate above 0."""
        return tuple(self.drop_switches.values())

    @property
    def draws(self) -> list[Draw]:
        """One for each drop at each site, in the order of `sites`."""
        return [
            Draw(path, switch, tally)
            for path, site in self.sites
            for switch, tally in zip(site.switches, site.tallies, strict=True)
        ]

    def is_unused(self, path: str) -> bool:
        """Whether a module is in a stack of which no layer was run in training."""
        entries = [entry for stack, entry in self.entries.items() if path.startswith(stack + ".")]
        return len(entries) > 0 and not any(entry.entered for entry in entries)

    def rates(self) -> dict[str, float]:
        """Realised drop rates since attaching, by site ("position module.path").

        NaN before a site's first draw, 0 while its drop is switched off.
        """
        return {draw.name: draw.tally.rate if draw.switch.is_on else 0.0 for draw in self.draws}

    def position_rates(self) -> dict[str, float]:
        """The same by position, over all entries drawn there by the drops that are switched on."""
        totals: dict[str, Tally] = {}
        on = {switch.drop.position for switch in self.switches if switch.is_on}
        for draw in self.draws:
            total = totals.setdefault(draw.drop.position, Tally())
            if draw.switch.is_on:
                total.merge(draw.tally)
        return {position: tally.rate if position in on else 0.0 for position, tally in totals.items()}

    def detach(self) -> None:
        """Take every hook, site and name off the model and give its own dropouts back; again: nothing happens."""
        if vars(self.model).get(MARK) is not self:
            return
        delattr(self.model, MARK)
        ATTACHED.discard(self)
        self.take_off()

    def take_off(self) -> None:
        """What `detach` does, also of what was put on in part."""
        self.end_softmaxes()
        for _, handle in self.handles:
            handle.remove()
        remove_unattached(self.model, ATTACHED)
        transformer = find_transformer(self.model)[1]
        transformer._modules.pop(SWITCHES, None)
        generate = vars(transformer).get("generate")
        if isinstance(generate, partial) and generate.func is generate_without_drops:
            del transformer.generate
            if generate.args[1] is not None:
                transformer.generate = generate.args[1]
        for config in self.renamed:
            if not any(config is other for attachment in ATTACHED for other in attachment.renamed):
                restore_backend(config)
        later = [pair for pair in saved_copies(self.model) if pair[1] not in self.copies]
        restore_rates([*self.zeroed, *zeroed_in(later, self.zeroed)])

    def end_softmaxes(self) -> None:
        """Leave every softmax of a forward that was interrupted; none is at work before a forward of the model."""
        for own in reversed(self.softmaxes):
            own.end()

    def __repr__(self) -> str:
        state = "attached to" if vars(self.model).get(MARK) is self else "detached from"
        return f"<Attachment: '{self.recipe}' {state} {self.plan.model}, {len(self.plan.sites)} sites>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        ATTACHED.add(self)


def find_attachment(model: nn.Module) -> Attachment | None:
    """The handle of the recipe attached to the model, to a model inside it or around it, or None.

    Around it, because PEFT's `merge_and_unload` and `get_base_model` give out what is inside. Raises AttachError for
    what is no model.
    """
    require_model(model, "find_attachment", "a model")
    marked = (vars(module)[MARK] for module in model.modules() if MARK in vars(module))
    return next(marked, None) or attached_to(model)


def attached_to(model: nn.Module) -> Attachment | None:
    """What is attached to a model that shares modules with this one."""
    hooks = {found for module in model.modules() for found in hooks_in(module, (*OURS, PassWatch))}
    others = ATTACHED if hooks else ()
    return next((other for other in others if not hooks.isdisjoint(hooks_of(other))), None)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None where there is none any more."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


@dataclass
class StepState:
    """What the first training steps find out about a model, so that later ones need not look again.

    dense: whether a language model's loss cannot be computed from its last hidden states. shares_lower: whether the
    layers below the drops are the same in both views. pooling_seen: whether a regression was seen to predict from the
    token that its consistency compares. divides: whether the loss is divided by the number of items that it is given.
    None: not looked at yet.
    """

    dense: bool | None = None
    shares_lower: bool | None = None
    pooling_seen: bool = False
    divides: bool | None = None


_STATES: weakref.WeakKeyDictionary[Attachment, StepState] = weakref.WeakKeyDictionary()


def step_state(attachment: Attachment) -> StepState:
    """The state of the steps taken with an attachment; a copy of its model begins anew."""
    return _STATES.setdefault(attachment, StepState())


def set_step_state(attachment: Attachment, state: StepState) -> StepState:
    """Put another state in its place; returns the one before."""
    before = step_state(attachment)
    _STATES[attachment] = state
    return before


def remove_unattached(model: nn.Module, attachments: Collection[Attachment]) -> None:
    """Take off the model what is ours and of none of the attachments: hooks, sites and names of backends."""
    configs = {id(config) for attachment in attachments for config in attachment.renamed}
    ours: list[nn.Module] = []
    for module in model.modules():
        if SITE in vars(module) or any(hooks_in(module, OURS)):
            ours.append(module)
        config = getattr(module, "config", None)
        if id(config) not in configs:
            restore_backend(config)
    if not ours:  # and no other attached model is looked at
        return
    hooks = {hook for attachment in attachments for hook in hooks_of(attachment)}
    sites = {site for attachment in attachments for _, site in attachment.sites}
    for module in ours:
        _remove_hooks(module, hooks)
        if SITE in vars(module) and vars(module)[SITE] not in sites:
            delattr(module, SITE)


def hooks_in(module: nn.Module, kinds: tuple[type, ...]) -> Iterator[Hook]:
    """The hooks of a module that are methods of one of the kinds of objects.

    A hook is known by its dictionary and number: a copy's have the numbers of those they are copies of.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            if isinstance(getattr(hook, "__self__", None), kinds):
                yield id(hooks), number


def hooks_of(attachment: Attachment) -> Iterator[Hook]:
    """The hooks of an attached recipe."""
    return ((id(handle.hooks_dict_ref()), handle.id) for _, handle in attachment.handles)


def saved_copies(model: nn.Module) -> list[Copy]:
    """(module, copy of it) for each module that PEFT saves, and each adapter."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [(wrapper.original_module, copy) for wrapper in wrappers for copy in wrapper.modules_to_save.values()]


def zeroed_in(copies: Sequence[Copy], zeroed: ZeroedRates) -> ZeroedRates:
    """The same rates in copies of the modules."""
    found = []
    for original, copy in copies:
        paths = {module: path for path, module in original.named_modules()}
        pairs = [(module_at(copy, paths[module]), own) for module, own in zeroed if module in paths]
        found += [(module, own) for module, own in pairs if module is not None]
    return found


def _remove_hooks(module: nn.Module, known: set[Hook]) -> None:
    notes = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
    unknown = {hook for hook in hooks_in(module, OURS) if hook not in known}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number in hooks if (id(hooks), number) in unknown]:
            for numbers in (hooks, *notes, module._forward_hooks_always_called):
                numbers.pop(number, None)
