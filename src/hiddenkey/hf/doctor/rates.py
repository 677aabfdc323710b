"""Every site draws, at the rate the recipe says, as far as chance allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from .diagnosis import Finding
from .patient import SEED, Patient

# Over all sites of one diagnosis, the probability of a red rate by chance.
FALSE_ALARM = 1e-6
UNITS = {"entry": "draws", "row": "rows", "fixed": "places"}
# What falls on a key that no query sees (a later one, padding) shows nowhere; fewer may all be such.
ENOUGH = 20
UNUSED = "the batches enter no layer of this stack, as texts enter no vision tower; give some that do, with batches="
TOO_LITTLE = "too little fell to be seen: the rates are too small for batches as small as these"


class Record:
    """What one drop did at one site: entries drawn, dropped, draws of their own, and how many a span must drop.

    places: the largest number of keys or tokens.
    """

    def __init__(self, drop: Drop) -> None:
        self.drop = drop
        self.dropped = self.drawn = self.must = self.squares = self.places = 0

    def add(self, keep: Tensor, grid: Grid, lead: int) -> None:
        """Count a draw over the whole mask."""
        together = drawn_together(self.drop, keep, lead)
        self.dropped += keep.numel() - int(torch.count_nonzero(keep))
        self.squares += keep.numel() * together
        self.places = max(self.places, grid.places)
        if PATTERNS[self.drop.pattern].unit == "fixed":
            must, places = fixed_count(grid, self.drop.p)
            self.must += must
            self.drawn += places
        else:
            self.drawn += keep.numel()

    @property
    def rate(self) -> float:
        return self.dropped / self.drawn

    @property
    def draws(self) -> float:
        return self.drawn**2 / self.squares


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
def recorded(patient: Patient) -> Iterator[dict[str, Record]]:
    """Count what the sites draw, apart from their own tallies: "position path" -> record."""
    records: dict[str, Record] = {}
    for path, site in patient.attachment.sites:
        mine = [records.setdefault(f"{drop.position} {path}", Record(drop)) for drop in site.drops]
        watched: Any = _watch_attention if isinstance(site, AttentionSite) else _watch_stream
        vars(site)["draw"] = watched(site, mine)
    try:
        yield records
    finally:
        for _, site in patient.attachment.sites:
            del vars(site)["draw"]


def _watch_attention(site: AttentionSite, records: list[Record]) -> Any:
    draw = site.draw

    def watched(shape: Shape, device: torch.device, mask: Mask) -> list[Tensor]:
        keeps = draw(shape, device, mask)
        active = [record for record in records if record.drop in site.active]
        for keep, record in zip(keeps, active, strict=True):
            record.add(keep, Grid.attention(shape, device, site.mask_of_documents(mask).segments(shape)), lead=2)
        return keeps

    return watched


def _watch_stream(site: StreamSite, records: list[Record]) -> Any:
    draw = site.draw

    def watched(x: Tensor) -> Tensor:
        keep = draw(x)
        known = site.documents
        folded, segments = (x, None) if known is None else (known.view(x), known.segments)
        laid = keep if folded is x else keep.view(*folded.shape[:-1], -1)
        records[0].add(laid, Grid.stream(folded, segments), lead=1)
        return keep

    return watched


def check_rates(patient: Patient, rounds: int) -> Iterator[Finding]:
    """One finding per site, over `rounds` training forwards of every batch."""
    attachment = patient.attachment
    with recorded(patient) as records, torch.no_grad():
        for turn in range(rounds):
            for index, batch in enumerate(patient.batches):
                patient.train(patient.model, batch, SEED + turn * len(patient.batches) + index)
    for draw in attachment.draws:
        where, record = f"{draw.drop} at {draw.path}", records[draw.name]
        if not draw.switch.is_on:
            yield Finding("rate", "wrong", switched_off([draw.switch]), where)
        elif record.drawn == 0 and patient.trains and attachment.is_unused(draw.path):
            yield Finding("rate", "skipped", UNUSED, where)
        elif record.drawn == 0:
            yield Finding("rate", "wrong", _why_silent(patient, draw.path), where)
        else:
            yield _rate(record, where, len(records))


def _why_silent(patient: Patient, path: str) -> str:
    module = module_at(patient.attachment.model, path)
    if module is not None and not module.training:
        return "drew nothing: its module is in evaluation mode; call model.train()"
    return (
        "drew nothing: the forward goes past this module (a fused or patched forward, a kernel, a layer that is "
        "skipped); take the patch off, or give the recipe layers that are run"
    )


def _rate(record: Record, where: str, sites: int) -> Finding:
    p = record.drop.p
    unit = PATTERNS[record.drop.pattern].unit
    if unit == "fixed":
        values: dict[str, float | str] = {"p": p, "rate": record.rate, "must": record.must / record.drawn}
        fits = record.dropped == record.must
        reason = f"{record.rate:.4f}: {record.dropped} of {record.drawn} places, round(p x length) is {record.must}"
        return Finding("rate", "ok" if fits else "wrong", reason, where, values)
    low, high = interval(record.rate, record.draws, FALSE_ALARM / sites)
    values = {"p": p, "rate": record.rate, "low": low, "high": high, "draws": record.draws}
    fits = low <= p <= high
    reason = f"{record.rate:.4f} [{low:.4f}, {high:.4f}] in {record.draws:,.0f} {UNITS[unit]}"
    return Finding("rate", "ok" if fits else "wrong", reason + ("" if fits else f": {p} is outside"), where, values)
