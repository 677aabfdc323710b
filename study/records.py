"""Records of runs as one table, and the trial that stands for each method and seed.

A record is a `result.json` of `hiddenkey sweep`, or one line of a `.jsonl` file that holds several of them.
The trial is chosen by the validation metric, never by the test metric: by that of its best epoch, or, for the results
without early stopping, by that of its last epoch. Of equally good trials the first counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hiddenkey.lab.config import OF_A_TASK, complete
from hiddenkey.lab.report import seed_name
from hiddenkey.lab.run_folder import NOT_OF_THE_RUN

from .paper import BASELINE, METHODS, PRINTED_METRICS, RIVALS, TASK_LABELS, method_order, paper_task

When = Literal["best", "last"]
GROUP = ["task", "condition", "method", "seed"]
"""What the trials of one choice have in common; the seed is that of the run and that of its data."""
SEEDS = ("seed", "data_seed")


@dataclass(frozen=True)
class Metric:
    """How a metric is shown; records are multiplied by `scale`, so that shares become points."""

    label: str
    scale: float = 1.0
    lower_is_better: bool = False
    digits: int = 2

    @property
    def sign(self) -> float:
        """Turns a difference so that positive is better."""
        return -1.0 if self.lower_is_better else 1.0


METRICS = {
    "accuracy": Metric("accuracy", 100),
    "matthews": Metric("Matthews", 100),
    "pearson": Metric("Pearson", 100),
    "bleu": Metric("BLEU", 100),
    "nist": Metric("NIST", digits=3),
    "meteor": Metric("METEOR", 100),
    "rouge_l": Metric("ROUGE-L", 100),
    "cider": Metric("CIDEr", digits=3),
    "ter": Metric("TER", 100, lower_is_better=True),
    "nll": Metric("NLL", lower_is_better=True, digits=3),
    "loss": Metric("loss", lower_is_better=True, digits=3),
}


def metric_of(name: str) -> Metric:
    """The metric of that name; `bleu_seen` and the like are shown as `bleu`."""
    return METRICS[name.removesuffix("_seen").removesuffix("_unseen")]


def read_records(folder: Path) -> pd.DataFrame:
    """One row for each run below the folder: sorted by task, method and trial.

    Raises:
        ValueError: there are no records, a record lacks a field, or two records are of one trial.
    """
    rows = [_row(record, where) for where, record in _records(folder)]
    if not rows:
        raise ValueError(f"{folder} holds no result.json and no .jsonl file of records.")
    runs = pd.DataFrame(rows)
    runs["order"] = [
        (*_task_order(run), len(run.condition), run.condition, *method_order(run.method), run.trial)
        for run in runs.itertuples()
    ]
    runs = runs.sort_values(["order", "id"]).drop(columns="order").reset_index(drop=True)
    twice = runs[runs.duplicated([*GROUP, "trial"])]
    if len(twice):
        raise ValueError(f"{folder}: several records of one trial, such as {twice.iloc[0].id}; give one study alone.")
    _require_one_plan(runs)
    return runs


def _require_one_plan(runs: pd.DataFrame) -> None:
    """Runs of one sweep are of one task, those of a method in it of one plan, and those of a seed of the same rows.

    Raises ValueError, so that records of a pilot or of an earlier plan are never averaged with those of the study.
    """
    for task, own in runs.groupby("task"):
        axes = {name for text in own["axes"] for name in json.loads(text)}
        for fields in (own[["task_key", "task_kind", "metric", "is_decoder"]], _fields(own).filter(OF_A_TASK)):
            _require_one(f"runs of the sweep {task!r}", fields, axes)
        rows = own[own["data_digest"] != ""].groupby(["condition", "seed"])["data_digest"].nunique()
        if (rows > 1).any():
            raise ValueError(f"runs of the sweep {task!r} have different rows under the seed {rows.idxmax()[1]}.")
    for (task, method), own in runs.groupby(["task", "method"]):
        varied = {name for text in (*own["params"], *own["axes"]) for name in json.loads(text)}
        free = {*SEEDS, *NOT_OF_THE_RUN, "recipe", *varied}
        _require_one(f"runs of {method} in the sweep {task!r}", _fields(own), free)


def _fields(runs: pd.DataFrame) -> pd.DataFrame:
    """All settings of each run; those that an older record does not have are the defaults."""
    return pd.DataFrame([complete(config) for config in runs["config"]], runs.index)


def _require_one(whose: str, fields: pd.DataFrame, free: set[str]) -> None:
    differing = [name for name in fields if name not in free and fields[name].astype(str).nunique() > 1]
    if differing:
        raise ValueError(f"{whose} differ in {', '.join(differing)}; give different plans different names.")


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("result.json")):
        yield str(path), json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield f"{path}:{number}", json.loads(line)


def _row(record: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        sweep, config, metric = record["sweep"], record["config"], record["metric"]
        axes = {name: value for name, value in sweep["axes"].items() if name not in SEEDS}
        epochs, best, last = record["epochs"], record["best"], record["last"]
        finished = record["status"] == "finished"
        return {
            "task": sweep["name"],
            "task_key": paper_task(record["task_key"]),
            "task_kind": record["task"],
            "is_decoder": record["is_decoder"],
            "model": Path(config["model"]).name,
            "method": sweep["method"],
            "preset": record["preset"],
            "recipe": record["recipe"],
            "condition": " ".join(f"{name} {value}" for name, value in sorted(axes.items())),
            "seed": seed_name(config),
            "params": json.dumps(sweep["params"]),
            "axes": json.dumps(sweep["axes"]),
            "trial": sweep["trial"],
            "trials": sweep["trials"],
            "id": Path(record["folder"]).name,
            "status": record["status"],
            "failure": record["failure"],
            "metric": metric,
            "sign": METRICS[metric].sign,
            "validation_best": best.get(f"validation_{metric}", math.nan) if finished else math.nan,
            "validation_last": last.get(f"validation_{metric}", math.nan) if finished else math.nan,
            "best_epoch": best.get("epoch", math.nan),
            "last_epoch": last.get("epoch", math.nan),
            "test": record["test"],
            "epochs": epochs,
            "config": config,
            "data_digest": record.get("data_digest", ""),
            "data_rows": record["data_rows"],
            "step_seconds": record["step_seconds"].get("p20", math.nan),
            "seconds": record["seconds"],
            "started": record["started"],
            "versions": record["versions"],
            "device": record["versions"].get("device", ""),
            "commit": record["commit"],
        }
    except KeyError as error:
        raise ValueError(f"{where}: the record has no field {error}; write it by `hiddenkey sweep`.") from None


def _task_order(run: Any) -> tuple[bool, int, str]:
    keys = list(TASK_LABELS)
    return (
        run.task_kind == "causal-lm",
        keys.index(run.task_key) if run.task_key in keys else len(keys),
        run.task,
    )


@dataclass(frozen=True)
class Study:
    """All runs, and the values that tables and figures are made of."""

    runs: pd.DataFrame
    """Of `read_records`; groups of which a trial is missing are in `incomplete` instead."""
    incomplete: pd.DataFrame
    notes: tuple[str, ...] = ()
    """What the records cannot say, one item each, as inline Markdown."""

    @staticmethod
    def read(folder: Path) -> Study:
        """The records and `notes.md` of a folder."""
        runs = read_records(folder)
        groups = runs.groupby(GROUP)
        planned = groups["trials"].transform("max")
        planned = planned.where(planned > 0, runs.groupby(["task", "condition", "method"])["trial"].transform("max"))
        whole = groups["trial"].transform("size") >= planned
        notes = folder / "notes.md"
        lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
        items = tuple(line.removeprefix("- ") for line in lines if line)
        return Study(runs[whole].reset_index(drop=True), runs[~whole], items)

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks: those of Table 1 in its order, then the others, generated texts last."""
        return list(self.runs["task"].unique())

    @cached_property
    def pool(self) -> list[str]:
        """The tasks that are averaged: classification and regression with a metric in points, of one model."""
        fit = self.runs[
            (self.runs.task_kind != "causal-lm") & (self.runs.metric.map(lambda m: METRICS[m].scale) == 100)
        ]
        model = fit["model"].value_counts().index[:1]
        return list(fit[fit.model.isin(model)]["task"].unique())

    @cached_property
    def generated(self) -> list[str]:
        """The tasks whose texts are generated."""
        return list(self.runs[self.runs.task_kind == "causal-lm"]["task"].unique())

    def of(self, task: str, method: str | None = None, condition: str | None = None) -> pd.DataFrame:
        """The runs of a task, of one condition of it (else of its main one) and of one method (else of all)."""
        condition = self._main[task] if condition is None else condition
        if method is None:
            return self.runs[(self.runs["task"] == task) & (self.runs["condition"] == condition)]
        return self._groups.get((task, condition, method), self.runs.iloc[:0])

    def main(self, task: str) -> str:
        """The condition that tables are of: without further axes, else rank 8, else the one with most methods."""
        return self._main[task]

    @cached_property
    def _groups(self) -> dict[tuple[str, ...], pd.DataFrame]:
        return dict(list(self.runs.groupby(["task", "condition", "method"])))

    @cached_property
    def _main(self) -> dict[str, str]:
        counts = self.runs.groupby(["task", "condition"])["method"].nunique()
        return {
            task: min(found.index, key=lambda pair: (pair[1] != "", pair[1] != "lora_r 8", -counts[pair]))[1]
            for task, found in counts.groupby("task")
        }

    def methods(self, *tasks: str) -> list[str]:
        """The methods of the main conditions, in the order of Table 1."""
        names = {name for task, condition, name in self._groups if task in tasks and condition == self._main[task]}
        return sorted(names, key=method_order)

    @property
    def compared(self) -> list[str]:
        """The paper's methods and the rivals on the pooled tasks, without the baseline."""
        return [method for method in self.methods(*self.pool) if method in (*METHODS, *RIVALS) and method != BASELINE]

    def label(self, task: str) -> str:
        """The task as it is shown."""
        return TASK_LABELS.get(task, task)

    def key(self, task: str) -> str | None:
        """The paper's task."""
        key = self._about.loc[task, "task_key"]
        return key if isinstance(key, str) else None

    @cached_property
    def _about(self) -> pd.DataFrame:
        return self.runs.drop_duplicates("task").set_index("task")

    def result_metric(self, task: str) -> str:
        """What a result is: BLEU of generated texts, else the metric that chose the epoch."""
        return "bleu" if task in self.generated else self.validation_metric(task)

    def validation_metric(self, task: str) -> str:
        """The metric that chose trial and epoch."""
        return str(self._about.loc[task, "metric"])

    def paper_metric(self, task: str) -> bool:
        """Whether the paper prints numbers of this task in this metric."""
        return PRINTED_METRICS.get(self.key(task) or "") == self.result_metric(task)

    def tested(self, runs: pd.DataFrame, when: When, name: str) -> pd.Series:
        """A test metric of each run, in its unit; generated texts are those of the one adapter that was kept."""

        def value(test: dict[str, Any], kind: str) -> float:
            found = test.get(when, {}).get(name)
            if found is None and kind == "causal-lm" and when == "best":
                found = test.get("last", {}).get(name)
            return math.nan if found is None else found * metric_of(name).scale

        found = [value(test, kind) for test, kind in zip(runs["test"], runs["task_kind"], strict=True)]
        return pd.Series(found, runs.index, dtype=float)

    def values(
        self, task: str, method: str, when: When = "best", name: str = "", condition: str | None = None
    ) -> pd.Series:
        """Test metric of the chosen trial of each seed."""
        runs = chosen(self.of(task, method, condition), when)
        return self.tested(runs, when, name or self.result_metric(task)).set_axis(runs["seed"]).dropna().sort_index()

    def tuned(self, task: str, method: str) -> list[str]:
        """The names of the values that a method's trials differ in."""
        tried = pd.DataFrame([json.loads(params) for params in self.of(task, method)["params"]])
        return [name for name in tried if tried[name].nunique() > 1]


def chosen(runs: pd.DataFrame, when: When = "best") -> pd.DataFrame:
    """Of every group the finished trial with the best validation metric; groups that all failed have none."""
    column = f"validation_{when}"
    score = runs[column] * runs["sign"]
    best = score.dropna().groupby([runs[name] for name in GROUP]).idxmax()
    return runs.loc[sorted(best)]
