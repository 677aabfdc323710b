"""What a trainer says in its log when drops are not what the recipe says."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..patterns import PATTERNS
from ..recipe import Drop
from .attachment import Attachment
from .checks import silent_sites, some, switched_off
from .model_dropouts import own_dropouts


def divergence(rate: float, p: float) -> float:
    """KL(Bernoulli(rate) || Bernoulli(p)) in nats, for 0 < p < 1."""
    terms = ((rate, p), (1 - rate, 1 - p))
    return sum(a * math.log(a / b) for a, b in terms if a > 0)


def surprise(rate: float, p: float, draws: float) -> float:
    """A bound on the probability that the mean of `draws` independent draws at p is as surprising as `rate`, or more.

    2 exp(-n KL(rate || p)): for n independent variables in [0, 1] with mean p each tail is below exp(-n KL), whatever
    n is (Hoeffding 1963, Theorem 1). A normal approximation is off by orders of magnitude where n p is small.
    """
    return min(1.0, 2 * math.exp(-draws * divergence(rate, p)))


def interval(rate: float, draws: float, level: float) -> tuple[float, float]:
    """All p for which `surprise` of the realised rate is above `level`: contains p but for that probability."""
    return _bound(rate, draws, level, 0.0), _bound(rate, draws, level, 1.0)


def _bound(rate: float, draws: float, level: float, end: float) -> float:
    """Bisection between the rate, which is inside, and an end of [0, 1]."""
    inside, outside = rate, end
    for _ in range(50):
        middle = (inside + outside) / 2
        if 0 < middle < 1 and surprise(rate, middle, draws) > level:
            inside = middle
        else:
            outside = middle
    return outside


# Over a whole run, however often it is looked at, the probability of a warning by chance.
FALSE_ALARM = 1e-6

Counts = list[int]
logger = logging.getLogger(__name__)


def log_what_is_wrong(trainer: Any, attachment: Attachment) -> None:
    """Warn in the log of what a `RateWatch` finds; the trainer keeps it, one for every attachment."""
    watch: RateWatch | None = vars(trainer).get("_rate_watch")
    if watch is None or watch.attachment is not attachment:
        watch = trainer._rate_watch = RateWatch(attachment)
    for sentence in watch.look():
        logger.warning(sentence)


class RateWatch:
    """Looks at the draws since the last look, each time with a smaller share of the false alarms of the run.

    The k-th look spends 1 / k(k + 1) of `FALSE_ALARM`, divided by the drops looked at; the shares add up to 1.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.looks = 0
        self.seen: list[Counts] = []
        self.said: set[str] = set()

    def look(self) -> list[str]:
        """What is wrong and was not said before, one sentence each.

        Call it where training steps were made since the last look; the first one looks back to attach.
        """
        self.looks += 1
        now = self._counts()
        before = self.seen or [[0, 0, 0] for _ in now]
        fresh = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(now, before, strict=True)]
        self.seen = now
        found = [*self._silent(fresh), *self._off_rate(fresh), *self._surroundings()]
        new = [sentence for sentence in found if sentence not in self.said]
        self.said.update(new)
        for entry in self.attachment.entries.values():
            entry.entered = False
        return new

    def _silent(self, fresh: list[Counts]) -> Iterator[str]:
        sites = silent_sites(self.attachment, [drawn > 0 for _, drawn, _ in fresh])
        if sites:
            yield (
                f"{some(sites)} drew nothing since the last log: something bypasses these modules, or put them in "
                "evaluation mode; hiddenkey.doctor(model) tells more"
            )

    def _off_rate(self, fresh: list[Counts]) -> Iterator[str]:
        """Rates that chance does not explain, over all sites of a drop."""
        totals: dict[Drop, Counts] = {}
        for draw, counts in zip(self.attachment.draws, fresh, strict=True):
            total = totals.setdefault(draw.drop, [0, 0, 0])
            total[:] = [a + b for a, b in zip(total, counts, strict=True)]
        level = FALSE_ALARM / (self.looks * (self.looks + 1) * max(len(totals), 1))
        for drop, (dropped, drawn, squares) in totals.items():
            if drawn == 0 or PATTERNS[drop.pattern].unit == "fixed":
                continue
            rate, draws = dropped / drawn, drawn**2 / squares
            if surprise(rate, drop.p, draws) < level:
                yield f"'{drop}' dropped {rate:.4g} since the last log, in {draws:.4g} draws: that is no chance"

    def _surroundings(self) -> Iterator[str]:
        off = [switch for switch in self.attachment.switches if not switch.is_on]
        if off:
            yield switched_off(off)
        own = [f"{dropout.path}.{dropout.name} {dropout.p:g}" for dropout in own_dropouts(self.attachment.model)]
        if own:
            yield f"dropouts of the model itself were turned on again after attach: {some(own)}"

    def _counts(self) -> list[Counts]:
        """[dropped, drawn, squares] of every site and drop, with one wait for the device."""
        counts = [draw.tally.counts for draw in self.attachment.draws]
        device = next((count.device for count in counts if count is not None), torch.device("cpu"))
        none = torch.zeros(3, dtype=torch.long, device=device)
        rows = [none if count is None else count.to(device) for count in counts]
        return torch.stack(rows).tolist() if rows else []
