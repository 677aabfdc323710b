"""The small objects that sit on a module and drop. They are plain data, so a model with them copies and pickles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_paths import draw_keeps
from ..compensations import COMPENSATIONS
from ..dropout import draw_stream, drop_stream
from ..errors import UserError
from ..masks import Mask, Shape, Tally, drawn_together, hiding
from ..patterns import PATTERNS
from ..recipe import Drop
from .document_bounds import MASK_ARGUMENTS, Documents
from .peft_layers import works_by_token
from .preserve import evaluation
from .structure import is_linear

SWITCHES = "hiddenkey_drops"


class DropSwitch(nn.Dropout):
    """One drop of the attached recipe: an `nn.Dropout` that stands in the model and is never called.

    All sites of the drop look at its `p`. Code that walks over the modules and sets every dropout to 0 (TRL's
    `disable_dropout`, for reproducible log-probabilities) turns the drop off; p put back turns it on again. They look
    at its mode too, which is the whole model's: PEFT's new layers are in training mode in a model that
    `from_pretrained` left in evaluation mode. It has no parameters and no buffers, so `state_dict` does not know it.
    """

    def __init__(self, drop: Drop) -> None:
        super().__init__(drop.p)
        self.drop = drop

    @property
    def is_on(self) -> bool:
        return self.p > 0

    @property
    def is_active(self) -> bool:
        """Whether it is on and the model is in training mode."""
        return self.is_on and self.training

    def extra_repr(self) -> str:
        return f"{self.drop}{'' if self.is_on else ', switched off'}"


def generate_without_drops(model: Any, generate: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` with the switches in evaluation mode: TRL's GRPO and its kin generate in training mode.

    generate: one that was set on the model by hand; None: that of its class.
    """
    with evaluation(getattr(model, SWITCHES)):
        return type(model).generate(model, *args, **kwargs) if generate is None else generate(*args, **kwargs)


class StackEntry:
    """Notes whether a layer of one stack was run in training: only then must the sites in it draw.

    A text alone does not enter the vision tower of a model. entered: since attach, or since somebody set it to False.
    """

    def __init__(self, switch: DropSwitch) -> None:
        self.switch = switch
        self.entered = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a layer. Writes without reading, so that nothing is compiled again."""
        if self.switch.training:
            self.entered = True


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
        if known is not None and not known.is_known:
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


def can_skip(block: nn.Module, drop: Drop) -> bool:
    """Whether the block has no parts but linear maps and functions without state, and the drop is a plain factor.

    An adapter other than LoRA may look at several tokens at once, so nothing is skipped under it.
    """
    if not all(works_by_token(part) for part in block.children()):
        return False
    parts = [part for part in block.children() if not is_linear(part)]
    linears = len(list(block.children())) - len(parts)
    stateless = not any(True for part in parts for _ in (*part.parameters(), *part.buffers()))
    own = any(True for _ in block.parameters(recurse=False))
    return linears >= 2 and stateless and not own and COMPENSATIONS[drop.compensation].factor is not None


class TokenSkip(StreamSite):
    """A drop at the output of such a block. Draws before it, gives it the kept tokens, puts its output back.

    A draw over single features, which drops no token, is applied to the output as elsewhere.
    """

    rows: Tensor | None = None
    keep: Tensor | None = None
    shape: torch.Size | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook with keywords."""
        self.rows = self.keep = None
        whole = len(args) == 1 and not kwargs and args[0].dim() == 3
        if not self.is_active(module) or not whole or torch.compiler.is_compiling():
            return args, kwargs
        x = args[0]
        self.keep = self.draw(x)
        if self.keep.shape[-1] != 1:
            return args, kwargs
        self.shape, self.rows = x.shape, self.keep.expand(*x.shape[:2], 1).flatten().nonzero().squeeze(1)
        return (x.flatten(0, 1).index_select(0, self.rows).unsqueeze(0),), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook. The draw goes afterwards: with activation checkpointing nobody else needs it."""
        try:
            return super().after(module, args, output) if self.rows is None else self._put_back(output)
        finally:
            self.rows = self.keep = None

    def _put_back(self, output: Tensor) -> Tensor:
        assert self.rows is not None
        assert self.shape is not None
        factor = COMPENSATIONS[self.drops[0].compensation].factor
        assert factor is not None
        kept = output.squeeze(0) * factor(self.drops[0].p)
        whole = kept.new_zeros(self.shape[0] * self.shape[1], kept.shape[-1]).index_copy(0, self.rows, kept)
        return whole.view(*self.shape[:2], -1)

    def _drop(self, x: Tensor) -> Tensor:
        return super()._drop(x) if self.keep is None else drop_stream(x, self.drops[0], self.keep)
