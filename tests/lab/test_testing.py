"""The test part: looked at once, after training, by two models, and by nothing that learns or chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import AutoPeftModelForSequenceClassification
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F
from transformers import AutoTokenizer

from hiddenkey.errors import ConfigError, DataError
from hiddenkey.lab import data_files as sources
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.data import Examples, load_examples
from hiddenkey.lab.run_folder import RunResult, read_result

from . import tiny
from .test_faults import kill_at
from .test_run import config, no_weights, same  # noqa: F401

FULL = pytest.mark.full


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    rows = [{**row, "label": "bad" if i % 5 == 0 else row["label"]} for i, row in enumerate(tiny.labelled_rows(30))]
    return tiny.write_csv(tmp_path / "held_out.csv", rows)


@pytest.fixture
def worsening(config: TrainConfig, tests: Path, tmp_path: Path) -> TrainConfig:  # noqa: F811
    """A run whose validation rows say the opposite of training's: the first of its four epochs is the best."""
    rows = [{**row, "label": {"good": "bad", "bad": "good"}[str(row["label"])]} for row in tiny.labelled_rows(40)]
    opposite = tiny.write_csv(tmp_path / "opposite.csv", rows)
    fields = {
        "epochs": 4,
        "learning_rate": 1e-2,
        "scheduler": "constant",
        "warmup": 0.0,
        "recipe": "dropkey:column@0.02",
    }
    return replace(config, validation=str(opposite), test=str(tests), metric="loss", **fields)


def load(data: Path | str, **fields: Any) -> Examples:
    return load_examples(TrainConfig(model="m", data=str(data), out="o", **fields))


def folder_of(root: Path, **parts: list[dict[str, object]]) -> Path:
    root.mkdir()
    for name, rows in parts.items():
        tiny.write_csv(root / f"{name}.csv", rows)
    return root


def numbered(start: int, stop: int) -> list[dict[str, object]]:
    return [{"text": f"t{i}", "label": i % 2} for i in range(start, stop)]


def texts(rows: Dataset | None) -> set[str]:
    assert rows is not None
    return set(rows["first"])


