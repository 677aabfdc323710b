"""Exactness: the training forward and backward of an attached model against transformers' own eager attention.

The oracle knows the recorded masks and the module paths of each family's source, nothing else of the library: it
multiplies streams by hand, and puts minus infinity into the model's own logits, a kept row where one was emptied.
Everything is in float64, the softmax of eager code too, but for norms and rotary angles that models take in float32.
"""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import hiddenkey

from .tiny import make
from .tools import (
    ALL,
    PACKABLE,
    TEXT,
    assert_same_gradients,
    draws,
    gradients,
    inputs_for,
    logits_of,
    quiet,
    real_of,
    shown,
    sites_of,
)

KINDS = {
    "logits column": "logits[:]:column@0.7",
    "logits element": "logits[:]:element@0.7",
    "logits span": "logits[:]:span@0.6",
    "weights column": "weights[:]:column@0.7",
    "weights element rescale": "weights[:]:element:rescale@0.5",
    "weights span none": "weights[:]:span:none@0.6",
    "weights column normalize-grad": "weights[:]:column:normalize-grad@0.6",
    "hidden element": "hidden[:]:element@0.4",
    "hidden span": "hidden[:]:span@0.4",
    "input and output": "input:column:none@0.3 + output:element@0.3",
    "all": ALL,
}
BOTH = "logits[:]:column@0.5 + weights[:]:element@0.5 + hidden[:]:span@0.4 + input:element@0.2"
SOFTMAX = torch.nn.functional.softmax
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def double_softmax(logits: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_) -> Tensor:
    """Softmax that leaves float64 as it is: eager code asks for float32."""
    return logits.softmax(dim)


