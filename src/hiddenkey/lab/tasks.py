"""What differs between tasks: model class, tokens, batches and metrics."""

from __future__ import annotations

from .columns import TaskName
from .data import Examples
from .errors import ConfigError
from .tasks_completion import Completion
from .tasks_sequence import Classification, Regression

Task = Classification | Regression | Completion


def make_task(examples: Examples, separator: str) -> Task:
    """The task of these examples; `separator` stands between prompt and completion."""
    if examples.task == "causal-lm":
        return Completion(separator)
    return Regression() if examples.task == "regression" else Classification(examples.label_names)


def choose_metric(task: Task, asked: str) -> str:
    """The metric of the best epoch.

    Raises:
        ConfigError: the task has no such metric.
    """
    if asked and asked not in (*task.metrics, "loss"):
        raise ConfigError(f"metric = {asked!r} is not one of this task: {', '.join(task.metrics)}, loss.")
    return asked or task.metrics[0]


def refuse_smoothing(task: TaskName, label_smoothing: float) -> None:
    """Raises ConfigError where scores would be smoothed, which have no classes to spread a probability over."""
    if task == "regression" and label_smoothing:
        raise ConfigError(
            f"label_smoothing = {label_smoothing} is for classes and tokens, which regression has not; "
            "give 0 or leave it out."
        )
