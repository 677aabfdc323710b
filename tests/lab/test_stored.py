"""Damaged state: what a run, a bench or a person left in files is checked before anything is done with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import hiddenkey
from hiddenkey.errors import ConfigError, UnfitFolderError
from hiddenkey.lab.checkpoints import last_checkpoint, mark_complete
from hiddenkey.lab.config import TrainConfig, read_fields
from hiddenkey.lab.run_folder import RunResult, open_folder, read_result

DEEP = "[" * 200_000 + "]" * 200_000


def result_in(folder: Path, **changes) -> RunResult:
    values = {
        "folder": str(folder),
        "status": "running",
        "config": TrainConfig(model="m", data="d", out=str(folder)).to_dict(),
        "recipe": "baseline",
        "plan": "",
        "task": "classification",
        "versions": {"torch": "2"},
        "commit": None,
        "data_rows": {"train": 3},
        "trainable_parameters": 1,
        "metric": "accuracy",
        "last": {"validation_loss": 0.5, "step": 3, "validation_perplexity": None},
        "best": {},
        "epochs": [{"epoch": 1.0}],
        "history": [],
        "drop_rates": {"logits": 0.1, "hidden": None},
        "drop_rates_by_site": {},
        "step_seconds": {},
        "seconds": 1.0,
    }
    return RunResult(**values | changes)


def written(folder: Path, **changes) -> Path:
    """A result with fields of other values, as damage or a person leaves it."""
    path = folder / "result.json"
    path.write_text(json.dumps(asdict(result_in(folder)) | changes))
    return path


def test_a_result_is_read_as_it_was_written(tmp_path: Path):
    written(tmp_path)
    assert read_result(tmp_path) == result_in(tmp_path)


GOOD = TrainConfig(model="m", data="d", out="o").to_dict()
DAMAGED = {
    "a configuration that is a list": ({"config": []}, "config"),
    "a seed that is a text": ({"config": GOOD | {"seed": "1"}}, "config: seed"),
    "an unknown option": ({"config": GOOD | {"sed": 1}}, "sed"),
    "a missing model": ({"config": {}}, "model"),
    "a metric that is NaN": ({"last": {"validation_loss": float("nan")}}, "last.validation_loss"),
    "a metric that is a text": ({"best": {"validation_loss": "0.5"}}, "best.validation_loss"),
    "a number of parameters that is a text": ({"trainable_parameters": "1"}, "trainable_parameters"),
    "a field of another version": ({"colour": "red"}, "colour"),
    "labels of numbers": ({"label_names": [1, 2]}, "label_names.0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_names_the_file_and_the_field(tmp_path: Path, damage: str):
    changes, field = DAMAGED[damage]
    path = written(tmp_path, **changes)
    with pytest.raises(UnfitFolderError) as caught:
        read_result(tmp_path)
    assert f"{path} is damaged: " in str(caught.value)
    assert field in str(caught.value)
    assert "--overwrite" in str(caught.value)


@pytest.mark.parametrize("text", [DEEP, '{"status": "\\ud800"}', '{"seconds": 1' + "0" * 400 + "}", "3", "\0"])
def test_a_result_that_no_run_wrote(tmp_path: Path, text: str):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UnfitFolderError, match=r"result\.json is damaged"):
        read_result(tmp_path)


def test_a_finished_run_without_its_adapter_is_not_believed(tmp_path: Path):
    config = TrainConfig(model="m", data="d", out=str(tmp_path))
    written(tmp_path, status="finished")
    with pytest.raises(UnfitFolderError, match="adapter is not in"):
        open_folder(config)
    (tmp_path / "adapter").mkdir()
    hiddenkey.save_recipe(tmp_path / "adapter", "baseline")
    assert open_folder(config) is not None


def checkpoint_in(folder: Path) -> Path:
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    mark_complete(folder, 3)
    return checkpoint


@pytest.mark.parametrize("mark", ["[]", "3", "null", '{"a": 1}', DEEP])
def test_a_damaged_mark_of_a_checkpoint_is_told(tmp_path: Path, mark: str):
    checkpoint = checkpoint_in(tmp_path)
    assert last_checkpoint(tmp_path, print) == checkpoint
    (checkpoint / "complete").write_text(mark)
    with pytest.raises(UnfitFolderError, match="checkpoint-3 is damaged: complete changed"):
        last_checkpoint(tmp_path, print)


@pytest.mark.parametrize("text", [DEEP, "[]", "3", '{"format": 1, "recipe": []}', '{"format": ' + "9" * 5000 + "}"])
def test_a_damaged_recipe_is_told(tmp_path: Path, text: str):
    (tmp_path / "hiddenkey.json").write_text(text)
    with pytest.raises(hiddenkey.SavedRecipeError, match=r"hiddenkey\.json"):
        hiddenkey.load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"model: {DEEP}", "recursion"),
        ("model: &m [*m]", "model = "),
        ('data: "\\ud800"', "data = "),
        ("epochs: 1" + "0" * 400, "epochs = "),
        ("seed: 1" + "0" * 5000, "is not YAML"),
    ],
)
def test_a_configuration_that_nobody_means(tmp_path: Path, text: str, said: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_fields(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_of_a_usual_size_are_read(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("target_modules: &names [query, value]\ntext_columns: *names\n")
    assert read_fields(path) == {"target_modules": ("query", "value"), "text_columns": ("query", "value")}
