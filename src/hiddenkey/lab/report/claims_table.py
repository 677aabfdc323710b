"""The claims with their verdicts, and the rule in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from . import machine, words
from .blocks import Block, Bullets, Table, Text
from .claims import ALPHA, FEWEST, MARGIN, Verdict
from .pool import Finding, Pool

BASIS = (
    "Claims and rule were fixed before the runs (`lab/report/claims.py`). Each claim is one difference: the mean "
    "over tasks, paired over seeds, of test metrics in points."
)
VERDICTS: tuple[Verdict, ...] = ("replicated", "not replicated", "undecided", "not run")


def blocks(found: Sequence[Finding], pool: Pool | None) -> list[Block]:
    """The rule and the table."""
    return [Text(f"{count(found)} {BASIS}"), table(found, pool), Bullets(rule(found))]


def count(found: Sequence[Finding]) -> str:
    """How many claims have which verdict."""
    counts = Counter(finding.verdict for finding in found)
    parts = [f"{counts[name]} {name}" for name in VERDICTS if counts[name]]
    return f"Of {len(found)} claims of the paper: {words.listed(parts)}."


def rule(found: Sequence[Finding]) -> list[str]:
    """The rule for a verdict, as fixed in claims.py."""
    tested = sum(finding.difference is not None for finding in found)
    return [
        f"“Better” is replicated where the difference is above 0 at p ≤ {ALPHA} after Holm's correction over the "
        f"{words.plural(tested, 'claim')} that were run; not replicated where it is below 0 by the same test, or "
        f"where the interval ends below half of the paper's own gap (or below {MARGIN} points, if that is less).",
        f"“No effect” is replicated where the whole interval lies within ± {MARGIN} points, “adds nothing” where it "
        f"ends below +{MARGIN}; not replicated where it does not and the difference (for “adds nothing”: a gain) is "
        "significant.",
        f"Everything else, and whatever has fewer than {FEWEST} seeds, is undecided.",
        "Intervals are each claim's own, without correction, also where they decide.",
    ]


def table(found: Sequence[Finding], pool: Pool | None) -> Table:
    """One row for each claim."""
    rows, data = [], []
    for finding in found:
        claim, change = finding.claim, finding.difference
        rows.append(
            [
                claim.says + _pairs(finding),
                finding.verdict,
                words.difference(change, nothing=finding.nothing),
                str(change.n) if change else words.NOTHING,
                words.p_value(finding.adjusted),
                words.signed(claim.paper_gap),
                words.signed(finding.paper_here),
                _tasks(finding, pool),
                claim.place,
            ]
        )
        about = {"claim": claim.says.replace("`", ""), "place": claim.place, "kind": claim.kind}
        printed = {"paper_gap": claim.paper_gap, "paper_gap_same_tasks": finding.paper_here}
        rest = {name: machine.rounded(gap) for name, gap in printed.items()} | {"tasks": " ".join(finding.tasks)}
        data.append(about | {"verdict": finding.verdict} | machine.gain(change, finding.adjusted) | rest)
    headings = (
        "claim",
        "verdict",
        "difference [95 %], points",
        "n",
        "p (Holm)",
        "in the paper, four tasks",
        "in the paper, same tasks",
        "tasks",
        "where",
    )
    note = words.left_out({finding.claim.says.replace("`", ""): finding.lost for finding in found})
    return Table("claims", "The paper's claims", headings, rows, data, note)


def _pairs(finding: Finding) -> str:
    if not finding.partly:
        return ""
    return f" (run: {words.listed(f'`{first}`' for first, _ in finding.claim.pairs)})"


def _tasks(finding: Finding, pool: Pool | None) -> str:
    if not finding.tasks or pool is None:
        return words.NOTHING
    every = len(finding.tasks) == len(pool.tasks)
    return f"all {len(finding.tasks)}" if every and len(finding.tasks) > 1 else ", ".join(finding.tasks)
