"""`hiddenkey doctor` from the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from rich.status import Status
from transformers import BertConfig, BertForMaskedLM

from hiddenkey.cli import _parse, main
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.doctor_command import load
from hiddenkey.patterns import PATTERNS, register_pattern

QUICK = ["--rounds", "1", "--size", "3", "--length", "12"]


@pytest.fixture
def broken():
    """A pattern that keeps everything, whatever its rate."""

    @register_pattern("broken", unit="entry")
    def keep_all(grid, p):
        import torch

        return torch.ones(grid.shape, dtype=torch.bool)

    yield "hidden[:]:broken@0.5"
    PATTERNS.remove("broken")


@pytest.mark.parametrize("name", ("bert", "llama"))
def test_a_model_that_is_well(name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]):
    main(["doctor", str(request.getfixturevalue(name)), "hiddenkey[:]@0.3", *QUICK])
    said = capsys.readouterr().out
    assert "none red: 'logits[:]:column@0.3 + hidden[:]:element@0.3 ~ kl*1.0' is on" in said
    assert "RED" not in said


def test_it_shows_what_it_is_at(bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown: list[str] = []
    monkeypatch.setattr(Status, "update", lambda self, status: shown.append(status))
    main(["doctor", str(bert), "hiddenkey[:]@0.3", "--json", *QUICK])
    heard = capsys.readouterr()
    assert f"Reading {bert}" in heard.err.replace("\n", "")
    checks = [finding["check"] for finding in json.loads(heard.out)["findings"]]
    assert shown == [f"Examining {bert}"] + [f"Examining {bert}: {check} is done" for check in checks]


def test_red_lines_exit_with_1(bert: Path, broken: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(bert), broken, *QUICK])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert said.count("RED  rate") == 2
    assert "2 of 10 checks are red" in said


def test_json(bert: Path, broken: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["doctor", str(bert), broken, "--json", *QUICK])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["recipe"] == "hidden[:]:broken@0.5"
    assert {"check", "verdict", "reason", "where", "values"} == set(found["findings"][0])


def test_the_arguments_of_a_training_run(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.yaml"
    path.write_text("data: mine.csv\nlora_dropout: 0.1\nattn_implementation: eager\ngradient_checkpointing: true\n")
    main(["doctor", str(llama), "hiddenkey@0.3", "--train-args", str(path), *QUICK])
    said = capsys.readouterr().out
    assert "8 dropouts of the adapter are on" in said
    assert "recomputed as the model is set to" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["BERT", "hiddenkie@0.1"], "Did you mean"),
        (["/no/such/model", "hiddenkey@0.1"], "/no/such/model"),
        (["BERT", "hiddenkey@0.1", "--train-args", "gone.yaml"], "gone.yaml"),
        (["BERT", "hiddenkey@0.1", "--rounds", "0"], "rounds = 0"),
        (["BERT", "logits[9:]:column@0.1"], "finds no site"),
    ],
)
def test_mistakes_exit_with_2(bert: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *(str(bert) if argument == "BERT" else argument for argument in arguments)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    assert [_parse(shlex.split(line)[1:]).model for line in lines] == ["MODEL"] * 5


@pytest.mark.parametrize("name", ("bert", "llama"))
@pytest.mark.parametrize("task", ("classification", "causal-lm"))
def test_half_precision_as_in_training(name, task, tmp_path: Path, request: pytest.FixtureRequest, capsys):
    """What is new in the model is trained in float32, and meets the rest under autocast."""
    if (name, task) == ("bert", "causal-lm"):
        pytest.skip("an encoder")
    path = tmp_path / "run.yaml"
    path.write_text("dtype: bfloat16\n")
    flags = ["--train-args", str(path), "--task", task]
    main(["doctor", str(request.getfixturevalue(name)), "hiddenkey[:]@0.3", *flags, *QUICK])
    assert "none red" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--task", "auto"], "BertForMaskedLM"),
        (["--task", "causal-lm"], "BertLMHeadModel"),
        (["--train-args", "RUN"], "BertLMHeadModel"),
        (["--train-args", "RUN", "--task", "classification"], "BertForSequenceClassification"),
    ],
)
def test_the_head_is_that_of_the_training_run(flags, wanted, bert: Path, tmp_path: Path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("task: causal-lm\n")
    flags = [str(path) if flag == "RUN" else flag for flag in flags]
    model = shutil.copytree(bert, tmp_path / "writes")
    BertForMaskedLM(BertConfig.from_pretrained(bert)).save_pretrained(model)
    main(["doctor", str(model), "hiddenkey[:]@0.3", *flags, *QUICK])
    assert f"model   {wanted}" in capsys.readouterr().out


def test_the_model_is_examined_where_it_would_be_trained(bert: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    model = load(TrainConfig(str(bert), "none", "none"), "")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("attn_implementation: nonsense", "cannot be a "),
        ("target_modules: [nothing]", "no linear layer named nothing"),
        *([] if torch.cuda.is_available() else [("dtype: float16", "dtype float16 needs a CUDA device")]),
    ],
)
def test_mistakes_are_told_as_in_training(line: str, said: str, bert: Path, tmp_path: Path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(line + "\n")
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(bert), "hiddenkey@0.3", "--train-args", str(path), *QUICK])
    assert said in capsys.readouterr().err


def test_weights_that_git_left_out(bert: Path, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(bert, tmp_path / "bert"))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(folder), "hiddenkey@0.3", *QUICK])
    assert "git lfs pull" in capsys.readouterr().err
