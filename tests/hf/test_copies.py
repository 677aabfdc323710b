"""Copies of an attached model drop by themselves; several attached models leave each other alone."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hiddenkey

from .tiny import FAMILIES, make
from .tools import ALL, assert_same_gradients, attached, draws, gradients, inputs_for, logits_of, lora, snapshot

ROOT = Path(__file__).parents[2]


def seeded(model, inputs, seed=3):
    torch.manual_seed(seed)
    return logits_of(model, inputs)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch": through_torch}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("used", (False, True), ids=("fresh", "after a step"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_drops_alike(family, used, way):
    model, inputs = attached(family, ALL), inputs_for(family, "right")
    if used:
        logits_of(model, inputs).sum().backward()
        model.zero_grad()
    other = WAYS[way](model)
    assert torch.equal(seeded(model, inputs), seeded(other, inputs))
    assert not torch.equal(seeded(other, inputs, 3), seeded(other, inputs, 4))
    for m in (model, other):
        seeded(m, inputs).square().mean().backward()
    assert_same_gradients(gradients(model), gradients(other))
    attachment = hiddenkey.find_attachment(other)
    assert attachment.model is other
    assert str(attachment.recipe) == str(hiddenkey.find_attachment(model).recipe)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("detached", ("original", "copy"))
@pytest.mark.parametrize("family", ("bert", "llama", "mpnet", "t5"))
def test_one_is_detached_and_the_other_drops_on(family, detached, way):
    model, inputs = make(family), inputs_for(family, "right")
    before = snapshot(model)
    hiddenkey.attach(model, ALL)
    wanted = seeded(model, inputs)
    other = WAYS[way](model)
    gone, left = (model, other) if detached == "original" else (other, model)
    hiddenkey.find_attachment(gone).detach()
    assert snapshot(gone) == before
    assert torch.equal(logits_of(gone.eval(), inputs), logits_of(make(family).eval(), inputs))
    assert torch.equal(seeded(left, inputs), wanted)
    hiddenkey.find_attachment(left).detach()
    assert snapshot(left) == before


def test_a_copy_counts_for_itself():
    model, inputs = attached("bert", ALL), inputs_for("bert", "right")
    other = copy.deepcopy(model)
    logits_of(other, inputs)
    rates = hiddenkey.find_attachment(model).rates().values()
    assert all(rate != rate for rate in rates)
    assert all(rate == rate for rate in hiddenkey.find_attachment(other).rates().values())


def test_a_copy_with_an_adapter():
    model, inputs = lora(make("llama")), inputs_for("llama", "right")
    hiddenkey.attach(model, ALL)
    other = copy.deepcopy(model)
    assert torch.equal(seeded(model, inputs), seeded(other, inputs))


LOAD = """
import sys, torch
model, inputs, wanted = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(1)
torch.manual_seed(3)
torch.testing.assert_close(model(**inputs).logits, wanted)
import hiddenkey
hiddenkey.find_attachment(model).detach()
model.eval()
torch.manual_seed(3)
first = model(**inputs).logits
assert torch.equal(first, model(**inputs).logits)
assert str(model.config._attn_implementation) == "sdpa", model.config._attn_implementation
print("fine")
"""


def test_a_saved_model_drops_in_another_process(tmp_path):
    model, inputs = attached("llama", ALL), inputs_for("llama", "right")
    path = tmp_path / "model.pt"
    torch.save((model, inputs, seeded(model, inputs).detach()), path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, path], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


@pytest.mark.parametrize("first_out", (0, 1))
def test_two_models_that_share_one_config(first_out):
    one, inputs = make("bert"), inputs_for("bert", "right")
    two = type(one)(one.config).train()
    two.load_state_dict(one.state_dict())
    assert one.config is two.config
    before = [snapshot(model) for model in (one, two)]
    models = [one, two]
    handles = [hiddenkey.attach(one, "logits:column@0.4"), hiddenkey.attach(two, "logits:element@0.6")]
    both = [seeded(model, inputs) for model in models]
    assert not torch.equal(both[0], both[1])
    handles[first_out].detach()
    left = 1 - first_out
    assert torch.equal(seeded(models[left], inputs), both[left])
    plain = make("bert").eval()
    assert torch.equal(logits_of(models[first_out].eval(), inputs), logits_of(plain, inputs))
    handles[left].detach()
    assert [snapshot(model.train()) for model in models] == before


@pytest.mark.parametrize("way", WAYS)
def test_copies_that_share_one_config(way):
    """Copied together they still share; the copy that stays attached must not lose its attention function."""
    one, inputs = make("bert"), inputs_for("bert", "right")
    two = type(one)(one.config).train()
    for model in (one, two):
        hiddenkey.attach(model, "logits:column@0.4")
    first, second = WAYS[way]([one, two])
    assert first.config is second.config
    wanted = seeded(second, inputs)
    hiddenkey.find_attachment(first).detach()
    assert torch.equal(seeded(second, inputs), wanted)


def test_a_plain_model_that_shares_the_config_of_an_attached_one():
    one, inputs = make("llama"), inputs_for("llama", "left")
    two = type(one)(one.config).train()
    two.load_state_dict(one.state_dict())
    wanted = logits_of(two, inputs)
    with hiddenkey.attach(one, ALL):
        assert torch.equal(logits_of(two, inputs), wanted)


@pytest.mark.parametrize("families", (("bert", "bert"), ("llama", "mpnet"), ("t5", "gemma2")))
def test_two_models_attached_at_once(families, monkeypatch):
    recipes = ("logits[:]:column@0.4 + hidden[:]:element@0.2", "weights[:]:element@0.3 + input:column@0.1")
    models = [make(family) for family in families]
    alone = []
    for model, family, recipe in zip(models, families, recipes, strict=True):
        with hiddenkey.attach(model, recipe):
            alone.append(seeded(model, inputs_for(family, "right")))
    handles = [hiddenkey.attach(model, recipe) for model, recipe in zip(models, recipes, strict=True)]
    for model, family, recipe, wanted in zip(models, families, recipes, alone, strict=True):
        with draws(monkeypatch) as record:
            assert torch.equal(seeded(model, inputs_for(family, "right")), wanted)
        assert {drawn.drop for drawn in record} == set(hiddenkey.parse(recipe).drops)
    handles[0].detach()
    assert torch.equal(seeded(models[1], inputs_for(families[1], "right")), alone[1])
    handles[1].detach()


def test_attach_again_after_detach():
    model, inputs = make("gpt2"), inputs_for("gpt2", "right")
    wanted = seeded(attached("gpt2", ALL), inputs)
    for _ in range(3):
        with hiddenkey.attach(model, ALL):
            assert torch.equal(seeded(model, inputs), wanted)
        with hiddenkey.attach(model, "baseline"):
            assert not torch.equal(seeded(model, inputs), wanted)


def test_saved_weights_load_without_the_library(tmp_path):
    model = attached("llama", ALL)
    model.save_pretrained(tmp_path)
    assert "hiddenkey" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    inputs = inputs_for("llama", "right")
    assert torch.equal(logits_of(again.eval(), inputs), logits_of(model.eval(), inputs))
