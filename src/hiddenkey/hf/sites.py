"""The small objects that sit on a module and drop. They are plain data, so a model with them copies and pickles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_paths import draw_keeps
from ..dropout import draw_stream, drop_stream
from ..errors import UserError
from ..masks import Mask, Shape, Tally, drawn_together, hiding
from ..patterns import PATTERNS
from ..recipe import Drop
from .documents import MASK_ARGUMENTS, Documents
from .switch import DropSwitch


class AttentionSite:
    """The drops inside one attention module, with a tally each.

    by_interface: the module asks transformers' AttentionInterface for its function; else it has its own softmax.
    parameters: the names of its forward's arguments. in_windows: its last mask was one of windows, (windows, Q, K).
    """

    in_windows = False

    def __init__(self, switches: Sequence[DropSwitch], by_interface: bool, parameters: Iterable[str] = ()) -> None:
        self.switches, self.by_interface, self.parameters = tuple(switches), by_interface, tuple(parameters)
        self.drops = tuple(switch.drop for switch in switches)
        self.tallies = [Tally() for _ in self.drops]

    @property
    def active(self) -> tuple[Drop, ...]:
        """The drops that are switched on, while the model is in training mode."""
        return tuple(switch.drop for switch in self.switches if switch.is_active)

    def draw(self, shape: Shape, device: torch.device, mask: Mask) -> list[Tensor]:
        """One keep mask per active drop over (B, Hkv, Q, K), counted."""
        keeps = draw_keeps(self.active, shape, device, self.mask_of_documents(mask))
        tallies = [tally for tally, switch in zip(self.tallies, self.switches, strict=True) if switch.is_active]
        for keep, tally, drop in zip(keeps, tallies, self.active, strict=True):
            tally.add(keep, drawn_together(drop, keep, lead=2))
        return keeps

    def mask_of_documents(self, mask: Mask) -> Mask:
        """The mask of which documents are read off: a window is one, whatever parts of an image meet in it."""
        return Mask() if self.in_windows else mask

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook with keywords: what a mask means to hide is hidden for certain (see `hiding`)."""
        if not module.training or not self.active:
            return args, kwargs
        self.in_windows = False
        names = (*self.parameters, *("" for _ in args))
        args = tuple(self._hide(name, value) for name, value in zip(names, args, strict=False))
        return args, {name: self._hide(name, value) for name, value in kwargs.items()}

    def _hide(self, name: str, value: Any) -> Any:
        if name not in MASK_ARGUMENTS or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self.in_windows = value.dim() == 3
        return hiding(value)


class StreamSite:
    """One drop at the input or output of a module."""

    def __init__(self, switch: DropSwitch, documents: Documents | None) -> None:
        self.switches, self.drops, self.documents = (switch,), (switch.drop,), documents
        self.tallies = [Tally()]

    def is_active(self, module: nn.Module) -> bool:
        """Whether it drops now: the module and the model are training and the drop is switched on."""
        return module.training and self.switches[0].is_active

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: drop from the output, or from the first of several."""
        if not self.is_active(module):
            return output
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook with keywords: drop from the first argument, or from `hidden_states`."""
        if not self.is_active(module):
            return args, kwargs
        if args:
            return (self._drop(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._drop(kwargs["hidden_states"])}

    def draw(self, x: Tensor) -> Tensor:
        """A keep mask that broadcasts to x, counted."""
        drop, known = self.drops[0], self.documents
        if known is not None and not known.is_told:
            raise UserError(
                f"'{drop}' needs to know where documents begin, which this layer learns in its attention, and that "
                "comes later; use the pattern element or column"
            )
        folded = x if known is None else known.view(x)
        if PATTERNS[drop.pattern].needs_segments and folded.dim() < 3:
            raise UserError(
                f"'{drop}' needs a sequence of tokens, but this model passes vectors of shape {tuple(x.shape)} "
                "here; use the pattern element or column"
            )
        if known is not None and not known.fits(folded):
            raise UserError(
                f"'{drop}' needs the text that attention sees, but this model computes parts of {folded.shape[1]} "
                "tokens here; set chunk_size_feed_forward=0 in its configuration where it has that, or use the "
                "pattern element or column"
            )
        keep = draw_stream(folded, drop, None if known is None else known.segments)
        self.tallies[0].add(keep, drawn_together(drop, keep, lead=1))
        return keep if folded is x else keep.view(x.shape[0], -1)

    def _drop(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise UserError(
                f"'{self.drops[0]}' needs a tensor, but a {type(x).__name__} is passed here: an adapter that wraps "
                "whole layers passes an object of its own between them; leave this position out"
            )
        return drop_stream(x, self.drops[0], self.draw(x))
