"""The study's pages: `report.md` with its figures, and every table as CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hiddenkey.lab.report import csv_table, latex_table, markdown, markdown_table
from hiddenkey.lab.statistics import holm, paired_difference

from . import tables
from .claims import ALPHA, FEWEST, MARGIN, Finding, findings, refuting
from .comparisons import compare, decline, difference, over_same_settings, over_tasks, step_ratio, transfer
from .figures import draw_figures
from .paper import BASELINE, HIDDENKEY, METHODS
from .records import Study, metric_of
from .tables import Table, interval, p_value

STATISTICS = (
    "For each seed the trial and the epoch were "
    "chosen on a validation part; the test part was looked at once, after training. Differences are paired over the "
    "seeds that both sides have. Intervals are Student's 95 % intervals of the mean paired difference: with so few "
    "seeds the bootstrap's are too short, and sign-flip tests cannot give small p-values; both are in the CSV files. "
    "Tasks are taken as given: intervals tell of other seeds, not of other tasks or other test rows."
)
RULE = (
    f"- “Better” is replicated where the difference is above 0 at p ≤ {ALPHA} after Holm's correction over the "
    "claims; not replicated where it is below 0 by the same test, or where the interval ends below half of the "
    f"paper's own gap (or below {MARGIN} points, if that is less).\n"
    f"- “No effect” is replicated where the whole interval lies within ± {MARGIN} points, “adds nothing” where it "
    f"ends below +{MARGIN}; not replicated where it does not and the difference (for “adds nothing”: a gain) is "
    "significant.\n"
    f"- Everything else, and whatever has fewer than {FEWEST} seeds, is undecided."
)


def write_report(study: Study, folder: Path) -> None:
    """Write all pages into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = findings(study)
    made = all_tables(study, claims)
    for table in made:
        (folder / f"{table.name}.csv").write_text(csv_table(table.numbers), encoding="utf-8")
        if table.shown is not None:
            (folder / f"{table.name}.tex").write_text(latex_table(table.shown), encoding="utf-8")
    figures = draw_figures(study, folder)
    (folder / "report.md").write_text(_page(study, claims, made, figures), encoding="utf-8")


def all_tables(study: Study, claims: Sequence[Finding]) -> list[Table]:
    """Every table, in the order of the report."""
    return [
        tables.claims_table(study, claims),
        tables.table1(study),
        tables.tasks_table(study),
        tables.paper_table1(),
        tables.conditions_table(study),
        tables.rivals_table(study),
        tables.same_settings_table(study),
        tables.early_stopping_table(study),
        tables.equal_time_table(study),
        tables.transfer_table(study),
        *(tables.generation_table(study, task) for task in study.generated),
        *tables.small_tables(study),
        tables.cost_table(study),
        tables.runs_table(study),
        tables.origins_table(study),
    ]


def _page(study: Study, claims: Sequence[Finding], made: Sequence[Table], figures: dict[str, str]) -> str:
    shown = {table.name: _block(table) for table in made}
    texts = [shown[tables.generation_name(task)] + f"\n\n{_overfitting(study, task)}" for task in study.generated]
    small = [block for name, block in shown.items() if name in ("table4", "table5")]
    drawn = [f"![{title}]({name})\n\n{title}." for name, title in figures.items() if name != "gains.png"]
    first = f"![{figures['gains.png']}](gains.png)" if "gains.png" in figures else ""
    notes = "\n".join(f"- {note}" for note in study.notes)
    sections = {
        "Does it help?": [headline(study, claims), first],
        "Claims": [
            f"{_verdicts(claims)} Claims and rule were fixed before the runs (`study/claims.py`).",
            shown["claims"],
            RULE,
        ],
        "Table 1": [shown["table1"], shown["tasks"], shown["paper-table1"]],
        "Rate, rank and training": [*drawn, shown["conditions"]],
        "Rivals and fair comparisons": [
            shown[name] for name in ("rivals", "same-settings", "early-stopping", "equal-time", "transfer")
        ],
        "Generated texts, and tables 4 and 5": [*texts, *small],
        "Cost": [shown["cost"]],
        "How it was done": [_trials(study), STATISTICS, notes, _missing(study), shown["runs"], shown["origins"]],
    }
    parts = ["# Results: dropout in LoRA fine-tuning", "Written by `python -m study`; do not edit."]
    for title, blocks in sections.items():
        parts += [f"## {title}", *(block for block in blocks if block)]
    return "\n\n".join(parts) + "\n"


def _block(table: Table) -> str:
    links = f"[CSV]({table.name}.csv)"
    if table.shown is None:
        return f"{markdown(table.title)}: {links}"
    links += f", [LaTeX]({table.name}.tex)"
    parts = [f"**{markdown(table.title)}** ({links})", markdown_table(table.shown), table.note]
    return "\n\n".join(part for part in parts if part)


