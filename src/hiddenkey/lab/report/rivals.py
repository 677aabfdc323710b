"""What reviewers would ask: rivals, equal settings, early stopping, equal time, values chosen on another task."""

from __future__ import annotations

from . import machine, same_settings, words
from .blocks import Block, Table, Text
from .budget import within_budget
from .cells import gain_cells
from .paper import BASELINE, HIDDENKEY, HIDDENKEY_MINUS, METHODS, RIVAL_NOTES, RIVALS
from .pool import Pool, Pooled, against
from .statistics import Difference, holm
from .study import When
from .transfer import transfer_table, transfer_words

# First and second: method and epoch.
EPOCHS: tuple[tuple[tuple[str, When], tuple[str, When]], ...] = (
    ((BASELINE, "best"), (BASELINE, "last")),
    ((HIDDENKEY_MINUS, "last"), (BASELINE, "last")),
    ((HIDDENKEY, "last"), (BASELINE, "last")),
    ((HIDDENKEY_MINUS, "last"), (BASELINE, "best")),
    ((HIDDENKEY, "last"), (BASELINE, "best")),
    ((HIDDENKEY_MINUS, "best"), (BASELINE, "best")),
    ((HIDDENKEY, "best"), (BASELINE, "best")),
)

CUT_SHORT = (
    "The learning rate of a slower method had not come to the end of its decay by then, which the baseline's had: "
    "a run planned for that time might have done better."
)


def blocks(pool: Pool) -> list[Block]:
    """Five tables; the long ones with what they say of HiddenKey."""
    found: list[Block] = [rivals_table(pool), *same_settings.blocks(pool), early_stopping(pool)]
    found += [_in_time(pool), equal_time(pool)]
    if len(pool.tasks) == 1:
        return [*found, Text(f"Values chosen on another task: {words.NOT_RUN}; it takes two tasks.")]
    return [*found, transfer_words(pool), transfer_table(pool)]


def rivals_table(pool: Pool) -> Table:
    """Each rival against the baseline, and HiddenKey against each rival."""
    gains = {method: (pooled, p) for method, pooled, p in against(pool, BASELINE, RIVALS)}
    leads = [pool.compare(HIDDENKEY, method) for method in RIVALS]
    adjusted = holm([lead.difference.p if lead.difference else None for lead in leads])
    rows, data = [], []
    for method, lead, lead_p in zip(RIVALS, leads, adjusted, strict=True):
        pooled, p = gains[method]
        rows.append(
            [f"`{method}`: {RIVAL_NOTES[method]}", *gain_cells(pool, pooled, p), *gain_cells(pool, lead, lead_p)]
        )
        numbers = machine.gain(pooled.difference, p)
        ours = {f"hiddenkey_{name}": value for name, value in machine.gain(lead.difference, lead_p).items()}
        data.append({"method": method, "tasks": " ".join(pooled.tasks)} | numbers | ours)
    headings = (
        "rival",
        "gain over baseline [95 %]",
        "n",
        "p (Holm)",
        "`hiddenkey` over the rival [95 %]",
        "n",
        "p (Holm)",
    )
    note = (
        "Points, mean over tasks, paired over seeds; of every rival too the trial that validation chose. Holm's "
        "correction over the rivals that were run, for either comparison apart."
    )
    lost = {method: pooled.lost for method, (pooled, _) in gains.items()}
    lost |= {f"{HIDDENKEY} over {method}": lead.lost for method, lead in zip(RIVALS, leads, strict=True)}
    note = f"{note} {words.left_out(lost)}".rstrip()
    return Table("rivals", "Rivals", headings, rows, data, note)


