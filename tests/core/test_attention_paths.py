"""hiddenkey.attention as scaled_dot_product_attention: masks, dtypes, given masks, bad input."""

import pytest
import torch
import torch.nn.functional as F

import hiddenkey
from tests.oracles import KINDS, assert_same, attention, qkv, some_keep, visibility

NO_DROPS = [recipe.format("column", 0) for recipe in KINDS]
CAUSAL = visibility("causal+right", 2, 5)
NUMBERS = torch.linspace(-1, 1, 25, dtype=torch.float64).view(1, 1, 5, 5)
SDPA_MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": CAUSAL},
    "bool over queries and keys": {"attn_mask": visibility("window", 1, 5)[0, 0]},
    "bool over keys": {"attn_mask": torch.tensor([[True, False, True, True, False]])},
    "bool over heads, without batch": {"attn_mask": visibility("causal", 1, 5)[0].expand(4, 5, 5)},
    "bool of every head": {"attn_mask": CAUSAL.expand(2, 4, 5, 5)},
    "additive": {"attn_mask": NUMBERS},
    "additive with minus infinity": {"attn_mask": NUMBERS.expand(2, 1, 5, 5).masked_fill(~CAUSAL, -torch.inf)},
    "additive with the lowest number": {
        "attn_mask": NUMBERS.expand(2, 1, 5, 5).masked_fill(~CAUSAL, torch.finfo(torch.float64).min)
    },
    "scale": {"scale": 0.3},
    "scale and mask": {"scale": 2.0, "attn_mask": CAUSAL},
}


@pytest.mark.parametrize("mask", SDPA_MASKS)
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
@pytest.mark.parametrize("drop", NO_DROPS)
def test_without_drops_it_is_sdpa(drop, kv_heads, mask):
    inputs = qkv(heads=4, kv_heads=kv_heads)
    kwargs = {**SDPA_MASKS[mask], "enable_gqa": kv_heads < 4}
    ours = hiddenkey.attention(*inputs, drop, **kwargs)
    assert_same(ours, F.scaled_dot_product_attention(*inputs, **kwargs), inputs)


@pytest.mark.parametrize("mask", SDPA_MASKS)
@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("drop", ("logits:column@0.5", "weights:element@0.5 + logits:span@0.5", "hiddenkey@0.5"))
def test_outside_of_training_it_is_sdpa(drop, kv_heads, mask):
    inputs = qkv(heads=4, kv_heads=kv_heads)
    kwargs = {**SDPA_MASKS[mask], "enable_gqa": kv_heads < 4}
    before = torch.get_rng_state()
    ours = hiddenkey.attention(*inputs, drop, **kwargs, training=False)
    assert_same(ours, F.scaled_dot_product_attention(*inputs, **kwargs), inputs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert not torch.allclose(ours, hiddenkey.attention(*inputs, drop, **kwargs))


@pytest.mark.parametrize("hidden", (False, -100.0, -torch.inf, torch.finfo(torch.float32).min))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_outside_of_training_a_mask_means_what_it_means_inside(hidden, dtype):
    """A row that sees nothing is zero, and what hides by -100 hides; a mask of float32 serves every dtype."""
    query, key, value = (x.detach().to(dtype) for x in qkv())
    value[:, :, 1] = 1e6
    mask = torch.zeros(5, 5) if hidden is not False else torch.ones(5, 5, dtype=torch.bool)
    mask[2], mask[:, 1] = hidden, hidden
    inside = hiddenkey.attention(query, key, value, "logits:column@0", attn_mask=mask)
    outside = hiddenkey.attention(query, key, value, "logits:column@0.5", attn_mask=mask, training=False)
    assert (outside[:, :, 2] == 0).all()
    torch.testing.assert_close(outside, inside, rtol=1e-2, atol=1e-2)
    assert outside.abs().max() < 100
    with pytest.raises(ValueError, match="fit together"):
        hiddenkey.attention(query, key[:1], value, "logits:column@0.5", training=False)


@pytest.mark.parametrize("causal", (False, True))
def test_queries_and_keys_of_different_lengths(causal):
    inputs = qkv(queries=3, keys=6)
    ours = hiddenkey.attention(*inputs, "logits:span@0", is_causal=causal)
    assert_same(ours, F.scaled_dot_product_attention(*inputs, is_causal=causal), inputs)


def test_values_may_have_another_width():
    query, key, _ = qkv()
    value = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    ours = hiddenkey.attention(query, key, value, "logits:column@0")
    assert_same(ours, F.scaled_dot_product_attention(query, key, value), (query, key, value))


@pytest.mark.parametrize("hidden", (False, -torch.inf, torch.finfo(torch.float64).min))
@pytest.mark.parametrize("pattern", ("element", "column", "span"))
@pytest.mark.parametrize("recipe", KINDS)
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(recipe, pattern, hidden):
    inputs = qkv()
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[2] = False
    mask = visible if hidden is False else torch.zeros(5, 5, dtype=torch.float64).masked_fill(~visible, hidden)
    out = hiddenkey.attention(*inputs, recipe.format(pattern, 0.4), attn_mask=mask)
    assert not out[:, :, 2].any()
    assert out[:, :, [0, 1, 3, 4]].abs().min() > 0
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("recipe", KINDS)
def test_a_kept_key_of_no_weight_gives_no_nan(recipe):
    """The softmax of the dropped sink key is 1, that of all the others rounds to 0 in float32."""
    query, key = torch.ones(1, 1, 1, 1, requires_grad=True), torch.tensor([300.0, -300.0, -301.0]).view(1, 1, 3, 1)
    value = torch.eye(3)[None, None]
    keep = torch.tensor([False, True, True])
    out = hiddenkey.attention(query, key, value, recipe.format("column", 0.3), keep=keep)
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), query)[0]).all()


