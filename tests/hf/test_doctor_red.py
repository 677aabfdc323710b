"""Red lines that a check could miss by looking at something else: found by breaking the checks themselves."""

import types

import pytest
import torch

import hiddenkey
from hiddenkey.drop import is_recomputing
from hiddenkey.hf import sites, step
from hiddenkey.hf.doctor.rates import FALSE_ALARM
from hiddenkey.hf.interval import interval
from hiddenkey.hf.structure import find_transformer

from .tiny import batch, make
from .tools import attached, lora


def red(model, *arguments):
    diagnosis = hiddenkey.doctor(model, *arguments, rounds=1, size=3, length=12)
    return {finding.check: finding.reason for finding in diagnosis.wrong}


@pytest.mark.parametrize("tie", ("held constant", "without effect"))
def test_a_term_that_teaches_nothing(tie, monkeypatch):
    real = step.tie

    def broken(*arguments):
        term = real(*arguments)
        return term.detach() if tie == "held constant" else term * 0 + 0.5

    monkeypatch.setattr(step, "tie", broken)
    assert "reaches 0 parameters" in red(attached("bert", "hiddenkey@0.3"))["consistency"]


def test_the_adapters_dropout_is_no_effect_of_ours():
    """The head's weight is read past our drop; the outputs differ all the same, by `lora_dropout`."""
    model = lora(make("llama"), ["q_proj"], lora_dropout=0.5)
    hiddenkey.attach(model, "output:element@0.3")
    transformer = find_transformer(model)[1]

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits = states @ self.lm_head.weight.T
        return {"loss": logits.square().mean(), "logits": logits}

    transformer.forward = types.MethodType(forward, transformer)
    transformer.generate = lambda **_: torch.zeros(1)
    found = hiddenkey.doctor(model, None, [batch("llama")], rounds=1).wrong
    assert "effect" in {finding.check for finding in found}


def test_a_recomputation_that_fails_with_the_recipe_alone(monkeypatch):
    real = sites.draw_stream

    def once(*arguments):
        if is_recomputing():
            raise ValueError("no draw is left")
        return real(*arguments)

    monkeypatch.setattr(sites, "draw_stream", once)
    found = red(attached("llama", "hidden[:]:element@0.3"))
    assert set(found) == {"recompute"}
    assert "as they can without: no draw is left" in found["recompute"]


def test_false_alarms_are_shared_by_all_sites():
    """Of four sites each may be red by chance a quarter as often."""
    findings = hiddenkey.doctor(make("llama"), "logits[:]:element@0.3", rounds=1, size=3, length=12).findings
    rates = [finding.values for finding in findings if finding.check == "rate"]
    assert len(rates) == 4
    for values in rates:
        assert (values["low"], values["high"]) == interval(values["rate"], values["draws"], FALSE_ALARM / 4)
