"""Layers below the first drop are taken from the first view only where the second would compute the same."""

from __future__ import annotations

import random
from functools import partial

import numpy
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hiddenkey
from hiddenkey.hf import attachment as attachment_module
from hiddenkey.hf.attachment import StepState, step_state

from .tiny import batch, make
from .tools import assert_same_gradients, gradients

SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": 3,
    "vocab_size": 10,
    "initializer_range": 0.5,
    "mask_time_length": 2,
}


def speech(**options):
    torch.manual_seed(0)
    model = hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**SPEECH, **options))
    return model, {"input_values": torch.randn(4, 800), "labels": torch.tensor([0, 1, 2, 0])}


def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.PhimoeConfig(vocab_size=50, intermediate_size=32, num_local_experts=4, initializer_range=0.3, **sizes)
    ids = torch.randint(1, 50, (4, 8))
    model = hf.PhimoeForCausalLM(config)
    model.lm_head.requires_grad_(False)
    return model, {"input_ids": ids, "labels": ids}


def parts_of_layers():
    torch.manual_seed(0)
    sizes = {"emb_dim": 16, "n_layers": 4, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
    config = hf.XLMConfig(vocab_size=50, num_labels=3, embed_init_std=0.3, init_std=0.3, **sizes)
    ids = torch.randint(3, 50, (2, 8))
    return hf.XLMForSequenceClassification(config), {"input_ids": ids, "labels": torch.tensor([0, 1])}


def plain():
    return make("bert"), batch("bert")


UNLIKE = {
    "SpecAugment": speech,
    "sum of all layers": lambda: speech(apply_spec_augment=False, use_weighted_layer_sum=True),
    "noise of the router": experts,
    "a list of parts of layers": parts_of_layers,
}


def by_hand(model, inputs, first):
    """Eq. 12 of the first view and a real inference pass."""
    model.eval()
    with torch.no_grad():
        second = model(**inputs).logits
    model.train()
    if first.dim() == 3:
        first, second = first[:, :-1], second[:, :-1]
    return float(hiddenkey.consistency_loss("js", first.detach(), second))


@pytest.mark.parametrize(("why", "shares"), [*((why, False) for why in UNLIKE), ("plain", True)])
@pytest.mark.parametrize("position", ("hidden[2:]", "output"))
def test_the_second_view_is_the_inference_pass(why, shares, position):
    model, inputs = (UNLIKE | {"plain": plain})[why]()
    options = {"task_loss": whole_logits} if why == "noise of the router" else {}
    with hiddenkey.attach(model.train(), f"{position}:element@1e-9 ~ js") as attachment:
        for _ in range(2):
            found = hiddenkey.consistency_step(model, inputs, **options)
            assert float(found.consistency) == pytest.approx(by_hand(model, inputs, found.outputs.logits), abs=1e-6)
        assert step_state(attachment).shares_lower is shares


@pytest.mark.parametrize("recipe", ("hiddenkey@0.3 ~ kl-rdrop", "hiddenkey@0.3"))
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("chunked", (False, True))
def test_layers_that_are_checkpointed_from_outside_learn_the_same(chunked, reentrant, recipe, monkeypatch):
    """As transformers before 5.23 does it, and code from the hub: the layer's hooks stand inside the checkpoint."""
    checkpoint_around(LlamaDecoderLayer, monkeypatch)

    def learned(checkpoints):
        model, inputs = make("llama"), batch("llama")
        model.lm_head.requires_grad_(not chunked)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        hiddenkey.attach(model.train(), recipe)
        torch.manual_seed(9)
        for _ in range(2):
            hiddenkey.consistency_step(model, inputs).total.backward()
        return gradients(model)

    assert_same_gradients(learned(False), learned(True), rtol=1e-4, atol=1e-5)


def checkpoint_around(layer, monkeypatch):
    inner = getattr(layer.forward, "__wrapped__", None)
    if inner is None:
        return

    def call(self, *args, **kwargs):
        if not (self.gradient_checkpointing and self.training):
            return nn.Module.__call__(self, *args, **kwargs)
        kwargs |= {"use_cache": False, "past_key_values": None}
        return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), *args)

    monkeypatch.setattr(layer, "forward", inner)
    monkeypatch.setattr(layer, "__call__", call)


def whole_logits(model, inputs, num_items):
    outputs = model(**inputs)
    return outputs.loss, outputs


def test_the_views_of_kl_have_noise_of_their_own():
    """In chunks too: nothing is dropped, so only the routers' noise tells the views apart."""
    model, inputs = experts()
    with hiddenkey.attach(model.train(), "hidden[2:]:element@1e-9 ~ kl") as attachment:
        found = [float(hiddenkey.consistency_step(model, inputs).consistency) for _ in range(2)]
        assert step_state(attachment).dense is False
        assert step_state(attachment).shares_lower is False
    assert min(found) > 1e-3


@pytest.mark.parametrize("build", (speech, experts))
def test_seeing_it_draws_nothing_that_is_not_drawn_otherwise(build, monkeypatch):
    """A run that goes on in another process sees it again, and has to draw what the first would have."""

    def after():
        model, inputs = build()
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        with hiddenkey.attach(model.train(), "hidden[2:]:element@0.2 ~ kl"):
            hiddenkey.consistency_step(model, inputs)
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    found = after()
    monkeypatch.setattr(attachment_module, "StepState", partial(StepState, shares_lower=False))
    assert found == after()


@pytest.mark.parametrize("recipe", ("output:element@0.1 ~ kl", "baseline ~ kl"))
def test_a_model_without_layers(recipe):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = hf.ResNetForImageClassification(config).train()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    with hiddenkey.attach(model, recipe):
        found = hiddenkey.consistency_step(model, inputs)
    assert found.total.isfinite()
    assert (found.consistency > 0) == ("output" in recipe)


def test_a_regression_without_layers_has_no_token_to_compare():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=1)
    model = hf.ResNetForImageClassification(config).train()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0.5, 1.0])}
    with (
        hiddenkey.attach(model, "output:element@0.1 ~ kl"),
        pytest.raises(hiddenkey.UserError, match=r"has no layers.*use 'mse'"),
    ):
        hiddenkey.consistency_step(model, inputs)
