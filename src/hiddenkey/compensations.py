"""What makes up for a drop between training and inference (arXiv 2403.00812, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .registry import Registry

Compensate = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Compensation:
    """A named compensation and the spaces (see `positions.py`) in which it means something.

    factor: set where it is no more than a number, a function of p, that multiplies what is kept.
    """

    name: str
    apply: Compensate
    spaces: tuple[str, ...]
    factor: Callable[[float], float] | None = None


COMPENSATIONS: Registry[Compensation] = Registry("compensation")
COMPENSATED = ("weights", "stream")


def register_compensation(
    name: str, *, spaces: tuple[str, ...], factor: Callable[[float], float] | None = None
) -> Callable[[Compensate], Compensate]:
    """Decorator: add a compensation under `name`, for the positions of the named spaces: "weights", "stream".

    The function takes the tensor whose dropped entries are zero already, and the rate p. factor: see
    `Compensation`; it lets erasing and compensating be one pass over the data.

    Raises ValueError for a malformed or taken name, and for another space: dropped logits are made up for by the
    softmax, where no function is called.
    """
    if not set(spaces) <= set(COMPENSATED):
        raise ValueError(
            f"the compensation {name!r} is for the spaces {', '.join(spaces)}; allowed: {', '.join(COMPENSATED)}. "
            "Dropped logits are made up for by the softmax that follows"
        )

    def add(apply: Compensate) -> Compensate:
        COMPENSATIONS.add(name, Compensation(name, apply, spaces, factor))
        return apply

    return add


def none(erased: Tensor, p: float) -> Tensor:
    """Nothing: the softmax after dropped logits renormalises by itself (DropKey, arXiv 2208.02646)."""
    return erased


COMPENSATIONS.add("none", Compensation("none", none, ("logits", *COMPENSATED), factor=lambda p: 1.0))


@register_compensation("rescale", spaces=("weights", "stream"), factor=lambda p: 1 / (1 - p))
def rescale(erased: Tensor, p: float) -> Tensor:
    """Divide by 1 - p, as ordinary dropout does."""
    return erased / (1 - p)


def mass(erased: Tensor) -> Tensor:
    """What survives in each row; 1 where it underflows to nothing, so that the row stays zero."""
    total = erased.sum(-1, keepdim=True)
    return total.masked_fill(total == 0, 1)


@register_compensation("normalize", spaces=("weights",))
def normalize(erased: Tensor, p: float) -> Tensor:
    """Divide each row by its surviving mass, held constant (DropAttention, eq. 1-2)."""
    return erased / mass(erased).detach()


@register_compensation("normalize-grad", spaces=("weights",))
def normalize_grad(erased: Tensor, p: float) -> Tensor:
    """The same with the gradient through the mass: equal to DropKey, forward and backward (eq. 4-10)."""
    return erased / mass(erased)
