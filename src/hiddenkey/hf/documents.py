"""Where documents begin and end in the sequence that a layer is working on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..axes.pattern import PATTERNS
from ..errors import UserError
from ..masks import documents_in, read_mask
from .structure import Layer, Structure

if TYPE_CHECKING:
    from .plan import Site

MASK_ARGUMENTS = ("attention_mask", "mask", "attn_mask")


class Documents:
    """Where documents begin and end in the sequence a layer is working on, read off its attention mask.

    Sits before an attention module, because that is called again when activation checkpointing recomputes the
    layer; a note of the batch would by then belong to another one.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.segments: Tensor | None = None
        self.is_told = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook with keywords."""
        if module.training:
            self.shape, self.segments = documents(module, args, kwargs)
            self.is_told = True

    def view(self, x: Tensor) -> Tensor:
        """Fold a flat (B·T, D) stream back to (B, T, D)."""
        if x.dim() == 2 and self.shape is not None and x.shape[0] == self.shape[0] * self.shape[1]:
            return x.view(*self.shape, -1)
        return x

    def is_more_than(self, x: Tensor) -> bool:
        """Whether x (B, t, D) is a part of the sequence, as BERT's `chunk_size_feed_forward` makes them."""
        return self.shape is not None and x.shape[0] == self.shape[0] and x.shape[1] < self.shape[1]


class Notes:
    """The notes of every layer in which spans are drawn."""

    def __init__(self, model: nn.Module, structure: Structure, handles: list[tuple[str, RemovableHandle]]) -> None:
        self.model, self.structure, self.handles = model, structure, handles
        self.notes: dict[str, Documents] = {}

    def of(self, site: Site) -> Documents | None:
        """Who tells the site where documents begin and end: the layer it stands before, or its layer's attention.

        A layer without attention (Mamba) is asked itself. None where the pattern does not ask.
        """
        if not PATTERNS[site.drop.pattern].needs_segments:
            return None
        firsts = [stack.layers[0].path for stack in self.structure.stacks]
        if site.layer is None and site.side == "input" and site.path in firsts:
            return self._at(site.path, site.path)
        layer = self._layer(site)
        if not layer.attentions:
            return self._at(layer.path, layer.path)
        return self._at(layer.path + " attention", layer.attentions[0])

    def _at(self, key: str, path: str) -> Documents:
        if key not in self.notes:
            self.notes[key] = Documents()
            hook = self.model.get_submodule(path).register_forward_pre_hook(self.notes[key].before, with_kwargs=True)
            self.handles.append((path, hook))
        return self.notes[key]

    def _layer(self, site: Site) -> Layer:
        stacks = self.structure.stacks
        if site.layer is None:
            return stacks[-1].layers[-1]
        path, index = site.layer
        return next(stack for stack in stacks if stack.path == path).layers[index]


def documents(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, int] | None, Tensor | None]:
    """((B, T), segments) from the arguments of a layer's or an attention module's forward."""
    parameters = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    states = given.get("hidden_states", args[0] if args else None)
    mask = next((given[name] for name in MASK_ARGUMENTS if given.get(name) is not None), None)
    if not isinstance(states, Tensor) or states.dim() != 3:
        return None, None
    batch, length = states.shape[:2]
    if mask is None:
        return (batch, length), _between_restarts(given.get("position_ids"), batch, length)
    if not isinstance(mask, Tensor):
        raise UserError(
            f"a span needs to know where documents begin, and the attention here is given a {type(mask).__name__}; "
            "load the model with attn_implementation='sdpa', or use the pattern element or column"
        )
    if not mask.is_floating_point():
        mask = mask.bool()  # layers without attention are given the padding mask itself, of integers
    full = read_mask(mask)[0].full
    if full is not None and full.dim() == 3:
        return (batch, length), None  # of windows, each of which is a sequence of its own
    if full is not None and full.dim() == 4:
        # Keys of a prefix come before those of the sequence.
        return (batch, length), documents_in(full, (batch, 1, length, full.shape[-1]))[:, -length:]
    return (batch, length), None if full is None else full.long()


def _between_restarts(positions: object, batch: int, length: int) -> Tensor | None:
    """Flash attention is given no mask for packed texts: their positions begin anew in each."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != length:
        return None
    opens = positions[:, 1:] != positions[:, :-1] + 1
    segments = F.pad(opens.long().cumsum(-1), (1, 0)) + 1
    return segments.expand(batch, -1)
