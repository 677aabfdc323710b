from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from hiddenkey.errors import ConfigError
from hiddenkey.lab.config import FIELD_TYPES, OTHER_NAMES, TextMetric, TrainConfig, read_fields
from hiddenkey.lab.metrics import OF_CAPTIONS, OF_NGRAMS
from hiddenkey.lab.tasks import Regression
from hiddenkey.lab.trainer_settings import training_arguments

GOOD = TrainConfig(model="m", data="d", out="o")


def test_defaults_are_allowed():
    GOOD.check()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("data", "rows\0.csv", "a NUL character stands in it"),
        ("out", "runs\0", "a NUL character stands in it"),
        ("lora_r", 0, "greater than or equal to 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", "fast", "a valid number"),
        ("learning_rate", "1e-4", "a valid number"),
        ("seed", 2**32, "less than 4294967296"),
        ("data_seed", -1, "equal to 0"),
        ("warmup", True, "a valid number"),
        ("weight_decay", float("inf"), "a finite number"),
        ("lora_dropout", 1.0, "less than 1"),
        ("validation_fraction", 1.0, "less than 1"),
        ("max_length", 1, "equal to 2"),
        ("batch_size", 1.5, "a valid integer"),
        ("batch_size", True, "a valid integer"),
        ("overwrite", "yes", "a valid boolean"),
        ("task", "translation", "causal-lm"),
        ("dtype", "float8", "bfloat16"),
        ("scheduler", "linaer", "linear"),
        ("text_columns", "text", "a valid tuple"),
        ("text_columns", ("a", "b", "c"), "at most 2 items"),
        ("model", "", "at least 1 character"),
        ("prompt_column", "prompt", "completion_column"),
        ("test_size", 5, "test part"),
        ("generation_metrics", ("bleu", "rouge"), "'rouge_l' or 'cider'"),
        ("generation_metrics", ("bleu",), "test part"),
        ("length_penalty", float("inf"), "finite"),
    ],
)
def test_bad_value_names_itself_and_what_is_allowed(name, value, said):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(GOOD, **{name: value}).check()
    assert name in str(caught.value)
    assert said in str(caught.value)


def test_the_metrics_of_texts_are_those_that_are_measured():
    assert get_args(TextMetric) == (*OF_NGRAMS, *OF_CAPTIONS)


def test_a_home_folder_is_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    given = TrainConfig(model="~/m", data="~/d.csv", out="~/run", test="~/t.csv", validation="dev", recipe="~/r")
    found = (given.model, given.data, given.out, given.test, given.validation, given.recipe)
    assert found == (*(f"/home/of/mine/{name}" for name in ("m", "d.csv", "run", "t.csv")), "dev", "~/r")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"text_columns": ("text",)}, "not both"),
        ({"label_column": "label"}, "not both"),
        ({"task": "classification"}, "text_columns"),
    ],
)
def test_columns_of_two_kinds_exclude_each_other(other, said):
    config = dataclasses.replace(GOOD, prompt_column="a", completion_column="b", **other)
    with pytest.raises(ConfigError, match=said):
        config.check()


def test_a_constant_learning_rate_has_its_warm_up():
    """As `scheduler` is the shape after it; transformers' own `constant` starts at once."""
    arguments = training_arguments(dataclasses.replace(GOOD, scheduler="constant", warmup=4.0), Regression(), "loss")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(100), 100)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


def test_yaml_uses_the_same_names_and_types(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nout: o\nlearning_rate: 1e-4\nwarmup: 1\ntext_columns: [a, b]\nkeep: best\n")
    config = TrainConfig(**read_fields(path))
    assert config == dataclasses.replace(GOOD, learning_rate=1e-4, warmup=1.0, text_columns=("a", "b"), keep="best")
    assert isinstance(config.learning_rate, float)


def test_unknown_yaml_name_gets_the_nearest_and_all_names(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1e-4\n")
    with pytest.raises(ConfigError) as caught:
        read_fields(path)
    message = str(caught.value)
    assert "'lerning_rate'" in message
    assert "Did you mean 'learning_rate'" in message
    assert all(field.name in message for field in dataclasses.fields(TrainConfig))
    path.write_text("per_device_train_batch_size: 8\n")
    with pytest.raises(ConfigError, match="it is called batch_size here"):
        read_fields(path)
    assert set(OTHER_NAMES.values()) <= set(FIELD_TYPES)
    assert not set(OTHER_NAMES) & set(FIELD_TYPES)


def doubled(times: int) -> str:
    """A YAML list that stands for 2 to the power of `times` values."""
    return "[&a0 [x, x], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, times)) + "]"


def test_aliases_stand_for_values_but_not_for_too_many(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("text_columns: &both [a, b]\ntarget_modules: *both\n")
    assert read_fields(path) == {"text_columns": ("a", "b"), "target_modules": ("a", "b")}
    for field in ("model", "text_columns"):
        path.write_text(f"{field}: {doubled(60)}\n")
        with pytest.raises(ConfigError, match="its aliases stand for more than 1,000,000 values"):
            read_fields(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [\n", "", "epochs: many\n", "seed: 1\nseed: 2\n"])
def test_malformed_yaml_is_an_error(tmp_path: Path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_fields(path)


def test_the_configuration_needs_no_torch():
    code = (
        "import sys; from hiddenkey.lab.config import TrainConfig, read_fields;"
        "TrainConfig(model='m', data='d', out='o').check();"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
