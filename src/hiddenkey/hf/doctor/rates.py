"""Every site draws, at the rate the recipe says, as far as chance allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...masks import Mask, Shape, drawn_together
from ...patterns import PATTERNS, Grid, document_bounds, run_length
from ...recipe import Drop
from ..attachment import module_at
from ..checks import switched_off
from ..rate_monitor import interval
from ..sites import AttentionSite, StreamSite
from .findings import Finding
from .model_under_test import SEED, ModelUnderTest

# Over all sites of one diagnosis, the probability of a red rate by chance.
FALSE_ALARM = 1e-6
UNITS = {"entry": "draws", "row": "rows", "fixed": "places"}
# What falls on a key that no query sees (a later one, padding) shows nowhere; fewer may all be such.
ENOUGH = 20
UNUSED = "the batches enter no layer of this stack, as texts enter no vision tower; give some that do, with batches="
TOO_LITTLE = "too little fell to be seen: the rates are too small for batches as small as these"
ASLEEP = "drew nothing: its module is in evaluation mode; call model.train()"
BYPASSED = (
    "drew nothing: the forward goes past this module (a fused or patched forward, a kernel, a layer that is "
    "skipped); take the patch off, or give the recipe layers that are run"
)


@dataclass
class Record:
    """What one drop did at one site: entries drawn, dropped, draws of their own, and how many a span must drop.

    squares: the sum of the squared sizes of what is drawn together. places: the largest number of keys or tokens.
    """

    drop: Drop
    dropped: int = 0
    drawn: int = 0
    must: int = 0
    squares: int = 0
    places: int = 0

    @property
    def unit(self) -> str:
        return PATTERNS[self.drop.pattern].unit

    def add(self, keep: Tensor, grid: Grid, lead: int) -> None:
        """Count a draw over the whole mask."""
        self.dropped += keep.numel() - int(torch.count_nonzero(keep))
        self.squares += keep.numel() * drawn_together(self.drop, keep, lead)
        self.places = max(self.places, grid.places)
        must, drawn = fixed_count(grid, self.drop.p) if self.unit == "fixed" else (0, keep.numel())
        self.must += must
        self.drawn += drawn

    def finding(self, where: str, level: float) -> Finding:
        """Whether the realised rate fits. level: the probability of a red line by chance."""
        p, rate = self.drop.p, self.dropped / self.drawn
        if self.unit == "fixed":
            fits, wrong = self.dropped == self.must, ""
            values: dict[str, float | str] = {"p": p, "rate": rate, "must": self.must / self.drawn}
            reason = f"{rate:.4f}: {self.dropped} of {self.drawn} places, round(p x length) is {self.must}"
        else:
            draws = self.drawn**2 / self.squares
            low, high = interval(rate, draws, level)
            fits, wrong = low <= p <= high, f": {p} is outside"
            values = {"p": p, "rate": rate, "low": low, "high": high, "draws": draws}
            reason = f"{rate:.4f} [{low:.4f}, {high:.4f}] in {draws:,.0f} {UNITS[self.unit]}"
        return Finding("rate", "ok" if fits else "wrong", reason + ("" if fits else wrong), where, values)


def fallen(records: Mapping[str, Record]) -> int:
    """How many entries fell in all."""
    return sum(record.dropped for record in records.values())


def fixed_count(grid: Grid, p: float) -> tuple[int, int]:
    """(places that must be dropped, real places) of a grid: round(p · length) of every document, halves up."""
    segments = grid.segments_over_lead().expand(*grid.lead, grid.places)
    first, length = document_bounds(segments)
    opens = (first == torch.arange(grid.places, device=grid.device)) & (segments > 0)
    must = run_length(length, p)[opens].sum()
    return int(must), int((segments > 0).sum())


@contextmanager
def recorded(tested: ModelUnderTest) -> Iterator[dict[str, Record]]:
    """Count what the sites draw, apart from their own tallies: "position path" -> record."""
    records: dict[str, Record] = {}
    for path, site in tested.attachment.sites:
        mine = {drop: records.setdefault(f"{drop.position} {path}", Record(drop)) for drop in site.drops}
        draw: Any = _draw_attention if isinstance(site, AttentionSite) else _draw_stream
        vars(site)["draw"] = partial(draw, site, site.draw, mine)
    try:
        yield records
    finally:
        for _, site in tested.attachment.sites:
            del vars(site)["draw"]


def _draw_attention(
    site: AttentionSite, draw: Any, records: Mapping[Drop, Record], shape: Shape, device: torch.device, mask: Mask
) -> list[Tensor]:
    keeps: list[Tensor] = draw(shape, device, mask)
    for keep, drop in zip(keeps, site.active, strict=True):
        records[drop].add(keep, Grid.attention(shape, device, site.mask_of_documents(mask).segments(shape)), lead=2)
    return keeps


def _draw_stream(site: StreamSite, draw: Any, records: Mapping[Drop, Record], x: Tensor) -> Tensor:
    keep: Tensor = draw(x)
    known = site.documents
    folded, segments = (x, None) if known is None else (known.view(x), known.segments)
    laid = keep if folded is x else keep.view(*folded.shape[:-1], -1)
    for record in records.values():
        record.add(laid, Grid.stream(folded, segments), lead=1)
    return keep


def check_rates(tested: ModelUnderTest) -> Iterator[Finding]:
    """One finding per site, over as many training forwards of every batch as there are rounds."""
    turns, attachment = [batch for _ in range(tested.rounds) for batch in tested.batches], tested.attachment
    with recorded(tested) as records, torch.no_grad():
        for turn, batch in enumerate(turns):
            tested.run(tested.model, batch, SEED + turn)
    for draw in attachment.draws:
        where, record = f"{draw.drop} at {draw.path}", records[draw.name]
        if not draw.switch.is_on:
            yield Finding("rate", "wrong", switched_off([draw.switch]), where)
        elif record.drawn:
            yield record.finding(where, FALSE_ALARM / len(records))
        elif tested.trains and attachment.is_unused(draw.path):
            yield Finding("rate", "skipped", UNUSED, where)
        else:
            module = module_at(attachment.model, draw.path)
            asleep = module is not None and not module.training
            yield Finding("rate", "wrong", ASLEEP if asleep else BYPASSED, where)
