"""The conversions of docs/paper_index.md: losses as other code computes them, from the two views of one step."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hiddenkey
from hiddenkey.consistency import CONSISTENCIES

from ..hf.tiny import batch, make

ALPHA = 0.7


def kl(first, second):
    """KL(P1 || P2), summed over rows and classes."""
    p, q = first.softmax(-1), second.softmax(-1)
    return (p * (p.log() - q.log())).sum()


def rdrop_readme(first, second, labels):
    task = (cross_entropy(first, labels) + cross_entropy(second, labels)) / 2
    return task + ALPHA * (kl(first, second) + kl(second, first)) / 2


def rdrop_fairseq(first, second, labels):
    task = cross_entropy(first, labels, reduction="sum") + cross_entropy(second, labels, reduction="sum")
    return (task + ALPHA * (kl(first, second) + kl(second, first)) / 2) / len(labels)


def rdrop_bert(first, second, labels):
    task = cross_entropy(first, labels) + cross_entropy(second, labels)
    return task + 0.5 * (kl(first, second) + kl(second, first)) / 2


def rdrop_vit(first, second, labels):
    task = cross_entropy(first, labels) + cross_entropy(second, labels)
    return task + ALPHA * (kl(first, second) + kl(second, first))


# The loss, our weight for a batch of so many rows, and how many times our total it is.
CODES = {
    "R-Drop, README": (rdrop_readme, lambda rows: ALPHA * rows, 1),
    "R-Drop, fairseq": (rdrop_fairseq, lambda rows: ALPHA / 2, 2),
    "R-Drop, BERT": (rdrop_bert, lambda rows: 0.25 * rows, 2),
    "R-Drop, ViT": (rdrop_vit, lambda rows: ALPHA * rows, 2),
}


@pytest.mark.parametrize("code", CODES)
def test_our_weight_gives_the_loss_and_the_gradient_of_other_code(code):
    theirs, weight, times = CODES[code]
    model, inputs, views = make("bert").double(), batch("bert"), []
    rows = len(inputs["labels"])
    model.register_forward_hook(lambda module, args, output: views.append(output["logits"]))
    with hiddenkey.attach(model, f"hidden:element@0.3 ~ kl-rdrop*{weight(rows)}"):
        step = hiddenkey.consistency_step(model, inputs)
    first, second = views
    assert not torch.equal(first, second)
    expected = theirs(first, second, inputs["labels"])
    torch.testing.assert_close(times * step.total, expected, rtol=1e-12, atol=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(times * step.total, parameters, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for found, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-12)


def test_hiddencuts_code_cuts_a_span_without_rescaling():
    """At a length that gives the same number of places either way."""
    drop = hiddenkey.StructuredDropout("hidden:span:none@0.2").double().train()
    x = torch.randn(4, 10, 3, dtype=torch.float64)
    out = drop(x)
    gone = (out == 0).all(-1)
    assert gone.sum(-1).tolist() == [2] * 4
    assert torch.equal(out[~gone], x[~gone])
    for row in gone:
        first, last = row.nonzero().squeeze(-1).tolist()
        assert last == first + 1


def reversed_js(first, second):
    """½ KL(M || P1) + ½ KL(M || P2), M the mean of both: by row."""
    p, q = first.softmax(-1), second.softmax(-1)
    m = (p + q) / 2
    return ((m * (m.log() - p.log())).sum(-1) + (m * (m.log() - q.log())).sum(-1)) / 2


def test_hiddencuts_term_is_no_consistency_of_ours_but_one_of_four_lines():
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, 4, dtype=torch.float64)
    # As torch's kl_div(log P, M, reduction="batchmean") for both sides, halved.
    middle = (p.softmax(-1) + q.softmax(-1)) / 2
    wanted = sum(nn.functional.kl_div(side.log_softmax(-1), middle, reduction="batchmean") for side in (p, q)) / 2
    hiddenkey.register_consistency("hiddencut-js", both=True)(reversed_js)
    try:
        torch.testing.assert_close(hiddenkey.consistency_loss("hiddencut-js", p, q), wanted)
        for name in ("kl", "js", "jsd"):
            assert abs(hiddenkey.consistency_loss(name, p, q) - wanted) > 1e-3
    finally:
        CONSISTENCIES.remove("hiddencut-js")
