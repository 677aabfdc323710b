"""Every fast path equals the reference: forward and gradients, over masks, heads, dtypes and emptied rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hiddenkey
from hiddenkey import attention_paths
from hiddenkey.attention_paths import attend, reference
from hiddenkey.masks import Mask
from hiddenkey.recipe import parse

DROPS = parse("logits:column@0.5").drops
LENGTH, LENGTHS = 9, (9, 5, 0)


def padding(side):
    """Rows with 9, 5 and no real keys."""
    places, lengths = torch.arange(LENGTH)[None], torch.tensor(LENGTHS)[:, None]
    return places < lengths if side == "right" else places >= LENGTH - lengths


def sliding_window():
    ones = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return Mask(full=(ones.tril() & ones.triu(-2))[None, None] & padding("right")[:, None, None])


def packed():
    document = (torch.arange(LENGTH) >= 4).long()
    return Mask(full=(document[:, None] == document[None]).tril()[None, None].expand(3, 1, -1, -1))


MASKS = {
    "everything": lambda: Mask(),
    "causal": lambda: Mask(causal=True),
    "right padding": lambda: Mask(keys=padding("right")),
    "left padding": lambda: Mask(keys=padding("left")),
    "causal, right padding": lambda: Mask(keys=padding("right"), causal=True),
    "causal, left padding": lambda: Mask(keys=padding("left"), causal=True),
    "window": sliding_window,
    "one window for all": lambda: Mask(full=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2)),
    "packed": packed,
}


def inputs(dtype, kv_heads, width=8, value_width=8):
    shapes = ((3, 4, LENGTH, width), (3, kv_heads, LENGTH, width), (3, kv_heads, LENGTH, value_width))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def some_keep(kind, kv_heads):
    """Draws with whole heads, first keys and last keys dropped, so that rows are emptied in every way."""
    keep = torch.rand(3, kv_heads, 1 if kind == "key" else LENGTH, LENGTH) > 0.5
    keep[0, 0] = False
    keep[1, :, :, :3] = False
    return keep


def outcome(function, tensors, keep, mask, bias=None, scale=None):
    """Output and gradients of one path."""
    output = function(*tensors, DROPS, [keep], mask=mask, bias=bias, scale=scale)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weight).sum(), tensors)


def assert_equal_paths(tensors, keep, mask, bias=None, scale=None, **tolerance):
    found, wanted = (outcome(path, tensors, keep, mask, bias, scale) for path in (attend, reference))
    for fast, slow in zip(found, wanted, strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


@pytest.mark.parametrize("small", (True, False))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("kind", ("key", "cell"))
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
@pytest.mark.parametrize("mask", MASKS)
def test_every_path_is_the_reference_in_float64(mask, kv_heads, kind, with_bias, small, monkeypatch):
    monkeypatch.setattr(attention_paths, "SMALL", 2**22 if small else 0)
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64) if with_bias else None
    tensors, keep = inputs(torch.float64, kv_heads), some_keep(kind, kv_heads)
    assert_equal_paths(tensors, keep, MASKS[mask](), bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("small", (True, False))
@pytest.mark.parametrize("kind", ("key", "cell"))
@pytest.mark.parametrize("mask", MASKS)
def test_a_scale_of_its_own(mask, kind, small, monkeypatch):
    monkeypatch.setattr(attention_paths, "SMALL", 2**22 if small else 0)
    tensors, keep = inputs(torch.float64, 2), some_keep(kind, 2)
    assert_equal_paths(tensors, keep, MASKS[mask](), scale=0.9, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", (5, 40))
@pytest.mark.parametrize("kind", ("key", "cell"))
@pytest.mark.parametrize("mask", MASKS)
def test_values_of_another_width(mask, kind, width):
    assert_equal_paths(inputs(torch.float64, 2, 8, width), some_keep(kind, 2), MASKS[mask](), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("key", "cell"))
@pytest.mark.parametrize("mask", MASKS)
def test_error_in_a_dtype_is_that_of_plain_attention(mask, kind, dtype):
    """Against float64 on the same numbers: no more than 4 times what the reference makes in that dtype."""
    tensors, keep = inputs(dtype, 2), some_keep(kind, 2)
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted = outcome(reference, exact, keep, MASKS[mask]())
    ours, own = (errors(outcome(path, tensors, keep, MASKS[mask]()), wanted) for path in (attend, reference))
    for error, floor in zip(ours, own, strict=True):
        assert error <= 4 * max(floor, torch.finfo(dtype).eps)


def errors(found, exact):
    return [float((a.double() - b).detach().abs().max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("mask", ("window", "packed", "causal"))
def test_a_folded_feature_in_float32(mask, monkeypatch):
    """A shifted row loses the digits of the shift: one of 120 to 240 has an ulp of 8e-6 to 1.5e-5 in float32."""
    monkeypatch.setattr(attention_paths, "SMALL", 0)
    assert_equal_paths(inputs(torch.float32, 2), some_keep("key", 2), MASKS[mask](), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("far", (118.0, 130.0, 1500.0))
@pytest.mark.parametrize("by", ("logit", "bias"))
def test_a_dropped_key_far_above_the_kept_ones(by, far, dtype):
    query = torch.zeros(1, 1, 4, 8, dtype=dtype)
    key, value = torch.zeros_like(query), torch.zeros(1, 1, 4, 6, dtype=dtype)
    value[..., 0, 0], query[..., 0], bias = 1, 1, None
    if by == "logit":
        key[..., 0, 0] = far * 8**0.5
    else:
        bias = torch.zeros(1, 1, 4, 4, dtype=dtype)
        bias[..., 0] = far
    keep = torch.tensor([False, True, True, True]).view(1, 1, 1, 4)
    found = attention_paths.folded(query, key, value, keep, Mask(causal=True), bias, None)[0, 0, :, 0]
    assert found.tolist() == [1, 0, 0, 0], "the first query sees no other key, the others must not see this one"


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 7),
    st.integers(0, 5),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_causal_of_any_shape(batch, heads, queries, more_keys, p, padded, seed):
    torch.manual_seed(seed)
    keys = queries + more_keys
    shapes = ((batch, heads[0], queries, 4), (batch, heads[1], keys, 4), (batch, heads[1], keys, 4))
    tensors = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    real = torch.rand(batch, keys) > 0.3 if padded else None
    keep = torch.rand(batch, heads[1], 1, keys) >= p
    assert_equal_paths(tensors, keep, Mask(keys=real, causal=True), rtol=1e-10, atol=1e-10)


@settings(max_examples=80)
@given(
    st.sampled_from(sorted(MASKS)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from(("key", "cell")),
    st.sampled_from((8, 5, 40)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_whatever_path_chance_takes(mask, kv_heads, kind, value_width, with_bias, small, seed):
    torch.manual_seed(seed)
    tensors, keep = inputs(torch.float64, kv_heads, 8, value_width), some_keep(kind, kv_heads)
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_paths, "SMALL", 2**22 if small else 0)
        assert_equal_paths(tensors, keep, MASKS[mask](), bias, rtol=1e-10, atol=1e-10)


def test_the_paths_that_are_meant_are_taken(monkeypatch):
    taken = []
    for name in ("by_key", "folded", "by_cell"):
        real = getattr(attention_paths, name)
        monkeypatch.setattr(attention_paths, name, lambda *a, name=name, real=real: (taken.append(name), real(*a))[1])
    tensors, keep = inputs(torch.float32, 2), some_keep("key", 2)
    for mask in ("everything", "right padding", "causal", "window"):
        attend(*tensors, DROPS, [keep], mask=MASKS[mask]())
    attend(*tensors, DROPS, [some_keep("cell", 2)], mask=Mask(causal=True))
    monkeypatch.setattr(attention_paths, "SMALL", 0)
    for mask in ("everything", "causal", "window"):
        attend(*tensors, DROPS, [keep], mask=MASKS[mask]())
    assert taken == ["by_key"] * 2 + ["by_cell"] * 3 + ["by_key"] + ["folded"] * 2


def test_nothing_of_queries_times_keys_is_saved(monkeypatch):
    """At length 512 the tensors kept for the backward pass of the causal path are all proportional to the length."""
    monkeypatch.setattr(attention_paths, "SMALL", 0)
    length, sizes = 512, []
    tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
    keep = torch.rand(1, 2, 1, length) > 0.1
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (sizes.append(x.untyped_storage().nbytes()), x)[1], lambda x: x
    ):
        attend(*tensors, DROPS, [keep], mask=Mask(causal=True))
    assert sizes
    assert max(sizes) <= 2 * length * (8 + attention_paths.FEATURES) * 4


@pytest.mark.parametrize("recipe", ("logits:column@0.4", "logits:element@0.4"))
def test_tensors_that_lie_apart_in_memory(recipe):
    """Such as (…, 3) of one projection."""
    apart = torch.randn(2, LENGTH, 4, 8, 3).permute(4, 0, 2, 1, 3)
    keep = torch.rand(2, 4, 1 if "column" in recipe else LENGTH, LENGTH) > 0.4
    results = []
    for tensors in (apart, apart.contiguous()):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = hiddenkey.attention(*leaves, recipe, is_causal=True, keep=keep)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    assert apart[0].stride(-1) == 3
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
