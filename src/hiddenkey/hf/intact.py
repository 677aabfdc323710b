"""What can take drops off a model after attach, told before a training step rather than never."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recipe import Recipe
from .backend import PREFIX, SITE
from .sites import AttentionSite
from .switch import DropSwitch

if TYPE_CHECKING:
    from .attach import Attachment


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


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None where there is none any more."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


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


def silent_sites(attachment: Attachment) -> list[str]:
    """The sites that are switched on and never drew, as "position module.path"."""
    return [
        f"{drop.position} {path}"
        for path, site in attachment.sites
        for drop, tally, switch in zip(site.drops, site.tallies, site.switches, strict=True)
        if switch.is_on and tally.counts is None
    ]


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
