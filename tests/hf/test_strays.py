"""Copies of single modules of an attached model: what they carry of us goes with the recipe, or with the next."""

import copy

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version

import hiddenkey
from hiddenkey.hf.attention_backend import SITE

from .adapters import adapt
from .test_config_rates import falcon
from .tiny import CLASSES, make
from .tools import inputs_for, logits_of, quiet, snapshot

OUTPUT = "output:element@0.5"
HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query"]}  # PEFT saves the classifier by itself.


def adapted_too_late(recipe=OUTPUT, **options):
    """(model in PEFT, handle): PEFT has copied the classifier with our hook on it."""
    model = make("roberta", **options)
    attachment = hiddenkey.attach(model, recipe)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **HEAD)).train(), attachment


def hooks(model):
    """How many hooks and sites there are, and torch's notes on how hooks are called."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    names += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(vars(m)[name]) for m in model.modules() for name in names) + sum(
        SITE in vars(m) for m in model.modules()
    )


def kept(model, inputs):
    """The share of the classifier's inputs that is not dropped."""
    seen = []
    dense = model.get_submodule("base_model.model.classifier.modules_to_save.default.dense")
    handle = dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for _ in range(100):
            logits_of(model, inputs)
    handle.remove()
    return float(torch.stack(seen).ne(0).float().mean())


def test_a_clone_goes_with_the_recipe():
    model, attachment = adapted_too_late()
    attachment.detach()
    assert hooks(model) == 0
    assert kept(model, inputs_for("roberta", "right")) == pytest.approx(0.9, abs=0.03), "its own dropout is back"


def test_a_clone_drops_once_after_the_next_attach():
    model, attachment = adapted_too_late()
    attachment.detach()
    hiddenkey.attach(model, OUTPUT)
    assert kept(model, inputs_for("roberta", "right")) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("recipe", (OUTPUT, "baseline"))
def test_the_rates_of_a_copy_are_given_back(recipe):
    model, attachment = adapted_too_late(recipe)
    wrapper = model.base_model.model.classifier
    assert wrapper.modules_to_save["default"].dropout.p == 0
    attachment.detach()
    assert wrapper.modules_to_save["default"].dropout.p == wrapper.original_module.dropout.p == 0.1


def test_a_copy_with_rates_in_its_configuration():
    model = falcon()
    attachment = hiddenkey.attach(model, "baseline")
    config = peft.LoraConfig(r=2, target_modules=["dense_4h_to_h"], modules_to_save=["self_attention"])
    adapted = peft.get_peft_model(model, config)
    attachment.detach()
    for layer in adapted.base_model.model.transformer.h:
        attention = layer.self_attention.modules_to_save["default"]
        assert (attention.config.attention_dropout, attention.attention_dropout.p) == (0.2, 0.2)
        assert type(attention.config) is hf.FalconConfig


def with_copied_attentions():
    """PEFT has copied the attentions with our backend's name in their configuration; detached since."""
    model = make("llama")
    attachment = hiddenkey.attach(model, "logits[:]:column@0.5")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["self_attn"])
    adapted = peft.get_peft_model(model, config).train()
    attachment.detach()
    return adapted


def test_a_copy_of_an_attention_has_the_backend_of_before():
    adapted = with_copied_attentions()
    model = adapted.get_base_model()
    copies = [layer.self_attn.modules_to_save["default"] for layer in model.model.layers]
    assert {copy.config._attn_implementation for copy in copies} == {"sdpa"}
    assert hooks(adapted) == 0


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="its wrapper takes no keyword arguments alone"
)
def test_a_copy_of_an_attention_drops_when_it_is_attached_again():
    adapted = with_copied_attentions()
    with hiddenkey.attach(adapted, "logits[:]:column@0.5") as again:
        logits_of(adapted, inputs_for("llama", "none"))
        assert any("modules_to_save" in site and rate > 0 for site, rate in again.rates().items())


def test_a_copy_made_before_keeps_its_own_rate():
    model = adapt(make("roberta"), "LoRA on attention", "bert")
    wrapper = model.base_model.model.classifier
    wrapper.modules_to_save["default"].dropout.p = 0.0
    hiddenkey.attach(model, OUTPUT).detach()
    assert wrapper.modules_to_save["default"].dropout.p == 0
    assert wrapper.original_module.dropout.p == 0.1


def test_a_copy_for_a_later_adapter_is_given_its_rates():
    model = adapt(make("roberta"), "LoRA on attention", "bert")
    attachment = hiddenkey.attach(model, OUTPUT)
    model.add_adapter("other", peft.LoraConfig(r=2, **HEAD))
    attachment.detach()
    assert model.base_model.model.classifier.modules_to_save["other"].dropout.p == 0.1
    assert hooks(model) == 0


PLACES = {
    "output:element@0.5": "classifier",
    "input:element@0.5": "bert.encoder.layer.0",
    "hidden[:]:span@0.5": "bert.encoder.layer.1",
    "logits[:]:column@0.5": "bert.encoder.layer.2.attention.self",
}


@pytest.mark.parametrize("recipe", PLACES)
def test_a_part_of_another_model(recipe):
    """A copied part of an attached model in another: as if nothing were on it, and its own drops are its own."""
    model, other, inputs = quiet("bert"), quiet("bert"), inputs_for("bert", "right")
    attachment = hiddenkey.attach(model, recipe)
    parent, _, name = PLACES[recipe].rpartition(".")
    setattr(other.get_submodule(parent), name, copy.deepcopy(model.get_submodule(PLACES[recipe])))
    assert hooks(other) > 0
    before = snapshot(model)
    with hiddenkey.attach(other, "baseline"):
        assert torch.equal(logits_of(other, inputs), logits_of(quiet("bert"), inputs))
    assert hooks(other) == 0
    assert snapshot(model) == before
    logits_of(model, inputs)
    assert all(rate > 0 for rate in attachment.rates().values()), "the first model drops on"


def test_an_attached_model_inside_of_another_drops_on():
    model, inside = quiet("bert"), quiet("bert")
    outer, inner = (hiddenkey.attach(m, "logits:column@0.5 + input:element@0.5") for m in (model, inside))
    model.inside = inside
    outer.detach()
    logits_of(inside, inputs_for("bert", "right"))
    assert all(rate > 0 for rate in inner.rates().values())


def test_hooks_of_others_stay():
    model, attachment = adapted_too_late()
    theirs = model.base_model.model.classifier.modules_to_save["default"]
    theirs.register_forward_hook(lambda *args: None, always_call=True)
    attachment.detach()
    assert hooks(model) == 2
    assert logits_of(model, inputs_for("roberta", "right")).shape[-1] == CLASSES
