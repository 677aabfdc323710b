"""The tables: numbers in long form for files, and the same as texts to read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from hiddenkey.lab.statistics import Difference, holm, paired_difference

from . import paper
from .claims import Finding
from .comparisons import (
    Pooled,
    compare,
    decline,
    difference,
    over_same_settings,
    over_tasks,
    paper_gap,
    step_ratio,
    step_seconds,
    transfer,
    within_budget,
)
from .paper import BASELINE, HIDDENKEY, HIDDENKEY_MINUS, METHODS, PRINTED_TEXT_METRICS, RIVAL_NOTES, RIVALS
from .records import Study, When, chosen, metric_of

NOTHING = "-"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    name: str
    """Of its files."""
    title: str
    numbers: pd.DataFrame
    """Long form, for CSV."""
    shown: pd.DataFrame | None = None
    """Texts, for Markdown and LaTeX; None: only the CSV file is written, and the report links to it."""
    note: str = ""


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number, or a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    value = round(value, digits) + 0.0  # no -0.00
    return f"{value:{'+' if sign and value else ''}.{digits}f}"


def interval(found: Difference, digits: int = 2) -> str:
    """Mean difference with its 95 % interval."""
    return found.shown(digits, nothing=NOT_RUN)


def spread(values: pd.Series, digits: int = 2) -> str:
    """Mean ± sd."""
    if values.empty:
        return NOT_RUN
    sd = values.std()
    return number(values.mean(), digits) + ("" if math.isnan(sd) else f" ± {number(sd, digits)}")


def p_value(p: float) -> str:
    """Two or three places."""
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def counted(values: Iterable[str]) -> str:
    """`0.1 ×3, 0.2 ×2`: the most frequent first."""
    return ", ".join(
        f"{value} ×{count}" for value, count in sorted(Counter(values).items(), key=lambda v: (-v[1], v))
    )


def gain(found: Difference, p_holm: float = math.nan, prefix: str = "") -> dict[str, Any]:
    """A difference as columns."""
    values = {f"gain_{name}": value for name, value in asdict(found).items() if name != "n"}
    return {f"{prefix}{name}": value for name, value in ({"pairs": found.n} | values | {"p_holm": p_holm}).items()}


def summary(values: pd.Series) -> dict[str, Any]:
    """Mean, sd and n as columns."""
    return {"n": len(values), "mean": values.mean(), "sd": values.std()}


def _gains(pooled: Sequence[Pooled | Difference]) -> list[tuple[Difference, float]]:
    found = [one.difference if isinstance(one, Pooled) else one for one in pooled]
    return list(zip(found, holm([one.p for one in found]), strict=True))


def _on(study: Study, pooled: Pooled) -> str:
    """n, with the tasks where they are not all."""
    few = "" if len(pooled.tasks) == len(study.pool) else f" ({', '.join(map(study.label, pooled.tasks))})"
    return f"{pooled.difference.n}{few}" if pooled.difference.n else NOTHING


def _labels(study: Study, pooled: Pooled) -> str:
    return " ".join(map(study.label, pooled.tasks))


def claims_table(study: Study, found: Sequence[Finding]) -> Table:
    """One row for each claim."""
    rows, shown = [], []
    for one in found:
        claim, change = one.claim, one.pooled.difference
        gaps: dict[str, Any] = {"paper_gap": claim.paper_gap, "paper_gap_same_tasks": one.paper_gap}
        rows.append(
            {"claim": claim.says, "place": claim.place, "kind": claim.kind, "verdict": one.verdict}
            | gain(change, one.adjusted)
            | gaps
            | {"tasks": _labels(study, one.pooled)}
        )
        shown.append(
            {
                "claim": claim.says,
                "verdict": one.verdict,
                "difference [95 %], points": interval(change),
                "n": _on(study, one.pooled),
                "p (Holm)": p_value(one.adjusted),
                "paper": number(claim.paper_gap, sign=True),
                "paper, same tasks": number(one.paper_gap, sign=True),
                "where": claim.place,
            }
        )
    return Table("claims", "The paper's claims", pd.DataFrame(rows), pd.DataFrame(shown))


def table1(study: Study) -> Table:
    """Methods × tasks, and what each gains over the baseline on average."""
    names = [BASELINE, *(method for method in METHODS if method != BASELINE)]
    pooled = {method: compare(study, method, BASELINE) for method in names[1:]}
    gains = dict(zip(pooled, _gains(list(pooled.values())), strict=True))
    rows, shown = [], []
    for method in names:
        values = {task: study.values(task, method) for task in study.pool}
        whole = all(len(found) for found in values.values())
        average = pd.DataFrame(values).dropna().mean(axis=1) if whole else pd.Series(dtype=float)
        change, p = gains.get(method, (Difference(0), math.nan))
        printed = paper.gap(method, BASELINE) if method != BASELINE else None
        here = paper_gap(study, pooled[method].tasks, method, BASELINE) if method != BASELINE else None
        rows.append(
            {"method": method, "tasks": _labels(study, pooled[method]) if method in pooled else ""}
            | summary(average)
            | gain(change, p)
            | {"paper_gain": printed, "paper_gain_same_tasks": here}
        )
        shown.append(
            {
                "method": method,
                "gain over baseline [95 %]": interval(change) if method != BASELINE else NOTHING,
                "n": _on(study, pooled[method]) if method in pooled else NOTHING,
                "p (Holm)": p_value(p),
                "paper": number(printed, sign=True),
                "paper, same tasks": number(here, sign=True),
                "average": spread(average),
            }
            | {
                f"{study.label(task)}, {metric_of(study.result_metric(task)).label}": spread(found)
                for task, found in values.items()
            }
        )
    note = (
        "Test metrics in points, mean ± sd over seeds; of each seed the trial and the epoch that the validation part "
        "chose. Gain: the mean over tasks, paired over seeds (n). p: paired t-test, Holm's correction over the "
        "methods. Paper: RoBERTa-large, medians of five runs; the mean of RTE, MRPC, STS-B and SST-2, and that "
        "of the tasks that stand here, where it prints the method on all of them. It prints the averages 91.16 "
        "for `hiddenkey-input` and 90.95 for `hiddenkey-output`; those of its own four numbers are 91.91 and 91.70, "
        "which are used here."
    )
    return Table("table1", "Table 1", pd.DataFrame(rows), pd.DataFrame(shown), note)


def paper_table1() -> Table:
    """The paper's Table 1."""
    rows = [
        {"method": method, **dict(zip((*paper.TABLE1_TASKS, "average_printed"), numbers, strict=True))}
        | {"average_true": paper.true_average(method)}
        for method, numbers in paper.TABLE1.items()
    ]
    return Table("paper-table1", "The paper's Table 1", pd.DataFrame(rows))


