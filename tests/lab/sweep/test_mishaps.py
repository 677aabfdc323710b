"""What goes wrong around a sweep: changed data, folders and databases of others, names that collide."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from optuna.trial import create_trial
from rich.console import Console

from hiddenkey.lab.artifacts import RESULT
from hiddenkey.lab.data import load_examples
from hiddenkey.lab.errors import BusyError, ConfigError, RunError
from hiddenkey.lab.sweep import crew, storage, worker
from hiddenkey.lab.sweep import run as running
from hiddenkey.lab.sweep.board import Board
from hiddenkey.lab.sweep.check import check_plan
from hiddenkey.lab.sweep.config import SweepConfig
from hiddenkey.lab.sweep.crew import Crew, Job
from hiddenkey.lab.sweep.plan import Run, SweepPlan
from hiddenkey.lab.sweep.record import RUNS, WORK, RunRecord, read_record, write_record
from hiddenkey.lab.sweep.run import sweep
from hiddenkey.lab.sweep.show import Display, _told
from hiddenkey.lab.sweep.space import Choice, read_space
from hiddenkey.lab.sweep.storage import open_storage, url_of
from hiddenkey.lab.sweep.sync import known_records

from .. import tiny
from .tools import GRACE, board_of, plan_of, record_of, write_sweep

ONE = {"baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-4]}}}
QUIET = Console(quiet=True)


@pytest.fixture
def base(bert: Path, sentences: Path) -> dict[str, Any]:
    return {
        "model": str(bert),
        "data": str(sentences),
        "epochs": 1,
        "batch_size": 16,
        "max_length": 16,
        "train_eval_size": 0,
    }


def runs_of(plan: SweepPlan) -> list[Run]:
    return [slot.run for group in plan.groups for slot in group.slots if slot.run is not None]


def test_data_that_changed_since_a_run_was_made_are_told(base: dict[str, Any], tmp_path: Path):
    data = tiny.write_csv(tmp_path / "mine.csv", tiny.labelled_rows(24))
    plan = plan_of(tmp_path, base=base | {"data": str(data)}, methods=ONE)
    first, second = runs_of(plan)
    made = [replace(record_of(first), data_digest=load_examples(first.config).digest)]
    check_plan(plan, made)
    old = replace(record_of(second), data_digest="")
    tiny.write_csv(data, tiny.labelled_rows(25))
    check_plan(plan, [old])  # of a version that did not say
    with pytest.raises(RunError, match=rf"mine.csv with data_seed = 0 are no longer those of {first.id}"):
        check_plan(plan, made)


def test_only_rows_of_one_data_seed_must_be_the_same(base: dict[str, Any], tmp_path: Path):
    axes = {"seed, data_seed": [[1, 1], [2, 2]]}
    plan = plan_of(tmp_path, base=base, methods=ONE, axes=axes)
    runs = runs_of(plan)
    records = [replace(record_of(run), data_digest=load_examples(run.config).digest) for run in runs]
    assert len({record.data_digest for record in records}) == 2
    check_plan(plan, records)


def test_a_record_has_the_hash_of_its_rows(base: dict[str, Any], tmp_path: Path):
    (run,) = runs_of(plan_of(tmp_path, base=base, methods=ONE, axes=None))
    assert worker.make_run(run, QUIET).data_digest == load_examples(run.config).digest


SAME = {"recipe": "dropkey:column@{p}", "grid": {"p": {"low": 0.01, "high": 0.3}}}


def test_two_methods_with_one_file_name_are_told(tmp_path: Path):
    searched = {"search": "tpe", "trials": 2, "axes": None}
    with pytest.raises(ConfigError, match=r"'hiddenkey\+' and 'hiddenkey' have a run in common"):
        plan_of(tmp_path, methods={"hiddenkey+": SAME, "hiddenkey": SAME}, **searched)
    named = {f"hiddenkey{end}": {"recipe": f"hiddenkey{end}@{{p}}", "grid": SAME["grid"]} for end in ("-", "")}
    assert plan_of(tmp_path, methods=named, **searched).total == 4
    with pytest.raises(ConfigError, match="'基线' and '方法' have a run in common"):
        plan_of(tmp_path, methods={"基线": ONE["baseline"], "方法": ONE["baseline"]})


def test_a_method_with_another_name_takes_its_records_along(tmp_path: Path):
    plan = plan_of(tmp_path, methods={"drop (key)": ONE["baseline"]})
    board = board_of(plan, tmp_path)
    board.open({run.id: record_of(run) for run in runs_of(plan)})
    renamed = board_of(plan_of(tmp_path, methods={"drop key": ONE["baseline"]}), tmp_path)
    assert renamed.open({record.id: record for record in board.records()}) == 0
    assert {record.method for record in renamed.records()} == {"drop key"}


@pytest.mark.parametrize("field", [{"validation": "v.csv"}, {"num_beams": 4}, {"text_columns": ["text"]}])
def test_all_methods_are_judged_alike(field: dict[str, Any], tmp_path: Path):
    methods = {"baseline": ONE["baseline"] | {"set": field}}
    with pytest.raises(ConfigError, match=f"{next(iter(field))} is the same for all methods"):
        plan_of(tmp_path, methods=methods)


@pytest.mark.parametrize("left", ["{}", None], ids=["a result of another version", "another configuration"])
def test_a_run_is_made_anew_where_its_folder_does_not_fit(left: str | None, base: dict[str, Any], tmp_path: Path):
    plan = plan_of(tmp_path, base=base, methods=ONE, axes=None)
    (run,) = runs_of(plan)
    folder = Path(run.config.out)
    folder.mkdir(parents=True)
    if left is None:
        worker.make_run(run, QUIET)
        result = json.loads((folder / RESULT).read_text())
        left = json.dumps(result | {"status": "running", "config": result["config"] | {"epochs": 9}})
    (folder / RESULT).write_text(left)
    board = board_of(plan, tmp_path)
    board.open({})
    worker.work(plan, board, 1.0, QUIET)
    record = read_record(plan.folder / RUNS / f"{run.id}.json")
    assert (record.status, record.config["epochs"], len(record.epochs)) == ("finished", 1, 1)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "make_run", lambda run, console: record_of(run))


@pytest.mark.usefixtures("no_training")
def test_the_end_of_a_sweep_leaves_the_folders_of_another(tmp_path: Path):
    plan = plan_of(tmp_path)
    board = board_of(plan, tmp_path)
    board.open({})
    ours, theirs = plan.folder / WORK / runs_of(plan)[0].id, plan.folder / WORK / "of-another"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
    worker.work(plan, board, 1.0, QUIET)
    running._write(plan, board)
    assert (ours.exists(), theirs.exists()) == (False, True)
    theirs.rmdir()
    running._write(plan, board)
    assert not (plan.folder / WORK).exists()


def test_a_folder_that_is_held_keeps_no_worker_from_the_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path)
    held, tried, now = runs_of(plan)[0].id, [], [0.0]

    def make(run: Run, console: Console) -> RunRecord:
        tried.append(run.id)
        if run.id == held and now == [0.0]:
            raise BusyError("held")
        return record_of(run)

    monkeypatch.setattr(worker, "make_run", make)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.insert(0, now.pop() + seconds))
    monkeypatch.setattr(worker, "time", clock)
    board = board_of(plan, tmp_path)
    board.open({})
    worker.work(plan, board, 1.0, QUIET)
    assert tried == [run.id for run in runs_of(plan)] + [held]


def test_workers_agree_on_who_is_dead(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, methods=ONE, axes=None)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    board = Board(plan_of(tmp_path, base=base, methods=ONE, axes=None), open_storage(url, GRACE), "leader")
    board.open({})
    board.note_grace(600)
    with pytest.raises(ConfigError, match=r"grace = 120 is not allowed: the sweep was started with --grace 600"):
        sweep(SweepConfig(str(path), worker=True, storage=url), QUIET)


def test_a_home_folder_is_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for field in ("model", "data", "validation", "test"):
        names = set()
        for home in ("/home/a", "/home/b"):
            monkeypatch.setenv("HOME", home)
            plan = plan_of(tmp_path, base={"model": "m", "data": "d.csv", field: "~/bert"}, methods=ONE)
            assert getattr(runs_of(plan)[0].config, field) == plan.sweep.base[field] == f"{home}/bert"
            names.add(plan.name)
        assert len(names) == 2, field


def test_a_record_under_another_name_is_told(tmp_path: Path):
    plan = plan_of(tmp_path)
    record = record_of(runs_of(plan)[0])
    path = write_record(record, plan.folder)
    assert known_records(plan) == {record.id: record}
    path.rename(path.with_name("copy.json"))
    with pytest.raises(RunError, match=rf"copy.json is the record of {record.id}"):
        known_records(plan)


def test_a_record_of_another_version_in_the_database_is_told(tmp_path: Path):
    plan = plan_of(tmp_path)
    run = runs_of(plan)[0]
    board = board_of(plan, tmp_path)
    board.open({})
    later = record_of(run).to_dict() | {"a_later_field": 1}
    board._add(create_trial(value=0.5, user_attrs={"key": run.id, "id": run.id, "record": later}))
    with pytest.raises(RunError, match=r"of another version of hiddenkey \(.*a_later_field.*sweep.db"):
        board.records()


def test_workers_that_were_started_end_where_the_next_cannot_be(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    process = Mock(is_alive=lambda: False)

    def start(self: Crew, number: int) -> Any:
        if number == 2:
            raise OSError(11, "no more processes")
        return crew._Member(number, "one", process, Mock())

    monkeypatch.setattr(Crew, "_start", start)
    with pytest.raises(OSError, match="no more processes"):
        sweep(SweepConfig(str(write_sweep(tmp_path, base=base, methods=ONE)), workers=2), QUIET)
    process.terminate.assert_called_once()


def test_no_process_is_left_where_the_storage_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path)
    board = Mock(bury=Mock(side_effect=RunError("gone")))
    ours = Crew(Job(plan, "", GRACE, 1), board)
    ours._members = [crew._Member(number, str(number), Mock(is_alive=lambda: True), Mock()) for number in (1, 2)]
    monkeypatch.setattr(crew, "_PATIENCE", 0.0)
    with pytest.raises(RunError, match="gone"):
        ours.stop()
    for member in ours._members:
        member.process.kill.assert_called_once()


def test_a_crew_starts_as_many_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    numbers: list[int] = []
    monkeypatch.setattr(Crew, "_start", lambda self, number: numbers.append(number))
    plan = plan_of(tmp_path)
    Crew(Job(plan, "", GRACE, 1), board_of(plan, tmp_path)).start(3)
    assert numbers == [1, 2, 3]


@pytest.mark.parametrize("name", ["a{x}", "a?b", "a%20b"])
def test_a_folder_that_a_url_would_misread_is_told(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="mean something else in a URL"):
        url_of("", tmp_path / name)
    assert url_of("postgresql://host/db", tmp_path / name) == "postgresql://host/db"


@pytest.mark.parametrize("url", ["postgresql://u@h:port/db", "postgresql://u:{p}@h/db"])
def test_a_storage_that_is_no_url_is_told(url: str):
    with pytest.raises(ConfigError, match="storage 'postgresql' cannot be used"):
        open_storage(url, GRACE)


def test_a_damaged_database_is_told_at_once_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sweep.db").write_text("not a database" * 100)
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(RunError, match=r"not a database\n.*Move sweep.db away: it is made again"):
        open_storage(f"sqlite:///{tmp_path / 'sweep.db'}", GRACE)


def test_a_metric_that_is_no_number_is_shown_as_none(tmp_path: Path):
    record = record_of(runs_of(plan_of(tmp_path))[0])
    assert "validation_accuracy no number in 1.0 s" in _told(replace(record, best={"validation_accuracy": None}))


def test_names_are_shown_as_they_are(tmp_path: Path):
    plan = plan_of(tmp_path, name="mine [/small]")
    board = board_of(plan, tmp_path)
    board.open({})
    shown = io.StringIO()
    with Display(plan, board, Console(file=shown, force_terminal=True, width=100)) as display:
        display.tick({1: "one"})
    assert "mine [/small]" in shown.getvalue()


def test_texts_in_a_grid_stay_texts():
    assert read_space("grid", {"x": ["12", "1_0", "1e-1", 3]}, "grid")["x"] == Choice(("12", "1_0", 0.1, 3))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("data=2024-13-45",), "is not YAML"),
        (("epochs=2", "epochs=7"), "--set gives epochs twice"),
    ],
)
def test_mistakes_in_set_are_told(sets: tuple[str, ...], said: str, tmp_path: Path):
    path = write_sweep(tmp_path)
    with pytest.raises(ConfigError, match=said):
        sweep(SweepConfig(str(path), dry_run=True, set=sets), QUIET)


def test_a_field_in_the_recipe_is_told(tmp_path: Path):
    methods = {"a": {"recipe": "dropkey@{lora_dropout}", "grid": {"lora_dropout": [0.1]}}}
    with pytest.raises(ConfigError, match="both a field and in the recipe; give what is in braces another name"):
        plan_of(tmp_path, methods=methods)
