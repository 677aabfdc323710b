"""The work of `attach`, counted in calls of functions: it grows with the layers, and with nothing else."""

import sys

import pytest
import torch
import transformers

import hiddenkey

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}
EVERYWHERE = "logits[:]:column@0.1 + hidden[:]:element@0.1"


def bert(depth):
    config = transformers.BertConfig(num_hidden_layers=depth, **SIZES)
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(config)


def llama(depth):
    config = transformers.LlamaConfig(num_hidden_layers=depth, num_key_value_heads=1, **SIZES)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def calls(work, *args):
    """(functions of Python and C that it calls, what it returns); a generator counts each time it goes on."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        result = work(*args)
    finally:
        sys.setprofile(None)
    return count, result


def attach_and_detach(model):
    hiddenkey.attach(model, EVERYWHERE).detach()


@pytest.mark.parametrize("make", (bert, llama))
def test_attach_and_detach_are_linear_in_layers(make):
    attach_and_detach(make(2))  # what is cached by class is read
    counts = [calls(attach_and_detach, make(depth))[0] for depth in (16, 32, 64)]
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.02)


def test_a_model_looks_at_no_other_attached_model():
    attach_and_detach(bert(2))
    alone, handle = calls(hiddenkey.attach, bert(2), EVERYWHERE)
    handle.detach()
    others = [hiddenkey.attach(bert(32), EVERYWHERE) for _ in range(3)]
    beside, handle = calls(hiddenkey.attach, bert(2), EVERYWHERE)
    assert beside == pytest.approx(alone, rel=0.02)
    for other in (*others, handle):
        other.detach()
