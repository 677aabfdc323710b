"""Drops that are switched off from outside, as TRL does it, and that come back."""

import copy
import pickle

import pytest
import torch

import hiddenkey

from ..api import find_transformer
from .test_faults import disable_dropout
from .tiny import make
from .tools import attached, inputs_for, logits_of, quiet, snapshot

RECIPE = "input:column@0.2 + logits[:]:column@0.3 + weights[:]:element@0.3 + hidden[:]:column@0.3"


@pytest.mark.filterwarnings("ignore:switched off")
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("bert", "sdpa"),
        ("llama", "eager"),
        ("mpnet", "eager"),
        pytest.param("llama", "sdpa", marks=pytest.mark.full),
        pytest.param("t5", "sdpa", marks=pytest.mark.full),
        pytest.param("t5", "eager", marks=pytest.mark.full),
    ],
)
def test_all_of_ours_go_off_are_seen_to_be_off_and_come_back(family, implementation):
    options = {} if family == "mpnet" else {"attn_implementation": implementation}
    model, inputs = make(family, **options), inputs_for(family, "right")
    before = snapshot(model)
    attachment = hiddenkey.attach(model, RECIPE)
    keys = list(model.state_dict())
    disable_dropout(model)
    assert torch.equal(logits_of(model, inputs), logits_of(quiet(family, **options), inputs))
    assert set(attachment.rates().values()) == set(attachment.position_rates().values()) == {0.0}
    assert "switched off" in str(find_transformer(model)[1].hiddenkey_drops)
    for switch in attachment.switches:
        switch.p = switch.drop.p
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    assert all(rate > 0 for rate in attachment.rates().values())
    assert list(model.state_dict()) == keys == list(make(family).state_dict())
    disable_dropout(model)
    attachment.detach()
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:switched off")
def test_some_drops_off_and_others_on():
    model, inputs = attached("llama", "logits[:]:column@0.4 + weights[:]:element@0.4"), inputs_for("llama", "right")
    other = attached("llama", "weights[:]:element@0.4")
    model.hiddenkey_drops[0].p = 0
    outputs = []
    for each in (model, other):
        torch.manual_seed(1)
        outputs.append(logits_of(each, inputs))
    assert torch.equal(*outputs)


@pytest.mark.filterwarnings("ignore:switched off")
@pytest.mark.parametrize("way", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_the_switches_of_a_copy_are_its_own(way):
    model, inputs = attached("llama", "hiddenkey-[:]@0.3", depth=2), inputs_for("llama", "right")
    other = way(model)
    disable_dropout(other)
    assert torch.equal(logits_of(other, inputs), logits_of(other, inputs))
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs))
