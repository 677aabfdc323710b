"""The first screen: does it help, by how much, how sure."""

from __future__ import annotations

from collections.abc import Sequence

from . import claims_table, figures, words
from .blocks import Block, Bullets, Text
from .budget import step_ratio
from .claims import MARGIN
from .paper import BASELINE, HIDDENKEY, METHODS
from .pool import Finding, Pool, against
from .statistics import Difference


def blocks(pool: Pool | None, found: Sequence[Finding]) -> list[Block]:
    """The answer, what qualifies it, and the gains of all methods in one figure."""
    if pool is None:
        return [Text("No classification or regression task was run, so the main question is open.", lead=True)]
    main = next(finding for finding in found if finding.claim.main)
    return [Text(_answer(main, pool), lead=True), Bullets(_context(main, pool, found)), *figures.gains(pool)]


def _answer(main: Finding, pool: Pool) -> str:
    change = main.difference
    if change is None:
        return f"`{HIDDENKEY}` against LoRA alone: {words.NOT_RUN}."
    over = f"{words.plural(len(main.tasks), 'task')} ({', '.join(main.tasks)})"
    where = f"the mean over {over}" if len(main.tasks) > 1 else over
    return (
        f"**{_verdict(main, change)}** `{HIDDENKEY}` minus LoRA alone, {where}, {pool.model}, both tuned with the same "
        f"number of trials: **{words.difference(change)} points** (95 % interval, n = "
        f"{words.plural(change.n, 'seed')}, p = {words.p_value(change.p)}, after Holm's correction "
        f"{words.p_value(main.adjusted)})."
    ).replace("p = < ", "p < ").replace("correction < ", "correction < ")


def _verdict(main: Finding, change: Difference) -> str:
    if change.low is None or change.high is None:
        return "Does HiddenKey help? One seed cannot tell."
    if main.verdict == "replicated":
        return "HiddenKey helps."
    if main.verdict == "not replicated" and change.mean < 0 and change.high < 0:
        return "HiddenKey does harm here."
    if main.verdict == "not replicated":
        return f"HiddenKey does not help here by what the paper reports: a gain above {words.number(change.high)} points is unlikely."
    if change.low > 0:
        return "HiddenKey seems to help, but not surely after correction for all the claims tested."
    return "Whether HiddenKey helps is undecided."


def _context(main: Finding, pool: Pool, found: Sequence[Finding]) -> list[str]:
    printed = words.signed(main.claim.paper_gap) if main.claim.paper_gap is not None else words.NOTHING
    items = [f"The paper reports {printed} points for it, with RoBERTa-large on four tasks and rates chosen on the test set."]
    names = [method for method in METHODS if method != BASELINE]
    ranked = [
        (pooled.difference.mean, method, pooled.difference, p)
        for method, pooled, p in against(pool, BASELINE, names)
        if pooled.difference and len(pooled.tasks) == len(pool.tasks)
    ]
    if ranked:
        _, method, change, p = max(ranked, key=lambda row: row[0])
        items.append(
            f"Best of {words.plural(len(ranked), 'method')} of Table 1 is `{method}`: {words.difference(change)} points, n = "
            f"{change.n}, p = {words.p_value(p)} after Holm's correction. Picked after the fact, so its gain is flattered."
            .replace("p = < ", "p < ")
        )
    stopped = pool.compare(BASELINE, BASELINE, "best", "last").difference
    if stopped:
        items.append(
            f"Early stopping alone gains the baseline {words.difference(stopped)} points over its last epoch, n = "
            f"{stopped.n}. Every method here has it."
        )
    ratios = [ratio for task in pool.tasks if (ratio := step_ratio(task, HIDDENKEY)) is not None]
    if ratios:
        items.append(f"A step of `{HIDDENKEY}` takes {sum(ratios) / len(ratios):.2f} times the baseline's.")
    return [*items, claims_table.count(list(found)) + f" A difference of less than {MARGIN} points counts as none."]
