"""The identities of arXiv 2403.00812 (eq. 4-13), forward and backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

import hiddenkey
from tests.oracles import KINDS, assert_same, attention, qkv, some_keep, visibility

P = 0.3
PATTERNS = ("element", "column", "span")
MASKS = ("all", "causal", "left", "causal+right", "causal+packed", "window+left")


def run(drop, query, key, value, keep, **kwargs):
    gqa = query.shape[1] != key.shape[1]
    return hiddenkey.attention(query, key, value, drop, keep=keep, enable_gqa=gqa, **kwargs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", KINDS)
def test_every_kind_is_its_equation(recipe, pattern, mask):
    query, key, value = qkv()
    keep, visible = some_keep(pattern, 2, 2, 5, 5), visibility(mask, 2, 5)
    ours = run(recipe.format(pattern, P), query, key, value, keep, attn_mask=visible)
    theirs = attention(query, key, value, keep, KINDS[recipe], P, visible)
    assert_same(ours, theirs, (query, key, value))


@pytest.mark.parametrize("mask", ("all", "causal", "causal+right"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropkey_is_normalised_dropattention(pattern, mask):
    """Eq. 4-6: any mask; forward for both normalisations, backward for the one with gradient."""
    query, key, value = qkv()
    keep, visible = some_keep(pattern, 2, 2, 5, 5), visibility(mask, 2, 5)
    dropkey = run(f"logits:{pattern}@{P}", query, key, value, keep, attn_mask=visible)
    with_grad = run(f"weights:{pattern}:normalize-grad@{P}", query, key, value, keep, attn_mask=visible)
    without = run(f"weights:{pattern}:normalize@{P}", query, key, value, keep, attn_mask=visible)
    assert_same(dropkey, with_grad, (query, key, value))
    torch.testing.assert_close(dropkey, without, rtol=1e-12, atol=1e-12)


def one_row(drop, keep):
    """The weights of one row as a function of its logits: keys and values are unit vectors."""
    unit = torch.eye(len(keep), dtype=torch.float64)[None, None]
    return lambda g: run(drop, g.view(1, 1, 1, -1), unit, unit, keep, scale=1.0).view(-1)


def closed_jacobian(g, keep, second):
    """J[u, j] = d w'_u / d g_j = [u = j] w'_u - w'_u s_j with s = w' or w, entry by entry."""
    n = len(g)
    exps = [float(torch.exp(x)) for x in g]
    total, surviving = sum(exps), sum(e for e, kept in zip(exps, keep, strict=True) if kept)
    w = [e / total for e in exps]
    dropped = [e / surviving if kept else 0.0 for e, kept in zip(exps, keep, strict=True)]
    other = dropped if second == "w'" else w
    rows = [[(u == j) * dropped[u] - dropped[u] * other[j] for j in range(n)] for u in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("drop", "second"),
    [("logits:column@0.3", "w'"), ("weights:column:normalize-grad@0.3", "w'"), ("weights:column@0.3", "w")],
)
def test_jacobian_of_a_whole_row(drop, second, seed):
    torch.manual_seed(seed)
    g, keep = torch.randn(7, dtype=torch.float64), torch.rand(7) > 0.4
    keep[:2] = torch.tensor([True, False])
    ours = jacobian(one_row(drop, keep), g)
    torch.testing.assert_close(ours, closed_jacobian(g, keep, second), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("u", range(4))
def test_k_factor_is_below_one(u):
    """Eq. 7-10: DropKey's own gradient is k times DropAttention's, k = [1 - e^g/S_m] / [1 - e^g/S] < 1."""
    g, keep = torch.randn(6, dtype=torch.float64), torch.tensor([True, True, True, True, False, False])
    dropkey = jacobian(one_row("logits:element@0.3", keep), g)[u, u]
    dropattention = jacobian(one_row("weights:element@0.3", keep), g)[u, u]
    exps = g.exp()
    k = (1 - exps[u] / exps[keep].sum()) / (1 - exps[u] / exps.sum())
    assert 0 < k < 1
    torch.testing.assert_close(dropkey / dropattention, k, rtol=1e-12, atol=0)


def test_only_the_stop_gradient_reaches_a_dropped_logit():
    """A key that DropKey drops gets no gradient; DropAttention with NoGrad still pushes it: -w'_u w_j."""
    g, keep = torch.randn(6, dtype=torch.float64), torch.tensor([True, True, True, True, True, False])
    assert jacobian(one_row("logits:column@0.3", keep), g)[:, 5].abs().max() == 0
    assert jacobian(one_row("weights:column@0.3", keep), g)[:5, 5].max() < 0


