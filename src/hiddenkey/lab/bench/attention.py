"""The suite `attention`: attention alone over lengths, forward and backward, against plain sdpa."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import attention
from ...attention_paths import folded
from ...masks import Mask, guard
from ...patterns import random_keep
from .config import BenchConfig
from .measure import Work, interleave
from .memory import peak_memory
from .record import Case, Row
from .textbook import bernoulli_keep, dropkey

RATE = 0.1
PLAIN = "plain sdpa"
LENGTHS = (512, 1024, 2048, 4096, 8192)
# Beyond these a mask or weights of (B, H, Q, K) no longer fit a usual machine.
CELLS_MASK, CELLS_WEIGHTS = 4096, 2048


@dataclass(frozen=True)
class Tensors:
    """Query, key and value of shape (B, H, L, D), with gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool


Attend = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Rival:
    """A way to attend, up to a length."""

    what: str
    attend: Attend
    longest: int = LENGTHS[-1]


def plain(x: Tensors) -> Tensor:
    """torch's own attention."""
    return F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=x.causal)


def ours(recipe: str) -> Attend:
    """`hiddenkey.attention` with a recipe."""
    return lambda x: attention(x.query, x.key, x.value, recipe, is_causal=x.causal)


def one_more_feature(x: Tensors) -> Tensor:
    """The same drop for a kernel that takes no mask."""
    return folded(x.query, x.key, x.value, key_keep(x), Mask(causal=x.causal), None, None)


def whole_mask(x: Tensors) -> Tensor:
    """The same drop in a boolean mask for sdpa."""
    return F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=whole(key_keep(x), x))


def textbook(x: Tensors) -> Tensor:
    """DropKey over cells in eager attention."""
    bias = None
    if x.causal:
        bias = x.query.new_full((x.query.shape[2], x.key.shape[2]), torch.finfo(x.query.dtype).min).triu(1)
    return dropkey(x.query, x.key, x.value, bias, bernoulli_keep(x.query, x.key, RATE))


def key_keep(x: Tensors) -> Tensor:
    """A draw over keys: (B, H, 1, K)."""
    batch, heads, length, _ = x.key.shape
    return random_keep((batch, heads, length), RATE, x.key.device).unsqueeze(2)


def whole(keep: Tensor, x: Tensors) -> Tensor:
    """Visible and kept cells, no row emptied: (B, H, Q, K)."""
    length = x.query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=x.query.device)
    visible = visible.tril() if x.causal else visible
    return guard(keep, visible)


RIVALS = {
    PLAIN: Rival("torch's sdpa, nothing dropped", plain),
    "column": Rival("ours: logits:column@0.1", ours("logits:column@0.1")),
    "span": Rival("ours: logits:span@0.1", ours("logits:span@0.1")),
    "element": Rival("ours: logits:element@0.1", ours("logits:element@0.1"), CELLS_MASK),
    "column, one more feature": Rival("the draw of column as one more feature for sdpa", one_more_feature),
    "column, boolean mask": Rival("the draw of column as a mask of (B, H, Q, K) for sdpa", whole_mask, CELLS_MASK),
    "textbook DropKey": Rival("element draw, eager attention", textbook, CELLS_WEIGHTS),
}


def attention_cases(config: BenchConfig, device: torch.device) -> list[Case]:
    """Every length, causal and not, and the shape of a batch of sentences."""
    lengths = (32,) if config.quick else LENGTHS
    heads, sentence = (2, (2, 2, 32, 16)) if config.quick else (16, (8, 12, 512, 64))
    shapes = [sentence, *((1, heads, length, 64) for length in lengths)]
    return [attention_case(shape, causal, config, device) for shape in shapes for causal in (False, True)]


def attention_case(shape: tuple[int, int, int, int], causal: bool, config: BenchConfig, device: torch.device) -> Case:
    """One shape (B, H, L, D)."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config.dtype)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    x = Tensors(q, k, v, causal)
    rivals = {name: rival for name, rival in RIVALS.items() if shape[2] <= rival.longest}
    works = {name: backward_of(rival.attend, x) for name, rival in rivals.items()}
    times = interleave(works, config.rounds_of(_rounds(shape[2])), config.seconds)
    peaks = peak_memory(works, device)
    rows = [Row(name, rivals[name].what, times[name], peaks[name]) for name in works]
    name = f"{'causal' if causal else 'full'} {' x '.join(map(str, shape))}"
    return Case(name, {"shape": list(shape), "causal": causal, "dtype": config.dtype}, PLAIN, rows)


def backward_of(attend: Attend, x: Tensors) -> Work:
    """Forward and backward with a gradient of ones."""
    inputs = (x.query, x.key, x.value)
    ones = torch.ones_like(x.query)
    return lambda: torch.autograd.grad(attend(x), inputs, ones)


def _rounds(length: int) -> int:
    return 15 if length <= 2048 else 5