def tasks_table(study: Study) -> Table:
    """Every method on every pooled task: result, gain with all its tests, chosen values, failed runs."""
    rows = []
    for task in study.pool:
        methods = study.methods(task)
        found = [paired_difference(difference(study, task, name, BASELINE)) for name in methods if name != BASELINE]
        gains = dict(zip([name for name in methods if name != BASELINE], _gains(found), strict=True))
        rows += [
            _about(study, task, method)
            | summary(study.values(task, method))
            | gain(*gains.get(method, (Difference(0), math.nan)))
            | {"chosen": _chosen(study, task, method), "trials": study.of(task, method)["trial"].max()}
            | {"failed": (study.of(task, method)["status"] == "failed").sum()}
            for method in methods
        ]
    return Table("tasks", "Every task in full", pd.DataFrame(rows))


def _about(study: Study, task: str, method: str) -> dict[str, Any]:
    model = study.of(task)["model"].iloc[0]
    return {"task": task, "model": model, "metric": study.result_metric(task), "method": method}


def _chosen(study: Study, task: str, method: str) -> str:
    names = study.tuned(task, method)
    runs = chosen(study.of(task, method))["config"].index
    params = study.runs.loc[runs, "params"].map(json.loads)
    return counted(
        f"{one['p']:.3g}" if names == ["p"] else " ".join(f"{name} {one[name]:.3g}" for name in names)
        for one in params
    )


