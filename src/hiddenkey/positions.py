"""Where something is dropped (arXiv 2403.00812, Fig. 1). One position is one function that finds its places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .registry import Registry

Space = Literal["logits", "weights", "stream"]
Side = Literal["attention", "input", "output"]


class LayerView(Protocol):
    """What a position sees of one transformer layer: module paths."""

    @property
    def path(self) -> str: ...
    @property
    def attentions(self) -> Sequence[str]: ...
    @property
    def feed_forwards(self) -> Sequence[str]: ...


class ModelView(Protocol):
    """What a position sees of a model: for every stack its layers, and the modules after the last layer."""

    @property
    def stacks(self) -> Sequence[Any]: ...
    @property
    def heads(self) -> Sequence[str]: ...


Locate = Callable[[Any], Iterable[tuple[str, Side]]]


@dataclass(frozen=True)
class Position:
    """A named place in the forward pass.

    space: what is dropped there: attention `logits`, attention `weights`, or vectors of a `stream`.
    compensation: the default one.
    per_layer: whether it exists once per layer; then `locate` gets a `LayerView`, else a `ModelView`.
    locate: yields (module path, side): the attention of that module, its input, or its output.
    """

    name: str
    space: Space
    compensation: str
    per_layer: bool
    locate: Locate


POSITIONS: Registry[Position] = Registry("position")
COMPENSATION_OF: dict[Space, str] = {"logits": "none", "weights": "normalize", "stream": "rescale"}


def register_position(
    name: str, *, space: Space = "stream", compensation: str = "", per_layer: bool = True
) -> Callable[[Locate], Locate]:
    """Decorator: add a position under `name`; the function is `Position.locate`.

    compensation: the default one; left out, that of our own positions of the space. Raises ValueError for a malformed
    or taken name, or a space that there is not.
    """
    if space not in COMPENSATION_OF:
        raise ValueError(f"space = {space!r} is not allowed: it is one of {', '.join(COMPENSATION_OF)}")

    def add(locate: Locate) -> Locate:
        POSITIONS.add(name, Position(name, space, compensation or COMPENSATION_OF[space], per_layer, locate))
        return locate

    return add


# In the order of the forward pass, which is the order of a recipe's normal form.


@register_position("input", per_layer=False)
def input_(model: ModelView) -> Iterable[tuple[str, Side]]:
    """The embedded sequence as it enters the first layer (cutoff, arXiv 2009.13818)."""
    for stack in model.stacks:
        yield stack.layers[0].path, "input"


@register_position("logits", space="logits")
def logits(layer: LayerView) -> Iterable[tuple[str, Side]]:
    """Attention logits: after the scale, before the softmax (DropKey, arXiv 2208.02646)."""
    for path in layer.attentions:
        yield path, "attention"


@register_position("weights", space="weights")
def weights(layer: LayerView) -> Iterable[tuple[str, Side]]:
    """Attention weights: after the softmax, before the values (DropAttention, arXiv 1907.11065)."""
    for path in layer.attentions:
        yield path, "attention"


@register_position("hidden")
def hidden(layer: LayerView) -> Iterable[tuple[str, Side]]:
    """The feed-forward block's output, before the residual add (HiddenCut, arXiv 2106.00149)."""
    for path in layer.feed_forwards:
        yield path, "output"


@register_position("output", per_layer=False)
def output(model: ModelView) -> Iterable[tuple[str, Side]]:
    """The representation that enters the classifier or the language-model head."""
    for path in model.heads:
        yield path, "input"
