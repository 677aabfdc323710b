"""How it was done, in words that the records bear out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import words
from .blocks import Text
from .study import Task

CUT = "a validation part cut from the training data"
FOUND = (
    "the validation or dev part of the data, or, where there is none or it is the test, a part cut from the training "
    "data"
)
_DEV = ("validation", "valid", "val", "dev")
STATISTICS = (
    "Differences are paired over the seeds that both sides have. Intervals are Student's 95 % "
    "intervals of the mean paired difference: with so few seeds the bootstrap's are too short, and sign-flip tests "
    "cannot give small p-values; both stand in the full tables. Tasks are taken as given: intervals tell of other "
    "seeds, not of other tasks or other test rows."
)


def how(tasks: Sequence[Task]) -> Text:
    """Trials, choice, test, statistics."""
    parts = (_trials(tasks), _choice(tasks), _ties(tasks), _test(tasks), STATISTICS)
    return Text(" ".join(part for part in parts if part))


def validation_of(config: dict[str, Any]) -> str:
    """The rows on which a run was chosen, by the rule of `lab/parts.py`: the test part is never among them."""
    if config.get("validation"):
        return f"the validation part that was asked for (`{config['validation']}`)"
    # Of a file, or of one of several such parts, the record does not say which others there are.
    return CUT if str(config.get("test", "")).lower() in _DEV else FOUND


def _trials(tasks: Sequence[Task]) -> str:
    if all(len(set(task.trials.values())) <= 1 for task in tasks):
        return f"Every method, the baseline included, had the same number of trials{_over(tasks)}."
    return f"The methods had different numbers of trials{_over(tasks)}, which favours those that had more; see below."


def _over(tasks: Sequence[Task]) -> str:
    found: dict[str, dict[str, None]] = {}
    for task in tasks:
        for method in task.methods:
            found.setdefault(" and ".join(f"`{name}`" for name in task.tuned(method)), {})[method] = None
    parts = [
        f"of {names} for "
        + (words.listed(f"`{method}`" for method in methods) if len(methods) < 4 else f"{len(methods)} methods")
        for names, methods in sorted(found.items(), key=lambda item: len(item[1]))
        if names
    ]
    return f" (other values {', '.join(parts)})" if parts else ""


def _choice(tasks: Sequence[Task]) -> str:
    found: dict[str, set[str]] = {}
    for task in tasks:
        for run in task.records:
            found.setdefault(validation_of(run.config), set()).add(task.label)
    parts = [part if len(found) == 1 else f"{part} ({', '.join(sorted(found[part]))})" for part in sorted(found)]
    return f"For each seed the trial and the epoch were chosen on {words.listed(parts)}."


def _ties(tasks: Sequence[Task]) -> str:
    counts = []
    for task in tasks:
        methods = [seeds for methods in task.conditions.values() for seeds in methods.values()]
        tied = [group.tied for seeds in methods for group in seeds.values()]
        if any(tied):
            counts.append(f"{sum(tied)} of {len(tied)} choices on {task.label}")
    if not counts:
        return ""
    return f"Where trials were equally good in validation ({', '.join(counts)}) the first in the file counts."


def _test(tasks: Sequence[Task]) -> str:
    without = sorted(
        {task.label for task in tasks for run in task.records if not run.test and run.status == "finished"}
    )
    lacking = f", which {words.listed(without)} lacked," if without else ""
    return f"The test part{lacking} was looked at once, after training."
