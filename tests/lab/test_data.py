from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hiddenkey.errors import DataError
from hiddenkey.lab import data_files as sources
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.data import Examples, load_examples
from hiddenkey.lab.data_files import PLACE

from . import tiny


def load(data: Path | str, **fields: Any) -> Examples:
    return load_examples(TrainConfig(model="m", data=str(data), out="o", **fields))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def copy_of(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_stem(f"{path.stem} again")))


def test_a_hub_data_set_of_several_configurations(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise ValueError("Config name is missing.")

    monkeypatch.setattr(sources, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"super_glue cannot be read: Config name is missing\. Name .*--data-config"):
        load("super_glue")


def test_subsets_of_given_parts_depend_on_the_data_seed_alone(tmp_path: Path):
    for name, count in (("train", 40), ("dev", 20)):
        rows = [{"text": f"{name} {i}", "label": i % 2} for i in range(count)]
        tiny.write_csv(tmp_path / f"{name}.csv", rows)

    def chosen(**seeds: int) -> tuple[set[str], set[str]]:
        examples = load(tmp_path, train_size=10, eval_size=5, **seeds)
        return set(examples.train["first"]), set(examples.validation["first"])

    first = chosen(data_seed=1)
    assert chosen(data_seed=1, seed=9) == first
    other = chosen(data_seed=2)
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_csv_is_classification_with_classes_in_order(sentences: Path):
    examples = load(sentences)
    assert examples.task == "classification"
    assert examples.label_names == ("bad", "good")
    assert (len(examples.train), len(examples.validation)) == (36, 4)
    assert set(examples.train["label"]) == {0, 1}
    for row in examples.train:
        assert row["label"] == any(word in row["first"] for word in tiny.GOOD)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tsv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, sentences: Path):
    rows = tiny.labelled_rows(40)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    assert load(path).train.to_list() == load(sentences).train.to_list()


def test_tsv_takes_quotes_as_they_are_and_words_such_as_null_as_texts(tmp_path: Path):
    path = tmp_path / "rows.tsv"
    path.write_text('sentence\tlabel\n"it is fine\t1\nnull\t0\nNA\t0\nso "so"\t1\n')
    examples = load(path, validation=str(copy_of(path)))
    assert examples.train["first"][:] == ['"it is fine', "null", "NA", 'so "so"']


def test_folder_with_train_and_dev_and_no_header(tmp_path: Path):
    (tmp_path / "train.tsv").write_text("gj04\t1\t\tShe sang.\ngj04\t0\t*\tSang she did that.\n")
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tHe sang.\n")
    examples = load(tmp_path, column_names=("source", "label", "star", "sentence"))
    assert examples.train["first"][:] == ["She sang.", "Sang she did that."]
    assert examples.validation["first"][:] == ["He sang."]
    assert examples.label_names == ("0", "1")


def test_folder_without_training_file_lists_what_it_has(tmp_path: Path):
    (tmp_path / "test.csv").write_text("text,label\na,1\n")
    with pytest.raises(DataError, match=r"test\.csv"):
        load(tmp_path)


