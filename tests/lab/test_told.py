"""What is told of a run before it begins: its rows, and what is allowed but seldom meant."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, TrainerState

import hiddenkey
from hiddenkey.lab import train as run
from hiddenkey.lab.callbacks import ProgressBar
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.console import say
from hiddenkey.lab.preflight import check_run, doubts, is_idle
from hiddenkey.lab.run_folder import RunResult
from hiddenkey.lab.tasks import Classification

from . import tiny
from .test_run import config  # noqa: F401

PATIENT = {"epochs": 3, "batch_size": 4, "warmup": 0.0}


def told(base: TrainConfig, **fields: object) -> str:
    asked = replace(base, **PATIENT | fields)
    recipe = hiddenkey.parse(asked.recipe)
    return " ".join(doubts(check_run(asked, recipe), asked, recipe))


@pytest.fixture
def base(config: TrainConfig) -> TrainConfig:  # noqa: F811
    return config


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(tiny.write_csv(tmp_path / "rows.csv", tiny.labelled_rows(300)))


def test_a_run_as_it_is_meant_leaves_no_doubt(base: TrainConfig, rows: str):
    assert told(base, data=rows) == ""


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_a_chat_template_that_is_not_applied(
    base: TrainConfig,
    bert: Path,
    llama: Path,
    pairs: Path,
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """It is no matter for a classifier, which nobody chats with."""
    said, written = "has a chat template, which is not applied", "without the tokenizer's chat template"
    for source, data in ((bert, rows), (llama, str(pairs))):
        instruct = tmp_path / source.name
        shutil.copytree(source, instruct)
        for model, templated in ((source, False), (instruct, True)):
            if templated:
                (instruct / "chat_template.jinja").write_text(CHAT)
            result = run.train(replace(base, model=str(model), data=data, separator=" ", max_steps=1, overwrite=True))
            wanted = templated and source == llama
            assert (said in capsys.readouterr().err) == wanted
            assert (written in (result.adapter / "README.md").read_text()) == wanted


def test_the_counts_of_rows_are_told(base: TrainConfig, rows: str, capsys: pytest.CaptureFixture[str]):
    run.train(replace(base, data=rows, train_size=100, epochs=1))
    assert "100 rows to learn from, 30 to choose the epoch by, none to test on." in capsys.readouterr().err


def test_the_plan_and_the_rates_are_told(base: TrainConfig, capsys: pytest.CaptureFixture[str]):
    result = run.train(replace(base, epochs=1))
    said = capsys.readouterr().err
    assert result.plan in said
    (line,) = [line for line in said.splitlines() if "dropped: " in line]
    rates = dict(zip(*[iter(line.partition("dropped: ")[2].split())] * 2, strict=True))
    assert rates == {name: f"{rate:.4g}" for name, rate in result.drop_rates.items()}


@pytest.mark.parametrize("width", [40, 80])
def test_the_steps_stay_in_sight_on_a_narrow_terminal(width: int):
    with io.StringIO() as heard:
        bar = ProgressBar(Console(file=heard, width=width, force_terminal=True, color_system=None))
        state, nothing = TrainerState(max_steps=12345, global_step=6789), None
        bar.on_train_begin(nothing, state, nothing)
        bar.on_log(nothing, state, nothing, logs={"loss": 0.69311, "task_loss": 0.61234, "consistency_loss": 0.08077})
        bar.stop()
        assert "6789/12345" in heard.getvalue()
        assert "0.08077" in heard.getvalue().replace("\n", "")


def test_a_choice_on_few_rows(base: TrainConfig, rows: str):
    assert "The epoch is chosen on 19 rows alone" in told(base, data=rows, eval_size=19)
    assert "alone" not in told(base, data=rows, eval_size=20)


def test_marks_that_stand_in_the_texts(base: TrainConfig, llama: Path, tmp_path: Path):
    rows = [{"prompt": f"[CLS]the film {i}", "completion": "was fine[SEP]" if i % 2 else "was"} for i in range(40)]
    data = str(tiny.write_csv(tmp_path / "pairs.csv", rows))
    said = told(base, model=str(llama), data=data)
    assert "36 rows of training begin with the start token '[CLS]', which the tokenizer adds too" in said
    assert "rows of training end in the end mark '[SEP]', which is added too" in said
    plain = [{name: text.replace("[CLS]", "").replace("[SEP]", "") for name, text in row.items()} for row in rows]
    assert "added too" not in told(base, model=str(llama), data=str(tiny.write_csv(tmp_path / "plain.csv", plain)))


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_start_token_that_stands_in_a_text_to_classify(
    base: TrainConfig, model: str, request: pytest.FixtureRequest, tmp_path: Path
):
    rows = [{"text": f"[CLS] {row['text']}", "label": row["label"]} for row in tiny.labelled_rows(40)]
    data = str(tiny.write_csv(tmp_path / "rows.csv", rows))
    folder = request.getfixturevalue(model)
    assert "36 rows of training begin with the start token '[CLS]'" in told(base, model=str(folder), data=data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {"first": ["[CLS] the film", "the film"], "label": [0, 1]}
    found = Classification(("bad", "good")).tokenise(Dataset.from_dict(texts), tokenizer, 64)
    assert found["input_ids"][0] == found["input_ids"][1] == tokenizer("the film")["input_ids"]
    assert found["attention_mask"][0] == found["attention_mask"][1]


def test_a_class_that_a_subset_has_lost(base: TrainConfig, tmp_path: Path):
    rare = [{"text": "the film", "label": "rare" if i == 7 else "often"} for i in range(300)]
    data = str(tiny.write_csv(tmp_path / "rare.csv", rare))
    said = told(base, data=data)
    assert ("No validation row is of class rare." in said) != ("No training row is of class rare." in said)


@pytest.mark.parametrize(
    ("fields", "warmup", "steps"),
    [
        ({"max_steps": 1, "warmup": 0.06}, 1, 1),
        ({"max_steps": 2, "warmup": 0.06}, 1, 2),
        ({"max_steps": 40, "warmup": 40}, 40, 40),
        ({"epochs": 1, "batch_size": 64, "gradient_accumulation": 8, "warmup": 0.5}, 1, 1),
        ({"epochs": 2, "batch_size": 64, "gradient_accumulation": 2, "warmup": 500}, 500, 6),
    ],
)
def test_a_warm_up_that_takes_all_steps(
    fields: dict[str, float], warmup: int, steps: int, base: TrainConfig, rows: str
):
    said = f"Warm-up takes {warmup} of {steps} steps, so the learning rate never gets to"
    assert (said in told(base, data=rows, **fields)) == (warmup >= steps)


def test_that_count_of_steps_is_the_trainers(base: TrainConfig, rows: str):
    fields = {"epochs": 2, "batch_size": 64, "gradient_accumulation": 2, "warmup": 0.0}
    result: RunResult = run.train(replace(base, data=rows, **fields))
    assert result.last["step"] == 6


@pytest.mark.parametrize(
    ("recipe", "fields", "idle"),
    [
        ("baseline ~ kl", {}, True),
        ("hiddenkey@0", {}, True),
        ("baseline ~ kl", {"lora_dropout": 0.1}, False),
        ("baseline ~ js", {"neftune_alpha": 5.0}, False),
        ("hiddenkey@0.1", {}, False),
        ("baseline", {}, False),
    ],
)
def test_a_consistency_of_two_views_that_are_the_same(
    recipe: str, fields: dict[str, float], idle: bool, base: TrainConfig
):
    assert is_idle(hiddenkey.parse(recipe), replace(base, **fields)) is idle


def test_a_finished_run_says_how_it_is_made_anew(base: TrainConfig, capsys: pytest.CaptureFixture[str]):
    run.train(replace(base, max_steps=1))
    run.train(replace(base, max_steps=1))
    assert "nothing to do. If its data have changed since, --overwrite makes it anew." in capsys.readouterr().err


def test_brackets_in_a_name_are_no_markup_and_long_lines_stay_whole():
    text = "runs/x[b] [/a] [red]3.5[/red] " + 40 * "long "
    with io.StringIO() as heard:
        say(Console(file=heard, width=20, force_terminal=True), text)
        assert heard.getvalue() == f"{text}\n"