def by_hand(checkpoint: Path, result: RunResult, rows: Dataset) -> dict[str, float]:
    """The metrics of a checkpoint, example by example, with PEFT alone."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.config["model"])
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in rows["first"]])
    found, truth = logits.argmax(-1).tolist(), list(rows["label"])
    return {
        "loss": F.cross_entropy(logits, torch.tensor(truth)).item(),
        "accuracy": accuracy_score(truth, found),
        "matthews": matthews_corrcoef(truth, found),
        "f1": f1_score(truth, found, zero_division=0),
    }


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=FULL)])
def test_both_models_are_tested_and_that_of_keep_is_saved(worsening: TrainConfig, keep: Any):
    config = worsening if keep == "best" else replace(worsening, keep=keep)  # noqa: F811 - the default
    result = run.train(config)
    assert result.best["step"] < result.last["step"] - 6, "older than what is kept anyway"
    assert len(list((Path(config.out) / "checkpoints").iterdir())) == 3
    rows = load_examples(config).test
    for name in ("best", "last"):
        checkpoint = Path(config.out) / "checkpoints" / f"checkpoint-{getattr(result, name)['step']}"
        assert result.test[name] == pytest.approx(by_hand(checkpoint, result, rows), abs=1e-5)
    assert result.test["best"]["loss"] != result.test["last"]["loss"]
    assert result.test[keep] == pytest.approx(by_hand(result.adapter, result, rows), abs=1e-5)
    assert result.data_rows == {"train": 40, "validation": 40, "test": 30}
    assert read_result(Path(config.out)) == result
    assert f"| test | last epoch | best epoch by {result.metric} |" in (result.adapter / "README.md").read_text()


def test_nothing_but_the_test_metrics_depends_on_the_test_part(config: TrainConfig, tests: Path):  # noqa: F811
    config = replace(config, keep="best", metric="loss")
    without = run.train(config)
    first = run.train(replace(config, test=str(tests), out=config.out + "1"))
    tiny.write_csv(tests, [{"text": "was grey", "label": "good"}, {"text": "fine", "label": "bad"}])
    second = run.train(replace(config, test=str(tests), out=config.out + "2"))
    assert without.test == {}
    assert first.test != second.test
    for other in (first, second):
        assert same(without.folder, other.folder)
        for name in ("epochs", "best", "last", "drop_rates", "drop_rates_by_site"):
            assert getattr(other, name) == getattr(without, name)


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=FULL)])
def test_a_run_killed_before_its_test_continues_to_the_same_numbers(
    worsening: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: Any,
):
    config = replace(worsening, keep=keep)  # noqa: F811
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    kill_at(monkeypatch, "final_scores", config)
    assert read_result(Path(config.out)).status == "running"
    moved = replace(config, out=str(tmp_path / "moved"))
    Path(config.out).rename(moved.out)
    continued = run.train(moved)
    assert continued.test == whole.test
    assert (continued.best, continued.last) == (whole.best, whole.last)
    assert same(moved.out, whole.folder)


def test_regression_and_completion_have_a_test_too(
    config: TrainConfig,  # noqa: F811
    llama: Path,
    tmp_path: Path,
):
    rows = [{"text": row["text"], "score": i / 7} for i, row in enumerate(tiny.labelled_rows(30))]
    folder = folder_of(tmp_path / "scores", train=rows[:20], dev=rows[20:25], test=rows[25:])
    result = run.train(replace(config, data=str(folder), test="test", epochs=1))
    assert set(result.test["best"]) == {"loss", "pearson", "spearman"}
    assert result.data_rows == {"train": 20, "validation": 5, "test": 5}
    pairs = tiny.paired_rows(24)
    folder = folder_of(tmp_path / "pairs", train=pairs, dev=pairs[:3], test=[*pairs[:8], *pairs[:4], *pairs[16:24]])
    config = replace(config, model=str(llama), data=str(folder), epochs=1, out=config.out + "2", separator=" ")
    result = run.train(replace(config, test="test", test_size=3))
    assert {"loss", "nll", "perplexity", "token_accuracy"} == set(result.test["last"])
    assert result.test["best"] == result.test["last"]
    test = load_examples(replace(config, test="test", test_size=3)).test
    assert len(set(test["prompt"])) == 3
    assert result.data_rows["test"] == len(test) > 3


def test_the_dev_part_as_test_leaves_validation_to_training_rows(tmp_path: Path):
    folder = folder_of(tmp_path / "data", train=numbered(0, 40), dev=numbered(40, 50))
    usual = load(folder)
    assert (len(usual.train), len(usual.validation), usual.test) == (40, 10, None)
    assert texts(usual.validation) == {f"t{i}" for i in range(40, 50)}
    for name in ("dev", "validation", str(folder / "dev.csv")):
        cut = load(folder, test=name, validation_fraction=0.25)
        assert texts(cut.test) == texts(usual.validation)
        assert texts(cut.train) | texts(cut.validation) == texts(usual.train)
        assert (len(cut.train), len(cut.validation)) == (30, 10)
        few = load(folder, test=name, validation_fraction=0.25, train_size=8, eval_size=5)
        assert (len(few.train), len(few.validation)) == (8, 5)
        assert texts(few.train) <= texts(cut.train)
        assert texts(few.validation) <= texts(cut.validation)


def test_the_test_rows_are_the_same_for_every_seed(tmp_path: Path):
    folder = folder_of(tmp_path / "data", train=numbered(0, 40), test=numbered(40, 60))
    first, second = (load(folder, test="test", test_size=7, seed=seed, data_seed=seed) for seed in (1, 2))
    assert first.test.to_list() == second.test.to_list()
    assert len(first.test) == 7
    assert texts(first.validation) != texts(second.validation)


def test_parts_of_a_hub_set(monkeypatch: pytest.MonkeyPatch, tests: Path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})

    def rows(start: int, stop: int) -> Dataset:
        texts = [f"t{i}" for i in range(start, stop)]
        return Dataset.from_dict({"sentence": texts, "label": [i % 2 for i in range(start, stop)]}, features=features)

    parts = DatasetDict(train=rows(0, 20), validation=rows(20, 24), test=rows(24, 30))
    monkeypatch.setattr(sources, "load_dataset", lambda *_: parts)
    assert texts(load("o/s", test="test").test) == {f"t{i}" for i in range(24, 30)}
    cut = load("o/s", test="validation")
    assert texts(cut.test) == texts(load("o/s", test="dev").test) == {"t20", "t21", "t22", "t23"}
    assert (len(cut.train), len(cut.validation)) == (18, 2)
    assert len(load("o/s", test="dev", validation="test").validation) == 6
    with pytest.raises(DataError, match="'tset'; it has train, validation, test"):
        load("o/s", test="tset")
    with pytest.raises(DataError, match="test = 'validation' is the validation part of"):
        load("o/s", test="validation", validation="validation")


def test_what_is_learnt_from_or_chosen_by_is_no_test(tmp_path: Path):
    folder = folder_of(tmp_path / "data", train=numbered(0, 20), dev=numbered(20, 30))
    for fields, said in (
        ({"test": "train"}, "is the training part of"),
        ({"test": "dev", "validation": str(folder / "dev.csv")}, "is the validation part of"),
    ):
        with pytest.raises(DataError, match=said):
            load(folder, **fields)
    with pytest.raises(DataError, match="is the training part of"):
        load(folder / "train.csv", test=str(tmp_path / "data" / ".." / "data" / "train.csv"))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"test": "dev"}, DataError, r"'dev'; it has sentences\.csv"),
        ({"test": "gone.csv"}, OSError, r"gone\.csv"),
        ({"test": "OTHER"}, DataError, "test data has labels that training has not: middling"),
        ({"test": "OTHER", "test_size": 2}, DataError, "test_size = 2, but there are 1 rows"),
        ({"test_size": 2}, ConfigError, "needs a test part"),
    ],
)
def test_mistakes_are_told_before_the_weights_are_read(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    error: type[Exception],
    said: str,
):
    other = tiny.write_csv(tmp_path / "other.csv", [{"text": "a", "label": "middling"}])
    monkeypatch.setattr(run, "load_model", no_weights)
    fields = {name: str(other) if value == "OTHER" else value for name, value in fields.items()}
    with pytest.raises(error, match=said):
        run.train(replace(config, **fields))
