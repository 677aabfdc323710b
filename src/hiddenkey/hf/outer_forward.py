"""What the outermost forward takes and gives: that of a transformers model, or of a user's module around one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .source_reading import WRAPPERS, parameters, written_in
from .structure import ancestors, find_transformer


def outermost(model: nn.Module) -> nn.Module:
    """The module whose forward a batch is for: the user's outermost around a transformers model, or that model."""
    path, transformer = find_transformer(model)
    around = (model.get_submodule(outer) for outer in sorted({*ancestors(path), ""} - {path}, key=len))
    return next((module for module in around if not written_in(module) <= WRAPPERS), transformer)


def is_own(model: nn.Module) -> bool:
    """Whether the outermost forward is a user's."""
    return outermost(model) is not find_transformer(model)[1]


def arguments(model: nn.Module) -> set[str]:
    """What the outermost forward takes, by name; `**kwargs` of a user's are taken to reach the model inside."""
    outer = outermost(model)
    inner = parameters(find_transformer(model)[1]) if is_own(model) and takes_the_rest(outer) else ()
    return {*parameters(outer), *inner}


def takes_the_rest(module: nn.Module) -> bool:
    """Whether a module's forward has `**kwargs`."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters(module).values())


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without labels, so that no loss is computed; but a user's forward may need them for its outputs."""
    outer = outermost(model)
    needs = is_own(model) and ("labels" in parameters(outer) or takes_the_rest(outer))
    return {name: value for name, value in batch.items() if needs or name != "labels"}


def named_outputs(outputs: Any) -> dict[str, Any]:
    """What a model put out, by name: a mapping, a dataclass or a named tuple as it says; a tuple as transformers'
    Trainer reads it, (loss, logits, …), or (logits, …) where the first is no scalar; a tensor as either.

    Raises UserError for anything else.
    """
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, tuple) and hasattr(outputs, "_asdict"):
        return dict(outputs._asdict())
    parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if parts and isinstance(parts[0], Tensor):
        names = ("logits",) if parts[0].dim() else ("loss", "logits")
        return dict(zip(names, parts, strict=False))
    raise UserError(
        f"the model puts out a {type(outputs).__name__}, in which no loss and logits are found; return a dict with "
        "'loss' and 'logits', or the tuple (loss, logits)"
    )