def test_two_texts_and_a_fractional_label_are_regression(tmp_path: Path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": i / 2} for i in range(10)]
    examples = load(tiny.write_csv(tmp_path / "scores.csv", rows))
    assert examples.task == "regression"
    assert examples.train.column_names == ["first", "second", "label", PLACE]
    assert sorted([*examples.train["label"], *examples.validation["label"]]) == [i / 2 for i in range(10)]


def test_lists_of_texts_become_examples_and_their_entry_stays_in_one_part(tmp_path: Path):
    rows = [{"triples": [f"a{i} | b", "c"], "texts": [f"one {i}", f"two {i}"]} for i in range(10)]
    examples = load(write_jsonl(tmp_path / "webnlg.jsonl", rows))
    assert examples.task == "causal-lm"
    assert (len(examples.train), len(examples.validation)) == (18, 2)
    assert len(set(examples.validation["prompt"])) == 1
    assert "; c" in examples.validation["prompt"][0]


def test_empty_list_of_texts_makes_no_example_but_all_of_them_are_an_error(tmp_path: Path):
    rows = [{"triples": ["a"], "texts": ["b"] if i else []} for i in range(4)]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    assert len(load(path, validation=str(copy_of(path))).train) == 3
    empty = write_jsonl(tmp_path / "none.jsonl", [{"triples": ["a"], "texts": []}, *rows[:1]])
    with pytest.raises(DataError, match="'texts' is empty"):
        load(path, validation=str(empty))


def test_named_prompt_and_completion_columns_win(tmp_path: Path):
    rows = [{"text": "a", "label": i % 2, "in": f"x{i % 2}", "out": "y"} for i in range(4)]
    path = tiny.write_csv(tmp_path / "rows.csv", rows)
    assert load(path).task == "classification"
    named = load(path, prompt_column="in", completion_column="out")
    assert {row["prompt"] for row in (*named.train, *named.validation)} == {"x0", "x1"}
    assert set(named.train["completion"]) == {"y"}


def test_subset_larger_than_the_data_is_an_error(sentences: Path):
    with pytest.raises(DataError, match="36 or fewer"):
        load(sentences, train_size=37)


def test_missing_column_lists_those_there(sentences: Path):
    with pytest.raises(DataError, match=r"'sentiment'.*text, label"):
        load(sentences, label_column="sentiment")


def test_validation_file_without_the_column(tmp_path: Path, sentences: Path):
    other = tiny.write_csv(tmp_path / "other.csv", [{"words": "a", "label": "good"}])
    with pytest.raises(DataError, match=r"validation data has no column 'text'.*words"):
        load(sentences, validation=str(other))


def test_no_usual_names(tmp_path: Path):
    path = tiny.write_csv(tmp_path / "rows.csv", [{"x": "a", "y": "b"}])
    with pytest.raises(DataError, match=r"--text-columns.*x, y"):
        load(path)
    with pytest.raises(DataError, match=r"--prompt-column.*x, y"):
        load(path, task="causal-lm")


def test_unlabelled_rows_are_named(tmp_path: Path):
    rows = tiny.labelled_rows(20)
    rows[2]["label"] = rows[6]["label"] = ""
    with pytest.raises(DataError, match=r"no label in column 'label' in 2 rows: 3, 7 "):
        load(tiny.write_csv(tmp_path / "rows.csv", rows))


def test_hidden_labels_of_a_hub_set_count_as_unlabelled(monkeypatch: pytest.MonkeyPatch):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    monkeypatch.setattr(sources, "load_dataset", lambda *_: DatasetDict(train=rows, validation=rows))
    with pytest.raises(DataError, match="in 1 rows: 3 "):
        load("owner/set")


def test_glue_name_reaches_its_hub_set_and_keeps_class_names(monkeypatch: pytest.MonkeyPatch):
    asked = []
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["yes", "no"])}
    )
    rows = Dataset.from_dict(
        {"sentence1": ["a"] * 4, "sentence2": ["b"] * 4, "label": [0, 1, 1, 0]}, features=features
    )

    def load_dataset(*names: str) -> DatasetDict:
        asked.append(names)
        return DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    examples = load("glue/rte")
    assert asked == [("nyu-mll/glue", "rte")]
    assert examples.label_names == ("yes", "no")
    assert examples.train["label"][:] == [0, 1, 1, 0]
    with pytest.raises(DataError, match="'dev2'; it has train, validation"):
        load("glue/rte", validation="dev2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("text,label\n", "no rows"),
        ("text,label\na,1\n", "one label only"),
        ("prompt,completion\na,1\na,2\n", "split"),
    ],
)
def test_too_few_rows(tmp_path: Path, text: str, said: str):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        load(path)


def test_a_rare_label_is_a_class_whichever_part_it_falls_into(tmp_path: Path):
    rows = [{"text": str(i), "label": "rare" if i == 7 else "often"} for i in range(20)]
    path = tiny.write_csv(tmp_path / "rows.csv", rows)
    found = [load(path, data_seed=seed, validation_fraction=0.5) for seed in range(8)]
    assert {examples.label_names for examples in found} == {("often", "rare")}
    assert {1 in examples.validation["label"] for examples in found} == {True, False}


