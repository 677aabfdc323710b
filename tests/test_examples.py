"""Every example runs on a tiny model: it drops, compares the two views, and saves a plain adapter with its recipe."""

import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from transformers import Trainer

import hiddenkey

from .lab.tiny import save_bert, save_llama

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "sample_texts")
CLASSIFIERS = ("trainer", "accelerate_loop")
NEEDS = {"sft": "trl", "dpo": "trl", "lightning_loop": "pytorch_lightning"}
OWN = "own_model"
RECIPE = "hiddenkey@0.3"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    for name in (*NAMES, "sample_texts"):
        importlib.sys.modules.pop(name, None)


def test_there_is_one_for_every_trainer():
    assert NAMES == ["accelerate_loop", "dpo", "lightning_loop", "own_model", "plain_loop", "sft", "trainer"]


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_on_a_screen(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 66


@pytest.mark.parametrize("name", [name for name in NAMES if name != OWN])
def test_an_example(name, load, tmp_path, capsys):
    example = load(name)
    model = (save_bert if name in CLASSIFIERS else save_llama)(tmp_path / "model")
    length = "epochs" if "epochs" in inspect.signature(example.main).parameters else "steps"
    done = example.main(str(model), out=str(tmp_path / "out"), recipe=RECIPE, **{length: 2})

    attachment = find(done)
    rates = attachment.rates().values()
    assert rates
    assert all(0 < rate < 1 for rate in rates)
    assert 0.15 < sum(rates) / len(rates) < 0.45
    losses = consistencies(done, capsys.readouterr().out)
    assert losses
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert hiddenkey.load_recipe(tmp_path / "out") == hiddenkey.parse(RECIPE)


def test_a_model_of_ones_own(load, capsys, monkeypatch):
    """It learns, from its consistency too, drops in training alone, and its padding changes nothing."""
    example, losses, real = load(OWN), [], hiddenkey.consistency_loss
    monkeypatch.setattr(hiddenkey, "consistency_loss", lambda *args: losses.append(real(*args)) or losses[-1])
    torch.manual_seed(0)
    model = example.main(recipe=RECIPE, steps=160)
    assert len(losses) == 160
    assert all(loss.requires_grad for loss in losses)
    printed = re.findall(r"task ([\d.]+), consistency ([\d.]+)", capsys.readouterr().out)
    assert float(printed[-1][0]) < 0.35 < float(printed[0][0])
    assert all(float(consistency) > 0 for _, consistency in printed)
    words, valid = torch.randint(example.WORDS, (64, example.LENGTH)), torch.arange(example.LENGTH) < 9
    valid = valid.expand(64, -1)
    logits = model(words, valid)
    assert torch.equal(logits, model(words, valid))
    assert torch.allclose(logits, model(torch.where(valid, words, 0), valid))
    classes = words[:, :9].remainder(2).sum(1) > 4
    assert (logits.argmax(-1) == classes).float().mean() > 0.8
    model.train()
    assert not torch.allclose(logits, model(words, valid))
    assert not torch.equal(model(words, valid), model(words, valid))


def find(done):
    if isinstance(done, hiddenkey.Attachment):
        return done
    return hiddenkey.find_attachment(done.model)


def consistencies(done, printed):
    """The consistency losses that were logged or printed."""
    if isinstance(done, Trainer):
        return [entry["consistency_loss"] for entry in done.state.log_history if "consistency_loss" in entry]
    if isinstance(done, hiddenkey.Attachment):
        return [float(value) for value in re.findall(r"consistency ([\d.e-]+)", printed)]
    return [float(done.callback_metrics["consistency_loss"])]
