"""Where documents begin and end in the sequence that a layer is working on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from ..masks import documents_in, hiding, is_recomputing, read_mask
from ..patterns import PATTERNS
from .source_reading import parameters
from .structure import Layer, Site, Stack, Structure, find_transformer

MASK_ARGUMENTS = ("attention_mask", "mask", "attn_mask")
# T5Gemma 2: over the keys of the text, then those of the encoder.
MERGED = "merged_attention_mask"


class Padding:
    """Where the batch at hand has padding, as its masks say that are given to the model.

    By it is checked what the layers know: some of a model are told nothing, or in a way of their own.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook with keywords, of the model."""
        self.masks = {}
        if torch.compiler.is_compiling():
            return
        for name, mask in _arguments(module, args, kwargs).items():
            if name in ("attention_mask", "decoder_attention_mask") and isinstance(mask, Tensor) and mask.dim() == 2:
                self.masks[name] = mask == 0

    def is_missed(self, name: str, shape: tuple[int, int], segments: Tensor | None) -> bool | None:
        """Whether there is padding that the segments (B, T) do not leave out; None: there is none to see it by."""
        padding = self.masks.get(name)
        if padding is None or tuple(padding.shape) != shape or is_recomputing() or not padding.any():
            return None
        return segments is None or bool((segments.to(padding.device)[padding] != 0).any())


class Documents:
    """Where documents begin and end in the sequence a layer is working on, read off its attention mask.

    Sits before an attention module, because that is called again when activation checkpointing recomputes the
    layer; a note of the batch would by then belong to another one. mask_name: the model's argument whose padding
    counts here.
    """

    def __init__(self, padding: Padding, mask_name: str) -> None:
        self.padding, self.mask_name = padding, mask_name
        self.shape: tuple[int, int] | None = None
        self.segments: Tensor | None = None
        self.is_known = self._knows_padding = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook with keywords."""
        if module.training:
            self.shape, self.segments = documents(module, args, kwargs)
            self.is_known = True
            if self.shape is not None and not self._knows_padding:
                self._check(module, self.shape)

    def _check(self, module: nn.Module, shape: tuple[int, int]) -> None:
        missed = self.padding.is_missed(self.mask_name, shape, self.segments)
        if missed:
            raise UserError(
                f"a span must not run over padding, and {type(module).__name__} is not told where that is; give "
                "batches without padding, or use the pattern element or column"
            )
        self._knows_padding = missed is not None

    def view(self, x: Tensor) -> Tensor:
        """Fold a flat (B·T, D) stream back to (B, T, D)."""
        if x.dim() == 2 and self.shape is not None and x.shape[0] == self.shape[0] * self.shape[1]:
            return x.view(*self.shape, -1)
        return x

    def fits(self, x: Tensor) -> bool:
        """Whether x (B, t, D) is the sequence, no part of it, as BERT's `chunk_size_feed_forward` makes them."""
        if self.shape is None or x.shape[0] != self.shape[0] or x.shape[1] == self.shape[1]:
            return True
        return x.shape[1] > self.shape[1] and self.segments is None