def conditions_table(study: Study) -> Table:
    """Results on further axes, such as ranks: every condition beside its own baseline."""
    rows, shown = [], []
    groups = study.runs.groupby(["task", "condition", "method"], sort=False)
    for (task, condition, method), runs in groups:
        if condition == study.main(task):
            continue
        values = study.values(task, method, condition=condition)
        change = paired_difference(difference(study, task, method, BASELINE, condition=condition))
        change = Difference(0) if method == BASELINE else change
        axes = {name: value for name, value in json.loads(runs["axes"].iloc[0]).items() if "seed" not in name}
        rows.append(
            _about(study, task, method)
            | axes
            | summary(values)
            | gain(change)
            | {"failed": (runs["status"] == "failed").sum()}
        )
        shown.append(
            {"task": study.label(task), "condition": condition, "method": method}
            | {"result": spread(values), "n": len(values)}
            | {"gain over baseline [95 %]": NOTHING if method == BASELINE else interval(change)}
        )
    return Table("conditions", "Further conditions", pd.DataFrame(rows), pd.DataFrame(shown))


def rivals_table(study: Study) -> Table:
    """Each rival against the baseline, and HiddenKey against each rival."""
    gains = [compare(study, method, BASELINE) for method in RIVALS]
    leads = [compare(study, HIDDENKEY, method) for method in RIVALS]
    rows, shown = [], []
    for method, pooled, lead, ours, theirs in zip(RIVALS, gains, leads, _gains(gains), _gains(leads), strict=True):
        rows.append(
            {"method": method, "tasks": _labels(study, pooled)} | gain(*ours) | gain(*theirs, prefix="hiddenkey_")
        )
        shown.append(
            {
                "rival": f"{method}: {RIVAL_NOTES[method]}",
                "gain over baseline [95 %]": interval(pooled.difference),
                "p (Holm)": p_value(ours[1]),
                "hiddenkey over the rival [95 %]": interval(lead.difference),
                "p (Holm) of that": p_value(theirs[1]),
                "n": _on(study, lead),
            }
        )
    note = (
        "Points, mean over tasks, paired over seeds; of every rival too the trial that validation chose. Holm's "
        "correction over the rivals, for either comparison apart."
    )
    return Table("rivals", "Rivals", pd.DataFrame(rows), pd.DataFrame(shown), note)


def same_settings_table(study: Study) -> Table:
    """Every method over the baseline with the method's settings."""
    names = study.compared
    best, every = ([over_same_settings(study, method, one) for method in names] for one in (True, False))
    rows, shown = [], []
    for method, one, ours, theirs in zip(names, best, _gains(best), _gains(every), strict=True):
        rows.append({"method": method, "tasks": _labels(study, one)} | gain(*ours) | gain(*theirs, prefix="all_"))
        shown.append(
            {"method": method, "chosen trial [95 %]": interval(ours[0]), "p (Holm)": p_value(ours[1])}
            | {"all trials [95 %]": interval(theirs[0]), "p (Holm) of that": p_value(theirs[1]), "n": _on(study, one)}
        )
    note = (
        "Each trial of a method minus the baseline's trial with the same learning rate. Chosen trial: the one that "
        "validation chose, against a baseline without a choice; this favours the method, and is how the paper "
        "compares. All trials: their mean, so that neither side has a choice."
    )
    return Table(
        "same-settings", "Over the baseline with the same settings", pd.DataFrame(rows), pd.DataFrame(shown), note
    )


EPOCHS: tuple[tuple[tuple[str, When], tuple[str, When]], ...] = (
    ((BASELINE, "best"), (BASELINE, "last")),
    ((HIDDENKEY_MINUS, "last"), (BASELINE, "last")),
    ((HIDDENKEY, "last"), (BASELINE, "last")),
    ((HIDDENKEY_MINUS, "last"), (BASELINE, "best")),
    ((HIDDENKEY, "last"), (BASELINE, "best")),
    ((HIDDENKEY_MINUS, "best"), (BASELINE, "best")),
    ((HIDDENKEY, "best"), (BASELINE, "best")),
)


