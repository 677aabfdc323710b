"""The task loss of a step is the model's own, whatever that is, and the consistency compares the rows it counts."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hiddenkey
from hiddenkey.hf.compared_outputs import count_labels
from hiddenkey.hf.source_reading import shifts_labels

from ..models.shrink import shrink
from ..models.tiny import build as build_tiny
from .test_step import DROPS, WEIGHT, check, divergence, shifted
from .test_token_loss import frozen
from .tiny import VOCABULARY, batch, decoder
from .tools import lora

SMOOTH = 0.1


def bart():
    config = hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=4,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        init_std=0.3,
        max_position_embeddings=64,
    )
    return lora(hf.BartForCausalLM(config).double(), ["q_proj", "v_proj"])


def xlnet():
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=4, n_head=4, d_inner=48, initializer_range=0.3)
    return lora(hf.XLNetLMHeadModel(config).double(), ["layer_1", "layer_2"])


def in_place(logits, labels):
    """The logits of a place with a label, and that label."""
    valid = labels != -100
    return logits[valid], labels[valid]


def attached(model, consistency="kl"):
    hiddenkey.attach(model, f"{DROPS} ~ {consistency}*{WEIGHT}")
    return model


def inputs_with_gaps():
    inputs = batch("llama")
    inputs["labels"][0, :4] = -100
    return inputs


@pytest.mark.parametrize("num_items", (None, 50))
@pytest.mark.parametrize("build", (bart, xlnet))
def test_labels_that_are_shifted_already(build, num_items):
    torch.manual_seed(0)
    model, inputs = attached(build()), inputs_with_gaps()

    def by_hand(first, second):
        rows, labels = in_place(first.logits, inputs["labels"])
        others, _ = in_place(second.logits, inputs["labels"])
        count = num_items or len(labels)
        task = F.cross_entropy(rows, labels, reduction="sum") / count
        torch.testing.assert_close(first.loss, F.cross_entropy(rows, labels))
        return task, divergence("kl", rows, others).sum() / count

    check(model, inputs, "kl", by_hand, num_items=num_items)


def smoothed(logits, labels, vocab_size=None, **kwargs):
    return F.cross_entropy(*shifted(logits, labels), label_smoothing=SMOOTH)


class SmoothedForCausalLM(hf.LlamaForCausalLM):
    """Another loss, on the logits of the model."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        outputs = super().forward(input_ids, attention_mask, logits_to_keep=logits_to_keep, **kwargs)
        outputs.loss = None if labels is None else smoothed(outputs.logits, labels)
        return outputs


def with_loss_function():
    model = frozen("llama")
    model.base_model.model.loss_function = smoothed
    return model


def subclass():
    model = frozen("llama")
    model.base_model.model.__class__ = SmoothedForCausalLM
    return model


class PenalisedForCausalLM(hf.LlamaForCausalLM):
    """More than the loss that it asks transformers for, itself."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        states = self.model(input_ids, attention_mask).last_hidden_state
        logits = self.lm_head(states[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size) + states.square().mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Penalised(torch.nn.Module):
    """A model of the user's around one of transformers."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        outputs = self.inner(**inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


def penalised_subclass():
    model = frozen("llama")
    model.base_model.model.__class__ = PenalisedForCausalLM
    return model


def penalised_by_hand():
    model = frozen("llama")
    inner = model.base_model.model
    plain = inner.forward

    @functools.wraps(plain)
    def forward(**inputs):
        outputs = plain(**inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1
        return outputs

    inner.forward = forward
    return model


def mixtral():
    options = {"num_local_experts": 4, "initializer_range": 0.3, "router_aux_loss_coef": 0.5}
    return lora(decoder("Mixtral")(**options), ["q_proj"])


def bamba():
    model = build_tiny("bamba").double()
    model.z_loss_coefficient = 0.1
    return lora(model, ["q_proj"])


OWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss_function set by hand": (with_loss_function, {}),
    "subclass": (subclass, {}),
    "subclass that adds": (penalised_subclass, {}),
    "forward set by hand": (penalised_by_hand, {}),
    "a model of the user's around it": (lambda: Penalised(frozen("llama")), {}),
    "router logits asked for in the batch": (mixtral, {"output_router_logits": True}),
    "z loss": (bamba, {}),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_loss_that_is_more_than_that_of_next_tokens(kind):
    build, more = OWN[kind]
    model, inputs = attached(build()), inputs_with_gaps() | more

    def by_hand(first, second):
        rows, labels = shifted(first.logits, inputs["labels"])
        others, _ = shifted(second.logits, inputs["labels"])
        assert abs(first.loss - F.cross_entropy(rows, labels)) > 1e-3
        return first.loss, divergence("kl", rows, others).mean()

    check(model, inputs, "kl", by_hand)


def test_labels_shifted_by_the_collator():
    model, inputs = attached(frozen("llama")), batch("llama")
    inputs["shift_labels"] = inputs["labels"].roll(-2, 1)
    found = hiddenkey.consistency_step(model, inputs)
    rows = found.outputs.logits.flatten(0, 1).float()
    torch.testing.assert_close(found.task, F.cross_entropy(rows, inputs["shift_labels"].flatten()))


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("LlamaForCausalLM", True),
        ("GPT2LMHeadModel", True),
        ("GPT2DoubleHeadsModel", True),
        ("BertLMHeadModel", True),
        ("BlipForConditionalGeneration", True),
        ("Qwen2AudioForConditionalGeneration", True),
        ("BertForMaskedLM", False),
        ("ModernBertForMaskedLM", False),
        ("XLMWithLMHeadModel", False),
        ("ProphetNetForCausalLM", False),
        ("T5ForConditionalGeneration", False),
        ("LlamaForTokenClassification", False),
        ("LlamaForSequenceClassification", False),
    ],
)
def test_which_losses_shift(name, shifts):
    kind = getattr(hf, name)
    with torch.device("meta"):
        model = kind._from_config(shrink(kind.config_class.model_type))
    assert shifts_labels(model) is shifts
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]])
    assert count_labels(model, labels) == (2 if shifts else 4)


def test_a_subclass_that_adds_nothing_but_a_factor_shifts_as_its_parent():
    class Doubled(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = 2 * outputs.loss
            return outputs

    with torch.device("meta"):
        model = Doubled(CONFIG_MAPPING["llama"](num_hidden_layers=1, hidden_size=32, num_attention_heads=4))
    assert shifts_labels(model)


def test_a_loss_by_hand_whose_code_stands_in_no_file_is_refused():
    """As of a class that was typed into an interpreter: what cannot be read is not guessed."""
    names: dict[str, Any] = {"F": F}
    exec(
        "def forward(self, ids, labels):\n    return F.cross_entropy(self.head(ids)[:, :-1], labels[:, 1:])\n", names
    )
    with torch.device("meta"):
        kind = type("Typed", (hf.LlamaForCausalLM,), {"forward": names["forward"]})
        model = kind(CONFIG_MAPPING["llama"](num_hidden_layers=1, hidden_size=32, num_attention_heads=4))
    with pytest.raises(hiddenkey.UserError, match=r"in forward compares a place .* stands in no file; write the"):
        shifts_labels(model)
