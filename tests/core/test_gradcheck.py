"""Numerical gradients of every position, pattern and compensation, in float64.

`normalize` holds its denominator constant, so what it back-propagates is no gradient of what it computes:
it is checked against its own closed form, and gradcheck must reject it.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

import hiddenkey
from tests.oracles import qkv, row_weights, some_keep, visibility

PATTERNS = ("element", "column", "span")
TRUE_GRADIENTS = ("logits:{}", "weights:{}:none", "weights:{}:rescale", "weights:{}:normalize-grad")
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padded": {"attn_mask": visibility("causal+right", 2, 4)},
    "blind row": {"attn_mask": visibility("causal+left", 2, 4)},
    "additive": {
        "attn_mask": torch.randn(2, 1, 4, 4, dtype=torch.float64).masked_fill(~visibility("causal", 2, 4), -torch.inf)
    },
}


def seeded(drop, **kwargs):
    """Attention that draws the same mask at every call."""

    def function(query, key, value):
        torch.manual_seed(11)
        gqa = query.shape[1] != key.shape[1]
        return hiddenkey.attention(query, key, value, drop, enable_gqa=gqa, **kwargs)

    return function


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", TRUE_GRADIENTS)
def test_attention(recipe, pattern, mask):
    inputs = qkv(batch=2, heads=2, queries=4, keys=4, width=2, kv_heads=1)
    dropped = seeded(recipe.format(pattern) + "@0.5", **MASKS[mask])
    plain = seeded("logits:element@0", **MASKS[mask])
    assert not torch.allclose(dropped(*inputs), plain(*inputs))
    assert gradcheck(dropped, inputs, fast_mode=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", TRUE_GRADIENTS)
def test_attention_with_a_given_mask(recipe, pattern):
    inputs = qkv(batch=1, heads=2, queries=3, keys=4, width=2)
    keep = some_keep(pattern, 1, 2, 3, 4)
    assert gradcheck(seeded(recipe.format(pattern) + "@0.5", keep=keep), inputs)


def test_logits_and_weights_together():
    inputs = qkv(batch=1, heads=2, queries=4, keys=4, width=2)
    drop = "logits:column@0.3 + weights:element:rescale@0.3"
    assert gradcheck(seeded(drop, is_causal=True), inputs)


def normalize_by_hand(query, key, value, keep, visible, upstream):
    """dL/dg_j = A_j w'_j - w_j sum_u A_u w'_u with A = upstream v^T, then the chain rule to q, k and v."""
    scale = query.shape[-1] ** -0.5
    results = [torch.zeros_like(x) for x in (query, key, value)]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k, v = query[b, h], key[b, h], value[b, h]
            for i in range(query.shape[2]):
                g = k @ q[i] * scale
                see, kept = visible[b, 0, i], keep.expand(-1, -1, query.shape[2], -1)[b, h, i]
                w = row_weights(g, see, torch.ones_like(kept), "none", 0)
                new = row_weights(g, see, kept, "normalize", 0)
                pull = v @ upstream[b, h, i]
                slope = pull * new - w * (pull * new).sum()
                results[0][b, h, i] += slope @ k * scale
                results[1][b, h] += slope[:, None] * q[i] * scale
                results[2][b, h] += new[:, None] * upstream[b, h, i]
    return results


@pytest.mark.parametrize("mask", ("all", "causal", "causal+right", "window"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_normalize_is_its_closed_form(pattern, mask):
    inputs = qkv(queries=5, keys=5)
    keep, visible = some_keep(pattern, 2, 2, 5, 5), visibility(mask, 2, 5)
    out = hiddenkey.attention(*inputs, f"weights:{pattern}:normalize@0.5", attn_mask=visible, keep=keep)
    upstream = torch.randn_like(out)
    with torch.no_grad():
        expected = normalize_by_hand(*inputs, keep, visible, upstream)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_normalize_is_no_true_gradient(pattern):
    with pytest.raises(GradcheckError):
        gradcheck(seeded(f"weights:{pattern}:normalize@0.5"), qkv(batch=1, queries=4, keys=4, width=2))


VALID = torch.tensor([[True, True, True, True, True], [False, True, True, True, True]])


@pytest.mark.parametrize("valid", (None, VALID), ids=("whole", "padded"))
@pytest.mark.parametrize("compensation", ("rescale", "none"))
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", ("input", "hidden", "output"))
def test_stream(position, pattern, compensation, valid):
    module = hiddenkey.StructuredDropout(f"{position}:{pattern}:{compensation}@0.4")

    def function(x):
        torch.manual_seed(11)
        return module(x, valid)

    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    zeros = function(x) == 0
    assert zeros.any()
    assert not zeros.all()
    assert gradcheck(function, (x,))
    expected = (x / 0.6 if compensation == "rescale" else x).masked_fill(zeros, 0)
    torch.testing.assert_close(function(x), expected, rtol=1e-15, atol=0)
