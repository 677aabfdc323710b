"""What stands in a file is what is trained on, and no row of training chooses or tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hiddenkey.errors import DataError

from . import tiny
from .test_data import load, write_jsonl

TEXTS = ["7.50", "007", "true", "1e2", "100000000000000000001", "2020-01-03", "NA", "", "3"]


def write_classes(path: Path, labels: list[str], names: list[str]) -> Path:
    """A Parquet file whose labels are numbers in its own list of names."""
    rows = {"text": [f"is {label}" for label in labels], "label": [names.index(label) for label in labels]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def classes(rows: Any) -> dict[str, int]:
    return dict(zip(rows["first"], rows["label"], strict=True))


def test_numbered_classes_are_matched_by_name(tmp_path: Path):
    train = write_classes(tmp_path / "train.parquet", ["neg", "pos"] * 4, ["neg", "pos"])
    write_classes(tmp_path / "dev.parquet", ["neg", "pos"], ["pos", "neg"])
    examples = load(tmp_path)
    assert examples.label_names == ("neg", "pos")
    assert classes(examples.train) == classes(examples.validation) == {"is neg": 0, "is pos": 1}
    third = write_classes(tmp_path / "third.parquet", ["odd"], ["neg", "odd", "pos"])
    with pytest.raises(DataError, match="labels that training has not: odd; training has neg, pos"):
        load(train, validation=str(third))
    words = tmp_path / "words.csv"
    words.write_text("text,label\nis pos,pos\nis neg,neg\n")
    mixed = load(words, validation=str(tmp_path / "dev.parquet"))
    assert classes(mixed.train) == classes(mixed.validation) == {"is neg": 0, "is pos": 1}


@pytest.mark.parametrize("names", ((), ("text", "label")))
def test_more_fields_than_names(tmp_path: Path, names: tuple[str, ...]):
    path = tmp_path / "rows.csv"
    path.write_text(("" if names else "text,label\n") + "a,0,x\nb,1,y\n")
    with pytest.raises(DataError, match=r"2 column names \(text, label\), but 3 fields .*: 'a', '0', 'x'"):
        load(path, column_names=names)
    path.write_text("text,label\na,0\nb,1,y\n")
    with pytest.raises(DataError, match="3 fields in line 3: 'b', '1', 'y'"):
        load(path)


@pytest.mark.parametrize("kind", ("csv", "quoted.csv", "tsv"))
def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path, kind: str):
    separator = "\t" if kind == "tsv" else ","
    quoted = [f'"{text}"' if "quoted" in kind else text for text in TEXTS]
    path = tmp_path / f"rows.{kind}"
    path.write_text(f"prompt{separator}completion\n" + "".join(f"{text}{separator}{text}x\n" for text in quoted))
    if "quoted" in kind:
        path.write_text(path.read_text().replace('"x', 'x"'))
    examples = load(path)
    found = {(row["prompt"], row["completion"]) for row in (*examples.train, *examples.validation)}
    assert found == {(text, f"{text}x") for text in TEXTS}
    filled = [text for text in quoted if text.strip('"')]
    path.write_text(f"sentence{separator}label\n" + "".join(f"{t}{separator}{i % 2}\n" for i, t in enumerate(filled)))
    examples = load(path)
    assert {row["first"] for row in (*examples.train, *examples.validation)} == {text for text in TEXTS if text}
    assert examples.label_names == ("0", "1")


def test_a_column_of_numbers_as_completion(tmp_path: Path):
    path = tmp_path / "sums.csv"
    path.write_text("question,label\n" + "".join(f"{i} + 1,0{i + 1}\n" for i in range(20)))
    examples = load(path, prompt_column="question", completion_column="label")
    assert {row["completion"] for row in examples.train} <= {f"0{i + 1}" for i in range(20)}


@pytest.mark.parametrize("completion", ({"a": 1}, [[0]]))
def test_what_is_no_text_is_told(tmp_path: Path, completion: Any):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "completion": completion} for i in range(4)])
    with pytest.raises(DataError, match="not as texts"):
        load(path)


@pytest.mark.parametrize("kind", ("csv", "jsonl"))
def test_dates_are_texts(tmp_path: Path, kind: str):
    rows = [{"text": f"2020-01-0{i + 1}", "label": f"202{i % 2}-01-01"} for i in range(9)]
    path = tmp_path / f"rows.{kind}"
    write_jsonl(path, rows) if kind == "jsonl" else tiny.write_csv(path, rows)
    examples = load(path)
    assert examples.label_names == ("2020-01-01", "2021-01-01")
    assert {row["first"] for row in (*examples.train, *examples.validation)} == {row["text"] for row in rows}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("train", "train_1000", "dev"), "train"),
        (("train", "trainset", "dev"), "train"),
        (("train-1-of-2", "train_1000", "dev"), "train"),
        (("train", "dev", "validation"), "validation"),
        (("train", "dev", "dev_500"), "validation"),
    ],
)
def test_several_files_of_a_kind_are_shards_or_refused(tmp_path: Path, names: tuple[str, ...], kind: str):
    """A subset beside the whole would be learnt from twice, or choose by what was learnt from."""
    for name in names:
        (tmp_path / f"{name}.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=f"has several {kind} parts: "):
        load(tmp_path)


def test_one_of_several_parts_can_be_asked_for(tmp_path: Path):
    for name, rows in {"train": 8, "dev": 3, "validation": 2, "testset": 5, "testset_w_refs": 4}.items():
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "a,0\nb,1\n" * rows)
    examples = load(tmp_path, validation="dev", test="testset_w_refs")
    assert (len(examples.train), len(examples.validation)) == (16, 6)
    assert examples.test is not None
    assert len(examples.test) == 8
    with pytest.raises(DataError, match=r"several test parts: testset\.csv, testset_w_refs\.csv"):
        load(tmp_path, validation="dev", test="test")


def test_shards_are_one_part(tmp_path: Path):
    for number in (1, 2, 3):
        (tmp_path / f"train-0000{number}-of-00003.csv").write_text("text,label\n" + "a,0\nb,1\n" * number)
    (tmp_path / "dev.csv").write_text("text,label\na,0\nb,1\n")
    assert len(load(tmp_path).train) == 12


def test_the_training_part_cannot_choose_the_epoch(tmp_path: Path):
    for name in ("train-1-of-2", "train-2-of-2"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,0\nb,1\n")
    for data, validation in (
        (tmp_path / "train-1-of-2.csv", str(tmp_path / "train-1-of-2.csv")),
        (tmp_path, "train"),
        (tmp_path, "train-2-of-2"),
    ):
        with pytest.raises(DataError, match="is the training part of"):
            load(data, validation=validation)
