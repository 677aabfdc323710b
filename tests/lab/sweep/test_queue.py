"""The queue: each run is made once by many processes, whatever is killed, and nothing in the storage is a path."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from hiddenkey.errors import ConfigError, RunError
from hiddenkey.lab import sweep as sweep_module
from hiddenkey.lab.sweep import Queue
from hiddenkey.lab.sweep_file import SweepPlan

from .tools import plan_of, queue_of, results_in, runs_of, write_finished

FORK = multiprocessing.get_context("fork")
P = {"low": 0.01, "high": 0.3}
RANGES = {
    "baseline": {"recipe": "baseline", "grid": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}},
    "dropkey": {"recipe": "dropkey:column@{p}", "grid": {"p": P}},
}


def drain(queue: Queue) -> list[str]:
    """Finish all that waits; the ids in their order."""
    ids = []
    while (claim := queue.take(queue.open())) is not None:
        trial, slot = claim
        ids.append(slot.run.id)
        write_finished(slot.run)
        queue.end(trial, TrialState.COMPLETE, -0.5)
    return ids


def test_a_run_is_at_work_once_and_one_given_back_is_taken_again(tmp_path: Path):
    plan = plan_of(tmp_path)
    one, two = queue_of(plan, "one"), queue_of(plan, "two")
    claims = [queue.take(queue.open()) for queue in (one, two) * 4]
    assert {claim[1].run.id for claim in claims if claim} == {run.id for run in runs_of(plan)}
    assert one.take(one.open()) is two.take(two.open()) is None
    assert claims[0] and claims[1]
    one.end(claims[0][0], TrialState.WAITING)
    two.bury({"two"})
    two.end(claims[1][0], TrialState.COMPLETE, 0.0)  # too late: its worker was taken for dead
    again = drain(one)
    assert again[0] == claims[0][1].run.id
    assert set(again[1:]) == {claim[1].run.id for claim in claims[1::2] if claim}


def test_a_silent_worker_loses_its_run_and_one_that_beats_does_not(tmp_path: Path):
    plan = plan_of(tmp_path)
    silent, alive = queue_of(plan, "silent"), queue_of(plan, "alive")
    lost, kept = silent.take(silent.open()), alive.take(alive.open())
    assert lost and kept
    deadline = time.monotonic() + 60
    while not alive.silent() and time.monotonic() < deadline:
        alive.beat(kept[0])
        time.sleep(0.5)
    assert alive.silent() == {"silent"}
    ids = drain(alive)
    assert lost[1].run.id in ids
    assert kept[1].run.id not in ids


def test_the_folder_is_what_counts(tmp_path: Path):
    plan = plan_of(tmp_path)
    drain(queue_of(plan))
    assert not queue_of(plan).open()
    shutil.rmtree(runs_of(plan)[3].config.out)
    assert drain(queue_of(plan)) == [runs_of(plan)[3].id]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_searches_make_as_many_trials_of_every_group(search: str, tmp_path: Path):
    plan = plan_of(tmp_path, methods=RANGES, search=search, trials=7)
    ids = drain(queue_of(plan))
    assert len(set(ids)) == len(ids) == 28
    found = Counter((r.sweep["method"], r.sweep["axes"]["seed"]) for r in results_in(tmp_path / "out").values())
    assert set(found.values()) == {7}
    (tmp_path / "out/sweep.db").unlink()
    assert sorted(drain(queue_of(plan))) == sorted(ids), "the same draws from the same values"


def test_tpe_has_one_trial_of_a_group_at_a_time_and_learns_from_those_before(tmp_path: Path):
    plan = plan_of(tmp_path, methods=RANGES, axes=None, search="tpe", trials=3)
    queue = queue_of(plan)
    first, second = queue.take(queue.open()), queue.take(queue.open())
    assert first and second
    assert {first[1].run.sweep["method"], second[1].run.sweep["method"]} == {"baseline", "dropkey"}
    assert queue.take(queue.open()) is None
    write_finished(first[1].run)
    queue.end(first[0], TrialState.COMPLETE, math.inf)  # a failed run is the worst
    third = queue.take(queue.open())
    assert third and third[1].run.sweep["trial"] == 2
    assert queue.values == {first[1].index: math.inf}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_what_a_storage_holds_is_no_path(search: str, tmp_path: Path):
    """Point of attack: a shared database in which somebody else writes."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "victim").mkdir()
    more = {"trials": 2} if search == "tpe" else {}
    methods = {"a": {"recipe": "dropkey@{p}", "grid": {"p": P if search == "tpe" else [0.1, 0.2]}}}
    plan = plan_of(tmp_path / "inner", methods=methods, axes=None, search=search, **more)
    queue = queue_of(plan)
    before = files_of(tmp_path)
    for state in (TrialState.WAITING, TrialState.COMPLETE):
        for name in ("../../../X", "../../victim", ["list"], 7, None):
            value = 0.1 if state == TrialState.COMPLETE else None
            notes = {"slot": name, "run": name, "worker": name, "record": {"id": name}}
            queue.study.add_trial(create_trial(state=state, value=value, user_attrs=notes))
    assert len(drain(queue)) == 2
    beside = {name for name in files_of(tmp_path) - before if not name.startswith("inner/out/")}
    assert (beside, (tmp_path / "victim").exists()) == (set(), True)


