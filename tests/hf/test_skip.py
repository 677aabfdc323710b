"""Dropped tokens need not go through the feed-forward block: the same result as dropping its output."""

import pytest
import torch

import hiddenkey
from hiddenkey.hf import sites as skip
from hiddenkey.hf.sites import TokenSkip

from .tiny import batch, make
from .tools import assert_same_gradients, gradients, inputs_for, logits_of, lora

WHOLE_BLOCKS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "distilbert", "t5", "vit")


def skipping(attachment):
    return [site for _, site in attachment.sites if isinstance(site, TokenSkip)]


def outcome(model, family, recipe):
    with hiddenkey.attach(model, recipe) as attachment:
        torch.manual_seed(5)
        model.zero_grad()
        inputs = batch(family)
        logits = logits_of(model, inputs | inputs_for(family, "right") if family == "t5" else inputs)
        logits.square().mean().backward()
        return logits.detach(), gradients(model), attachment


@pytest.mark.parametrize("compensation", ("rescale", "none"))
@pytest.mark.parametrize("pattern", ("column", "span", "element"))
@pytest.mark.parametrize("family", WHOLE_BLOCKS)
def test_skipping_changes_nothing(family, pattern, compensation, monkeypatch):
    model, recipe = make(family), f"hidden[:]:{pattern}:{compensation}@0.4"
    logits, ours, attachment = outcome(model, family, recipe)
    assert skipping(attachment)
    monkeypatch.setattr("hiddenkey.hf.attach.can_skip", lambda *_: False)
    expected, theirs, attachment = outcome(model, family, recipe)
    assert not skipping(attachment)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapted", (False, True))
def test_the_block_sees_the_kept_tokens_alone(adapted):
    model, seen = make("llama"), []
    model = lora(model) if adapted else model
    block = next(module for name, module in model.named_modules() if name.endswith("layers.3.mlp"))
    block.act_fn.register_forward_hook(lambda m, a, output: seen.append(output.shape[:2].numel()))
    inputs = batch("llama")
    with hiddenkey.attach(model, "hidden[3:]:column@0.5") as attachment:
        model(**inputs)
        kept = round((1 - attachment.position_rates()["hidden"]) * inputs["input_ids"].numel())
    assert seen == [kept]
    assert 0 < kept < inputs["input_ids"].numel()


def test_blocks_with_more_than_linear_maps_are_left_alone():
    drop = hiddenkey.parse("hidden:column@0.5").drops[0]
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    normed = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    assert skip.can_skip(plain, drop)
    assert not skip.can_skip(normed, drop)
    assert not skip.can_skip(torch.nn.Linear(4, 4), drop)


def test_all_tokens_dropped_gives_zero():
    model = make("llama")
    with hiddenkey.attach(model, "hidden[3:]:column@0.999999"):
        found = []
        model.model.layers[3].mlp.register_forward_hook(lambda m, a, output: found.append(output))
        model(**batch("llama")).loss.backward()
    assert (found[0] == 0).all()


@pytest.mark.parametrize("pattern", ("column", "element"))
def test_no_draw_is_kept_after_its_use(pattern):
    """Under activation checkpointing it would hold the memory that the recomputation saves."""
    model = make("llama")
    with hiddenkey.attach(model, f"hidden[:]:{pattern}@0.4") as attachment:
        model(**batch("llama")).loss.backward()
        assert skipping(attachment)
        assert all(site.keep is None and site.rows is None for site in skipping(attachment))