def headline(study: Study, claims: Sequence[Finding]) -> str:
    """Does it help, by how much, how sure; and what qualifies the answer."""
    main = claims[0]
    change = main.pooled.difference
    if change.n == 0:
        return f"`{HIDDENKEY}` against LoRA alone: {tables.NOT_RUN}."
    labels = ", ".join(_label(study, task) for task in main.pooled.tasks)
    items = [
        f"**{_answer(main)}** `{HIDDENKEY}` minus LoRA alone, mean over {labels}, "
        f"{markdown(study.runs['model'].iloc[0])}: "
        f"**{interval(change)} points** (95 % interval, n = {change.n} seeds, p = {p_value(change.p)}, after Holm's "
        f"correction over all claims {p_value(main.adjusted)})."
    ]
    by_task = (
        f"{_label(study, task)} {interval(paired_difference(difference(study, task, HIDDENKEY, BASELINE)))}"
        for task in main.pooled.tasks
    )
    items.append(f"- By task: {', '.join(by_task)}.")
    items += [_of_texts(study, task) for task in study.generated]
    items.append(
        f"- The paper reports {main.claim.paper_gap:+.2f} points as the mean of its four tasks, with RoBERTa-large "
        "and rates chosen on the test set."
    )
    items += [_best(study), _stopped(study), _equal_settings(study), _transferred(study)]
    ratios = pd.Series({_label(study, task): step_ratio(study, task, HIDDENKEY) for task in study.pool}).dropna()
    if len(ratios):
        items.append(f"- A step of `{HIDDENKEY}` takes {ratios.mean():.2f} times the baseline's, roughly.")
    items.append(f"- {_verdicts(claims)}")
    return items[0] + "\n\n" + "\n".join(item for item in items[1:] if item)


def _label(study: Study, task: str) -> str:
    return markdown(study.label(task))


def _answer(main: Finding) -> str:
    change = main.pooled.difference
    if main.verdict == "replicated":
        return "HiddenKey helps."
    if main.verdict == "not replicated" and main.adjusted <= ALPHA and change.mean < 0:
        return "HiddenKey does harm here."
    if main.verdict == "not replicated":
        return f"HiddenKey does not help here, or little: a gain of {refuting(main.claim):g} points is ruled out."
    return "Whether HiddenKey helps is undecided."


def _verdicts(claims: Sequence[Finding]) -> str:
    counts = Counter(one.verdict for one in claims)
    return f"Of {len(claims)} claims of the paper: {', '.join(f'{count} {name}' for name, count in counts.items())}."


def _of_texts(study: Study, task: str) -> str:
    found = [
        f"{paired_difference(difference(study, task, HIDDENKEY, BASELINE, name=name)).shown(metric_of(name).digits)} "
        f"in {metric_of(name).label}"
        for name in dict.fromkeys((study.result_metric(task), study.validation_metric(task)))
    ]
    return f"- Texts, {_label(study, task)}: `{HIDDENKEY}` over LoRA alone {' and '.join(found)}; positive is better."


def _best(study: Study) -> str:
    pooled = {name: compare(study, name, BASELINE) for name in METHODS if name != BASELINE}
    ps = dict(zip(pooled, holm([one.difference.p for one in pooled.values()]), strict=True))
    everywhere = {name: one.difference for name, one in pooled.items() if len(one.tasks) == len(study.pool)}
    if not everywhere:
        return ""
    name = max(everywhere, key=lambda one: everywhere[one].mean)
    return (
        f"- Best of the {len(everywhere)} methods of Table 1 that were run on all tasks is `{name}`: "
        f"{interval(everywhere[name])} points, p = {p_value(ps[name])} after Holm's correction. It was picked after "
        "the fact, which flatters its gain."
    )


def _stopped(study: Study) -> str:
    chosen = compare(study, BASELINE, BASELINE, "best", "last").difference
    same = over_tasks({task: decline(study, task, BASELINE) for task in study.pool}).difference
    return (
        f"- Early stopping: the baseline with trial and epoch chosen by the best epoch lies "
        f"{interval(chosen)} points over itself chosen by the last; within a chosen run the best epoch lies "
        f"{interval(same)} over the last."
    )


def _equal_settings(study: Study) -> str:
    best, every = (over_same_settings(study, HIDDENKEY, one).difference for one in (True, False))
    return (
        f"- Over LoRA alone with the same settings, untuned as in the paper, `{HIDDENKEY}` lies {interval(best)} "
        f"points with the trial that validation chose, and {interval(every)} in the mean of its trials."
    )


def _transferred(study: Study) -> str:
    _, _, lost, gained = transfer(study, HIDDENKEY)
    return (
        f"- With values chosen on another task `{HIDDENKEY}` changes by {interval(lost.difference)} points, and lies "
        f"{interval(gained.difference)} over the baseline that is tuned on the task itself."
    )


def _overfitting(study: Study, task: str) -> str:
    runs = study.of(task)
    early = int((runs["best_epoch"] < runs["last_epoch"]).sum())
    name = study.validation_metric(task)
    lost = paired_difference(decline(study, task, BASELINE, name))
    return (
        f"{_label(study, task)}: in {early} of {len(runs)} runs the best epoch came before the last one. The chosen "
        f"runs of LoRA alone lose {lost.shown(metric_of(name).digits)} in test {metric_of(name).label} from their "
        "best epoch to their last."
    )


def _trials(study: Study) -> str:
    counts = study.runs.groupby(["task", "method"])["trial"].max()
    unequal = [task for task, found in counts.groupby("task") if found.nunique() > 1]
    if not unequal:
        return "Every method, the baseline included, had the same number of trials."
    names = ", ".join(map(markdown, unequal))
    return f"The methods had different numbers of trials on {names}, which favours those that had more."


def _missing(study: Study) -> str:
    failed = study.runs[study.runs["status"] != "finished"]
    lines = [f"{run.id} ({run.task}) failed: {run.failure}" for run in failed.itertuples()]
    lines += [f"left out, as trials are missing: {run.id} ({run.task})" for run in study.incomplete.itertuples()]
    return "\n".join(f"- {markdown(line)}" for line in lines)
