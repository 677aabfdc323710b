"""Bases whose weights are packed: found by their sizes, trained through LoRA; their heads are not plain ones."""

import peft
import pytest
import torch
from torch import nn

import hiddenkey
from hiddenkey.hf.chunked_loss import frozen_head

from .adapters import moved
from .bases import BASES, llama
from .tiny import batch, make
from .tools import logits_of, quiet, sites_of, snapshot

STEP = "logits[1:]:column@0.3 + hidden[1:]:{pattern}@0.3 ~ kl*1.0"
TARGETS = {"attention": ["q_proj", "v_proj"], "feed-forward": ["up_proj", "down_proj"]}


def with_lora(base, targets):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return peft.get_peft_model(base, config).train()


@pytest.mark.parametrize("pattern", ("element", "column"))
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("base", BASES)
def test_lora_on_a_quantised_base(base, targets, pattern, tmp_path):
    model, inputs = with_lora(BASES[base](tmp_path), TARGETS[targets]), batch("llama")
    evaluated = logits_of(model.eval(), inputs)
    wanted, before = model.train()(**inputs).loss, snapshot(model)
    with hiddenkey.attach(model, STEP.format(pattern=pattern)) as attachment:
        for position in ("logits", "hidden"):
            found = [site.path for site in attachment.plan.sites if site.drop.position == position]
            assert found == [f"base_model.model.{path}" for path in sites_of("llama", position, range(1, 4))]
        step = hiddenkey.consistency_step(model, inputs)
        step.total.backward()
        assert step.consistency > 0
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
        assert torch.equal(logits_of(model.eval(), inputs), evaluated)
    model.zero_grad()
    assert snapshot(model.train()) == before
    with hiddenkey.attach(model, STEP.replace("0.3", "0").format(pattern=pattern)):
        step = hiddenkey.consistency_step(model, inputs)
    # Every evaluation makes bitsandbytes pack its 4 bits anew on a CPU, which rounds a little otherwise each time.
    tolerance = 1e-3 if base == "bitsandbytes 4 bit" else 1e-5
    torch.testing.assert_close(step.task, wanted, rtol=tolerance, atol=tolerance)
    assert step.consistency.abs() < 1e-6


class Packed(nn.Module):
    """A quantised linear map as libraries write them: no nn.Linear, no weight, but sizes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("pattern", ("element", "column"))
@pytest.mark.parametrize("family", ("llama", "bert"))
def test_a_linear_class_of_a_library_that_is_not_known(family, pattern):
    model = quiet(family)
    names = ("up_proj", "gate_proj", "down_proj", "o_proj", "dense")
    for name, module in list(model.named_modules()):
        if name.endswith(names) and "pooler" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Packed(module))
    targets = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[family]
    model = moved(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)))
    attachment = hiddenkey.attach(model, STEP.format(pattern=pattern))
    found = [site.path for site in attachment.plan.sites if site.drop.position == "hidden"]
    assert found == [f"base_model.model.{path}" for path in sites_of(family, "hidden", range(1, 4))]
    hiddenkey.consistency_step(model, batch(family)).total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


class Elsewhere(torch.Tensor):
    """A weight of a class that may mean anything by a product, as torchao's and sharded ones."""


def heads():
    """(what is odd about it, a change to a frozen plain head)."""

    def subclass(head):
        head.weight = nn.Parameter(head.weight.detach().as_subclass(Elsewhere), requires_grad=False)

    def offloaded(head):
        head.weight = nn.Parameter(head.weight.detach().to("meta"), requires_grad=False)

    def packed(head):
        head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)

    def learning(head):
        head.weight.requires_grad_()

    return {"subclass": subclass, "offloaded": offloaded, "packed": packed, "learning": learning}


@pytest.mark.parametrize("oddity", heads())
def test_only_a_plain_frozen_head_is_computed_in_chunks(oddity):
    model = with_lora(make("llama"), TARGETS["attention"])
    attachment = hiddenkey.attach(model, "hiddenkey@0.1")
    head = model.get_base_model().lm_head
    assert frozen_head(attachment).weight is head.weight
    heads()[oddity](head)
    assert frozen_head(attachment) is None


def test_a_head_that_is_offloaded_until_it_is_called():
    """accelerate keeps the weight elsewhere; a step is that of the same model at home."""
    accelerate = pytest.importorskip("accelerate")
    losses = []
    for away in (False, True):
        model = with_lora(llama(), TARGETS["attention"])
        if away:
            accelerate.cpu_offload(model.get_base_model().lm_head, execution_device="cpu")
        hiddenkey.attach(model, "logits[1:]:column@0.3 ~ kl*1.0")
        torch.manual_seed(0)
        losses.append(hiddenkey.consistency_step(model, batch("llama")).total)
    torch.testing.assert_close(*losses)