def labour(plan: SweepPlan, url: str, log: Path) -> None:
    """A worker whose runs take no time to speak of."""
    queue = queue_of(plan, str(os.getpid()), url)
    while queue.open():
        claim = queue.take(queue.open())
        if claim is None:
            time.sleep(0.05)
            continue
        with log.open("a") as file:
            file.write(f"{claim[1].run.id}\n")
        time.sleep(0.01)
        write_finished(claim[1].run)
        queue.end(claim[0], TrialState.COMPLETE, -0.5)


def kill_at_random(plan: SweepPlan, url: str, folder: Path, kills: int) -> None:
    """Make a plan by four processes, of which `kills` are killed and replaced; every run must be made, and once."""
    watch, log = queue_of(plan, "watch", url), folder / "made"

    def start() -> Any:
        process = FORK.Process(target=labour, args=(plan, url, log))
        process.start()
        return process

    processes, generator = [start() for _ in range(4)], random.Random(0)
    for kill in range(kills):
        time.sleep(generator.uniform(0.05, 0.4))
        place = generator.randrange(4)
        processes[place].kill()
        processes[place].join()
        if kill % 4:  # the others are found by their silence
            watch.bury({str(processes[place].pid)})
        processes[place] = start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    ids, made = {run.id for run in runs_of(plan)}, Counter(log.read_text().split())
    assert not watch.open()
    assert results_in(plan.folder).keys() == set(made) == ids
    assert made.total() <= len(ids) + kills, "a run is made again only where it was cut short"


@pytest.mark.parametrize(("seeds", "kills"), [(10, 4), pytest.param(100, 40, marks=pytest.mark.full)])
def test_four_processes_killed_at_random_on_one_sqlite_file(seeds: int, kills: int, tmp_path: Path):
    kill_at_random(plan_of(tmp_path, axes={"seed": list(range(seeds))}), "", tmp_path, kills)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL cluster of its own, without the network; Debian keeps initdb out of the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = debian[-1] if debian else shutil.which("initdb")
    if program is None:
        pytest.skip("PostgreSQL is not installed; Debian: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed; pip install 'psycopg[binary]'")
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(folder, user)
    data, tools = folder / "data", Path(program).parent

    def call(*command: Any) -> None:
        subprocess.run([*map(str, command)], user=user, cwd=folder, stdout=subprocess.DEVNULL, check=True)

    call(program, "--pgdata", data, "--username", "hiddenkey", "--auth", "trust", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    call(tools / "pg_ctl", "start", "-w", "-D", data, "-o", options, "-l", folder / "log")
    try:
        yield f"postgresql+psycopg://hiddenkey@/postgres?host={folder}"
    finally:
        call(tools / "pg_ctl", "stop", "-w", "-D", data, "-m", "immediate")
        shutil.rmtree(folder)


@pytest.mark.full
def test_four_processes_killed_at_random_on_postgresql(tmp_path: Path, postgres: str):
    kill_at_random(plan_of(tmp_path, axes={"seed": list(range(50))}), postgres, tmp_path, kills=20)


def test_ten_thousand_runs_need_little_memory(tmp_path: Path):
    """In a process of its own, which has imported nothing else."""
    methods = {f"m{i}": {"recipe": "dropkey@{p}", "grid": {"p": [0.01 + i / 100]}} for i in range(10)}
    plan_of(tmp_path, methods=methods, axes={"seed": list(range(1000))})
    code = (
        "import resource, sys\n"
        "from tests.lab.sweep.tools import make_plan, queue_of, read_sweep\n"
        "def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "import hiddenkey, torch\n"
        "before = used()\n"
        f"plan = make_plan(read_sweep({str(tmp_path / 'sweep.yaml')!r}))\n"
        "queue = queue_of(plan)\n"
        "assert queue.take(queue.open())\n"
        "print(len(plan.slots), len(queue.study.trials), used() - before)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slots, trials, used = said.stdout.split()
    assert (slots, trials) == ("10000", "1"), "the storage grows with the runs that are made, not those planned"
    assert float(used) < 200


def test_a_storage_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path)
    monkeypatch.setattr(sweep_module.time, "sleep", lambda _: None)
    for url, said in (
        ("nonsense", "postgresql"),
        ("nosuch://host/db", "driver"),
        ("postgresql://u@h:port/d", "used"),
    ):
        with pytest.raises(ConfigError, match=said):
            queue_of(plan, storage=url)
    with pytest.raises(RunError, match="cannot be reached"):
        queue_of(plan, storage=f"sqlite:///{tmp_path}/no/such/folder/sweep.db")
    (tmp_path / "out/sweep.db").write_text("not a database" * 100)
    with pytest.raises(RunError, match=r"Move sweep\.db away"):
        queue_of(plan)
