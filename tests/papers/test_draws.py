"""Where draws on a CPU come from: bytes that are uniform and never the same twice, rare events by the gaps."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binom, chisquare

from hiddenkey.axes import pattern
from hiddenkey.axes.pattern import random_bytes, rare_places


def test_bytes_are_uniform():
    counts = torch.bincount(random_bytes(2**18).long() + 128, minlength=256)
    assert len(counts) == 256
    assert chisquare(counts).pvalue > 1e-5


@pytest.mark.parametrize("count", (1, 7, 8, 9, 1000))
def test_as_many_bytes_as_were_asked_for(count):
    assert random_bytes(count).shape == (count,)


def test_no_two_draws_are_alike():
    assert len({random_bytes(16).numpy().tobytes() for _ in range(2000)}) == 2000


def test_no_part_of_a_draw_repeats_another():
    count = 2**14
    found = random_bytes(count)
    for shift in (1, 2, 4, 8, 64, count // 4, count // 2):
        alike = int((found[shift:] == found[:-shift]).sum())
        assert alike <= binom.isf(1e-6, count - shift, 1 / 256)


@pytest.mark.parametrize("rounds", ("one", "several"))
@pytest.mark.parametrize("rate", (0.004, 0.05, 0.5))
def test_rare_events_fall_anywhere_at_their_rate(rate, rounds, monkeypatch):
    """Where the first gaps do not reach the end, others go on from there."""
    if rounds == "several":
        few = SimpleNamespace(sqrt=lambda x: -x / 10, log1p=math.log1p)
        monkeypatch.setattr(pattern, "math", few)
    count = 200_000
    places = rare_places(count, rate)
    assert (places.diff() > 0).all()
    assert 0 <= int(places[0]) <= int(places[-1]) < count
    for part in torch.bincount(places * 8 // count, minlength=8):
        low, high = binom.interval(1 - 1e-6, count // 8, rate)
        assert low <= int(part) <= high


def test_every_place_has_its_share():
    """The first and the last one too."""
    hits = torch.zeros(3, dtype=torch.long)
    for _ in range(4000):
        hits[rare_places(3, 0.5)] += 1
    low, high = binom.interval(1 - 1e-6, 4000, 0.5)
    assert ((hits >= low) & (hits <= high)).all()


def test_nothing_falls_at_rate_0():
    assert len(rare_places(1000, 0.0)) == 0