@pytest.mark.parametrize("additive", (False, True), ids=("bool", "additive"))
@pytest.mark.parametrize("recipe", KINDS)
def test_the_lowest_logit_outranks_the_future(recipe, additive):
    """A hidden key is hidden, not merely unlikely: no finite number stands for it."""
    query, key = torch.full((1, 1, 3, 1), -1e19), torch.full((1, 1, 3, 1), 1e19)
    visible = visibility("causal", 1, 3)
    mask = torch.zeros(1, 1, 3, 3).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    drop = recipe.format("column", 0.9)
    weights = hiddenkey.attention(query, key, torch.eye(3)[None, None], drop, attn_mask=mask, scale=1.0)
    assert torch.isfinite(weights).all()
    assert not weights[~visible].any()
    assert (weights[..., 0, 0] > 0).all()


@pytest.mark.parametrize("mask", ("all", "causal", "causal+right", "window+left"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("recipe", KINDS)
def test_error_in_a_dtype_is_the_references_own(recipe, dtype, mask):
    """Rounding the float64 reference's weights and output to the dtype costs no less than half our whole error."""
    length, p = 16, 0.3
    query, key, value = (x.detach().to(dtype) for x in qkv(2, 4, length, length, 8, kv_heads=2))
    keep, visible = some_keep("column", 2, 4, length, length), visibility(mask, 2, length)
    drop = recipe.format("column", p)
    out = hiddenkey.attention(query, key, value, drop, attn_mask=visible, keep=keep, enable_gqa=True)
    assert out.dtype == dtype
    doubles = query.double(), key.double(), value.double()
    exact = attention(*doubles, keep, KINDS[recipe], p, visible)
    unit = torch.eye(length, dtype=torch.float64).expand(2, 2, length, length)
    weights = attention(*doubles[:2], unit, keep, KINDS[recipe], p, visible).to(dtype)
    rounded = (weights.double() @ doubles[2].repeat_interleave(2, 1)).to(dtype).double()
    floor = max(float((rounded - exact).abs().max()), torch.finfo(dtype).eps)
    assert float((out.double() - exact).abs().max()) <= 4 * floor


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mask", ("causal", "causal+left", "window+right", "window+packed+left"))
@pytest.mark.parametrize("recipe", KINDS)
@pytest.mark.parametrize("pattern", ("element", "column", "span"))
def test_no_nan_in_any_dtype(pattern, recipe, mask, dtype):
    inputs = [torch.randn(3, 2, 8, 4).mul(4).to(dtype).requires_grad_() for _ in range(3)]
    visible = visibility(mask, 3, 8)
    for attn_mask in (visible, torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)):
        out = hiddenkey.attention(*inputs, recipe.format(pattern, 0.7), attn_mask=attn_mask)
        assert torch.isfinite(out).all()
        for gradient in torch.autograd.grad(out.float().square().sum(), inputs):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("causal", (False, True))
def test_autocast_does_what_it_does_to_sdpa(causal):
    inputs = [x.detach().float() for x in qkv(2, 4, 6, 6, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
        ours = hiddenkey.attention(*inputs, "logits:column@0", is_causal=causal)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 5, 5), (2, 2, 5, 5), (2, 2, 1, 5), (1, 1, 1, 5), (5,), (5, 5), (2, 1, 1, 5), (4, 5, 5), (2, 5, 5)],
)
def test_keep_broadcasts_over_query_or_key_value_heads(shape):
    inputs = qkv(heads=4, kv_heads=2)
    keep = torch.rand(shape) > 0.4
    keep[..., 0] = True
    full = keep if keep.dim() < 3 or keep.shape[-3] != 2 else keep.repeat_interleave(2, -3)
    ours = hiddenkey.attention(*inputs, "logits:column@0.3", keep=keep, enable_gqa=True)
    assert_same(ours, attention(*inputs, full, "dropkey", 0.3), inputs)


