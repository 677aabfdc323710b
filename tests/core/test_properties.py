"""What holds for every shape, mask and recipe of hiddenkey.attention."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hiddenkey
from tests.oracles import KINDS, attention, visibility

MASKS = ("all", "causal", "left", "right", "causal+left", "causal+right", "causal+packed", "window", "window+left")
KV_HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)])


@st.composite
def cases(draw, kinds=tuple(KINDS), masks=MASKS):
    """Tensors, a mask, a drop with its rate and equation, and a random keep mask of its shape."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch, length, width = draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(1, 4))
    heads, kv_heads = draw(KV_HEADS)
    p = draw(st.sampled_from([0.05, 0.3, 0.6, 0.9]))
    pattern = draw(st.sampled_from(["element", "column", "span"]))
    kind = draw(st.sampled_from(kinds))
    sharpness = draw(st.sampled_from([0.1, 1.0, 5.0]))
    queries = length if pattern == "element" else 1
    return {
        "query": sharpness * torch.randn(batch, heads, length, width, dtype=torch.float64),
        "key": torch.randn(batch, kv_heads, length, width, dtype=torch.float64),
        "value": torch.randn(batch, kv_heads, length, width, dtype=torch.float64),
        "visible": visibility(draw(st.sampled_from(masks)), batch, length),
        "drop": kind.format(pattern, p),
        "kind": KINDS[kind],
        "p": p,
        "keep": torch.rand(batch, kv_heads, queries, length) >= p,
        "seed": draw(st.integers(0, 2**31)),
    }


def run(case, *, fixed=False, **changes):
    """The case's attention with its seed, or with its keep mask."""
    case = {**case, **changes}
    torch.manual_seed(case["seed"])
    return hiddenkey.attention(
        case["query"],
        case["key"],
        case["value"],
        case["drop"],
        attn_mask=case["visible"],
        enable_gqa=True,
        keep=case["keep"] if fixed else None,
    )


def weights_of(case, **kwargs):
    """The attention weights: the output for unit vectors as values."""
    batch, heads, length, _ = case["key"].shape
    unit = torch.eye(length, dtype=torch.float64).expand(batch, heads, length, length)
    return run(case, value=unit, **kwargs)


@given(cases())
def test_a_given_mask_is_the_oracle(case):
    groups = case["query"].shape[1] // case["key"].shape[1]
    keep = case["keep"].repeat_interleave(groups, 1)
    query, key, value = case["query"], case["key"], case["value"]
    exact = attention(query, key, value, keep, case["kind"], case["p"], case["visible"])
    torch.testing.assert_close(run(case, fixed=True), exact, rtol=1e-10, atol=1e-12)


@given(cases(), st.booleans())
def test_output_and_gradient_are_finite(case, fixed):
    inputs = {name: case[name].clone().requires_grad_() for name in ("query", "key", "value")}
    out = run(case, fixed=fixed, **inputs)
    assert torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.square().sum(), tuple(inputs.values())):
        assert torch.isfinite(gradient).all()


@given(cases(kinds=("logits:{}@{}", "weights:{}@{}", "weights:{}:normalize-grad@{}")), st.booleans())
def test_normalised_rows_sum_to_one(case, fixed):
    total = weights_of(case, fixed=fixed).sum(-1)
    seen = case["visible"].any(-1).expand_as(total)
    torch.testing.assert_close(total, seen.to(total.dtype), rtol=1e-12, atol=1e-12)


@given(cases(), st.booleans())
def test_weights_are_positive_only_where_visible(case, fixed):
    weights = weights_of(case, fixed=fixed)
    assert (weights >= 0).all()
    assert not weights[~case["visible"].expand_as(weights)].any()