def keep_of_heads(keep: Tensor, heads: int) -> Tensor:
    """Query head h reads the mask of key/value head h // group."""
    group = heads // keep.shape[1]
    return keep[:, [h // group for h in range(heads)]]


def kept_or_all(keep: Tensor, visible: Tensor) -> Tensor:
    """What is visible and kept; a row left with nothing keeps all it sees."""
    kept = visible & keep
    return torch.where(kept.sum(-1, keepdim=True) == 0, visible, kept)


def dropped_softmax(logits: Tensor, masks: dict[str, tuple]) -> Tensor:
    """Softmax, eq. 3 for `logits`, eq. 1-2 and their variants for `weights`."""
    visible = logits > -1e30
    support, heads = visible, logits.shape[1]
    if "logits" in masks:
        _, keep = masks["logits"]
        support = kept_or_all(keep_of_heads(keep, heads), visible)
    weights = SOFTMAX(logits.masked_fill(visible & ~support, -torch.inf), -1)
    if "weights" not in masks:
        return weights
    drop, keep = masks["weights"]
    weights = weights * kept_or_all(keep_of_heads(keep, heads), support)
    mass = weights.sum(-1, keepdim=True)
    mass = torch.where(visible.any(-1, keepdim=True), mass, 1)
    divisors = {"none": 1.0, "rescale": 1 - drop.p, "normalize": mass.detach(), "normalize-grad": mass}
    return weights / divisors[drop.compensation]


class Oracle:
    """The plain eager model with recorded masks at the sites of its family."""

    def __init__(self, family: str, record: list) -> None:
        self.family, self.model = family, quiet(family, attn_implementation="eager").double()
        self.queues: dict[str, deque] = defaultdict(deque)
        for drawn in record:
            self.queues[drawn.drop.position].append((drawn.drop, drawn.keep))
        self.open: dict[str, tuple] | None = None

    def stream(self, position: str, x: Tensor) -> Tensor:
        drop, keep = self.queues[position].popleft()
        if x.dim() < keep.dim():
            keep = keep.expand(*keep.shape[:-1], x.shape[-1]).reshape(-1, x.shape[-1])
        return x * keep / (1.0 if drop.compensation == "none" else 1 - drop.p)

    def enter(self, module, args) -> None:
        self.open = {p: self.queues[p].popleft() for p in ("logits", "weights") if self.queues[p]}

    def softmax(self, logits: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_) -> Tensor:
        masks, self.open = self.open, None
        return SOFTMAX(logits, dim) if masks is None else dropped_softmax(logits, masks)

    @contextmanager
    def hooks(self, monkeypatch):
        at, handles = self.model.get_submodule, []

        def before(position):
            def hook(_, args, kwargs):
                if args:
                    return (self.stream(position, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": self.stream(position, kwargs["hidden_states"])}

            return hook

        for position in ("input", "output"):
            if self.queues[position]:
                handles += [
                    at(path).register_forward_pre_hook(before(position), with_kwargs=True)
                    for path in sites_of(self.family, position)
                ]
        if self.queues["hidden"]:
            handles += [
                at(path).register_forward_hook(lambda _, __, out: self.stream("hidden", out))
                for path in sites_of(self.family, "hidden")
            ]
        if self.queues["logits"] or self.queues["weights"]:
            handles += [at(path).register_forward_pre_hook(self.enter) for path in sites_of(self.family, "logits")]
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", self.softmax)
            yield
        for handle in handles:
            handle.remove()
        assert not any(self.queues.values()), "a mask was drawn that has no place in this model"


def backward(model, inputs) -> Tensor:
    logits = shown(logits_of(model, inputs), inputs)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=logits.dtype)
    (logits * upstream).sum().backward()
    return logits.detach()


def compare(family, implementation, layout, recipe, monkeypatch):
    inputs = inputs_for(family, layout)
    model = make(family, attn_implementation=implementation).double()
    hiddenkey.attach(model, recipe)
    torch.manual_seed(11)
    with monkeypatch.context() as patch, draws(monkeypatch) as record:
        patch.setattr(torch.nn.functional, "softmax", double_softmax)
        ours = backward(model, inputs)
    assert {drawn.drop for drawn in record if not drawn.keep.all()} == set(hiddenkey.parse(recipe).drops)
    oracle = Oracle(family, record)
    with oracle.hooks(monkeypatch):
        theirs = backward(oracle.model, inputs)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert_same_gradients(gradients(model), gradients(oracle.model), **TOLERANCE)


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("family", TEXT)
def test_one_draw_per_key_value_head(family, implementation, monkeypatch):
    if implementation not in backends(family) and family in ("mpnet", "gemma2"):
        pytest.skip("has no sdpa")
    model = make(family, attn_implementation=implementation)
    hiddenkey.attach(model, "logits[:]:column@0.5 + weights[:]:element@0.5")
    with draws(monkeypatch) as record:
        logits_of(model, inputs_for(family, "right"))
    heads = 2 if family in GROUPED else 4
    assert {drawn.grid.shape for drawn in record} == {(3, heads, 12, 12)}
    assert {drawn.keep.shape for drawn in record} == {(3, heads, 1, 12), (3, heads, 12, 12)}


def backends(family: str) -> tuple[str, ...]:
    return ("eager",) if family in ("mpnet", "gemma2") else ("sdpa",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("bert", "mpnet", "gpt2", "llama", "mistral", "gemma2", "t5"))
def test_every_drop_by_itself_under_right_padding(family, kind, monkeypatch):
    compare(family, backends(family)[0], "right", KINDS[kind], monkeypatch)


@pytest.mark.parametrize("layout", ("none", "right", "left"))
@pytest.mark.parametrize("family", TEXT)
def test_all_positions_in_every_family_and_padding(family, layout, monkeypatch):
    compare(family, backends(family)[0], layout, BOTH, monkeypatch)


@pytest.mark.parametrize("layout", ("right", "left"))
@pytest.mark.parametrize("family", ("bert", "gpt2", "llama", "mistral", "t5", "vit"))
def test_the_models_own_eager_attention(family, layout, monkeypatch):
    if family == "vit" and layout == "left":
        pytest.skip("images are not padded")
    compare(family, "eager", layout, BOTH, monkeypatch)


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_documents(family, monkeypatch):
    compare(family, backends(family)[0], "packed", BOTH, monkeypatch)


@pytest.mark.parametrize("family", ("gpt2", "llama", "mistral"))
def test_rows_were_emptied_and_kept(family, monkeypatch):
    """The cases above contain rows that a draw empties; otherwise they prove less than they say."""
    inputs = inputs_for(family, "left")
    model = make(family)
    hiddenkey.attach(model, "logits[:]:column@0.7")
    torch.manual_seed(11)
    with draws(monkeypatch) as record:
        logits_of(model, inputs)
    real, causal = real_of(inputs), torch.ones(12, 12, dtype=torch.bool).tril()
    visible = (causal & real[:, None])[:, None]
    emptied = [(~(drawn.keep & visible).any(-1) & visible.any(-1)).any() for drawn in record]
    assert any(emptied)
