"""The rule for a verdict; and effects of known size are found, while what is not there is not found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hiddenkey.lab import statistics
from hiddenkey.lab.statistics import Difference, paired_difference
from study.claims import CLAIMS, MARGIN, Finding, findings, refuting, verdict
from study.paper import METHODS

from .made_up import make_record, make_records, study_of

MORE = CLAIMS[0]
TINY = next(claim for claim in CLAIMS if "KL loss" in claim.says)
SAME = next(claim for claim in CLAIMS if claim.kind == "same")
NO_GAIN = next(claim for claim in CLAIMS if claim.kind == "no gain")
NO_PAPER = next(claim for claim in CLAIMS if claim.source == "rank")


@pytest.mark.parametrize(
    ("claim", "low", "high", "p", "expected"),
    [
        (MORE, 0.2, 0.8, 0.01, "replicated"),
        (MORE, 0.05, 0.3, 0.01, "replicated"),
        (MORE, 0.2, 0.8, 0.06, "undecided"),
        (MORE, -0.2, 0.8, 0.30, "undecided"),
        (MORE, -0.8, -0.2, 0.01, "not replicated"),
        (MORE, -0.8, -0.1, 0.06, "not replicated"),
        (MORE, -0.3, 0.4, 0.60, "not replicated"),
        (TINY, -0.3, 0.4, 0.60, "undecided"),
        (TINY, -0.3, 0.1, 0.60, "not replicated"),
        (NO_PAPER, -0.3, 0.49, 0.60, "not replicated"),
        (NO_PAPER, -0.3, 0.51, 0.60, "undecided"),
        (SAME, -0.4, 0.4, 1.0, "replicated"),
        (SAME, 0.1, 0.4, 0.01, "replicated"),
        (SAME, 0.3, 0.9, 0.01, "not replicated"),
        (SAME, -0.9, -0.3, 0.01, "not replicated"),
        (SAME, -0.6, 0.4, 0.80, "undecided"),
        (NO_GAIN, -2.0, 0.4, 0.01, "replicated"),
        (NO_GAIN, 0.2, 0.9, 0.01, "not replicated"),
        (NO_GAIN, -0.2, 0.9, 0.30, "undecided"),
        (NO_GAIN, -2.0, 0.6, 0.01, "undecided"),
    ],
)
def test_the_rule(claim, low, high, p, expected):
    assert verdict(claim, Difference(5, (low + high) / 2, 0.1, low, high), p) == expected


def test_few_or_equal_seeds_decide_nothing():
    assert verdict(MORE, Difference(0), math.nan) == "not run"
    assert verdict(MORE, Difference(1, 3.0), math.nan) == "undecided"
    assert verdict(MORE, Difference(2, 3.0, 0.1, 2.0, 4.0), 0.01) == "undecided"
    assert verdict(MORE, Difference(3, 3.0, 0.1, 2.0, 4.0), 0.01) == "replicated"
    for claim in (MORE, SAME, NO_GAIN):
        assert verdict(claim, paired_difference([0.36] * 5), 0.0625) == "undecided"


def test_what_refutes_is_half_the_papers_gap_or_the_margin():
    assert (refuting(MORE), refuting(NO_PAPER)) == (MARGIN, MARGIN)
    assert refuting(TINY) == pytest.approx(0.235 / 2)


def test_every_method_of_a_claim_is_one_of_table_1():
    assert {method for claim in CLAIMS for pair in claim.pairs for method in pair} <= set(METHODS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "_bootstrap", lambda differences: (math.nan, math.nan))


def found_in(folder: Path, effects: dict[str, float], chance: int) -> dict[str, Finding]:
    return {one.claim.says: one for one in findings(study_of(folder, make_records(effects, chance)))}


def test_an_effect_of_known_size_is_found(quick: None, tmp_path: Path):
    effects = {"hiddenkey": 0.02, "hiddenkey-": 0.02, "hiddenkey-input": 0.0, "hiddencut element": -0.02}
    for chance in range(4):
        found = found_in(tmp_path, effects, chance)
        main = found["hiddenkey beats LoRA alone"]
        assert main.verdict == "replicated"
        assert main.pooled.difference.mean == pytest.approx(2.0, abs=0.8)
        assert found["hiddencut element beats LoRA alone"].verdict == "not replicated"
        assert found["drops at the input add nothing"].verdict == "replicated"
        assert found["the JS loss has no effect"].verdict == "not run"
        assert main.paper_gap == pytest.approx((91.20 - 89.95 + 96.44 - 95.99) / 2)


def test_no_effect_is_not_found(quick: None, tmp_path: Path):
    verdicts = [found_in(tmp_path, {}, chance)["hiddenkey beats LoRA alone"].verdict for chance in range(5)]
    assert "replicated" not in verdicts


def test_overfitting_with_rank_and_the_decline(quick: None, tmp_path: Path):
    """The baseline loses three points from rank 8 to 64, and two from its best epoch to its last."""
    records = [
        make_record("sst2", "baseline", seed, trial, level + slope * seed, **axes)
        for level, slope, axes in ((0.8, 1e-3, {}), (0.78, 2e-3, {"lora_r": 2}), (0.77, 2e-3, {"lora_r": 64}))
        for seed in (1, 2, 3)
        for trial in (1, 2, 3)
    ]
    found = {one.claim.source: one for one in findings(study_of(tmp_path, records))}
    assert found["rank"].pooled.difference.mean == pytest.approx(3.0 - 0.2)
    assert found["epochs"].pooled.difference.mean == pytest.approx(2.0)
    # The largest rank is not judged while a run of it is missing.
    del records[-1]
    assert {one.claim.source: one.verdict for one in findings(study_of(tmp_path, records))}["rank"] == "not run"