def early_stopping_table(study: Study) -> Table:
    """Early stopping against drops, with and without each other."""
    found = [
        (f"{first}, {one} epoch", f"{second}, {other} epoch", compare(study, first, second, one, other))
        for (first, one), (second, other) in EPOCHS
    ]
    same = over_tasks({task: decline(study, task, BASELINE) for task in study.pool})
    found.insert(1, (f"{BASELINE}, best epoch", "the same run, last epoch", same))
    rows, shown = [], []
    for (first, second, pooled), (change, p) in zip(found, _gains([pooled for *_, pooled in found]), strict=True):
        rows.append({"first": first, "second": second} | gain(change, p))
        shown.append(
            {"first": first, "second": second, "first minus second [95 %]": interval(change)}
            | {"n": _on(study, pooled), "p (Holm)": p_value(p)}
        )
    note = (
        "Last epoch: the trial is chosen by the validation metric of its last epoch, as without early stopping. Best "
        "epoch: by that of its best epoch, as everywhere else. The same run: what a run loses after its best epoch."
    )
    return Table("early-stopping", "Early stopping as a rival", pd.DataFrame(rows), pd.DataFrame(shown), note)


def equal_time_table(study: Study) -> Table:
    """The validation metric at the epoch that a method reaches in the baseline's training time."""
    found = [(method, *within_budget(study, method)) for method in study.compared]
    rows, shown = [], []
    for (method, ratio, whole, timed), (change, p) in zip(found, _gains([timed for *_, timed in found]), strict=True):
        rows.append(
            {"method": method, "step_time_ratio": ratio, "gain_last_epochs": whole.difference.mean} | gain(change, p)
        )
        shown.append(
            {
                "method": method,
                "step time": f"× {number(ratio)}",
                "gain, last epochs [95 %]": interval(whole.difference),
            }
            | {"gain in the baseline's time [95 %]": interval(change), "n": _on(study, timed), "p (Holm)": p_value(p)}
        )
    note = (
        "Validation metric in points, over the baseline's last epoch. Last epochs: the method's own last one. In the "
        "baseline's time: the epoch (to the nearest) that the method reaches while the baseline trains; its learning "
        "rate had not decayed to the end by then. Runs were made side by side on shared cores, so times are rough."
    )
    return Table("equal-time", "At equal training time", pd.DataFrame(rows), pd.DataFrame(shown), note)


def transfer_table(study: Study) -> Table:
    """Another task's choice against the own choice and the tuned baseline, over all ordered pairs of tasks."""
    names = [BASELINE, *study.compared]
    found = [(method, *transfer(study, method)) for method in names]
    found = [one for one in found if one[1]]
    kept = [Difference(0) if method == BASELINE else gained.difference for method, _, _, _, gained in found]
    rows, shown = [], []
    for (method, pairs, missing, lost, _), (change, p) in zip(found, _gains(kept), strict=True):
        rows.append(
            {"method": method, "cost_of_transfer": lost.difference.mean}
            | {"task_pairs": len(lost.tasks), "task_pairs_run": pairs}
            | gain(change, p)
            | {"left_out": missing}
        )
        shown.append(
            {"method": method, "another task's choice minus its own [95 %]": interval(lost.difference)}
            | {"over the tuned baseline [95 %]": NOTHING if method == BASELINE else interval(change)}
            | {"n": lost.difference.n, "pairs of tasks": f"{len(lost.tasks)} of {pairs}", "p (Holm)": p_value(p)}
        )
    note = (
        "Test metrics in points, mean over all ordered pairs of tasks: for each seed the trial that validation chose "
        "on the one task is used on the other. The baseline is tuned on each task itself."
    )
    return Table("transfer", "Values chosen on another task", pd.DataFrame(rows), pd.DataFrame(shown), note)


