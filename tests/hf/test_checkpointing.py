"""Activation checkpointing recomputes with the same draws: gradients are those without it."""

import pytest
import torch

import hiddenkey

from .tiny import make
from .tools import ALL, POSITIONS, assert_same_gradients, gradients, inputs_for, logits_of, lora, shown

FAMILIES = ("bert", "distilbert", "gpt2", "opt", "llama", "gemma3", "t5", "vit")
SPANS = "logits[:]:span@0.4 + weights[:]:column@0.3 + hidden[:]:span@0.3"


def trained(family, recipe, reentrant, adapter, layout="right"):
    """Gradients of two backwards under one seed; reentrant None: no checkpointing."""
    model = make(family)
    model = (lora(model) if adapter else model).double()
    hiddenkey.attach(model, recipe)
    if reentrant is not None:
        inner = model.base_model.model if adapter else model
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if adapter:
            inner.enable_input_require_grads()
        assert inner.is_gradient_checkpointing
    torch.manual_seed(9)
    inputs = inputs_for(family, layout)
    if family == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    for _ in range(2):
        shown_logits = logits_of(model, inputs)
        if family != "vit":
            shown_logits = shown(shown_logits, inputs)
        shown_logits.square().mean().backward()
    return gradients(model)


@pytest.mark.parametrize("adapter", (False, True), ids=("plain", "lora"))
@pytest.mark.parametrize("recipe", (ALL, SPANS), ids=("all", "spans"))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpointing(family, recipe, adapter):
    if family == "vit":
        recipe = recipe.replace("span", "column")
    wanted = trained(family, recipe, None, adapter)
    for reentrant in (False, True):
        found = trained(family, recipe, reentrant, adapter)
        assert_same_gradients(wanted, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", ("llama", "t5"))
def test_every_position_by_itself(family, position, reentrant):
    wanted, found = (trained(family, POSITIONS[position], variant, False, "left") for variant in (None, reentrant))
    assert_same_gradients(wanted, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_consistency_step_with_checkpointing(reentrant):
    def step(variant):
        model = lora(make("llama"), ["q_proj", "v_proj"])
        hiddenkey.attach(model, "hiddenkey@0.3")
        if variant is not None:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": variant})
            model.base_model.model.enable_input_require_grads()
        torch.manual_seed(9)
        inputs = inputs_for("llama", "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses = hiddenkey.consistency_step(model, {**inputs, "labels": labels})
        losses.total.backward()
        return losses, gradients(model)

    (wanted, first), (found, second) = step(None), step(reentrant)
    torch.testing.assert_close(wanted.total, found.total)
    torch.testing.assert_close(wanted.consistency, found.consistency)
    assert_same_gradients(first, second, rtol=1e-4, atol=1e-5)
