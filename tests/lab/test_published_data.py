"""The benchmarks' original files as they are published: columns, quirks, and the metrics of their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction

from hiddenkey.errors import ConfigError, DataError
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.data import Examples, load_examples
from hiddenkey.lab.data_files import PLACE
from hiddenkey.lab.tasks import choose_metric, make_task

RTE = (
    "index\tsentence1\tsentence2\tlabel\n"
    '0\tHe "said it.\tHe spoke.\tentailment\n'
    "1\tIt rained.\tIt's dry.\tnot_entailment\n"
)
QNLI = "index\tquestion\tsentence\tlabel\n0\tWho?\tNobody knew.\tnot_entailment\n1\tWhen?\tIn 1887.\tentailment\n"
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    '1\t17\t18\tHe sold "it.\tHe sold it.\n'
    "0\t19\t20\tA fire.\tRain fell.\n"
)
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tnews\tMSR\t2012\t1\tnone\tnone\tA man runs.\tA man is running.\t5.000\n"
    "1\tnews\tMSR\t2012\t2\tnone\tnone\tA man runs.\tA cat sleeps.\t0.250\n"
)
SST2 = "sentence\tlabel\nhide new secretions \t0\nnull \t1\n"
COLA = 'gj04\t1\t\tShe sang "it.\nks08\t0\t*\tSang she did that.\n'
ORIGINAL = {
    "RTE": (RTE, 'He "said it.', "He spoke.", ["entailment", "not_entailment"], [0, 1]),
    "QNLI": (QNLI, "Who?", "Nobody knew.", ["entailment", "not_entailment"], [1, 0]),
    "MRPC": (MRPC, 'He sold "it.', "He sold it.", ["0", "1"], [1, 0]),
    "STS-B": (STSB, "A man runs.", "A man is running.", [], [5.0, 0.25]),
    "SST-2": (SST2, "hide new secretions ", None, ["0", "1"], [0, 1]),
    "CoLA": (COLA, 'She sang "it.', None, ["0", "1"], [1, 0]),
}


def load(data: Path, **fields: Any) -> Examples:
    return load_examples(TrainConfig(model="m", data=str(data), out="o", **fields))


@pytest.mark.parametrize("name", ORIGINAL)
def test_glue_folders_need_no_configuration(tmp_path: Path, name: str):
    text, first, second, names, labels = ORIGINAL[name]
    more = "".join(text.splitlines(keepends=True)[-2:])
    for part, times in (("train", 3), ("dev", 0)):
        (tmp_path / f"{part}.tsv").write_text(text + times * more, encoding="utf-8")
    examples = load(tmp_path)
    assert (len(examples.train), len(examples.validation)) == (8, 2)
    assert examples.train["first"][0] == first
    assert (examples.train["second"][0] if second else None) == second
    assert list(examples.label_names) == names
    assert list(examples.train["label"]) == 4 * labels
    assert load(tmp_path, test="dev", validation_fraction=0.25).test.to_list() == examples.validation.to_list()


def test_a_file_without_a_header_line_that_is_not_colas_needs_names(tmp_path: Path):
    (tmp_path / "train.tsv").write_text("x\t2\t\tShe sang.\nx\t3\t\tHe sang.\n" * 4)
    with pytest.raises(DataError, match="--column-names"):
        load(tmp_path)
    examples = load(tmp_path, column_names=("source", "label", "star", "sentence"), validation_fraction=0.25)
    assert examples.label_names == ("2", "3")


def test_the_references_of_an_e2e_meaning_are_never_in_two_parts(tmp_path: Path):
    lines = "".join(f'"name[Bar {i // 3}], area[city]",Text {i}.\n' for i in range(30))
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / f"{name}.csv").write_text("mr,ref\n" + lines)
    examples = load(tmp_path, test="test", test_size=4)
    assert (len(examples.train), len(examples.validation), len(examples.test)) == (30, 30, 12)
    cut = load(tmp_path, test="dev", validation_fraction=0.3)
    assert (len(cut.train), len(cut.validation)) == (21, 9)
    assert not set(cut.train["prompt"]) & set(cut.validation["prompt"])
    assert set(cut.test["prompt"]) == {f"name[Bar {i}], area[city]" for i in range(10)}


def test_webnlg_keeps_whether_training_has_the_category(tmp_path: Path):
    row = {
        "eid": "Id1",
        "category": "Airport",
        "size": 2,
        "triples": ["A | b | C", "A | d | E"],
        "texts": ["T.", "U."],
    }
    for part, more in (("train", {}), ("dev", {}), ("test", {"seen": False})):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(row | more) + "\n")
    examples = load(tmp_path, test="test")
    assert examples.train.column_names == ["prompt", "completion", PLACE]
    assert examples.test.to_list() == [
        {"prompt": "A | b | C; A | d | E", "completion": text, PLACE: 1, "seen": False} for text in ("T.", "U.")
    ]


def test_the_metric_of_each_task_can_choose_the_epoch(tmp_path: Path):
    tasks = {}
    for name in ORIGINAL:
        (tmp_path / name).mkdir()
        for part in ("train", "dev"):
            (tmp_path / name / f"{part}.tsv").write_text(ORIGINAL[name][0], encoding="utf-8")
        tasks[name] = make_task(load(tmp_path / name), "\n")
    assert [choose_metric(tasks["CoLA"], asked) for asked in ("", "matthews", "f1")] == ["accuracy", "matthews", "f1"]
    assert [choose_metric(tasks["STS-B"], asked) for asked in ("", "spearman")] == ["pearson", "spearman"]
    with pytest.raises(ConfigError, match="accuracy, matthews, f1, loss"):
        choose_metric(tasks["RTE"], "pearson")
    found = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # 1 1 0 1
    truth = np.array([1, 0, 0, 1])
    measured = tasks["CoLA"].measure(EvalPrediction(predictions=found, label_ids=truth))
    # true + 2, false + 1, true - 1, false - 0
    assert measured == pytest.approx(
        {"accuracy": 3 / 4, "matthews": 2 / (3 * 2 * 2 * 1) ** 0.5, "f1": 2 * 2 / (2 * 2 + 1)}
    )
    scores = EvalPrediction(predictions=np.array([[1.0], [2.0], [9.0]]), label_ids=np.array([0.0, 1.0, 2.0]))
    measured = tasks["STS-B"].measure(scores)
    assert measured == pytest.approx({"pearson": 8 / (2 * 38) ** 0.5, "spearman": 1.0})