@given(cases(masks=[mask for mask in MASKS if "causal" in mask or "window" in mask]), st.data())
def test_the_future_changes_nothing(case, data):
    length = case["query"].shape[2]
    now = data.draw(st.integers(0, length - 2))
    later = (torch.arange(length) > now)[:, None]
    names = ("query", "key", "value")
    inputs = {name: case[name].clone().requires_grad_() for name in names}
    before = run(case, **inputs)[:, :, : now + 1]
    changed = {name: torch.where(later, torch.randn_like(case[name]) * 9, case[name]) for name in names}
    torch.testing.assert_close(run(case, **changed)[:, :, : now + 1], before, rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(before.sum(), tuple(inputs.values())):
        assert not gradient[:, :, now + 1 :].any()


@given(cases(), st.randoms(use_true_random=False))
def test_examples_and_keys_may_be_permuted(case, random):
    """With a given mask the order of the examples is theirs, and the order of the keys no one's."""
    plain = run(case, fixed=True)
    batch, _, length, _ = case["key"].shape
    order = torch.tensor(random.sample(range(batch), batch))
    names = ("query", "key", "value", "visible", "keep")
    shuffled = run(case, fixed=True, **{name: case[name][order] for name in names})
    torch.testing.assert_close(shuffled, plain[order], rtol=1e-12, atol=1e-12)
    keys = torch.tensor(random.sample(range(length), length))
    moved = {name: case[name][:, :, keys] for name in ("key", "value")}
    moved |= {name: case[name][..., keys] for name in ("visible", "keep")}
    torch.testing.assert_close(run(case, fixed=True, **moved), plain, rtol=1e-10, atol=1e-12)


@given(cases(), st.integers(0, 2))
def test_examples_do_not_touch_one_another(case, which):
    which = which % case["key"].shape[0]
    alone = {name: case[name][which : which + 1] for name in ("query", "key", "value", "visible", "keep")}
    together = run(case, fixed=True)[which : which + 1]
    torch.testing.assert_close(run(case, fixed=True, **alone), together, rtol=1e-12, atol=1e-12)


@given(cases())
def test_grouped_queries_equal_repeated_keys(case):
    groups = case["query"].shape[1] // case["key"].shape[1]
    repeated = {name: case[name].repeat_interleave(groups, 1) for name in ("key", "value", "keep")}
    torch.testing.assert_close(run(case, fixed=True, **repeated), run(case, fixed=True), rtol=1e-12, atol=1e-12)


@given(cases(), st.floats(-50, 50))
def test_a_constant_added_to_a_row_of_logits_changes_nothing(case, shift):
    mask = torch.full(case["visible"].shape, shift, dtype=torch.float64)
    shifted = run(case, fixed=True, visible=mask.masked_fill(~case["visible"], -torch.inf))
    torch.testing.assert_close(shifted, run(case, fixed=True), rtol=1e-9, atol=1e-11)


@given(cases())
def test_a_mask_that_keeps_everything_drops_nothing(case):
    everything = torch.ones(1, dtype=torch.bool)
    factor = 1 - case["p"] if case["kind"] == "rescale" else 1
    plain = attention(case["query"], case["key"], case["value"], everything, "dropkey", 0, case["visible"])
    ours = hiddenkey.attention(
        case["query"],
        case["key"],
        case["value"],
        case["drop"],
        attn_mask=case["visible"],
        enable_gqa=True,
        keep=everything,
    )
    torch.testing.assert_close(ours * factor, plain, rtol=1e-10, atol=1e-12)


@settings(max_examples=50)
@given(
    st.sampled_from(["input", "hidden", "output"]),
    st.sampled_from(["element", "column", "span"]),
    st.sampled_from(["rescale", "none"]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5)),
    st.integers(0, 2**32 - 1),
)
def test_a_stream_is_erased_or_compensated_cell_by_cell(position, pattern, compensation, p, shape, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64) + 1
    out = hiddenkey.StructuredDropout(f"{position}:{pattern}:{compensation}@{p}")(x)
    factor = 1 / (1 - p) if compensation == "rescale" else 1
    assert out.shape == x.shape
    assert (torch.isclose(out, x * factor, rtol=1e-14) | (out == 0)).all()
    if pattern != "element":
        whole = out[..., :1] != 0
        assert torch.equal((out != 0), whole.expand_as(out))
