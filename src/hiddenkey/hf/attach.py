"""The only code that changes a model: attach a plan, and give everything back."""

from __future__ import annotations

import inspect
import weakref
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import AttachError
from ..masks import Tally
from ..recipe import Recipe
from .attention_backend import SITE, our_name, read_eager, restore_backend, wrapped_name
from .attention_softmax import OwnSoftmax
from .checks import Watch, problems, replicated, silent_sites, warn_of_silence, warn_of_switches
from .document_bounds import Notes
from .model_dropouts import Silenced, give_back, silence
from .plan import Plan, Site, plan
from .sites import SWITCHES, AttentionSite, DropSwitch, StreamSite, TokenSkip, can_skip, generate_without_drops
from .source_reading import uses_interface
from .strays import OURS, hooks_in, hooks_of, remove_strays, saved_copies, silenced_in
from .structure import find_transformer, require_model

MARK = "hiddenkey_attachment"
ATTACHED: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attach(model: nn.Module, recipe: str | Recipe) -> Attachment:
    """Attach `recipe` to a transformers model, with or without PEFT around it.

    Attach after `get_peft_model`, before or after `torch.compile`. The drops are active while the modules are in
    training mode; the model's own dropouts are set to 0. Use the handle as a context manager, or call `.detach()`.
    Drops that came with copies of another attached model's parts are taken off.

    Raises AttachError where a recipe is attached already, and what `plan` raises.
    """
    require_model(model, "attach")
    model = uncompiled(model)
    earlier = _attached_to(model)
    if earlier is not None:
        raise AttachError(
            f"the recipe '{earlier.recipe}' is attached to this model already; call .detach() on its handle "
            "(hiddenkey.find_attachment(model)) before attaching another"
        )
    remove_strays(model, ATTACHED)
    return Attachment(model, plan(model, recipe))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was put around, which it runs; another as it is."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def find_attachment(model: nn.Module) -> Attachment | None:
    """The handle of the recipe attached to the model, to a model inside it or around it, or None.

    Around it, because PEFT's `merge_and_unload` and `get_base_model` give out what is inside. Raises AttachError for
    what is no model.
    """
    require_model(model, "find_attachment", "a model")
    marked = (vars(module)[MARK] for module in model.modules() if MARK in vars(module))
    return next(marked, None) or _attached_to(model)


def _attached_to(model: nn.Module) -> Attachment | None:
    hooks = {found for module in model.modules() for found in hooks_in(module, (*OURS, Attachment))}
    others = ATTACHED if hooks else ()
    return next((other for other in others if not hooks.isdisjoint(hooks_of(other))), None)