class DocumentBounds:
    """The documents of every layer in which spans are drawn."""

    def __init__(self, model: nn.Module, structure: Structure, handles: list[tuple[str, RemovableHandle]]) -> None:
        self.model, self.structure, self.handles = model, structure, handles
        self.found: dict[str, Documents] = {}
        self.padding: Padding | None = None

    def of(self, site: Site) -> Documents | None:
        """Who tells the site where documents begin and end: the layer it stands before, or its layer's attention.

        In a layer without attention (Mamba) it is the first module inside that takes a mask, which checkpointing
        calls again as it does an attention, else the layer itself. None where the pattern does not ask.
        """
        last = self.structure.last
        if not PATTERNS[site.drop.pattern].needs_segments or last is None:
            return None
        for stack in self.structure.stacks:
            if site.layer is None and site.side == "input" and site.path == stack.layers[0].path:
                return self._at(site.path, site.path, stack)
        stack, layer = (last, last.layers[-1]) if site.layer is None else self._place(*site.layer)
        return self._at(layer.path + " inside", self._mask_taker(layer), stack)

    def _at(self, key: str, path: str, stack: Stack) -> Documents:
        if key not in self.found:
            decodes_beside_an_encoder = stack.causal and not stack.latter_half
            mask_name = "decoder_attention_mask" if decodes_beside_an_encoder else "attention_mask"
            self.found[key] = Documents(self._padding_of_batch(), mask_name)
            hook = self.model.get_submodule(path).register_forward_pre_hook(self.found[key].before, with_kwargs=True)
            self.handles.append((path, hook))
        return self.found[key]

    def _padding_of_batch(self) -> Padding:
        if self.padding is None:
            self.padding = Padding()
            path, transformer = find_transformer(self.model)
            self.handles.append((path, transformer.register_forward_pre_hook(self.padding.before, with_kwargs=True)))
        return self.padding

    def _mask_taker(self, layer: Layer) -> str:
        if layer.attentions:
            return layer.attentions[0]
        inside = self.model.get_submodule(layer.path).named_modules()
        takers = (
            name for name, module in inside if name and any(name in parameters(module) for name in MASK_ARGUMENTS)
        )
        return next((f"{layer.path}.{name}" for name in takers), layer.path)

    def _place(self, path: str, index: int) -> tuple[Stack, Layer]:
        stack = next(stack for stack in self.structure.stacks if stack.path == path)
        return stack, stack.layers[index]


def documents(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, int] | None, Tensor | None]:
    """((B, T), segments) from the arguments of a layer's or an attention module's forward."""
    given = _arguments(module, args, kwargs)
    states = given.get("hidden_states", args[0] if args else None)
    mask = next((given[name] for name in MASK_ARGUMENTS if given.get(name) is not None), None)
    if not isinstance(states, Tensor) or states.dim() != 3:
        return None, None
    batch, length = states.shape[:2]
    if isinstance(merged := given.get(MERGED), Tensor):
        mask = merged[..., :length]
    if mask is None:
        return (batch, length), _between_restarts(given.get("position_ids"), batch, length)
    if not isinstance(mask, Tensor):
        raise UserError(
            f"a span needs to know where documents begin, and the attention here is given a {type(mask).__name__}; "
            "load the model with attn_implementation='sdpa', or use the pattern element or column"
        )
    # Layers without attention are given the padding mask itself, of integers.
    full = read_mask(hiding(mask) if mask.is_floating_point() else mask.bool())[0].full
    if full is not None and full.dim() == 3 and mask.is_floating_point():
        return (batch, length), None  # of windows, each of which is a sequence of its own
    if full is not None and full.dim() == 3:
        full = full[:, None]
    if full is not None and full.dim() == 4:
        if full.shape[-2] not in (1, length):
            raise UserError(
                f"a span needs to know where documents begin, and {type(module).__name__} is given {length} tokens "
                f"and a mask of {full.shape[-2]}, as of words and entities; use the pattern element or column"
            )
        # Texts of two and three tokens packed into one row: token 3 does not see token 2, so that the mask
        #   1 . . . .
        #   1 1 . . .
        #   . . 1 . .     gives the segments 1 1 2 2 2, and with its last token padding, which nobody sees, 1 1 2 2 0:
        #   . . 1 1 .     no span runs over the border or into the padding.
        #   . . 1 1 1
        # Keys of a prefix come before those of the sequence.
        return (batch, length), documents_in(full, (batch, 1, length, full.shape[-1]))[:, -length:]
    return (batch, length), None if full is None else full.long()


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}


def _between_restarts(positions: object, batch: int, length: int) -> Tensor | None:
    """Flash attention is given no mask for packed texts: their positions begin anew in each."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != length:
        return None
    opens = positions[:, 1:] != positions[:, :-1] + 1
    segments = F.pad(opens.long().cumsum(-1), (1, 0)) + 1
    return segments.expand(batch, -1)
