"""The rule for a verdict, and that every claim measures what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiddenkey.lab.report.claims import CLAIMS, MARGIN, refuting, verdict
from hiddenkey.lab.report.claims_table import table
from hiddenkey.lab.report.figures import gains
from hiddenkey.lab.report.paper import METHODS
from hiddenkey.lab.report.pool import Pool, against, differences, findings, pools
from hiddenkey.lab.report.statistics import Difference, describe
from hiddenkey.lab.report.study import make_task

from .made_up import World, make_records

MORE = next(claim for claim in CLAIMS if claim.main)
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


def test_nothing_run_and_one_seed_decide_nothing():
    assert verdict(MORE, None, None) == "not run"
    assert verdict(MORE, Difference(1, 3.0), None) == "undecided"
    assert verdict(MORE, Difference(2, 3.0, 0.1, 2.0, 4.0), 0.01) == "undecided"


@pytest.mark.parametrize("claim", [MORE, SAME, NO_GAIN])
def test_seeds_that_all_differ_alike_decide_nothing(claim):
    assert verdict(claim, describe([0.36] * 5), 0.0625) == "undecided"


def test_three_seeds_are_enough():
    assert verdict(MORE, Difference(3, 3.0, 0.1, 2.0, 4.0), 0.01) == "replicated"


def test_what_refutes_is_half_the_papers_gap_or_the_margin():
    assert refuting(MORE) == MARGIN
    assert refuting(TINY) == pytest.approx(0.235 / 2)
    assert refuting(NO_PAPER) == MARGIN


def test_every_method_of_a_claim_is_one_of_table_1():
    assert {method for claim in CLAIMS for pair in claim.pairs for method in pair} <= set(METHODS)
    assert sum(claim.main for claim in CLAIMS) == 1


def pool_of(**changes) -> Pool:
    world = World(noise=0.001, seeds=(1, 2, 3, 4), **changes)
    return pools([make_task(world.task, make_records(world))])[0]


def found(pool, says):
    return next(finding for finding in findings(pool) if says in finding.claim.says)


def test_overfitting_with_rank_is_rank_8_against_the_largest():
    pool = pool_of(methods=("baseline", "hiddenkey-"), rank_effects={2: -0.02, 8: 0.0, 64: -0.03})
    rank = found(pool, "as its rank grows")
    assert rank.difference.mean == pytest.approx(3.0, abs=0.3)
    assert rank.verdict == "replicated"
    small = pool_of(methods=("baseline", "hiddenkey-"), rank_effects={2: -0.02})
    assert found(small, "as its rank grows").verdict == "not run"


def test_the_decline_is_best_against_last():
    declined = found(pool_of(methods=("baseline",), decline=0.02), "declines after its peak")
    assert declined.difference.mean == pytest.approx(2.0, abs=0.1)


def test_patterns_count_as_far_as_both_were_run():
    names = ("baseline", "dropkey element", "dropkey column", "dropattention element", "dropattention span")
    pool = pool_of(methods=names, effects={"dropattention element": -0.02})
    key = found(pool, "DropKey beats DropAttention")
    assert key.partly
    assert key.claim.pairs == (("dropkey element", "dropattention element"),)
    assert key.claim.paper_gap == pytest.approx(91.59 - 90.8875)
    assert not found(pool, "`column` beats `element`").partly
    assert found(pool, "DropKey beats DropAttention").difference.mean == pytest.approx(2.0, abs=0.3)
    assert found(pool, "`hiddenkey` beats LoRA").verdict == "not run"


def test_all_tasks_of_a_claim_have_the_same_pairs():
    names = ["dropattention element", "dropattention column", "dropattention span"]
    worlds = [
        World(methods=("baseline", names[2]), task="rte", effects={names[2]: -0.05}),
        World(methods=("baseline", *names), noise=0.001),
    ]
    pool = pools([make_task(world.task, make_records(world)) for world in worlds])[0]
    patterns = found(pool, "mean of its patterns")
    assert (patterns.tasks, patterns.partly) == (("SST-2",), False)
    assert patterns.difference.mean == pytest.approx(0.0, abs=0.3)
    assert patterns.paper_here == pytest.approx((95.76 + 95.87 + 96.10) / 3 - 95.99)


def test_the_papers_own_numbers_of_the_same_tasks_stand_beside_its_mean():
    methods = ("baseline", "hiddenkey", "hiddenkey-")
    one = pool_of(task="sst2", methods=methods)
    assert found(one, "`hiddenkey` beats LoRA").claim.paper_gap == pytest.approx(1.415)
    assert found(one, "`hiddenkey` beats LoRA").paper_here == pytest.approx(0.45)
    worlds = [World(task="sst2", methods=methods), World(task="cola", methods=methods[:2], metric="matthews")]
    both = pools([make_task(world.task, make_records(world)) for world in worlds])[0]
    assert found(both, "`hiddenkey` beats LoRA").paper_here == pytest.approx((0.45 + 1.95) / 2)
    assert found(both, "the KL loss helps").paper_here == pytest.approx(96.44 - 96.22)


def test_a_method_of_fewer_tasks_is_marked_in_the_figure():
    worlds = [
        World(methods=("baseline", "hiddenkey", "hiddenkey-")),
        World(task="rte", methods=("baseline", "hiddenkey")),
    ]
    pool = pools([make_task(world.task, make_records(world)) for world in worlds])[0]
    (figure,) = gains(pool)[0].figures
    assert "hiddenkey- (SST-2 alone) " in figure.alt
    assert "(SST-2 alone)" in figure.svg
    assert "hiddenkey (" not in figure.alt


def test_seeds_that_a_claim_leaves_out_are_named():
    methods = ("baseline", "hiddenkey")
    worlds = [World(task="sst2", methods=methods), World(task="rte", methods=methods, seeds=(1, 2, 3))]
    pool = pools([make_task(world.task, make_records(world)) for world in worlds])[0]
    assert found(pool, "`hiddenkey` beats LoRA").lost == ((4, 0), (5, 0))
    assert "4, 5 (`hiddenkey beats LoRA alone`)" in table(findings(pool), pool).note


def test_tasks_weigh_the_same_and_seeds_are_the_unit():
    worlds = [
        World(task=name, noise=0.0, of_a_seed=0.0, methods=("baseline", "hiddenkey"), effects={"hiddenkey": gain})
        for name, gain in (("rte", 0.03), ("sst2", 0.01))
    ]
    pool = pools([make_task(world.task, make_records(world)) for world in worlds])[0]
    pooled = pool.compare("hiddenkey", "baseline")
    assert pooled.difference.mean == pytest.approx(2.0, abs=0.02)
    assert len(pooled.values) == 5
    assert pooled.tasks == ("rte", "sst2") or pooled.tasks == ("RTE", "SST-2")


def test_models_are_not_mixed_and_generation_is_kept_apart():
    small = World(methods=("baseline", "hiddenkey"), seeds=(1, 2))
    worlds = [
        small,
        replace(small, task="rte"),
        replace(small, task="rte smollm2", model="models/SmolLM2-135M"),
        replace(small, task="e2e", kind="causal-lm", metric="nll"),
    ]
    found_pools = pools([make_task(world.task, make_records(world)) for world in worlds])
    assert [(pool.model, len(pool.tasks)) for pool in found_pools] == [("all-MiniLM-L6-v2", 2), ("SmolLM2-135M", 1)]


def test_a_lower_ter_is_a_gain():
    world = World(task="e2e", kind="causal-lm", metric="nll", methods=("baseline", "hiddenkey"), noise=0.0)
    task = make_task("e2e", make_records(replace(world, effects={"hiddenkey": 0.05})))
    assert all(
        gain == pytest.approx(2.5, abs=0.01)
        for gain in differences(task, "hiddenkey", "baseline", name="ter").values()
    )
    assert all(value > 0 for value in differences(task, "hiddenkey", "baseline").values())


def test_holm_is_over_the_methods_compared():
    pool = pool_of(methods=("baseline", "hiddenkey", "hiddenkey-"), effects={"hiddenkey": 0.01})
    rows = against(pool, "baseline", ("hiddenkey", "hiddenkey-", "hiddenkey-js"))
    ps = [pooled.difference.p if pooled.difference else None for _, pooled, _ in rows]
    assert rows[0][2] == pytest.approx(min(1.0, 2 * min(ps[:2]))) or rows[0][2] == pytest.approx(max(ps[:2]))
    assert rows[2][2] is None