def generation_table(study: Study, task: str) -> Table:
    """Tables 2 and 3: generated texts, with the paper's numbers below ours."""
    key = study.key(task)
    parts = ("all", "seen", "unseen") if key == "webnlg" else ("all",)
    judged = list(dict.fromkeys((study.result_metric(task), study.validation_metric(task))))
    wanted = [(part, name) for part in parts for name in (*PRINTED_TEXT_METRICS[key or "e2e"], "nll")]
    methods = study.methods(task)
    stored = {(part, name): name if part == "all" else f"{name}_{part}" for part, name in wanted}
    columns = {pair: {m: study.values(task, m, name=name) for m in methods} for pair, name in stored.items()}
    columns = {pair: found for pair, found in columns.items() if any(len(values) for values in found.values())}
    others = [method for method in methods if method != BASELINE]
    gains = {
        name: dict(
            zip(
                others,
                _gains([paired_difference(difference(study, task, m, BASELINE, name=name)) for m in others]),
                strict=True,
            )
        )
        for name in judged
    }
    rows, shown = [], []
    for method in methods:
        row = {name: value for name, value in _about(study, task, method).items() if name != "metric"}
        row["n"] = len(study.values(task, method))
        cells: dict[str, Any] = {"method": method}
        for name in judged:
            change, p = gains[name].get(method, (Difference(0), math.nan))
            metric = metric_of(name)
            cells[f"gain in {metric.label} [95 %]"] = interval(change, metric.digits) if change.n else NOTHING
            cells[f"p (Holm), {metric.label}"] = p_value(p)
        cells["n"] = str(row["n"])
        for (part, name), found in columns.items():
            row |= {f"{part}_{name}": found[method].mean(), f"{part}_{name}_sd": found[method].std()}
            cells[_heading(part, name, len(parts))] = spread(found[method], metric_of(name).digits)
        for name in judged:
            row |= gain(*gains[name].get(method, (Difference(0), math.nan)), prefix=f"{name}_")
        rows.append(row)
        shown.append(cells)
    for label, printed in _printed_texts(key):
        known = {
            _heading(*pair, len(parts)): number(value, metric_of(pair[1]).digits) for pair, value in printed.items()
        }
        shown.append({"method": f"paper, {label}"} | known)
    place = {"e2e": "Table 2: ", "webnlg": "Table 3: "}.get(key or "", "")
    note = (
        "Test part, mean ± sd over seeds; TER and NLL: lower is better. Trial and epoch were chosen by validation "
        "NLL. Gain: positive where the method is better, paired over seeds; Holm's correction over the "
        "methods, for each metric apart."
    )
    table = pd.DataFrame(shown).astype(object).fillna(NOTHING)
    return Table(
        generation_name(task), f"{place}{study.label(task)}, {_sizes(study, task)}", pd.DataFrame(rows), table, note
    )


def generation_name(task: str) -> str:
    """Of the task's files, whatever letters its name has."""
    return "generation-" + re.sub(r"\W+", "-", task)


def _heading(part: str, name: str, parts: int) -> str:
    return metric_of(name).label + (f", {part}" if parts > 1 else "")


def _printed_texts(key: str | None) -> list[tuple[str, dict[tuple[str, str], float]]]:
    names = PRINTED_TEXT_METRICS.get(key or "", ())
    if key == "e2e":
        return [
            (f"{model}: {method}", dict(zip((("all", name) for name in names), numbers, strict=True)))
            for model, methods in paper.TABLE2.items()
            for method, numbers in methods.items()
        ]
    if key != "webnlg":
        return []
    return [
        (
            f"GPT2-Medium: {method}",
            {
                (part, name): value
                for part, methods in paper.TABLE3.items()
                for name, value in zip(names, methods[method], strict=True)
            },
        )
        for method in (BASELINE, HIDDENKEY)
    ]


def _sizes(study: Study, task: str) -> str:
    """Model and sizes of the parts."""
    runs = study.of(task)
    sizes = pd.DataFrame(list(runs["data_rows"]))
    shown = ", ".join(
        f"{' to '.join(f'{size:,}' for size in sorted({sizes[part].min(), sizes[part].max()}))} {part}"
        for part in sizes
    )
    return f"{runs['model'].iloc[0]} ({shown} rows)"


def small_tables(study: Study) -> list[Table]:
    """Table 4, CoLA and QNLI on encoders, and Table 5, RTE and MRPC on decoders, as far as they were run."""
    found = []
    for name, title, printed, decoders in (
        ("table4", "Table 4: CoLA and QNLI", paper.TABLE4, False),
        ("table5", "Table 5: RTE and MRPC on a decoder-only model", paper.TABLE5, True),
    ):
        rows, shown = [], []
        for task in study.tasks:
            key, kind = study.key(task) or "", study.of(task)["is_decoder"].iloc[0]
            if key not in printed or kind != decoders or task in study.generated:
                continue
            for method in (BASELINE, HIDDENKEY):
                values = study.values(task, method)
                change = paired_difference(difference(study, task, method, BASELINE))
                change = Difference(0) if method == BASELINE else change
                about = _about(study, task, method)
                rows.append(
                    {part: about[part] for part in ("task", "metric", "method")} | summary(values) | gain(change)
                )
                mean, sd = printed[key][method]
                shown.append(
                    {"task": study.label(task), "metric": metric_of(about["metric"]).label, "method": method}
                    | {"ours": spread(values), "n": len(values)}
                    | {"gain over baseline [95 %]": interval(change) if change.n else NOTHING}
                    | {"paper": f"{mean:.2f} ± {sd:.2f}" if study.paper_metric(task) else NOTHING}
                )
        if rows:
            found.append(Table(name, title, pd.DataFrame(rows), pd.DataFrame(shown)))
    return found


