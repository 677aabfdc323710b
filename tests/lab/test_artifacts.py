"""Files that several processes write at once, as the workers of a sweep do with one folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiddenkey.lab.artifacts import make_folder, write_text

FORK = multiprocessing.get_context("fork")
TEXTS = [letter * 50_000 for letter in "abcd"]


def at_once(task: Callable[[Path, str], None], path: Path) -> list[Any]:
    """Start four processes that do the same with one path, each with a text of its own."""
    processes = [FORK.Process(target=task, args=(path, text)) for text in TEXTS]
    for process in processes:
        process.start()
    return processes


def write_often(path: Path, text: str) -> None:
    for _ in range(200):
        write_text(path, text)


def make_often(path: Path, text: str) -> None:
    for _ in range(200):
        make_folder(path)


def test_four_processes_write_one_file_and_every_reader_sees_it_whole(tmp_path: Path):
    path = tmp_path / "record.json"
    write_text(path, TEXTS[0])
    processes = at_once(write_often, path)
    while any(process.is_alive() for process in processes):
        assert path.read_text() in TEXTS
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == [path]


def test_four_processes_make_one_folder(tmp_path: Path):
    processes = at_once(make_often, tmp_path / "out")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "result.json", "text")
    assert not list(tmp_path.iterdir())
