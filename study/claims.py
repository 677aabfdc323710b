"""What the paper claims, written down before any run, and the rule for a verdict.

The comparison of a claim is an average of paired differences "first minus second" over its pairs of methods and over
the tasks of Table 1's kind (classification and regression, in points), seeds as the unit: for each seed one number.
Values are test metrics of the best epoch of the trial that the validation part chose.

Rule, with the 95 % interval of that difference and its p-value after Holm's correction over all claims that were run:

- a claim of more ("more"): replicated if the difference is above 0 after the correction (p ≤ 0.05); not replicated
  if it is below 0 after the correction, or if the interval's upper end is below half of the paper's own gap (or below
  the margin, where half of the gap is more than that or the paper gives none); else undecided.
- a claim of no effect ("same"): replicated if the interval lies within ± the margin; not replicated if it does not
  and the difference is not 0 after the correction; else undecided.
- a claim of no gain ("no gain"): replicated if the interval's upper end is below the margin; not replicated if it is
  not and the difference is above 0 after the correction; else undecided.
- with fewer than 3 seeds: undecided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hiddenkey.lab.statistics import Difference, holm

from .comparisons import Pooled, compare, difference, mean_over, over_tasks, paper_gap, rank_difference
from .paper import BASELINE, HIDDENKEY, HIDDENKEY_MINUS, PATTERNS, gap
from .records import Study

MARGIN = 0.5
"""Points. The methods of the paper's Table 1 lie 0.9 above its baseline on average; 0.5 is less than that, and about
the standard deviation over seeds that the paper prints for a single task."""
ALPHA = 0.05
FEWEST = 3
"""Seeds without which nothing is decided."""

Kind = Literal["more", "same", "no gain"]
Source = Literal["methods", "rank", "epochs"]
Verdict = Literal["replicated", "not replicated", "undecided", "not run"]


@dataclass(frozen=True)
class Claim:
    """One claim, its place in the paper, and the comparison that decides it."""

    says: str
    place: str
    kind: Kind
    pairs: tuple[tuple[str, str], ...] = ()
    """Methods: first minus second; several pairs are averaged, on the tasks that have them all."""
    source: Source = "methods"
    """rank: the baseline at rank 8 minus that at the largest rank; epochs: what its best epoch chooses minus what its
    last one chooses."""

    @property
    def paper_gap(self) -> float | None:
        """The difference in the averages of the paper's Table 1; None where it gives none."""
        if not self.pairs:
            return None
        return sum(gap(first, second) for first, second in self.pairs) / len(self.pairs)


def _against_baseline(method: str, place: str) -> Claim:
    return Claim(f"{method} beats LoRA alone", place, "more", ((method, BASELINE),))


CLAIMS = (
    _against_baseline(HIDDENKEY, "Table 1: the best method"),
    Claim(
        "LoRA overfits as its rank grows: worse at the largest rank than at rank 8", "Fig. 5", "more", source="rank"
    ),
    Claim("LoRA's metric declines after its peak: last epoch worse than best", "Fig. 6", "more", source="epochs"),
    _against_baseline("dropkey column", "Table 1: the best pattern of DropKey"),
    _against_baseline("hiddencut element", "Table 1: the best pattern of HiddenCut"),
    Claim(
        "DropAttention beats LoRA alone, mean of its patterns",
        "Table 1",
        "more",
        tuple((f"dropattention {pattern}", BASELINE) for pattern in PATTERNS),
    ),
    Claim("for DropKey, column beats element", "Table 1", "more", (("dropkey column", "dropkey element"),)),
    Claim(
        "for HiddenCut, element beats span",
        "Table 1",
        "more",
        (("hiddencut element", "hiddencut span"),),
    ),
    Claim(
        "DropKey beats DropAttention, pattern by pattern",
        "Table 1, Fig. 4",
        "more",
        tuple((f"dropkey {pattern}", f"dropattention {pattern}") for pattern in PATTERNS),
    ),
    Claim("hiddenkey- beats dropkey column alone", "Table 1", "more", ((HIDDENKEY_MINUS, "dropkey column"),)),
    Claim("hiddenkey- beats hiddencut element alone", "Table 1", "more", ((HIDDENKEY_MINUS, "hiddencut element"),)),
    Claim("the KL loss helps: hiddenkey beats hiddenkey-", "Table 1", "more", ((HIDDENKEY, HIDDENKEY_MINUS),)),
    Claim("the JS loss has no effect", "Table 1, + JS", "same", (("hiddenkey-js", HIDDENKEY_MINUS),)),
    Claim("drops at the input add nothing", "Table 1, + input", "no gain", (("hiddenkey-input", HIDDENKEY_MINUS),)),
    Claim(
        "drops at the output add nothing", "Table 1, + output", "no gain", (("hiddenkey-output", HIDDENKEY_MINUS),)
    ),
)


def refuting(claim: Claim) -> float:
    """The upper end below which a claim of more is not replicated."""
    half = MARGIN if claim.paper_gap is None else claim.paper_gap / 2
    return max(0.0, min(MARGIN, half))


def verdict(claim: Claim, found: Difference, adjusted: float) -> Verdict:
    """The rule of this file; `adjusted` is the p-value after Holm's correction."""
    if found.n == 0:
        return "not run"
    if found.n < FEWEST or math.isnan(found.low) or math.isnan(adjusted):
        return "undecided"
    differs = adjusted <= ALPHA
    if claim.kind == "more":
        if differs and found.mean > 0:
            return "replicated"
        refuted = (differs and found.mean < 0) or found.high < refuting(claim)
        return "not replicated" if refuted else "undecided"
    below = found.high < MARGIN
    if below and (claim.kind == "no gain" or found.low > -MARGIN):
        return "replicated"
    against = differs and (claim.kind == "same" or found.mean > 0)
    return "not replicated" if against else "undecided"


@dataclass(frozen=True)
class Finding:
    """A claim and what was found."""

    claim: Claim
    pooled: Pooled
    adjusted: float
    """p-value after Holm's correction over all claims that were run."""
    verdict: Verdict
    paper_gap: float | None
    """The difference in the paper on the tasks that were run; None where it does not print one."""


def findings(study: Study) -> list[Finding]:
    """Every claim with its verdict."""
    found = [_measure(study, claim) for claim in CLAIMS]
    adjusted = holm([pooled.difference.p for pooled in found])
    return [
        Finding(claim, pooled, p, verdict(claim, pooled.difference, p), _paper_gap(study, claim, pooled))
        for claim, pooled, p in zip(CLAIMS, found, adjusted, strict=True)
    ]


def _measure(study: Study, claim: Claim) -> Pooled:
    """Several pairs are averaged on the tasks that have them all."""
    if claim.source == "rank":
        return over_tasks({task: rank_difference(study, task) for task in study.pool})
    if claim.source == "epochs":
        return compare(study, BASELINE, BASELINE, "best", "last")
    asked = {method for pair in claim.pairs for method in pair}
    return over_tasks(
        {
            task: mean_over([difference(study, task, *pair) for pair in claim.pairs])
            for task in study.pool
            if asked <= set(study.methods(task))
        }
    )


def _paper_gap(study: Study, claim: Claim, pooled: Pooled) -> float | None:
    gaps = [paper_gap(study, pooled.tasks, *pair) for pair in claim.pairs]
    known = [gap for gap in gaps if gap is not None]
    return sum(known) / len(known) if known and len(known) == len(gaps) else None