def cost_table(study: Study) -> Table:
    """Step time over the baseline's, and seconds of a run, of every method and task."""
    rows = []
    for task in study.tasks:
        for method in study.methods(task):
            runs = study.of(task, method)
            runs = runs[runs["status"] == "finished"]
            about = {name: value for name, value in _about(study, task, method).items() if name != "metric"}
            rows.append(
                about
                | {"runs": len(runs), "median_seconds": runs["seconds"].median()}
                | {"step_seconds": step_seconds(study, task, method).min()}
                | {"step_time_ratio": step_ratio(study, task, method)}
            )
    numbers = pd.DataFrame(rows)
    shown = numbers.assign(cell=[f"× {number(ratio)}" for ratio in numbers["step_time_ratio"]])
    shown = shown.pivot(index="method", columns="task", values="cell").fillna(NOT_RUN)
    shown = shown.loc[study.methods(*study.tasks), study.tasks].rename(columns=study.label).reset_index()
    note = (
        "An optimiser step over the baseline's, each the 20th percentile of the steps of the least disturbed run, "
        "timed on one day and one kind of machine. Runs were made side by side on shared cores, so times are rough."
    )
    return Table("cost", "Step time over the baseline's", numbers, shown, note)


def runs_table(study: Study) -> Table:
    """One line for each run, and an overview of the sweeps."""
    runs = pd.concat([study.runs, study.incomplete]).sort_index()
    rows = []
    for task, own in runs.groupby("task", sort=False):
        metric, result = metric_of(own["metric"].iloc[0]), study.result_metric(task)
        tests = {when: study.tested(own, when, own["metric"].iloc[0]) for when in ("best", "last")}
        rows.append(
            own[
                [
                    "task",
                    "id",
                    "method",
                    "recipe",
                    "params",
                    "axes",
                    "trial",
                    "status",
                    "failure",
                    "metric",
                    "best_epoch",
                ]
            ]
            .rename(columns={"task": "sweep"})
            .assign(
                validation_best=own["validation_best"] * metric.scale,
                validation_last=own["validation_last"] * metric.scale,
                test_best=tests["best"],
                test_last=tests["last"],
                result_metric=result,
                result=study.tested(own, "best", result),
                seconds=own["seconds"],
                started=own["started"],
                commit=own["commit"],
            )
        )
    overview = runs.groupby("task", sort=False).agg(
        model=("model", "first"),
        runs=("id", "size"),
        failed=("status", lambda status: (status != "finished").sum()),
        methods=("method", "nunique"),
        seeds=("seed", "nunique"),
        conditions=("condition", lambda names: ", ".join(name for name in names.unique() if name) or NOTHING),
        hours=("seconds", lambda seconds: f"{seconds.sum() / 3600:.2f}"),
    )
    return Table("runs", "All runs", pd.concat(rows), overview.reset_index())


def origins_table(study: Study) -> Table:
    """Commits, versions and devices."""
    packages = ("python", "torch", "transformers", "peft")
    runs = study.runs.assign(
        versions=study.runs["versions"].map(
            lambda v: ", ".join(f"{name} {v[name]}" for name in packages if name in v)
        ),
        device=study.runs["device"].where(study.runs["device"] != "", "CPU"),
    )
    counts = runs.groupby(["commit", "versions", "device"]).size().rename("runs").reset_index()
    counts = counts.sort_values(["runs", "commit"], ascending=[False, True])
    return Table("origins", "Commits, versions and devices", counts, counts.assign(commit=counts["commit"].str[:10]))