def early_stopping(pool: Pool) -> Table:
    """Early stopping against drops, with and without each other."""
    found = [
        (f"`{first}`, {one} epoch", f"`{second}`, {other} epoch", pool.compare(first, second, one, other))
        for (first, one), (second, other) in EPOCHS
    ]
    found.insert(1, (f"`{BASELINE}`, best epoch", "the same run, last epoch", pool.decline(BASELINE)))
    adjusted = holm([pooled.difference.p if pooled.difference else None for *_, pooled in found])
    rows, data = [], []
    for (first, second, pooled), p in zip(found, adjusted, strict=True):
        rows.append([first, second, *gain_cells(pool, pooled, p)])
        names = {"first": first.replace("`", ""), "second": second.replace("`", "")}
        data.append(names | machine.gain(pooled.difference, p))
    headings = ("first", "second", "first minus second [95 %]", "n", "p (Holm)")
    note = (
        "Last epoch: the trial is chosen by the validation metric of its last epoch, as one who does not stop early "
        "would. Best epoch: by that of its best epoch, as everywhere else in this report. The same run: what "
        "a run loses after its best epoch; the other rows compare ways of choosing, which may choose other trials."
    )
    lost = {f"{first}, {second}".replace("`", ""): pooled.lost for first, second, pooled in found}
    note = f"{note} {words.left_out(lost)}".rstrip()
    return Table("early-stopping", "Early stopping as a rival", headings, rows, data, note)


def equal_time(pool: Pool) -> Table:
    """The validation metric at the epoch that a method reaches in the baseline's training time."""
    names = [method for method in (*METHODS, *RIVALS) if method != BASELINE and method in pool.methods]
    found = [(method, *within_budget(pool, method)) for method in names]
    adjusted = holm([budgeted.difference.p if budgeted.difference else None for _, _, _, budgeted in found])
    rows, data = [], []
    for (method, ratio, whole, budgeted), p in zip(found, adjusted, strict=True):
        full, cells = whole.difference, gain_cells(pool, budgeted, p)
        cells[0] = words.NOT_TIMED if _untimed(ratio, whole) else cells[0]
        rows.append([f"`{method}`", _ratio(ratio), words.difference(full, nothing=whole.nothing), *cells])
        data.append(
            {"method": method, "step_time_ratio": machine.rounded(ratio), "gain_last_epochs": _mean(full)}
            | machine.gain(budgeted.difference, p)
        )
    headings = (
        "method",
        "step time",
        "gain, last epochs [95 %]",
        "gain in the baseline's time [95 %]",
        "n",
        "p (Holm)",
    )
    note = (
        "Validation metric in points, over the baseline's last epoch; the test part was looked at for whole runs "
        "alone. One epoch for each side, and for each seed the trial with the best metric at it, so that no side has "
        "more epochs to choose from. Last epochs: the method's own last one. In the baseline's time: the one (to the "
        "nearest) that the method reaches while the baseline trains, by the ratio of step times. "
        f"{CUT_SHORT} A method that was never timed on one day and one kind of machine with the baseline has no row "
        "in time. Runs were made side by side on shared cores, so times are rough."
    )
    lost = {f"{method}, last epochs": whole.lost for method, _, whole, _ in found if whole.values}
    lost |= {f"{method}, in the baseline's time": timed.lost for method, _, _, timed in found if timed.values}
    note = f"{note} {words.left_out(lost)}".rstrip()
    return Table("equal-time", "At equal training time", headings, rows, data, note, long=True)


def _in_time(pool: Pool) -> Text:
    ratio, whole, budgeted = within_budget(pool, HIDDENKEY)
    if budgeted.difference is None:
        nothing = words.NOT_TIMED if _untimed(ratio, whole) else budgeted.nothing
        return Text(f"`{HIDDENKEY}` at the baseline's training time: {nothing}.")
    return Text(
        f"`{HIDDENKEY}` takes {_ratio(ratio)} of the baseline's step time. At the epoch that it reaches in the "
        f"baseline's training time its validation metric lies {words.difference(budgeted.difference)} points over "
        f"that of the baseline's last epoch, at its own last epoch {words.difference(whole.difference)}; "
        f"n = {budgeted.difference.n}. {CUT_SHORT}"
    )


def _untimed(ratio: float | None, whole: Pooled) -> bool:
    return ratio is None and whole.run


def _mean(found: Difference | None) -> float | None:
    return machine.rounded(found.mean) if found else None


def _ratio(value: float | None) -> str:
    return words.NOTHING if value is None else f"{words.TIMES} {value:.2f}"
