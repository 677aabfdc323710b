"""Statistics of the patterns (arXiv 2403.00812, Fig. 2) and the guard against emptied rows.

Masks are observed from outside. With zero queries and unit vectors as values the attention output is the
weights themselves, so that a kept key shows as a positive number; dropped features of a vector of ones are zero.
"""

from fractions import Fraction
from math import floor

import pytest
import torch
from scipy.stats import binom, chisquare

import hiddenkey
from tests.oracles import KINDS, visibility

PATTERNS = ("element", "column", "span")
RATES = ("0.02", "0.1", "0.3")


def watch(drop, batch, heads, queries, keys, *, kv_heads=None, mask=None, keep=None):
    """The keys that met the values, bool (B, H, Q, K); a weight of 1e-30 is one that a shift has underflowed."""
    kv = (batch, heads if kv_heads is None else kv_heads, keys)
    unit = torch.eye(keys).expand(*kv, keys)
    query, key = torch.zeros(batch, heads, queries, 1), torch.zeros(*kv, 1)
    return hiddenkey.attention(query, key, unit, drop, attn_mask=mask, enable_gqa=True, keep=keep) > 1e-30


def watch_stream(drop, batch, tokens, width, valid=None):
    """The features that survived, bool (B, T, D)."""
    return hiddenkey.StructuredDropout(drop)(torch.ones(batch, tokens, width), valid) != 0


def assert_rate(events, p):
    """The count lies in its binomial interval, which is so narrow that a rate 10 % off would leave it."""
    n, count = events.numel(), int(events.sum())
    low, high = binom.interval(1 - 1e-4, n, p)
    assert binom.ppf(0.999, n, 0.9 * p) < low, "too few cells to notice a rate 10 % too low"
    assert binom.isf(0.999, n, 1.1 * p) > high, "too few cells to notice a rate 10 % too high"
    assert low <= count <= high, f"{count / n:.4f} dropped, {p} wanted"


@pytest.mark.parametrize("p", (1e-5, 1e-4, 1 - 1e-4, 1 - 1e-5))
def test_rates_at_both_ends(p):
    """Fewer than one in 65,536, and more: no rate is rounded to the other side."""
    drop, rare = hiddenkey.StructuredDropout(f"hidden:element:none@{p!r}"), min(p, 1 - p)
    kept = sum(float(drop(torch.ones(1, 1000, 1000)).sum(dtype=torch.float64)) for _ in range(5))
    seen = kept if p > 0.5 else 5e6 - kept
    low, high = binom.interval(1 - 1e-6, 5 * 10**6, rare)
    assert 0 < low <= seen <= high


@pytest.mark.parametrize("p", (1e-9, 1 - 1e-9, 1 - 2**-40))
def test_rates_next_to_none_and_all(p):
    kept = hiddenkey.StructuredDropout(f"hidden:element:none@{p!r}")(torch.ones(1, 1000, 1000)).sum()
    assert abs(float(kept) - 1e6 * (p < 0.5)) <= 1


@pytest.mark.parametrize("p", (0.003, 0.0055, 0.1, 0.5, 0.998))
def test_cells_fall_independently(p):
    """Of every eight neighbours as many fall as of eight coins, whether bytes decide, gaps, or both."""
    kept = hiddenkey.StructuredDropout(f"hidden:element:none@{p}")(torch.ones(1, 2000, 2000)).view(-1, 8)
    counts = torch.bincount((8 - kept.sum(-1)).long(), minlength=9).double()
    wanted = torch.from_numpy(binom.pmf(range(9), 8, p)) * len(kept)
    common = wanted > 20
    pooled = [torch.cat([x[common], x[~common].sum().view(1)]) for x in (counts, wanted)]
    assert chisquare(pooled[0] + 1e-9, pooled[1] + 1e-9).pvalue > 1e-5


