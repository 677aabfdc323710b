"""StructuredDropout: a module in the place of nn.Dropout."""

import copy
import pickle

import pytest
import torch
from torch import nn

import hiddenkey
from hiddenkey import StructuredDropout

PATTERNS = ("element", "column", "span")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_drops_in_training_and_rescales(pattern):
    x = torch.randn(4, 10, 6, dtype=torch.float64)
    out = StructuredDropout(f"hidden:{pattern}@0.3")(x)
    kept = out != 0
    assert 0 < int((~kept).sum()) < x.numel()
    torch.testing.assert_close(out[kept], x[kept] / 0.7, rtol=1e-15, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_is_the_identity_in_evaluation_and_at_rate_zero(pattern):
    x = torch.randn(4, 10, 6)
    before = torch.random.get_rng_state()
    assert torch.equal(StructuredDropout(f"hidden:{pattern}@0.3").eval()(x), x)
    assert torch.equal(StructuredDropout(f"hidden:{pattern}@0")(x), x)
    keep = torch.zeros(1, dtype=torch.bool)
    assert torch.equal(StructuredDropout(f"hidden:{pattern}@0.3").eval()(x, keep=keep), x)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(4, 10, 6), (1, 10, 1), (4, 1, 1), (10, 1), (6,), (10, 6)])
@pytest.mark.parametrize("position", ("input", "hidden", "output"))
def test_keep_replaces_the_draw(position, shape):
    x = torch.randn(4, 10, 6, requires_grad=True)
    keep = torch.rand(shape) > 0.5
    before = torch.random.get_rng_state()
    out = StructuredDropout(f"{position}:column@0.2")(x, keep=keep)
    assert torch.equal(torch.random.get_rng_state(), before)
    wanted = torch.where(keep, torch.tensor(1 / 0.8), torch.tensor(0.0)).expand(4, 10, 6)
    torch.testing.assert_close(out, x * wanted)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], wanted)


def test_valid_confines_spans_and_nothing_else():
    x = torch.ones(200, 10, 1)
    valid = torch.arange(10).expand(200, 10) >= 6
    out = StructuredDropout("hidden:span@0.5")(x, valid)
    assert out[:, :6].all()
    assert ((out == 0).sum((1, 2)) == 2).all()
    assert (StructuredDropout("hidden:column@0.5")(x, valid)[:, :6] == 0).any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dtype_is_kept(pattern, dtype):
    x = torch.randn(4, 10, 6).to(dtype).requires_grad_()
    out = StructuredDropout(f"hidden:{pattern}@0.3")(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    exact = (x.double() / 0.7) * (out != 0)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_compensation_none_only_erases():
    x = torch.randn(4, 10, 6)
    out = StructuredDropout("hidden:element:none@0.3")(x)
    assert torch.equal(out[out != 0], x[out != 0])


def test_takes_the_place_of_dropout_in_a_model():
    model = nn.Sequential(nn.Linear(6, 6), StructuredDropout("hidden:column@0.5"), nn.Linear(6, 2))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(model[1].parameters())
    assert "hidden:column@0.5" in repr(model)
    x = torch.randn(2, 8, 6)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("clone", (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))))
def test_survives_deepcopy_and_pickle(clone):
    module, x = StructuredDropout("hidden:span:none@0.3"), torch.randn(4, 10, 6)
    twin = clone(module)
    assert (twin.drop, twin.training, str(twin)) == (module.drop, True, str(module))
    torch.manual_seed(4)
    first = module(x)
    torch.manual_seed(4)
    assert torch.equal(first, twin(x))
    assert not clone(module.eval()).training


BAD_RECIPES = {
    "logits:column@0.1": ["logits:column@0.1", "input or hidden or output"],
    "baseline": ["baseline", "input:column@0.1"],
    "input:element@0.1 + hidden:element@0.1": ["one drop", "2"],
    "hidden[:4]:element@0.1": ["leave out [:4]"],
    "hidden:element:normalize@0.1": ["normalize", "none, rescale"],
    "hidden:elemnt@0.1": ["Did you mean 'element'"],
}


@pytest.mark.parametrize("recipe", BAD_RECIPES)
def test_bad_recipes(recipe):
    with pytest.raises(hiddenkey.RecipeError) as caught:
        StructuredDropout(recipe)
    for word in BAD_RECIPES[recipe]:
        assert word in str(caught.value)


def ones(*shape, dtype=torch.bool):
    return torch.ones(*shape, dtype=dtype)


BAD_TENSORS = {
    "two dimensions": ((torch.ones(4, 6),), ["(B, T, D)", "(4, 6)"]),
    "a float valid": ((torch.ones(4, 5, 6), ones(4, 5, dtype=torch.float)), ["(4, 5)", "float32", "bool"]),
    "a valid of another length": ((torch.ones(4, 5, 6), ones(4, 6)), ["(4, 5)", "(4, 6)"]),
    "a float keep": ((torch.ones(4, 5, 6), None, ones(4, 5, 6, dtype=torch.float)), ["bool", "float32"]),
    "a keep of another width": ((torch.ones(4, 5, 6), None, ones(4, 5, 7)), ["(4, 5, 6)", "(4, 5, 7)"]),
    "a keep that widens": ((torch.ones(4, 1, 6), None, ones(4, 5, 6)), ["(4, 1, 6)", "(4, 5, 6)"]),
    "a keep of four dimensions": ((torch.ones(4, 5, 6), None, ones(2, 4, 5, 6)), ["(2, 4, 5, 6)"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case):
    inputs, words = BAD_TENSORS[case]
    with pytest.raises(ValueError) as caught:
        StructuredDropout("hidden:span@0.1")(*inputs)
    for word in words:
        assert word in str(caught.value)


def test_it_exports_with_dynamic_lengths():
    module = hiddenkey.StructuredDropout("hidden:element@0.3").train()
    x = torch.ones(2, 6, 3)
    torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim("length")},), strict=False)


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool))
def test_whole_numbers_cannot_be_rescaled(dtype):
    with pytest.raises(ValueError, match=f"floating point.*{dtype}"):
        hiddenkey.StructuredDropout("hidden:element@0.3")(torch.ones(1, 3, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("length", "p", "dropped"), [(50, 0.53, 27), (75, 0.42, 32), (150, 0.21, 32), (25, 0.58, 15)]
)
def test_a_span_of_half_a_place_more_is_rounded_up(length, p, dropped):
    """26.5, 31.5, 31.5 and 14.5 places, which float32 takes for less, and of the last float64 too."""
    out = hiddenkey.StructuredDropout(f"hidden:span:none@{p}")(torch.ones(1, length, 1))
    assert int((out == 0).sum()) == dropped