def test_label_unknown_to_training(tmp_path: Path, sentences: Path):
    other = tiny.write_csv(tmp_path / "other.csv", [{"text": "a", "label": "middling"}])
    with pytest.raises(DataError, match="middling; training has bad, good"):
        load(sentences, validation=str(other))


def test_regression_on_words_is_an_error(sentences: Path):
    with pytest.raises(DataError, match="not a number"):
        load(sentences, task="regression")


def test_broken_file_says_where(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text')
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: it is no JSON, Unterminated .* line 2"):
        load(path)


def test_classes_that_are_called_like_no_number_have_an_order(tmp_path: Path):
    """NaN is neither less nor more than 1: sorted by it, the order would be that of Python's hashes."""
    names = ("nan", "3", "1", "inf", "2", "-inf")
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"t{i}", "label": names[i % 6]} for i in range(60)])
    assert load(data).label_names == ("1", "2", "3", "-inf", "inf", "nan")


def test_a_configuration_of_the_hub_for_a_file(sentences: Path):
    with pytest.raises(DataError, match=r"data_config = 'rte' is for data sets of the hub"):
        load(sentences, data_config="rte")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data_config": "rte"}, "data_config = 'rte', but glue/rte names its configuration already"),
        ({"column_names": ("a", "b")}, "glue/rte names its columns itself"),
    ],
)
def test_what_says_nothing_to_the_hub_is_refused(fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "load_dataset", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match=said):
        load("glue/rte", **fields)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": ["b", " "]}, "no completion in column 'completion' in 1 rows: 3"),
        ({"prompt": "a", "completion": ["b", None]}, "no completion in column 'completion' in 1 rows: 3"),
        ({"prompt": [None, "a"], "completion": ["b"]}, "no text in column 'prompt' in 1 rows: 3"),
    ],
)
def test_an_empty_text_in_a_list(row: dict[str, Any], said: str, tmp_path: Path):
    lists = isinstance(row["prompt"], list)
    rows = [{"prompt": [f"p{i}"] if lists else f"p{i}", "completion": [f"c{i}"]} for i in range(10)]
    data = write_jsonl(tmp_path / "d.jsonl", [*rows[:2], row, *rows[2:]])
    with pytest.raises(DataError, match=said):
        load(data)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("01", "1", "2"), ("01", "1", "2")),
        (("007", "7"), ("007", "7")),
        (("1", "0"), ("0", "1")),
        (("1", "1.5x"), ("1", "1.5x")),
    ],
)
@pytest.mark.parametrize("kind", ("csv", "tsv", "jsonl"))
def test_classes_are_texts_in_every_format(
    labels: tuple[str, ...], names: tuple[str, ...], kind: str, tmp_path: Path
):
    rows = [{"text": f"t{i}", "label": labels[i % len(labels)]} for i in range(30)]
    data = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        write_jsonl(data, rows)
    else:
        mark = "," if kind == "csv" else "\t"
        data.write_text("".join(f"{mark.join(row)}\n" for row in [("text", "label"), *(r.values() for r in rows)]))
    assert load(data).label_names == names


@pytest.mark.parametrize(
    ("labels", "names"), [(("1.1", "1.10", "2.3"), ("1.1", "1.10", "2.3")), (("1.0", "2"), ("1", "2"))]
)
def test_numbers_that_are_classes(labels: tuple[str, ...], names: tuple[str, ...], tmp_path: Path):
    data = tmp_path / "d.csv"
    data.write_text("text,label\n" + "".join(f"t{i},{labels[i % len(labels)]}\n" for i in range(30)))
    assert load(data, task="classification").label_names == names


def test_scores_that_get_their_first_fraction_late(tmp_path: Path):
    """The reader of .csv decides on a column's type after ten thousand rows."""
    data = tmp_path / "d.csv"
    data.write_text("text,score\n" + "".join(f"t{i},{i % 5}{'.5' if i > 11000 else ''}\n" for i in range(12000)))
    examples = load(data)
    assert examples.task == "regression"
    assert {0.0, 4.0, 0.5, 4.5} <= set(examples.train["label"])
