"""The code of the model card, executed for each kind of model that it is written for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.run_folder import RunResult

from ..models.shrink import shrink
from . import tiny
from .test_remote_code import marker, model  # noqa: F401
from .test_run import config  # noqa: F401

TEXTS = ["dull", "the film in town was fine and warm"]
# Those that end a text with a mark; T5 and BART tell the class from it.
MARKED = ("bert", "roberta", "deberta-v2", "modernbert", "modernvbert", "t5", "bart")
# Each tells the class from the last token; the last two have a configuration of the text inside another.
DECODERS = ("gpt2", "llama", "qwen3", "mpt", "gemma3_text", "gemma3", "qwen3_5")


def _save(kind: str, folder: Path) -> str:
    """A model as it was published, whose tokenizer pads with another token than the model, or the model with none."""
    tiny.save_tokenizer(folder, decoder=kind not in MARKED)
    small = shrink(kind)
    text = small.get_text_config()
    text.eos_token_id, text.decoder_start_token_id = 3, 2
    text.pad_token_id = None if kind in ("llama", "gemma3", "qwen3_5") else 0
    published = getattr(transformers, modeling_auto.MODEL_MAPPING_NAMES[kind])
    torch.manual_seed(0)
    published._from_config(small).save_pretrained(folder)
    return str(folder)


def _run_card(result: RunResult) -> dict[str, Any]:
    code = (result.adapter / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code.replace("path/of/this/folder", str(result.adapter)), "README.md", "exec"), names)
    return names


def _trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[RunResult, Any]:  # noqa: F811
    models, save = [], run.save_adapter

    def remember(model: Any, *others: Any) -> None:  # noqa: F811
        models.append(model)
        save(model, *others)

    monkeypatch.setattr(run, "save_adapter", remember)
    return run.train(replace(config, max_steps=1, learning_rate=1e-2)), models[0].eval()


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:  # noqa: F811
    return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", (*MARKED, *DECODERS))
def test_a_classifier_does_not_change_its_class_with_padding(
    kind: str,
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    published = _save(kind, tmp_path / "published")
    result, trained = _trained(replace(config, model=published, recipe="baseline"), monkeypatch)
    found = _run_card(result)
    loaded, tokenizer = found["model"], found["tokenizer"]
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    together = _logits(loaded, tokenizer, TEXTS)
    torch.testing.assert_close(together, _logits(trained, tokenizer, TEXTS))
    torch.testing.assert_close(together[:1], _logits(loaded, tokenizer, TEXTS[:1]), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together[0], together[1])


def test_regression(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    rows = [{"text": row["text"], "score": i / 7} for i, row in enumerate(tiny.labelled_rows(30))]
    data = tiny.write_csv(tmp_path / "scores.csv", rows)
    result, trained = _trained(replace(config, data=str(data)), monkeypatch)
    found = _run_card(result)
    assert torch.equal(
        _logits(found["model"], found["tokenizer"], TEXTS), _logits(trained, found["tokenizer"], TEXTS)
    )


def test_a_language_model(
    config: TrainConfig,  # noqa: F811
    llama: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    result, trained = _trained(replace(config, model=str(llama), data=str(pairs), separator=" "), monkeypatch)
    found = _run_card(result)
    assert torch.equal(
        _logits(found["model"], found["tokenizer"], TEXTS), _logits(trained, found["tokenizer"], TEXTS)
    )


def test_a_model_with_code_of_its_own(
    config: TrainConfig,  # noqa: F811
    model: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    result, trained = _trained(replace(config, model=model, trust_remote_code=True), monkeypatch)
    found = _run_card(result)
    assert torch.equal(
        _logits(found["model"], found["tokenizer"], TEXTS), _logits(trained, found["tokenizer"], TEXTS)
    )
