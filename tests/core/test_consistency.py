"""Consistency losses (arXiv 2403.00812, eq. 11-12) against torch.distributions and closed forms, in float64."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import hiddenkey


def probabilities(row):
    """softmax of a vector, scalar by scalar."""
    exps = [torch.exp(x) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def symmetric(p, q):
    return (kl(p, q) + kl(q, p)) / 2


def textbook_js(p, q):
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def over_rows(divergence, first, second):
    """One value per row of (N, V) logits."""
    rows = zip(first, second, strict=True)
    return torch.stack([divergence(probabilities(a), probabilities(b)) for a, b in rows])


def squares(first, second):
    rows = zip(first, second, strict=True)
    return torch.stack([sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in rows])


CLOSED = {
    "kl": lambda a, b: over_rows(symmetric, a, b),
    "kl-clean": lambda a, b: over_rows(symmetric, a, b),
    "kl-rdrop": lambda a, b: over_rows(symmetric, a, b),
    "js": lambda a, b: over_rows(kl, a, b),
    "jsd": lambda a, b: over_rows(textbook_js, a, b),
    "mse": squares,
}
BOTH_SIDES = {"kl-rdrop"}


def categorical(name, first, second):
    """The same from torch.distributions."""
    p, q = Categorical(logits=first), Categorical(logits=second)
    if name == "js":
        return kl_divergence(p, q)
    if name == "jsd":
        middle = Categorical(probs=(p.probs + q.probs) / 2)
        return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2
    return (kl_divergence(p, q) + kl_divergence(q, p)) / 2


def views(*shape, dtype=torch.float64):
    return [(2 * torch.randn(*shape)).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", CLOSED)
def test_value_is_the_closed_form(name):
    first, second = views(6, 5)
    ours = hiddenkey.consistency_loss(name, first, second, reduction="none")
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, CLOSED[name](first, second), rtol=1e-12, atol=1e-13)
    assert (ours > 0).all()


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "mse"])
def test_value_agrees_with_torch_distributions(name):
    first, second = views(3, 4, 7)
    ours = hiddenkey.consistency_loss(name, first, second, reduction="none")
    assert ours.shape == (3, 4)
    torch.testing.assert_close(ours, categorical(name, first, second), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CLOSED)
def test_gradient_is_that_of_the_closed_form(name):
    first, second = views(6, 5)
    hiddenkey.consistency_loss(name, first, second).backward()
    wanted = torch.autograd.grad(CLOSED[name](first, second).mean(), (first, second))
    torch.testing.assert_close(first.grad, wanted[0], rtol=1e-11, atol=1e-13)
    assert first.grad.abs().max() > 1e-3
    if name in BOTH_SIDES:
        torch.testing.assert_close(second.grad, wanted[1], rtol=1e-11, atol=1e-13)
    else:
        assert second.grad is None


def test_gradient_of_kl_by_hand():
    """d/dx_i of KL(P||Q) is p_i (log p_i - log q_i - KL), of KL(Q||P) it is p_i - q_i."""
    first, second = views(1, 6)
    p, q = first[0].softmax(-1).detach(), second[0].softmax(-1).detach()
    one_way = p * ((p / q).log() - (p * (p / q).log()).sum())
    for name, wanted in (("js", one_way), ("kl", (one_way + p - q) / 2)):
        (gradient,) = torch.autograd.grad(hiddenkey.consistency_loss(name, first, second), first)
        torch.testing.assert_close(gradient[0], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CLOSED)
def test_equal_views_cost_nothing(name):
    first, _ = views(4, 5)
    loss = hiddenkey.consistency_loss(name, first, first.detach().clone())
    (gradient,) = torch.autograd.grad(loss, first)
    assert abs(loss.item()) < 1e-15
    assert gradient.abs().max() < 1e-15


def test_js_is_one_way_and_the_others_are_symmetric():
    first, second = views(4, 5)
    for name in CLOSED:
        there = hiddenkey.consistency_loss(name, first, second)
        back = hiddenkey.consistency_loss(name, second, first)
        assert torch.allclose(there, back) == (name != "js")


def test_jsd_is_at_most_log_two():
    first = torch.tensor([[200.0, 0.0]], dtype=torch.float64)
    loss = hiddenkey.consistency_loss("jsd", first, first.flip(-1))
    torch.testing.assert_close(loss, torch.tensor(2.0, dtype=torch.float64).log())


@pytest.mark.parametrize("name", CLOSED)
def test_rows_that_do_not_count(name):
    """-100 labels and padding: whatever stands there changes neither value nor gradient."""
    first, second = views(3, 4, 5)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        first[2], second[0, 3] = torch.nan, torch.inf
    values = CLOSED[name](first[valid], second[valid])
    for reduction, wanted in (("mean", values.sum() / 6), ("sum", values.sum())):
        loss = hiddenkey.consistency_loss(name, first, second, valid=valid, reduction=reduction)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
        ours = torch.autograd.grad(loss, first)[0]
        theirs = torch.autograd.grad(wanted, first, retain_graph=True)[0]
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-11, atol=1e-13)
        assert not ours[~valid].any()
    each = hiddenkey.consistency_loss(name, first, second, valid=valid, reduction="none")
    torch.testing.assert_close(each[valid], values, rtol=1e-12, atol=1e-13)
    assert torch.equal(each[~valid], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("name", CLOSED)
def test_without_any_row_the_loss_is_zero(name, reduction):
    first, second = views(3, 5)
    valid = torch.zeros(3, dtype=torch.bool)
    loss = hiddenkey.consistency_loss(name, first, second, valid=valid, reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert not first.grad.any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", CLOSED)
def test_half_precision_is_computed_in_float32(name, dtype):
    first, second = views(16, 50, dtype=dtype)
    loss = hiddenkey.consistency_loss(name, first, second)
    assert loss.dtype == torch.float32
    exact = CLOSED[name](first.double(), second.double()).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-7)
    loss.backward()
    assert first.grad.dtype == dtype
    assert torch.isfinite(first.grad).all()


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "mse"])
def test_far_apart_logits_stay_finite(name):
    first = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = hiddenkey.consistency_loss(name, first, first.detach().flip(-1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(first.grad).all()


BAD = {
    "a misspelt name": (("kll", (2, 3), (2, 3)), {}, ["'kll'", "Did you mean 'kl'", "jsd", "mse"]),
    "another name": (("nothing-like-it", (2, 3), (2, 3)), {}, ["nothing-like-it", "kl-rdrop"]),
    "unequal shapes": (("kl", (2, 3), (2, 4)), {}, ["(2, 3)", "(2, 4)"]),
    "broadcasting shapes": (("kl", (2, 3), (1, 3)), {}, ["(2, 3)", "(1, 3)"]),
    "another reduction": (("kl", (2, 3), (2, 3)), {"reduction": "batchmean"}, ["'batchmean'", "'mean'", "'none'"]),
    "valid of another shape": (
        ("kl", (2, 4, 3), (2, 4, 3)), {"valid": torch.ones(2, dtype=torch.bool)}, ["(2, 4)", "(2,)"],
    ),
    "valid of another type": (("kl", (2, 3), (2, 3)), {"valid": torch.ones(2)}, ["bool", "float32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (name, first, second), kwargs, words = BAD[case]
    with pytest.raises(ValueError) as caught:
        hiddenkey.consistency_loss(name, torch.zeros(first), torch.zeros(second), **kwargs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("apart", (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5))
@pytest.mark.parametrize("name", ("js", "kl"))
def test_kl_of_nearly_equal_views_is_that_of_float64_and_never_negative(name, apart):
    generator = torch.Generator().manual_seed(0)
    first, noise = (4 * torch.randn(200, 50, generator=generator) for _ in range(2))
    second = first + apart * noise
    p, q = (logits.double().softmax(-1) for logits in (first, second))
    there, back = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    found = hiddenkey.consistency_loss(name, first, second, reduction="none")
    assert (found >= 0).all()
    wanted = there if name == "js" else (there + back) / 2
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=1e-12)


@pytest.mark.parametrize("apart", (1e-1, 1e-2, 1e-3, 1e-4, 1e-5))
def test_jsd_of_nearly_equal_views_is_that_of_float64_and_never_negative(apart):
    generator = torch.Generator().manual_seed(0)
    first, noise = (torch.randn(200, 50, generator=generator) for _ in range(2))
    second = first + apart * noise
    p, q = (logits.double().softmax(-1) for logits in (first, second))
    m = (p + q) / 2
    wanted = ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2).clamp(min=0)
    first.requires_grad_()
    found = hiddenkey.consistency_loss("jsd", first, second, reduction="none")
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=1e-14)
    found.sum().backward()
    gradient = p * ((p / m).log() - (p * (p / m).log()).sum(-1, keepdim=True)) / 2
    assert (first.grad - gradient).norm() < 0.02 * gradient.norm()