@pytest.mark.parametrize("mask", ("all", "causal"))
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ("logits:{}@{}", lambda c: 1),
        ("weights:{}:none@{}", lambda c: c),
        ("weights:{}:rescale@{}", lambda c: c / (1 - P)),
        ("weights:{}@{}", lambda c: c / c.detach()),
    ],
)
def test_one_masked_attention_and_one_number_give_the_whole_row(recipe, factor, pattern, mask):
    """O_m, c O_m, c O_m / (1 - p), c O_m / sg(c), with c the mass of the unmasked softmax that survives."""
    query, key, value = qkv()
    visible = visibility(mask, 2, 5)
    keep = some_keep(pattern, 2, 2, 5, 5).expand(2, 2, 5, 5).clone()
    keep[..., 0] = True  # No row is emptied: the identity is about rows that keep something.
    ours = run(recipe.format(pattern, P), query, key, value, keep, attn_mask=visible)
    logits = (query @ key.transpose(-1, -2) / 3**0.5).masked_fill(~visible, -torch.inf)
    mass = (logits.softmax(-1) * keep).sum(-1, keepdim=True)
    surviving = F.scaled_dot_product_attention(query, key, value, attn_mask=visible & keep)
    assert_same(ours, factor(mass) * surviving, (query, key, value))


def columns(batch, kv_heads, keys):
    """Column masks that keep key 0, so that no causal row is emptied."""
    keep = torch.rand(batch, kv_heads, 1, keys) >= 0.4
    keep[..., 0], keep[..., 1] = True, False
    return keep


@pytest.mark.parametrize("kv_heads", (4, 2, 1))
@pytest.mark.parametrize(("recipe", "detached"), [("logits:column@0.3", False), ("weights:column@0.3", True)])
def test_masked_values_identity(recipe, detached, kv_heads):
    """Attn(q, k, m v) / Attn(q, k, m) = DropKey with an unmodified causal kernel; denominator detached: normalize."""
    query, key, value = qkv(heads=4, kv_heads=kv_heads)
    keep = columns(2, kv_heads, 5)
    mask = keep.transpose(-1, -2).to(torch.float64)
    above = F.scaled_dot_product_attention(query, key, value * mask, is_causal=True, enable_gqa=True)
    ones = mask.expand(2, kv_heads, 5, 3)
    below = F.scaled_dot_product_attention(query, key, ones, is_causal=True, enable_gqa=True)
    ours = run(recipe, query, key, value, keep, is_causal=True)
    assert_same(ours, above / (below.detach() if detached else below), (query, key, value))


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("first_kept", (0, 1, 3))
def test_appended_feature_identity(first_kept, kv_heads):
    """q <- [q, 1/scale], k <- [k, 0 or -C]: DropKey under is_causal; emptied rows keep their full support."""
    query, key, value = qkv(heads=4, kv_heads=kv_heads, queries=6, keys=6)
    keep = columns(2, kv_heads, 6)
    keep[..., :first_kept], keep[..., first_kept] = False, True
    scale = 0.7
    flag = torch.where(keep, 0.0, -100.0).transpose(-1, -2).to(torch.float64)
    longer_query = torch.cat([query, torch.full((2, 4, 6, 1), 1 / scale, dtype=torch.float64)], -1)
    longer_key = torch.cat([key, flag], -1)
    theirs = F.scaled_dot_product_attention(
        longer_query, longer_key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    ours = run("logits:column@0.3", query, key, value, keep, is_causal=True, scale=scale)
    assert_same(ours, theirs, (query, key, value), 1e-11)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(ours[:, :, :first_kept], plain[:, :, :first_kept], rtol=1e-12, atol=1e-12)
