"""Dropout of hidden states alone, forward and backward, in ratios to torch's F.dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hiddenkey import StructuredDropout

from .common import Work, measure, parse, parser, positive, write

RATE = 0.1


def backward(drop: Callable[[Tensor], Tensor], states: Tensor) -> Work:
    """Forward, and backward from a gradient of ones."""
    ones = torch.ones_like(states)
    return lambda: torch.autograd.grad(drop(states), states, ones)


def main() -> None:
    """Measure the three patterns on a stream of (B, T, D)."""
    flags = parser(__doc__)
    flags.add_argument("--shape", type=positive, nargs=3, default=(32, 128, 384), metavar=("B", "T", "D"))
    found = parse(flags)
    states = torch.randn(*found.shape, device=found.device, requires_grad=True)
    recipes = [f"hidden:{pattern}@{RATE}" for pattern in ("element", "column", "span")]
    drops: dict[str, Callable[[Tensor], Tensor]] = {"F.dropout": lambda x: F.dropout(x, RATE)}
    drops |= {recipe: StructuredDropout(recipe).train() for recipe in recipes}
    works = {name: backward(drop, states) for name, drop in drops.items()}
    write(found, [measure("x".join(map(str, found.shape)), works, found)])


if __name__ == "__main__":
    main()