def test_the_seed_decides_the_draw():
    drop, x = hiddenkey.StructuredDropout("hidden:element@0.3"), torch.ones(2, 50, 50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(drop(x))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def cells_for(p):
    """Enough cells for `assert_rate`."""
    return int(64 * (1 - p) / (0.01 * p))


def run_length(p, length):
    """round(p * length), halves up, in exact arithmetic."""
    return floor(Fraction(p) * length + Fraction(1, 2))


def runs(dropped):
    """(start, stop) of every run of True in a bool vector."""
    edges = [False, *dropped.tolist(), False]
    starts = [i for i in range(len(dropped)) if edges[i + 1] and not edges[i]]
    stops = [i for i in range(1, len(edges)) if edges[i] and not edges[i + 1]]
    return list(zip(starts, stops, strict=True))


# The rate.


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("position", ("logits", "weights"))
def test_rate_of_elements_in_attention(position, p):
    keys = 256
    rows = cells_for(float(p)) // (2 * 2 * keys) + 1
    assert_rate(~watch(f"{position}:element@{p}", 2, 2, rows, keys), float(p))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("position", ("logits", "weights"))
def test_rate_of_columns_in_attention(position, p):
    keys = 64
    batch = cells_for(float(p)) // (8 * keys) + 1
    assert_rate(~watch(f"{position}:column@{p}", batch, 8, 1, keys), float(p))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("position", ("input", "hidden", "output"))
def test_rate_in_a_stream(position, p):
    cells = cells_for(float(p))
    assert_rate(~watch_stream(f"{position}:element@{p}", 4, 64, cells // 256 + 1), float(p))
    assert_rate(~watch_stream(f"{position}:column@{p}", cells // 64 + 1, 64, 2)[..., 0], float(p))


@pytest.mark.parametrize("length", (1, 2, 5, 10, 30, 77))
@pytest.mark.parametrize("p", ("0.05", "0.1", "0.15", "0.25", "0.35", "0.5"))
def test_a_span_is_one_run_of_the_rounded_length(p, length):
    wanted = run_length(p, length)
    stream = ~watch_stream(f"hidden:span@{p}", 40, length, 2)[..., 0]
    attention = ~watch(f"weights:span:none@{p}", 10, 2, 1, length).flatten(0, 2)
    for dropped in (*stream, *(attention if wanted < length else ())):
        assert [stop - start for start, stop in runs(dropped)] == [wanted] * (wanted > 0)


def test_halves_round_up():
    assert [run_length("0.15", 10), run_length("0.05", 10), run_length("0.1", 4)] == [2, 1, 0]


@pytest.mark.parametrize("site", ("attention", "stream"))
def test_span_starts_are_uniform(site):
    if site == "attention":
        dropped = ~watch("logits:span@0.3", 2000, 4, 1, 10)[:, :, 0].flatten(0, 1)
    else:
        dropped = ~watch_stream("hidden:span@0.3", 8000, 10, 1)[..., 0]
    starts = dropped.int().argmax(-1)
    counts = torch.bincount(starts, minlength=8)
    assert len(counts) == 8
    assert chisquare(counts).pvalue > 1e-4


# What is shared and what is independent.


@pytest.mark.parametrize("pattern", ("column", "span"))
@pytest.mark.parametrize("position", ("logits", "weights"))
def test_a_column_is_dropped_for_every_query(position, pattern):
    keep = watch(f"{position}:{pattern}@0.2", 8, 4, 16, 64)
    assert torch.equal(keep, keep[:, :, :1].expand_as(keep))


@pytest.mark.parametrize("pattern", ("column", "span"))
def test_a_token_loses_its_whole_vector(pattern):
    keep = watch_stream(f"hidden:{pattern}@0.2", 8, 64, 16)
    assert torch.equal(keep, keep[..., :1].expand_as(keep))


def assert_independent(first, second, p=0.3):
    """Two independent masks drop a cell together with probability p squared."""
    both = ~first & ~second
    low, high = binom.interval(1 - 1e-4, both.numel(), p * p)
    assert high < 0.6 * p * both.numel(), "too few cells to tell shared from independent draws"
    assert low <= int(both.sum()) <= high


@pytest.mark.parametrize("position", ("logits", "weights"))
@pytest.mark.parametrize("pattern", ("element", "column"))
def test_heads_examples_and_calls_are_independent(position, pattern):
    drop = f"{position}:{pattern}@0.3"
    keep = watch(drop, 16, 16, 2, 64)
    assert_independent(keep[:, 0::2, 0], keep[:, 1::2, 0])
    assert_independent(keep[0::2, :, 0], keep[1::2, :, 0])
    assert_independent(keep[:, :, 0], watch(drop, 16, 16, 2, 64)[:, :, 0])
    if pattern == "element":
        assert_independent(keep[:, :, 0], keep[:, :, 1])
    assert_independent(keep[:, :, 0, :-1], keep[:, :, 0, 1:])


def test_tokens_features_examples_and_calls_are_independent():
    keep = watch_stream("hidden:element@0.3", 16, 32, 32)
    assert_independent(keep[:, 0::2], keep[:, 1::2])
    assert_independent(keep[..., 0::2], keep[..., 1::2])
    assert_independent(keep[0::2], keep[1::2])
    assert_independent(keep, watch_stream("hidden:element@0.3", 16, 32, 32))
    token = watch_stream("hidden:column@0.3", 64, 64, 1)[..., 0]
    assert_independent(token[0::2], token[1::2])
    assert_independent(token[:, 0::2], token[:, 1::2])


def test_span_starts_differ_between_heads_examples_and_calls():
    """Of 71 starts two independent ones agree in 1 of 71 pairs."""
    keep = watch("logits:span@0.3", 20, 20, 1, 100)[:, :, 0]
    starts = (~keep).int().argmax(-1)
    again = (~watch("logits:span@0.3", 20, 20, 1, 100)[:, :, 0]).int().argmax(-1)
    for first, second in ((starts[:, 1:], starts[:, :-1]), (starts[1:], starts[:-1]), (starts, again)):
        assert int((first == second).sum()) <= binom.isf(1e-5, first.numel(), 1 / 71)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", ("logits", "weights"))
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_query_heads_share_the_draw_of_their_key_value_head(kv_heads, position, pattern):
    keep = watch(f"{position}:{pattern}@0.3", 8, 8, 4, 64, kv_heads=kv_heads)
    groups = keep.unflatten(1, (kv_heads, 8 // kv_heads))
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    if kv_heads > 1:
        assert not torch.equal(groups[:, 0, 0], groups[:, 1, 0])


# True lengths: padding and packed documents.

LENGTHS = (20, 13, 6, 1)


def padding(side):
    """bool (B, T): documents of LENGTHS, padded to 20."""
    place = torch.arange(20)
    rows = [(place < n) if side == "right" else (place >= 20 - n) for n in LENGTHS]
    return torch.stack(rows)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("causal", (False, True))
def test_a_span_stays_inside_the_true_length_of_attention(causal, side):
    valid = padding(side)
    mask = valid[:, None, None] & (visibility("causal", 1, 20) if causal else torch.ones(1, dtype=torch.bool))
    seen = set()
    for _ in range(60):
        keep = watch("weights:span:none@0.3", 4, 2, 20, 20, mask=mask)
        for b, length in enumerate(LENGTHS):
            last = int(valid[b].nonzero().max())  # This query sees its whole document.
            for h in range(2):
                dropped = valid[b] & ~keep[b, h, last]
                assert [stop - start for start, stop in runs(dropped)] == [run_length("0.3", length)] * (length > 1)
                seen |= {start for start, _ in runs(dropped)} if b == 1 else set()
    offset = 0 if side == "right" else 7
    assert seen == {offset + start for start in range(13 - 4 + 1)}, "starts fill the true length and no more"


@pytest.mark.parametrize("side", ("left", "right"))
def test_a_span_stays_inside_the_true_length_of_a_stream(side):
    valid, seen = padding(side), set()
    for _ in range(80):
        keep = watch_stream("hidden:span@0.3", 4, 20, 3, valid)
        assert keep[~valid].all()
        for b, length in enumerate(LENGTHS):
            found = runs(~keep[b, :, 0])
            assert [stop - start for start, stop in found] == [run_length("0.3", length)] * (length > 1)
            seen |= {start for start, _ in found} if b == 1 else set()
    offset = 0 if side == "right" else 7
    assert seen == {offset + start for start in range(13 - 4 + 1)}


DOCUMENTS = ((0, 5), (5, 12), (12, 22))


def packed(causal):
    """Block-diagonal mask over DOCUMENTS, the last two places padding: bool (1, 1, 24, 24)."""
    mask = torch.zeros(24, 24, dtype=torch.bool)
    for start, stop in DOCUMENTS:
        mask[start:stop, start:stop] = True
    return (mask.tril() if causal else mask)[None, None]


@pytest.mark.parametrize("position", ("logits", "weights"))
@pytest.mark.parametrize("causal", (False, True))
def test_every_packed_document_has_one_run_of_its_own(causal, position):
    seen = {document: set() for document in DOCUMENTS}
    for _ in range(60):
        keep = watch(f"{position}:span@0.4", 1, 4, 24, 24, mask=packed(causal))[0]
        for start, stop in DOCUMENTS:
            for head in keep:
                found = runs(~head[stop - 1, start:stop])
                assert [b - a for a, b in found] == [run_length("0.4", stop - start)]
                seen[start, stop].add(found[0][0])
    for (start, stop), starts in seen.items():
        assert starts == set(range(stop - start - run_length("0.4", stop - start) + 1))


def test_documents_of_one_row_draw_for_themselves():
    """Two documents of ten places: their runs of three agree in 1 of 8 rows."""
    mask = visibility("packed", 1, 20)
    keep = watch("weights:span:none@0.3", 200, 4, 20, 20, mask=mask)
    first, second = ((~keep[:, :, start, start : start + 10]).int().argmax(-1) for start in (0, 10))
    low, high = binom.interval(1 - 1e-4, first.numel(), 1 / 8)
    assert low <= int((first == second).sum()) <= high


# The guard: no row is emptied, nothing invisible is seen.

MASKS = (
    "all",
    "causal",
    "left",
    "right",
    "causal+left",
    "causal+right",
    "causal+packed",
    "window",
    "window+left",
    "window+right",
    "causal+packed+left",
    "window+packed+right",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recipe", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_row_is_emptied_by_a_draw(pattern, recipe, mask):
    visible = visibility(mask, 3, 8).expand(3, 2, 8, 8)
    for _ in range(5):
        keep = watch(recipe.format(pattern, 0.8), 3, 2, 8, 8, mask=visible)
        assert not (keep & ~visible).any(), "an invisible key was attended to"
        assert torch.equal(keep.any(-1), visible.any(-1)), "a row that sees something was emptied"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recipe", KINDS)
def test_a_row_emptied_by_the_mask_keeps_its_full_support(recipe, mask):
    """Keys 0..4 are dropped for everyone: a row that sees only these equals attention without drops, rescaled
    like the others where the recipe says so."""
    visible = visibility(mask, 3, 8).expand(3, 2, 8, 8)
    query, key, value = torch.randn(3, 3, 2, 8, 4, dtype=torch.float64)
    keep = (torch.arange(8) > 4).expand(3, 2, 1, 8)
    emptied = visible.any(-1) & ~(visible & keep).any(-1)
    drop = recipe.format("column", 0.3)
    ours = hiddenkey.attention(query, key, value, drop, attn_mask=visible, keep=keep)
    logits = (query @ key.transpose(-1, -2) / 2).masked_fill(~visible, -torch.inf)
    plain = (logits.softmax(-1) @ value) / (0.7 if "rescale" in recipe else 1)
    assert emptied.any() or mask in ("all", "left", "right")
    torch.testing.assert_close(ours[emptied], plain[emptied], rtol=1e-12, atol=1e-12)
    thinned = (visible & keep).any(-1) & (visible & ~keep).any(-1)
    assert not torch.isclose(ours[thinned], plain[thinned]).all(-1).any()


@pytest.mark.parametrize("additive", (False, True), ids=("bool", "additive"))
@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("recipe", KINDS)
def test_nothing_leaks_from_invisible_keys(recipe, mask, additive):
    """Neither the output nor the gradient of a row depends on keys and values the row can't see."""
    visible = visibility(mask, 3, 8)
    attn_mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
    query, key, value = (torch.randn(3, 2, 8, 4, requires_grad=True) for _ in range(3))

    def run(key, value):
        torch.manual_seed(3)
        return hiddenkey.attention(query, key, value, recipe.format("column", 0.7), attn_mask=attn_mask)

    out = run(key, value)
    for i in (0, 3, 7):
        hidden = ~visible[:, 0, i][:, None, :, None]
        other = run(torch.where(hidden, 50.0, key), torch.where(hidden, -50.0, value))
        assert torch.equal(out[:, :, i], other[:, :, i])
        for gradient in torch.autograd.grad(out[:, :, i].sum(), (key, value), retain_graph=True):
            assert torch.isfinite(gradient).all()
            assert not gradient[hidden.expand_as(gradient)].any()
