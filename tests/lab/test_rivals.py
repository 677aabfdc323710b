"""Rivals of the paper's methods that are no recipes: NEFTune and label smoothing, alone and beside recipes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import hiddenkey
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig

from .test_run import config, same  # noqa: F401

ALPHA = 5.0


@pytest.fixture
def short(config: TrainConfig) -> TrainConfig:  # noqa: F811
    return replace(config, max_steps=2, epochs=1, recipe="baseline")


@pytest.mark.parametrize("recipe", ["hiddenkey@0.2", pytest.param("baseline", marks=pytest.mark.full)])
def test_neftune_changes_training_and_is_gone_in_evaluation(short: TrainConfig, tmp_path: Path, recipe: str):
    """The noise is α / √(tokens · features) at most, on every step; evaluation and the adapter have none of it."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    plain = run.train(replace(short, recipe=recipe))

    class Spy(run._Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **named: Any) -> Any:
            embeddings = self.accelerator.unwrap_model(model).get_input_embeddings()
            ids = inputs["input_ids"]
            seen[model.training].append(embeddings(ids) - F.embedding(ids, embeddings.weight))
            return super().compute_loss(model, inputs, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_Trainer", Spy)
        noisy = run.train(replace(short, recipe=recipe, neftune_alpha=ALPHA, out=str(tmp_path / "noisy")))
    assert not same(plain.folder, noisy.folder)
    assert len(seen[True]) == 2
    for noise in seen[True]:
        bound = ALPHA / math.sqrt(noise.shape[1] * noise.shape[2])
        assert 0.9 * bound < noise.abs().max() <= bound
    assert seen[False]
    assert all((noise == 0).all() for noise in seen[False])


@pytest.mark.parametrize("consistency", ["kl", "js"])
def test_no_view_takes_noise_from_the_other(llama: Path, consistency: str):
    """The layers below the first drop, run once for both views elsewhere, differ by the noise; inference has none."""
    model = LlamaForCausalLM.from_pretrained(llama)
    inputs = torch.tensor([[4, 5, 6, 7, 8, 9]])
    seen: list[torch.Tensor] = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with hiddenkey.attach(model, f"logits[2:]:column@0.3 ~ {consistency}*1.0"):
        hiddenkey.consistency_step(model.train(), {"input_ids": inputs, "labels": inputs})
        seen.clear()  # in which it is seen that both views are the same there
        hiddenkey.consistency_step(model.train(), {"input_ids": inputs, "labels": inputs})
        assert len(seen) == 1
        handle = activate_neftune(model, ALPHA)
        seen.clear()
        hiddenkey.consistency_step(model.train(), {"input_ids": inputs, "labels": inputs})
        deactivate_neftune(model, handle)
        first, second = seen
        assert not torch.equal(first, second)
        assert torch.equal(second, model.model.embed_tokens(inputs)) == (consistency == "js")


@pytest.mark.parametrize("recipe", ["hiddenkey@0.2", pytest.param("r-drop@0.2", marks=pytest.mark.full)])
def test_label_smoothing_is_in_the_task_loss_beside_a_consistency(short: TrainConfig, recipe: str):
    tasks = []
    for share in (0.0, 0.5):
        out = f"{short.out}{share}"
        result = run.train(replace(short, recipe=recipe, label_smoothing=share, log_steps=1, out=out))
        first = next(entry for entry in result.history if "task_loss" in entry)
        assert first["loss"] == pytest.approx(first["task_loss"] + first["consistency_loss"], rel=1e-4)
        tasks.append(first)
    assert tasks[0]["consistency_loss"] == pytest.approx(tasks[1]["consistency_loss"], rel=1e-5)
    assert tasks[0]["task_loss"] != pytest.approx(tasks[1]["task_loss"], rel=1e-3)


@pytest.mark.full
def test_the_smoothed_loss_is_the_mix_with_the_mean_over_classes(short: TrainConfig):
    """On one batch without drops: (1 - ε) · nll of the label + ε · mean nll of all classes."""
    one = replace(short, batch_size=36, max_steps=1)
    plain, mixed, uniform = (
        run.train(replace(one, label_smoothing=share, out=f"{one.out}{share}")).history[0]["loss"]
        for share in (0.0, 0.25, 0.999999)
    )
    assert mixed == pytest.approx(0.75 * plain + 0.25 * uniform, rel=1e-4)
