"""Each comparison on a few records whose answer is computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from study.comparisons import compare, over_same_settings, step_ratio, transfer, within_budget
from study.paper import METHODS, TABLE1, gap, misprinted, paper_task
from study.records import Study, chosen
from study.tables import tasks_table

from .made_up import make_record, study_of

SEEDS, TRIALS = (1, 2, 3), (1, 2, 3)
TESTED = {"baseline": (0.80, 0.84, 0.82), "hiddenkey": (0.83, 0.86, 0.81)}
"""Test accuracy of the three trials, plus a point for each seed; validation chooses the second of either."""


def records(task: str = "sst2", **tested: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        make_record(task, method, seed, trial, round(values[trial - 1] + seed / 100, 9))
        for method, values in (TESTED | tested).items()
        for trial in TRIALS
        for seed in SEEDS
    ]


def choose(trial: int):
    """Lets validation choose this trial by its best epoch, whatever the test part says."""

    def change(record: dict[str, Any]) -> None:
        record["best"]["validation_accuracy"] = 0.9 if record["sweep"]["trial"] == trial else 0.5

    return change


def test_validation_chooses_and_the_test_part_judges(tmp_path: Path):
    study = study_of(tmp_path, records(), choose(3))
    assert list(study.values("sst2", "hiddenkey")) == pytest.approx([82.0, 83.0, 84.0])
    assert compare(study, "hiddenkey", "baseline").difference.mean == pytest.approx(-1.0)


def test_of_equals_the_first_trial_counts_and_failed_ones_never_do(tmp_path: Path):
    def alike(record: dict[str, Any]) -> None:
        record["best"]["validation_accuracy"] = 0.7
        record["status"] = "failed" if record["sweep"]["trial"] == 1 else "finished"

    study = study_of(tmp_path, list(reversed(records())), alike)
    assert set(chosen(study.of("sst2", "hiddenkey"))["trial"]) == {2}
    assert list(tasks_table(study).numbers["failed"]) == [3, 3]


def test_without_early_stopping_the_last_epoch_chooses_and_judges(tmp_path: Path):
    def change(record: dict[str, Any]) -> None:
        record["last"]["validation_accuracy"] = record["sweep"]["trial"] / 10
        record["test"]["last"]["accuracy"] = 0.5 + record["sweep"]["trial"] / 100

    study = study_of(tmp_path, records(), change)
    assert list(study.values("sst2", "hiddenkey", "last")) == pytest.approx([53.0] * 3)


def test_a_seed_that_one_task_lacks_is_in_no_mean(tmp_path: Path):
    found = records("sst2") + [record for record in records("mrpc") if record["config"]["seed"] != 2]
    pooled = compare(study_of(tmp_path, found), "hiddenkey", "baseline")
    assert (pooled.tasks, pooled.difference.n) == (("mrpc", "sst2"), 2)


def test_a_group_without_all_its_trials_is_left_out_and_named(tmp_path: Path):
    study = study_of(tmp_path, records()[:-1])
    assert set(study.incomplete["id"]) == {f"hiddenkey-3-{trial}-{{}}" for trial in (1, 2)}
    assert list(study.values("sst2", "hiddenkey").index) == ["1", "2"]


def test_the_same_settings_are_the_baselines_trial_at_the_methods_learning_rate(tmp_path: Path):
    """All of the method's trials have the learning rate of the baseline's first."""
    study = study_of(tmp_path, records(), choose(2))
    assert over_same_settings(study, "hiddenkey", True).difference.mean == pytest.approx(86 - 80)
    assert over_same_settings(study, "hiddenkey", False).difference.mean == pytest.approx((83 + 86 + 81) / 3 - 80)

    def elsewhere(record: dict[str, Any]) -> None:
        if record["sweep"]["method"] != "baseline":
            record["config"]["learning_rate"] = 0.5

    assert over_same_settings(study_of(tmp_path, records(), elsewhere), "hiddenkey", True).difference.n == 0


def test_a_seed_with_a_failed_trial_has_no_mean_of_all_trials(tmp_path: Path):
    found = records()
    found[-1] |= {"status": "failed", "best": {}, "last": {}, "test": {}, "epochs": []}
    study = study_of(tmp_path, found)
    assert over_same_settings(study, "hiddenkey", True).difference.n == 3
    assert over_same_settings(study, "hiddenkey", False).difference.n == 2


def test_in_the_baselines_time_a_method_of_twice_the_step_time_has_half_the_epochs(tmp_path: Path):
    """HiddenKey's first epoch, two points above its last, against the baseline's last."""
    ratio, whole, timed = within_budget(study_of(tmp_path, records()), "hiddenkey")
    assert ratio == 2.0
    assert whole.difference.mean == pytest.approx(86 - 84)
    assert timed.difference.mean == pytest.approx(86 - 84 + 2)


@pytest.mark.parametrize("elsewhere", [{"started": "2026-11-25T00:00:00Z"}, {"versions": {"device": "another"}}])
def test_times_of_another_machine_or_day_are_not_compared(tmp_path: Path, elsewhere: dict[str, Any]):
    def change(record: dict[str, Any]) -> None:
        record |= elsewhere if record["sweep"]["method"] == "hiddenkey" else {}

    ratio = step_ratio(study_of(tmp_path, records(), change), "sst2", "hiddenkey")
    assert ratio != ratio


def test_transfer_takes_the_other_tasks_choice(tmp_path: Path):
    """MRPC chooses its first trial, SST-2 its second; each is used on the other."""
    found = records("sst2") + records("mrpc", hiddenkey=(0.9, 0.7, 0.6))
    pairs, missing, lost, gained = transfer(study_of(tmp_path, found), "hiddenkey")
    assert (pairs, missing) == (2, 0)
    assert lost.difference.mean == pytest.approx(((83 - 86) + (70 - 90)) / 2)
    assert gained.difference.mean == pytest.approx(((83 - 84) + (70 - 84)) / 2)


def test_what_was_not_tried_on_the_other_task_is_counted(tmp_path: Path):
    def other_rates(record: dict[str, Any]) -> None:
        if record["sweep"]["name"] == "mrpc" and "p" in record["sweep"]["params"]:
            record["sweep"]["params"] = {"p": record["sweep"]["trial"] / 100}

    study = study_of(tmp_path, records("sst2") + records("mrpc"), other_rates)
    assert transfer(study, "hiddenkey")[:2] == (2, 6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "pearson"}, "differ in metric"),
        ({"config": {"model": "m/tiny", "seed": 3, "data_seed": 3, "lora_r": 16}}, "differ in lora_r"),
        (
            {"config": {"model": "m/tiny", "seed": 3, "data_seed": 3, "text_columns": ["a"]}},
            "sst2' differ in text_columns",
        ),
        ({"data_digest": "other"}, "different rows"),
    ],
)
def test_records_of_another_plan_are_refused(tmp_path: Path, change: dict[str, Any], said: str):
    found = [record | {"data_digest": "rows"} for record in records()]
    found[-1] |= change
    with pytest.raises(ValueError, match=said):
        study_of(tmp_path, found)


def test_double_and_broken_records_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="several records of one trial"):
        study_of(tmp_path, [*records(), records()[0]])
    broken = records()
    del broken[3]["task_key"]
    with pytest.raises(ValueError, match=r"records.jsonl:4: the record has no field 'task_key'"):
        study_of(tmp_path, broken)
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no"):
        Study.read(tmp_path)


def test_the_papers_numbers():
    assert gap("hiddenkey", "baseline") == pytest.approx(1.415)
    assert [name for name in TABLE1 if misprinted(name)] == ["hiddenkey-input", "hiddenkey-output"]
    assert len(METHODS) == 15


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "study" / "sweeps").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_the_data_of_every_sweep_are_a_task_of_the_paper(path: Path):
    given = yaml.safe_load(path.read_text())
    assert paper_task(given["base"]["data"]) in given["name"].split("-")
    assert paper_task("data/mine") is None
