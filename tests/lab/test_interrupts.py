from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiddenkey.lab import generation, run
from hiddenkey.lab.artifacts import read_result
from hiddenkey.lab.callbacks import StepClock
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.interrupts import heed, postponed
from hiddenkey.lab.sweep import _terminated as terminated

from .test_generation import config as generating  # noqa: F401
from .test_run import config, same  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell's background job ignores Ctrl-C, and so do the tests in it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


class Finalised:
    """Freed, it is at work when a signal comes; what is raised then, Python prints and forgets."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, room: Any, name: str, call: int) -> list[int]:
    """Ctrl-C in a finaliser at the given call of a function; returns the numbers of the calls that were made."""
    function: Callable[..., Any] = getattr(room, name)
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == call:
            Finalised()
        return function(*args, **kwargs)

    monkeypatch.setattr(room, name, called)
    return calls


def stop_and_continue(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        run.train(config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    run.train(config)
    whole = replace(config, out=f"{config.out}-whole")
    run.train(whole)
    assert same(config.out, whole.out)


def test_training_stops_after_the_step_and_its_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    config = replace(config, save_steps=5, epochs=3)
    steps = interrupt_at(monkeypatch, StepClock, "on_step_end", 5)
    with pytest.raises(KeyboardInterrupt):
        run.train(config)
    assert steps == [1, 2, 3, 4, 5]
    assert (Path(config.out) / "checkpoints" / "checkpoint-5" / "complete").exists()


def test_training_continues(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    interrupt_at(monkeypatch, StepClock, "on_step_end", 5)
    stop_and_continue(replace(config, save_steps=2, epochs=3), monkeypatch)
    result = read_result(Path(config.out))
    assert result is not None
    assert [row["step"] for row in result.epochs] == [3, 6, 9]


def test_training_stops_within_an_accumulated_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    passes = interrupt_at(monkeypatch, run._Trainer, "training_step", 1)
    stop_and_continue(replace(config, batch_size=4, gradient_accumulation=3), monkeypatch)
    assert passes == [1]


def test_an_evaluation_stops_after_the_batch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    batches = interrupt_at(monkeypatch, run._Trainer, "prediction_step", 2)
    stop_and_continue(replace(config, eval_batch_size=2), monkeypatch)
    assert batches == [1, 2]


def test_generation_stops_before_the_next_batch(generating: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    batches = interrupt_at(monkeypatch, generation, "_processors", 1)
    stop_and_continue(replace(generating, eval_batch_size=2), monkeypatch)
    assert batches == [1]


def test_the_second_ctrl_c_is_acted_on_at_once():
    with pytest.raises(KeyboardInterrupt), postponed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        heed()
        raise AssertionError
    heed()


def test_a_second_ctrl_c_that_ends_it_leaves_nothing_to_heed():
    with pytest.raises(KeyboardInterrupt), postponed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    heed()


def test_what_nobody_heeded_is_acted_on_at_the_end():
    with pytest.raises(KeyboardInterrupt), postponed():
        signal.raise_signal(signal.SIGINT)
    heed()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_is_not_hidden_by_a_ctrl_c_that_waited():
    with pytest.raises(ValueError, match="the loss"), postponed():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the loss")
    with pytest.raises(KeyboardInterrupt):
        heed()
    heed()


def test_a_handler_that_only_takes_note_is_called_once():
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with postponed():
        signal.raise_signal(signal.SIGINT)
        assert seen == []
        heed()
        heed()
    assert seen == [signal.SIGINT]


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with postponed():
        signal.raise_signal(signal.SIGINT)
        heed()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_worker_is_ended_though_a_finaliser_was_at_work():
    with terminated():
        with pytest.raises(KeyboardInterrupt), postponed():
            Finalised(signal.SIGTERM)
            heed()
            raise AssertionError
        signal.raise_signal(signal.SIGTERM)  # the second one leaves its run's return alone
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_signals_are_left_alone():
    def look() -> None:
        with postponed():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[Any] = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
