"""Where draws on a CPU come from: bytes that are uniform and never the same twice, rare events by the gaps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare

from hiddenkey import patterns
from hiddenkey.patterns import SMALL_DRAW, generator, random_bytes, random_keep, rare_places

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", (SMALL_DRAW, SMALL_DRAW + 1, 2**20))
@pytest.mark.parametrize("p", (0.003, 0.1, 0.25, 0.999))
def test_cells_are_kept_at_their_rate_in_every_part(p, count):
    keep = random_keep((4, count // 4), p, CPU)
    for part in keep.flatten().chunk(8):
        low, high = binom.interval(1 - 1e-6, len(part), 1 - p)
        assert low <= int(part.sum()) <= high


@pytest.mark.parametrize("shape", ((3, 5), (2, SMALL_DRAW)))
def test_draws_follow_torchs_own_seed(shape):
    torch.manual_seed(3)
    first, other = random_keep(shape, 0.3, CPU), random_keep(shape, 0.3, CPU)
    torch.manual_seed(3)
    assert torch.equal(random_keep(shape, 0.3, CPU), first)
    assert not torch.equal(first, other)


def test_bytes_are_uniform():
    counts = torch.bincount(random_bytes(generator(), 2**18).long() + 128, minlength=256)
    assert len(counts) == 256
    assert chisquare(counts).pvalue > 1e-5


@pytest.mark.parametrize("count", (1, 7, 8, 9, 1000))
def test_as_many_bytes_as_were_asked_for(count):
    assert random_bytes(generator(), count).shape == (count,)


def test_no_two_draws_are_alike():
    assert len({random_bytes(generator(), 16).numpy().tobytes() for _ in range(2000)}) == 2000


def test_no_part_of_a_draw_repeats_another():
    count = 2**14
    found = random_bytes(generator(), count)
    for shift in (1, 2, 4, 8, 64, count // 4, count // 2):
        alike = int((found[shift:] == found[:-shift]).sum())
        assert alike <= binom.isf(1e-6, count - shift, 1 / 256)


@pytest.mark.parametrize("rounds", ("one", "several"))
@pytest.mark.parametrize("rate", (0.004, 0.05, 0.5))
def test_rare_events_fall_anywhere_at_their_rate(rate, rounds, monkeypatch):
    """Where the first gaps do not reach the end, others go on from there."""
    if rounds == "several":
        few = SimpleNamespace(sqrt=lambda x: -x / 10)
        monkeypatch.setattr(patterns, "math", few)
    count = 200_000
    places = rare_places(generator(), count, rate)
    assert (np.diff(places) > 0).all()
    assert 0 <= int(places[0]) <= int(places[-1]) < count
    for part in np.bincount(places * 8 // count, minlength=8):
        low, high = binom.interval(1 - 1e-6, count // 8, rate)
        assert low <= int(part) <= high


def test_every_place_has_its_share():
    """The first and the last one too."""
    hits = torch.zeros(3, dtype=torch.long)
    for _ in range(4000):
        hits[rare_places(generator(), 3, 0.5)] += 1
    low, high = binom.interval(1 - 1e-6, 4000, 0.5)
    assert ((hits >= low) & (hits <= high)).all()


def test_nothing_falls_at_rate_0():
    assert len(rare_places(generator(), 1000, 0.0)) == 0
