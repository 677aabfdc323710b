"""What differs between tasks: model class, tokens, batches and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from datasets import Dataset
from transformers import EvalPrediction

from .columns import TaskName
from .data import Examples
from .errors import ConfigError
from .tasks_completion import Completion
from .tasks_sequence import Classification, Regression


class Task(Protocol):
    """One way of learning from text."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics; the first chooses the best epoch unless another is asked for."""

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        """Those of them, and "loss", that a better model has lower."""

    @property
    def peft_type(self) -> str:
        """The task's name in PEFT."""

    @property
    def model_class(self) -> str:
        """The task's Auto class in transformers."""

    def model_options(self) -> dict[str, Any]:
        """What the head needs to know, as arguments of the model's configuration."""

    def tokenise(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Rows of token ids, attention mask and labels. Raises UserError where nothing is left to learn."""

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads rows into a batch."""

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """What evaluation keeps of a batch's logits."""

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics over a whole evaluation."""


def make_task(examples: Examples, separator: str) -> Task:
    """The task of these examples; `separator` stands between prompt and completion."""
    makers: dict[TaskName, Callable[[], Task]] = {
        "classification": lambda: Classification(examples.label_names),
        "regression": Regression,
        "causal-lm": lambda: Completion(separator),
    }
    return makers[examples.task]()


def lower_is_better(task: str, metric: str) -> bool:
    """Whether a better model has this metric of the task lower."""
    kinds: dict[str, type[Classification | Regression | Completion]] = {
        "classification": Classification,
        "regression": Regression,
        "causal-lm": Completion,
    }
    return metric in kinds[task].lower_is_better


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
