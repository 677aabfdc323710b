"""Encoder-decoders that classify: what their decoder reads in the second view."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import hiddenkey

from ..models.shrink import shrink
from .test_step import DROPS, WEIGHT, check, divergence
from .tiny import CLASSES, VOCABULARY, batch

EOS = 2
BART = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}


def build(name, sizes, consistency="kl", num_labels=CLASSES, **options):
    torch.manual_seed(0)
    kind = getattr(hf, name)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    config = kind.config_class(num_labels=num_labels, **tokens, **sizes, **options)
    model = kind(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    hiddenkey.attach(model, f"{DROPS} ~ {consistency}*{WEIGHT}")
    return model


def texts(labels):
    """Texts that end with <eos>, by which these models classify."""
    inputs = batch("llama", padding="none")
    inputs["input_ids"][:, -1] = EOS
    return {**inputs, "labels": labels}


@pytest.mark.parametrize(
    ("name", "sizes"), [("BartForSequenceClassification", BART), ("T5ForSequenceClassification", T5)]
)
def test_a_classifiers_labels_are_nothing_to_decode(name, sizes):
    model, inputs = build(name, sizes), texts(torch.tensor([0, 2, 1]))

    def by_hand(first, second):
        task = F.cross_entropy(first.logits, inputs["labels"])
        return task, divergence("kl", first.logits, second.logits).mean()

    check(model, inputs, "kl", by_hand)


def t5gemma():
    model = hf.T5GemmaForTokenClassification(shrink("t5gemma")).train()
    hiddenkey.attach(model, f"{DROPS} ~ kl*{WEIGHT}")
    return model


TOKEN_CLASSIFIERS = {
    "T5": lambda: build("T5ForTokenClassification", T5),
    "UMT5": lambda: build("UMT5ForTokenClassification", T5),
    "T5Gemma": t5gemma,
}


@pytest.mark.parametrize("family", TOKEN_CLASSIFIERS)
def test_a_token_classifiers_labels_are_nothing_to_decode(family):
    model, inputs = TOKEN_CLASSIFIERS[family](), batch("llama")
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, inputs["labels"] % model.config.num_labels)
    given = []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(set(kwargs)), with_kwargs=True)

    def by_hand(first, second):
        valid = inputs["labels"] != -100
        task = F.cross_entropy(first.logits[valid], inputs["labels"][valid])
        return task, divergence("kl", first.logits[valid], second.logits[valid]).mean()

    check(model, inputs, "kl", by_hand)
    assert set.union(*given) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("name", ("T5ForConditionalGeneration", "BartForConditionalGeneration"))
def test_embeddings_for_the_decoder_take_the_place_of_its_tokens(name):
    model = build(name, T5 if name.startswith("T5") else BART)
    inputs = batch("llama")
    inputs["decoder_inputs_embeds"] = torch.randn(*inputs["labels"].shape, 32)
    assert hiddenkey.consistency_step(model, inputs).consistency > 0
