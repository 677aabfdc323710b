"""Records that may stand in one table: runs of one task, and of each method the runs of one plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..artifacts import NOT_OF_THE_RUN
from ..config import OF_A_TASK, complete
from ..errors import RunError
from ..sweep.record import RunRecord

_WAY_OUT = "One name is one task and one plan: give the sweeps different names."
_FREE = (*NOT_OF_THE_RUN, "seed", "data_seed", "recipe")


def require_one_task(name: str, records: Iterable[RunRecord]) -> None:
    """Raises RunError where the records of a sweep differ in what is learnt or how it is judged."""
    records = list(records)
    axes = {axis for run in records for axis in run.axes}
    for field in (field for field in OF_A_TASK if field not in axes):
        _require_one(f"runs in the sweep {name!r}", field, records)
    _require_one_data(name, records)
    if len({(run.task, run.metric) for run in records}) > 1:
        raise RunError(
            f"runs of the sweep {name!r} have different tasks or metrics; give the sweeps different names."
        )


def _require_one_data(name: str, records: Iterable[RunRecord]) -> None:
    found: dict[str, RunRecord] = {}
    for run in (run for run in records if run.data_digest):
        of_rows = {axis: value for axis, value in run.axes.items() if axis in OF_A_TASK}
        other = found.setdefault(str(sorted((of_rows | {"data_seed": run.config["data_seed"]}).items())), run)
        if other.data_digest != run.data_digest:
            raise RunError(
                f"runs of the sweep {name!r} have different rows where they should have the same: {other.id} and "
                f"{run.id}. The data changed between them; make one of them anew."
            )


def require_one_setting(name: str, method: str, records: Iterable[RunRecord]) -> None:
    """Raises RunError where a method's records of all conditions differ in more than seeds, axes and their trials."""
    records = list(records)
    free = {*_FREE, *(field for run in records for field in run.params)}
    for field in {field: None for run in records for field in run.config if field not in free}:
        fixed = [run for run in records if field not in run.axes]
        _require_one(f"runs of {method} in the sweep {name!r}", field, fixed)


def require_one_plan(name: str, method: str, groups: Iterable[Collection[RunRecord]]) -> None:
    """Raises RunError where the trials of a method vary different things, or are more than were planned.

    groups: those of each seed, all of one condition.
    """
    groups = list(groups)
    records = [run for group in groups for run in group]
    varied = {tuple(sorted(run.params)) for run in records}
    if len(varied) > 1:
        said = " and ".join(sorted(", ".join(names) or "nothing" for names in varied))
        raise RunError(f"trials of {method} in the sweep {name!r} vary different things: {said}. {_WAY_OUT}")
    for group in groups:
        planned = max(run.trials for run in group)
        if planned and len(group) > planned:
            raise RunError(
                f"{method} has {len(group)} runs of one seed in the sweep {name!r}, of {planned} trials. {_WAY_OUT}"
            )


def _require_one(whose: str, field: str, records: Iterable[RunRecord]) -> None:
    values = {str(complete(run.config).get(field)) for run in records}
    if len(values) > 1:
        raise RunError(f"{whose} differ in {field}: {', '.join(sorted(values))}. {_WAY_OUT}")