class Attachment:
    """A recipe at work on a model.

    plan: what was attached. `rates()`: realised drop rates. `detach()`: gives everything back.
    renamed: the configurations whose attention implementation has our name.
    switches: one module per drop, found in the model as `hiddenkey_drops`; its `p` set to 0 switches the drop off.
    watch: sees that what is trained is what the recipe says.
    pooling_seen: set once a regression was seen to predict from the token that its consistency compares.
    dense: set by the first step of a language model: whether its loss can't be computed from its last hidden states.
    shares_lower: set by the first step of a consistency with layers below the drops: whether these are the same in
    both views.
    """

    dense: bool | None = None
    shares_lower: bool | None = None
    pooling_seen = False

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.sites: list[tuple[str, AttentionSite | StreamSite]] = []
        self.handles: list[tuple[str, RemovableHandle]] = []
        self.hooked: dict[str, nn.Module] = {}
        self._notes = Notes(model, plan.structure, self.handles)
        self.renamed: list[Any] = []
        self.softmaxes: list[OwnSoftmax] = []
        self.seen = False
        self._silenced: Silenced = ()
        self._copies: list[nn.Module] = []
        live = [site for site in plan.sites if site.drop.p > 0]
        self._switches = {drop: DropSwitch(drop) for drop in dict.fromkeys(site.drop for site in live)}
        try:
            self._put_on(live)
        except BaseException:
            self._take_off()
            raise
        setattr(model, MARK, self)
        ATTACHED.add(self)

    def _put_on(self, live: list[Site]) -> None:
        model, plan = self.model, self.plan
        for site in live:
            if site.side != "attention":
                self._attach_stream(site)
        attentions: dict[str, list[Site]] = {}
        for site in live:
            if site.side == "attention":
                attentions.setdefault(site.path, []).append(site)
        for path, sites in attentions.items():
            self._attach_attention(path, sites)
        self._silenced = silence(model, plan.own_dropouts)
        self._copies = [copy for _, copy in saved_copies(model)]
        inner, transformer = find_transformer(model)
        if live:
            transformer.add_module(SWITCHES, nn.ModuleList(self.switches).train(transformer.training))
            if hasattr(transformer, "generate"):
                generate = vars(transformer).get("generate")
                vars(transformer)["generate"] = partial(generate_without_drops, transformer, generate)
        self.watch = Watch(self)
        # PEFT 0.19 calls the forward of what is inside, so a hook there is not enough; but that may be called
        # by itself, and after `unload` only that is left.
        for path, module in {inner: transformer, "": model}.items():
            hooks = (
                module.register_forward_pre_hook(self._verify),
                module.register_forward_hook(self._look_back),
                module.register_forward_pre_hook(self.watch.before),
                module.register_forward_hook(self.watch.after, always_call=True),
            )
            self.handles += [(path, hook) for hook in hooks]
        self._watch_inside()

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def switches(self) -> tuple[DropSwitch, ...]:
        """One per drop with a rate above 0."""
        return tuple(self._switches.values())

    def rates(self) -> dict[str, float]:
        """Realised drop rates since attaching, by site ("position module.path").

        NaN before a site's first draw, 0 while its drop is switched off.
        """
        return {
            f"{drop.position} {path}": tally.rate if switch.is_on else 0.0
            for path, site in self.sites
            for drop, tally, switch in zip(site.drops, site.tallies, site.switches, strict=True)
        }

    def position_rates(self) -> dict[str, float]:
        """The same by position, over all entries drawn there by the drops that are switched on."""
        totals: dict[str, Tally] = {}
        on = {switch.drop.position for switch in self.switches if switch.is_on}
        for _, site in self.sites:
            for drop, tally, switch in zip(site.drops, site.tallies, site.switches, strict=True):
                total = totals.setdefault(drop.position, Tally())
                if switch.is_on:
                    total.merge(tally)
        return {position: tally.rate if position in on else 0.0 for position, tally in totals.items()}

    def detach(self) -> None:
        """Take every hook, site and name off the model and give its own dropouts back; again: nothing happens."""
        if vars(self.model).get(MARK) is not self:
            return
        delattr(self.model, MARK)
        ATTACHED.discard(self)
        self._take_off()

    def _take_off(self) -> None:
        self.end_softmaxes()
        for _, handle in self.handles:
            handle.remove()
        remove_strays(self.model, ATTACHED)
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
        later = [pair for pair in saved_copies(self.model) if pair[1] not in self._copies]
        give_back([*self._silenced, *silenced_in(later, self._silenced)])

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

    def _watch_inside(self) -> None:
        """At what holds the layers too: PEFT 0.19 calls the model's forward without its hooks."""
        path = self.plan.structure.stacks[0].path.rpartition(".")[0] if self.plan.structure.stacks else ""
        module = self.model.get_submodule(path)
        self.handles.append((path, module.register_forward_pre_hook(self._verify)))
        self.handles.append((path, module.register_forward_hook(self.watch.inside)))

    def _attach_attention(self, path: str, sites: list[Site]) -> None:
        module = self.model.get_submodule(path)
        switches = [self._switches[site.drop] for site in sites]
        site = AttentionSite(switches, uses_interface(module), inspect.signature(module.forward).parameters)
        self.sites.append((path, site))
        self.handles.append((path, module.register_forward_pre_hook(site.before, with_kwargs=True)))
        setattr(module, SITE, site)
        if site.by_interface:
            self._rename_backend(module.config)
        else:
            own = OwnSoftmax(site)
            self.softmaxes.append(own)
            self.hooked[path] = module
            self.handles.append((path, module.register_forward_pre_hook(own.before)))
            self.handles.append((path, module.register_forward_hook(own.after, always_call=True)))

    def _rename_backend(self, config: Any) -> None:
        if not any(config is known for known in self.renamed):
            name = wrapped_name(config._attn_implementation)
            self.renamed.append(config)
            if name == "eager":
                read_eager(self.model)
            config._attn_implementation_internal = our_name(self.model, name)

    def _attach_stream(self, planned: Site) -> None:
        module = self.model.get_submodule(planned.path)
        site = self._stream_site(planned, module)
        self.sites.append((planned.path, site))
        self.hooked[planned.path] = module
        if planned.side == "output":
            self.handles.append((planned.path, module.register_forward_hook(site.after)))
        if planned.side == "input" or isinstance(site, TokenSkip):
            self.handles.append((planned.path, module.register_forward_pre_hook(site.before, with_kwargs=True)))

    def _stream_site(self, planned: Site, module: nn.Module) -> StreamSite:
        documents = self._notes.of(planned)
        skips = planned.side == "output" and can_skip(module, planned.drop)
        return (TokenSkip if skips else StreamSite)(self._switches[planned.drop], documents)

    def _verify(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Fail loudly where something took us off the model since attach; warn where a drop is switched off."""
        if module.training:
            problem = replicated(module, self.recipe) or self._problem()
            if problem is not None:
                self._stop(problem)

    @torch.compiler.assume_constant_result
    def _problem(self) -> str | None:
        """The first of `problems`. A compiled model asks when it is compiled, as it is again after each of them."""
        problem = next(problems(self), None)
        if problem is None:
            warn_of_switches(self)
        return problem

    @torch.compiler.disable(reason="something took hiddenkey off the model since attach")
    def _stop(self, problem: str) -> None:
        raise RuntimeError(problem)

    def _look_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the first training forward: warn where a site drew nothing in it."""
        if module.training and not self.seen and not self.watch.in_evaluation():
            self.seen = True
            silent = silent_sites(self)
            if silent:
                self._warn_of_silence(silent)

    @torch.compiler.disable(reason="some sites of hiddenkey drew nothing")
    def _warn_of_silence(self, silent: list[str]) -> None:
        warn_of_silence(self, silent)