def test_keep_replaces_the_draw():
    inputs, keep = qkv(), some_keep("element", 2, 2, 5, 5)
    before = torch.random.get_rng_state()
    first = hiddenkey.attention(*inputs, "logits:element@0.9", keep=keep)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, hiddenkey.attention(*inputs, "logits:span@0.1", keep=keep))
    everything = torch.ones(1, dtype=torch.bool)
    kept = hiddenkey.attention(*inputs, "logits:element@0.9", keep=everything)
    torch.testing.assert_close(kept, F.scaled_dot_product_attention(*inputs), rtol=1e-12, atol=1e-12)


def test_logits_and_weights_draw_one_after_the_other():
    """The weights' drop acts on the softmax that the logits' drop left, and guards what is left to see."""
    torch.manual_seed(1)
    unit = torch.eye(50)[None, None].expand(4, 2, 50, 50)
    query = torch.zeros(4, 2, 1, 1)
    out = hiddenkey.attention(query, torch.zeros(4, 2, 50, 1), unit, "logits:column@0.5 + weights:column:rescale@0.5")
    survivors = (out > 0).float().mean()
    assert 0.15 < survivors < 0.35
    torch.testing.assert_close(out.sum(-1).mean(), torch.tensor(1.0), rtol=0.15, atol=0)


