"""The checks of the matrix can fail: each is shown a library with one thing broken."""

from __future__ import annotations

import pytest
import torch

from hiddenkey.hf import attach, sites, structure
from hiddenkey.hf import attention_backend as backend
from hiddenkey.hf import attention_softmax as softmax

from .examine import examine


def problems(kind: str) -> str:
    return " | ".join(examine(kind).problems)


def test_a_drop_that_never_happens(monkeypatch):
    monkeypatch.setattr(sites.StreamSite, "after", lambda self, module, args, output: output)
    monkeypatch.setattr(attach, "can_skip", lambda module, drop: False)
    assert "ran without a draw: hidden model.layers.#.mlp" in problems("llama")


def test_a_drop_in_evaluation(monkeypatch):
    monkeypatch.setattr(sites.StreamSite, "is_active", lambda self, module: True)
    monkeypatch.setattr(attach, "can_skip", lambda module, drop: False)
    assert "evaluates to something else" in problems("bert")


def test_a_look_into_the_future(monkeypatch):
    monkeypatch.setattr(backend.Mask, "dense", lambda self, shape, device: None)
    monkeypatch.setattr(backend, "attend", backend.attend.__globals__["reference"])
    found = problems("llama")
    assert "a later token changes an earlier output" in found
    assert "drops that keep everything change the output" in found


def test_hidden_keys_that_come_back(monkeypatch):
    monkeypatch.setattr(softmax, "drop_weights", lambda logits, visible, drops, keeps: torch.ones_like(logits) / 9)
    assert "masks_that_keep_everything" in problems("bloom")


def test_something_left_behind(monkeypatch):
    monkeypatch.setattr(attach.Attachment, "detach", lambda self: delattr(self.model, attach.MARK))
    assert "detach_gives_everything_back" in problems("llama")


def test_a_backend_that_is_not_refused(monkeypatch):
    monkeypatch.setattr("hiddenkey.hf.plan.check_backend", lambda path, module: None)
    assert "flash_attention_2 is not refused" in problems("llama")


def test_attention_that_is_not_found(monkeypatch):
    real = structure.is_attention
    monkeypatch.setattr(structure, "is_attention", lambda m: real(m) and type(m).__name__ != "LlamaAttention")
    record = examine("llava")
    assert record.status == "partly"
    assert record.missing == ["attention of model.language_model.layers.#.self_attn"]


def test_another_draw_when_checkpointing_recomputes(monkeypatch):
    drawn = []

    def other(shape, p, device):
        drawn.append(shape)
        generator = torch.Generator().manual_seed(len(drawn))
        return torch.rand(shape, generator=generator) >= p

    monkeypatch.setattr("hiddenkey.patterns.random_keep", other)
    assert "gradients with activation checkpointing are others" in problems("bert")


@pytest.mark.parametrize("kind", ("fsmt", "xlnet"))
def test_a_span_across_examples(kind, monkeypatch):
    assert "across the examples" not in problems(kind)
    monkeypatch.setattr("hiddenkey.hf.plan.passes_tokens_first", lambda module: False)
    assert "a span runs across the examples of a batch" in problems(kind)


@pytest.mark.parametrize("kind", ("bert", "llama"))
def test_the_plain_library_has_no_problem(kind):
    assert problems(kind) == ""
