"""Draws docs/figures/patterns.png: what a key drop, a feature drop and a span drop take away.

Nothing is sketched: every cell comes from a call of the library. Run: python docs/figures/patterns.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

import hiddenkey

TOKENS = ["the", "plot", "is", "thin", "but", "I", "had", "fun"]
FEATURES = 8
SHADES = LinearSegmentedColormap.from_list("kept", ["#dbe7f3", "#1f5f99"])
DROPPED = "#e8e4dd"


def attention_weights(drop: str) -> Tensor:
    """(tokens, tokens) weights after the softmax, read off by attending to one-hot values."""
    query, key = torch.randn(2, 1, 1, len(TOKENS), 16).unbind(0)
    values = torch.eye(len(TOKENS))[None, None]
    return hiddenkey.attention(query, key, values, drop)[0, 0]


def stream(drop: str) -> Tensor:
    """(tokens, features) of ones after the drop."""
    return hiddenkey.StructuredDropout(drop)(torch.ones(1, len(TOKENS), FEATURES))[0]


def show(axes: plt.Axes, cells: Tensor, title: str, recipe: str, below: str) -> None:
    shades = SHADES.copy()
    shades.set_bad(DROPPED)
    axes.imshow(cells.masked_fill(cells == 0, torch.nan).numpy(), cmap=shades, vmin=0, vmax=float(cells.max()))
    axes.set_title(f"{title}\n{recipe}", fontsize=10)
    axes.set_xlabel(below, fontsize=9)
    axes.set_yticks(range(len(TOKENS)), TOKENS, fontsize=8)
    axes.set_xticks([])
    for row in range(cells.shape[0]):
        for column in range(cells.shape[1]):
            axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def main() -> None:
    torch.manual_seed(11)
    figure, (keys, features, span) = plt.subplots(1, 3, figsize=(9.5, 3.7), layout="constrained")
    show(keys, attention_weights("logits:column@0.3"), "Key drop", "logits:column@0.3", "keys (attention weights)")
    keys.set_xticks(range(len(TOKENS)), TOKENS, fontsize=8, rotation=45)
    show(
        features, stream("hidden:element@0.3"), "Feature drop", "hidden:element@0.3", "features (feed-forward output)"
    )
    show(span, stream("hidden:span@0.3"), "Span drop", "hidden:span@0.3", "features (feed-forward output)")
    figure.savefig(Path(__file__).with_name("patterns.png"), dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