@pytest.mark.parametrize("far", [-100.0, -10_000.0, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("recipe", ["logits:column@0.5", "weights:column@0.5"])
def test_what_an_additive_mask_hides_stays_hidden_where_the_other_keys_are_dropped(recipe, far):
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.zeros(5, 5)
    mask[:, 3:] = far
    keep = torch.arange(5) >= 3  # the draw takes all that can be seen
    ours = hiddenkey.attention(query, key, value, recipe, attn_mask=mask, keep=keep)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, plain)


def test_a_bias_of_many_values_hides_nothing():
    query, key, value = torch.randn(3, 2, 4, 3, 8)
    bias = torch.tensor([0.0, -100.0, -300.0])
    ours = hiddenkey.attention(query, key, value, "logits:column@0.5", attn_mask=bias, keep=torch.arange(3) >= 1)
    torch.testing.assert_close(ours, value[:, :, 1:2].expand_as(ours))


def test_draws_follow_torchs_seed():
    inputs = qkv()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(hiddenkey.attention(*inputs, "logits:element@0.5"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_recipe_object_and_drops_elsewhere():
    inputs, keep = qkv(), some_keep("column", 2, 2, 5, 5)
    recipe = hiddenkey.parse("hiddenkey@0.3")
    ours = hiddenkey.attention(*inputs, recipe, keep=keep)
    assert torch.equal(ours, hiddenkey.attention(*inputs, "logits:column@0.3", keep=keep))


def shapes(query=(2, 4, 5, 3), key=(2, 4, 5, 3), value=(2, 4, 5, 3)):
    return [torch.zeros(shape) for shape in (query, key, value)]


def ones(*shape, dtype=torch.bool):
    return torch.ones(*shape, dtype=dtype)


COLUMN = "logits:column@0.1"
FEWER_HEADS = ((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3))
THREE_HEADS = ((2, 4, 5, 3), (2, 3, 5, 3), (2, 3, 5, 3))
TWO = "logits:column@0.1 + weights:column@0.1"
BAD = {
    "three dimensions": (shapes(query=(4, 5, 3)), COLUMN, {}, ["(4, 5, 3)", "(B, heads, length, D)"]),
    "another batch": (shapes(query=(3, 4, 5, 3)), COLUMN, {}, ["(3, 4, 5, 3)", "fit"]),
    "another width": (shapes(query=(2, 4, 5, 2)), COLUMN, {}, ["(2, 4, 5, 2)", "fit"]),
    "fewer values": (shapes(value=(2, 4, 4, 3)), COLUMN, {}, ["(2, 4, 4, 3)", "fit"]),
    "fewer heads": (shapes(*FEWER_HEADS), COLUMN, {}, ["4", "2", "enable_gqa"]),
    "heads that do not divide": (
        shapes(*THREE_HEADS), COLUMN, {"enable_gqa": True}, ["4", "3", "multiple"],
    ),
    "mask and causal": (
        shapes(), COLUMN, {"attn_mask": ones(5, 5), "is_causal": True}, ["attn_mask", "is_causal"],
    ),
    "an integer mask": (shapes(), COLUMN, {"attn_mask": ones(5, 5, dtype=torch.long)}, ["int64", "bool"]),
    "a mask of another length": (shapes(), COLUMN, {"attn_mask": ones(5, 7)}, ["(5, 7)", "(2, 4, 5, 5)"]),
    "a mask of five dimensions": (
        shapes(), COLUMN, {"attn_mask": ones(1, 1, 1, 5, 5)}, ["(1, 1, 1, 5, 5)", "(2, 4, 5, 5)"],
    ),
    "a float keep": (shapes(), COLUMN, {"keep": ones(5, dtype=torch.float)}, ["bool", "float32"]),
    "a keep of another length": (shapes(), COLUMN, {"keep": ones(4)}, ["(4,)", "broadcast"]),
    "a keep of five dimensions": (shapes(), COLUMN, {"keep": ones(1, 2, 4, 5, 5)}, ["(1, 2, 4, 5, 5)"]),
    "one keep for two drops": (shapes(), TWO, {"keep": ones(5)}, ["2", "logits:column@0.1", "weights:column@0.1"]),
    "no drop of attention": (shapes(), "hidden:element@0.1", {}, ["hidden:element@0.1", "logits or weights"]),
    "the baseline": (shapes(), "baseline", {}, ["baseline", "logits:column@0.1"]),
    "layers": (shapes(), "logits[1/2:]:column@0.1", {}, ["logits[1/2:]:column@0.1", "leave out [1/2:]"]),
    "no recipe": (shapes(), "logits:colum@0.1", {}, ["'colum'", "'column'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    inputs, drop, kwargs, words = BAD[case]
    with pytest.raises(ValueError) as caught:
        hiddenkey.attention(*inputs, drop, **kwargs)
    for word in words:
        assert word in str(caught.value)


def tensors(dtype=torch.float32, queries=5, keys=5, batch=2, heads=4):
    return [torch.ones(batch, heads, length, 8, dtype=dtype) for length in (queries, keys, keys)]


@pytest.mark.parametrize(
    "recipe", ("logits:column@0.1", "logits:span@0.1", "logits:element@0.1", "weights:element@0.1")
)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "sizes", ({"queries": 0}, {"queries": 0, "keys": 0}, {"keys": 0}, {"batch": 0}, {"heads": 0}), ids=str
)
def test_nothing_to_attend_to(recipe, causal, sizes):
    """torch's kernels divide by such lengths, and the process would die."""
    inputs = [x.requires_grad_() for x in tensors(**sizes)]
    out = hiddenkey.attention(*inputs, recipe, is_causal=causal)
    wanted = {"batch": 2, "heads": 4, "queries": 5, **sizes}
    assert out.shape == (wanted["batch"], wanted["heads"], wanted["queries"], 8)
    assert (out == 0).all()
    out.sum().backward()
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in inputs)


@pytest.mark.parametrize("recipe", ("logits:column@0.1", "logits:element@0.1", "weights:element@0.1"))
def test_kinds_that_no_kernel_may_see(recipe):
    query, key, value = tensors()
    for inputs, said in (
        (tensors(torch.int64), "floating point"),
        ((query, key.double(), value), "one dtype"),
        ((query, key.to("meta"), value), "one device"),
        ((query, key, value.to("meta")), "one device"),
    ):
        with pytest.raises(ValueError, match=said):
            hiddenkey.attention(*inputs, recipe)
    for options, said in (
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool, device="meta")}, "one device"),
        ({"keep": torch.ones(5, dtype=torch.bool, device="meta")}, "one device"),
        ({"scale": 0.0}, "scale must be more than 0"),
        ({"scale": -1.0}, "scale must be more than 0"),
    ):
        with pytest.raises(ValueError, match=said):
            hiddenkey.attention(query, key, value, recipe, **options)
    with torch.autocast("cpu", torch.bfloat16):
        hiddenkey.attention(query, key.bfloat16(), value, recipe)


@pytest.mark.parametrize("mask", (torch.tensor(True), torch.tensor([True, False, True, True, True]), torch.zeros(5)))
def test_outside_of_training_a_mask_may_have_few_dimensions(mask):
    query, key, value = (torch.randn_like(x) for x in tensors())
    inside = hiddenkey.attention(query, key, value, "logits:column@0", attn_mask=mask)
    outside = hiddenkey.attention(query, key, value, "logits:column@0.5", attn_mask=mask, training=False)
    torch.testing.assert_close(outside, inside)


def test_nothing_to_see_in_half_precision_is_no_nan():
    query = torch.full((2, 4, 500, 64), 100.0, dtype=torch.float16)
    empty = torch.ones(2, 4, 0, 64, dtype=torch.float16)
    assert (hiddenkey.attention(query, empty, empty, "logits:column@0.1") == 0).all()


def test_what_is_no_number_in_a_mask_is_seen():
    query, key, value = tensors()
    mask = torch.zeros(5, 5)
    mask[1, 2] = torch.nan
    out = hiddenkey.attention(query, key, value, "logits:column@0", attn_mask=mask)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 2:].isfinite().all()
