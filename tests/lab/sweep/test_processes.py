"""Several processes on one storage, killed at random: the runs here are only slept through."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hiddenkey.lab.errors import ConfigError, RunError
from hiddenkey.lab.sweep.board import Board
from hiddenkey.lab.sweep.plan import SweepPlan
from hiddenkey.lab.sweep.storage import open_storage

from .tools import GRACE, plan_of, record_of

FORK = multiprocessing.get_context("fork")


def labour(plan: SweepPlan, url: str, log: Path) -> None:
    """A worker whose runs take no time to speak of."""
    board = Board(plan, open_storage(url, GRACE), str(os.getpid()))
    while not board.finished():
        claim = board.take()
        if claim is None:
            time.sleep(0.05)
            continue
        with log.open("a") as file:
            file.write(f"{claim.run.id}\n")
        time.sleep(0.01)
        board.finish(claim, record_of(claim.run))


def kill_at_random(plan: SweepPlan, url: str, folder: Path, kills: int) -> tuple[Board, Counter[str]]:
    """Run a plan by four processes, of which `kills` are killed and replaced; the board, and how often each ran."""
    board = Board(plan, open_storage(url, GRACE), "watch")
    board.open({})
    log = folder / "made"

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
            board.bury(str(processes[place].pid))
        processes[place] = start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    return board, Counter(log.read_text().split())


def check(plan: SweepPlan, board: Board, made: Counter[str], kills: int) -> None:
    ids = {slot.run.id for group in plan.groups for slot in group.slots if slot.run}
    records = board.records()
    assert {record.id for record in records} == ids == set(made)
    assert len(records) == plan.total
    assert made.total() <= plan.total + kills, "a run is made again only where it was cut short"


def test_four_processes_killed_at_random_on_one_sqlite_file(tmp_path: Path):
    plan = plan_of(tmp_path, axes={"seed": list(range(10))})
    board, made = kill_at_random(plan, f"sqlite:///{tmp_path / 'sweep.db'}", tmp_path, kills=4)
    check(plan, board, made, 4)


@pytest.mark.full
def test_eight_hundred_runs_and_forty_kills(tmp_path: Path):
    plan = plan_of(tmp_path, axes={"seed": list(range(200))})
    board, made = kill_at_random(plan, f"sqlite:///{tmp_path / 'sweep.db'}", tmp_path, kills=40)
    check(plan, board, made, 40)


def initdb() -> str | None:
    """PostgreSQL's initdb, which Debian keeps out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return shutil.which("initdb") or (str(found[-1]) if found else None)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL cluster of its own, without the network."""
    program = initdb()
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
    plan = plan_of(tmp_path, axes={"seed": list(range(50))})
    board, made = kill_at_random(plan, postgres, tmp_path, kills=20)
    check(plan, board, made, 20)


def test_a_storage_that_cannot_be_used_is_told(tmp_path: Path):
    for url, said in (("nonsense", "postgresql"), ("nosuch://host/db", "driver")):
        with pytest.raises(ConfigError, match=said):
            open_storage(url, GRACE)
    with pytest.raises(RunError, match="cannot be reached"):
        open_storage(f"sqlite:///{tmp_path}/no/such/folder/sweep.db", GRACE)
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(RunError, match="cannot be reached"):
        open_storage(f"sqlite:///{tmp_path}/text.db", GRACE)
