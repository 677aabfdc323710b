"""Copies of single modules of an attached model, as PEFT makes them of `modules_to_save`: they carry our hooks and
sites, which no handle takes off, and own dropouts at 0, which nobody gives back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from peft.utils import ModulesToSaveWrapper
from torch import nn

from .attention_backend import SITE, restore_backend
from .attention_softmax import OwnSoftmax
from .checks import module_at
from .document_bounds import Documents
from .model_dropouts import Silenced
from .sites import AttentionSite, StreamSite

if TYPE_CHECKING:
    from .attach import Attachment

OURS = (AttentionSite, StreamSite, Documents, OwnSoftmax)
Hook = tuple[int, int]
Copy = tuple[nn.Module, nn.Module]


def remove_strays(model: nn.Module, attachments: Collection[Attachment]) -> None:
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


def silenced_in(copies: Sequence[Copy], silenced: Silenced) -> Silenced:
    """The same rates in copies of the modules."""
    found = []
    for original, copy in copies:
        paths = {module: path for path, module in original.named_modules()}
        pairs = [(module_at(copy, paths[module]), own) for module, own in silenced if module in paths]
        found += [(module, own) for module, own in pairs if module is not None]
    return found


def _remove_hooks(module: nn.Module, known: set[Hook]) -> None:
    notes = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
    strays = {hook for hook in hooks_in(module, OURS) if hook not in known}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number in hooks if (id(hooks), number) in strays]:
            for numbers in (hooks, *notes, module._forward_hooks_always_called):
                numbers.pop(number, None)
