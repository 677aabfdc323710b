"""Attaching a recipe: the only code that changes a model, and `Attachment.detach` gives everything back."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..errors import AttachError
from ..recipe import Recipe
from .attachment import ATTACHED, MARK, Attachment, attached_to, remove_unattached, saved_copies
from .attention_backend import SITE, our_name, read_eager, wrapped_name
from .attention_softmax import OwnSoftmax
from .checks import Watch
from .document_bounds import DocumentBounds
from .model_dropouts import zero_rates
from .plan import plan
from .sites import SWITCHES, AttentionSite, StackEntry, StreamSite, TokenSkip, can_skip, generate_without_drops
from .source_reading import parameters, uses_interface
from .structure import Site, find_transformer, require_model


def attach(model: nn.Module, recipe: str | Recipe) -> Attachment:
    """Attach `recipe` to a transformers model, with or without PEFT around it.

    Attach after `get_peft_model`, before or after `torch.compile`. The drops are active while the modules are in
    training mode; the model's own dropouts are set to 0. Use the handle as a context manager, or call `.detach()`.
    Drops that came with copies of another attached model's parts are taken off.

    Raises AttachError where a recipe is attached already, and what `plan` raises.
    """
    require_model(model, "attach")
    model = uncompiled(model)
    earlier = attached_to(model)
    if earlier is not None:
        raise AttachError(
            f"the recipe '{earlier.recipe}' is attached to this model already; call .detach() on its handle "
            "(hiddenkey.find_attachment(model)) before attaching another"
        )
    remove_unattached(model, ATTACHED)
    attachment = Attachment(model, plan(model, recipe))
    try:
        _put_on(attachment)
    except BaseException:
        attachment.take_off()
        raise
    setattr(model, MARK, attachment)
    ATTACHED.add(attachment)
    return attachment


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was put around, which it runs; another as it is."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _put_on(attachment: Attachment) -> None:
    model, plan = attachment.model, attachment.plan
    live = [site for site in plan.sites if site.drop.p > 0]
    bounds = DocumentBounds(model, plan.structure, attachment.handles)
    for site in live:
        if site.side != "attention":
            _attach_stream(attachment, site, bounds)
    for path in dict.fromkeys(site.path for site in live if site.side == "attention"):
        _attach_attention(attachment, path, [site for site in live if site.path == path and site.side == "attention"])
    attachment.zeroed = zero_rates(model, plan.own_dropouts)
    attachment.copies = [copy for _, copy in saved_copies(model)]
    inner, transformer = find_transformer(model)
    if live:
        transformer.add_module(SWITCHES, nn.ModuleList(attachment.switches).train(transformer.training))
        if hasattr(transformer, "generate"):
            generate = vars(transformer).get("generate")
            vars(transformer)["generate"] = partial(generate_without_drops, transformer, generate)
    if live and len(plan.structure.stacks) > 1:
        _attach_entries(attachment)
    watch = attachment.watch = Watch(attachment)
    # PEFT 0.19 calls the forward of what is inside, so a hook there is not enough; but that may be called by itself,
    # and after `unload` only that is left.
    for path, module in {inner: transformer, "": model}.items():
        attachment.handles += [(path, hook) for hook in watch.hooks_around(module)]
    path = plan.structure.stacks[0].path.rpartition(".")[0] if plan.structure.stacks else ""
    attachment.handles += [(path, hook) for hook in watch.hooks_inside(model.get_submodule(path))]


def _attach_entries(attachment: Attachment) -> None:
    for stack in attachment.plan.structure.stacks:
        entry = attachment.entries[stack.path] = StackEntry(attachment.switches[0])
        for layer in stack.layers:
            module = attachment.model.get_submodule(layer.path)
            attachment.handles.append((layer.path, module.register_forward_pre_hook(entry.before)))


def _attach_attention(attachment: Attachment, path: str, sites: list[Site]) -> None:
    module = attachment.model.get_submodule(path)
    switches = [attachment.drop_switches[site.drop] for site in sites]
    site = AttentionSite(switches, uses_interface(module), parameters(module))
    attachment.sites.append((path, site))
    attachment.handles.append((path, module.register_forward_pre_hook(site.before, with_kwargs=True)))
    setattr(module, SITE, site)
    if site.by_interface:
        _rename_backend(attachment, module.config)
        return
    own = OwnSoftmax(site)
    attachment.softmaxes.append(own)
    attachment.hooked[path] = module
    attachment.handles.append((path, module.register_forward_pre_hook(own.before)))
    attachment.handles.append((path, module.register_forward_hook(own.after, always_call=True)))


def _rename_backend(attachment: Attachment, config: Any) -> None:
    if any(config is known for known in attachment.renamed):
        return
    name = wrapped_name(config._attn_implementation)
    attachment.renamed.append(config)
    if name == "eager":
        read_eager(attachment.model)
    config._attn_implementation_internal = our_name(attachment.model, name)


def _attach_stream(attachment: Attachment, planned: Site, bounds: DocumentBounds) -> None:
    module = attachment.model.get_submodule(planned.path)
    documents, switch = bounds.of(planned), attachment.drop_switches[planned.drop]
    skips = planned.side == "output" and can_skip(module, planned.drop)
    site = (TokenSkip if skips else StreamSite)(switch, documents)
    attachment.sites.append((planned.path, site))
    attachment.hooked[planned.path] = module
    if planned.side == "output":
        attachment.handles.append((planned.path, module.register_forward_hook(site.after)))
    if planned.side == "input" or skips:
        attachment.handles.append((planned.path, module.register_forward_pre_hook(site.before, with_kwargs=True)))
