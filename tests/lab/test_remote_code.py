"""A model's own code runs where the flag says so, and nowhere else."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hiddenkey import cli
from hiddenkey.errors import ConfigError
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.model import build_skeleton, load_tokenizer

from .test_run import config  # noqa: F401

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def model(bert: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A BERT whose configuration, classifier and tokenizer are of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(bert, tmp_path / "own"))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier"}
    for name, own in (
        ("config.json", {"auto_map": places, "model_type": "own-bert"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"},
        ),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return str(folder)


def test_training_runs_it_with_the_flag_alone(config: TrainConfig, model: str, marker: Path):  # noqa: F811
    asked = replace(config, model=model, max_steps=1)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        run.train(asked)
    assert not marker.exists()
    run.train(replace(asked, trust_remote_code=True))
    assert marker.exists()


@pytest.mark.parametrize("command", ("plan", "doctor"))
def test_plan_and_doctor_do_too(command: str, model: str, marker: Path, capsys: pytest.CaptureFixture[str]):
    asked = [command, model, "hiddenkey-@0.3", "--task", "classification"]
    with pytest.raises(SystemExit) as stop:
        cli.main(asked)
    assert stop.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()
    try:
        cli.main([*asked, "--trust-remote-code"])
    except SystemExit as ended:
        assert ended.code != 2, capsys.readouterr().err
    assert marker.exists()


def test_the_tokenizer_too(config: TrainConfig, bert: Path, model: str, marker: Path):  # noqa: F811
    skeleton = build_skeleton(str(bert), "AutoModelForSequenceClassification")
    shutil.copy(bert / "config.json", Path(model) / "config.json")  # the tokenizer's code alone
    asked = replace(config, model=model)
    with suppress(ConfigError):  # where it can be read without its code, it may be
        load_tokenizer(asked, skeleton)
    assert not marker.exists()
    load_tokenizer(replace(asked, trust_remote_code=True), skeleton)
    assert marker.exists()
