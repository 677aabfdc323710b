from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiddenkey.lab import generation
from hiddenkey.lab import train as run
from hiddenkey.lab.callbacks import StepClock, heed, postponed
from hiddenkey.lab.config import TrainConfig
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


@pytest.mark.parametrize(
    ("room", "name", "call", "change"),
    [
        (StepClock, "on_step_end", 5, {"save_steps": 5, "epochs": 3}),
        (run._Trainer, "training_step", 1, {"batch_size": 4, "gradient_accumulation": 3}),
        (run._Trainer, "prediction_step", 2, {"eval_batch_size": 2}),
        (generation, "_processors", 1, {"eval_batch_size": 2}),
    ],
    ids=["step", "accumulated step", "evaluation", "generation"],
)
def test_a_run_stops_at_once_and_continues_to_the_same_weights(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    room: Any,
    name: str,
    call: int,
    change: dict[str, Any],
):
    stopped: TrainConfig = request.getfixturevalue("generating" if room is generation else "config")
    stopped = replace(stopped, **change)
    calls = interrupt_at(monkeypatch, room, name, call)
    with pytest.raises(KeyboardInterrupt):
        run.train(stopped)
    assert calls == list(range(1, call + 1))
    if room is StepClock:
        assert (Path(stopped.out) / "checkpoints" / "checkpoint-5" / "complete").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    continued, whole = run.train(stopped), run.train(replace(stopped, out=f"{stopped.out}-whole"))
    assert same(stopped.out, whole.folder)
    assert continued.epochs == whole.epochs


@pytest.mark.parametrize("times", [1, 2])
def test_the_end_heeds_what_nobody_heeded_and_leaves_nothing(times: int):
    reached = []
    with pytest.raises(KeyboardInterrupt), postponed():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        if times == 2:
            signal.raise_signal(signal.SIGINT)
            reached.append(2)
    assert reached == [1]
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
