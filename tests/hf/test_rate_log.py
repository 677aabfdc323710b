"""The statistics behind red lines and warnings, and what a trainer's log says when drops are lost."""

import logging
import math
import types

import pytest
import torch
from transformers import TrainerCallback

import hiddenkey
from hiddenkey.patterns import PATTERNS, random_keep, register_pattern

from ..api import FALSE_ALARM, RateWatch, Tally, interval, log_what_is_wrong, rate_monitor, surprise
from .test_faults import draw_at
from .test_trainer import drop_trainer
from .tiny import batch
from .tools import attached

RECIPE = "hiddenkey-[:]@0.3"


def binomial(draws, p):
    """P(X = k) of k = 0 … n."""
    return [math.comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(draws + 1)]


@pytest.mark.parametrize("p", (0.01, 0.1, 0.5))
@pytest.mark.parametrize("draws", (1, 7, 40, 400))
def test_a_small_surprise_is_as_rare_as_it_says(draws, p):
    values = [surprise(dropped / draws, p, draws) for dropped in range(draws + 1)]
    chances = binomial(draws, p)
    for value in values:
        true = sum(chance for chance, other in zip(chances, values, strict=True) if other <= value * (1 + 1e-9))
        assert true <= value * (1 + 1e-9)
    assert surprise(p, p, draws) == 1


def test_a_normal_approximation_would_not_do():
    """Six dropped of a hundred at p = 0.01: five standard deviations, and yet one case in 2000."""
    true = sum(binomial(100, 0.01)[6:])
    normal = math.erfc((0.06 - 0.01) / math.sqrt(0.01 * 0.99 / 100) / math.sqrt(2))
    assert normal < 1e-6 < 5e-4 < true < surprise(0.06, 0.01, 100)


@pytest.mark.parametrize("rate", (0.0, 0.1, 0.7, 1.0))
def test_the_interval_ends_where_the_surprise_begins(rate):
    low, high = interval(rate, 200, 1e-3)
    assert 0 <= low <= rate <= high <= 1
    for end in (low, high):
        if end not in (0.0, 1.0):
            assert surprise(rate, end, 200) == pytest.approx(1e-3, rel=1e-3)
    wide, narrow = interval(rate, 200, 1e-6), interval(rate, 20_000, 1e-3)
    assert wide[1] - wide[0] > high - low > narrow[1] - narrow[0]


def test_false_alarms_of_a_run_add_up_to_less_than_promised():
    assert sum(FALSE_ALARM / (k * (k + 1)) for k in range(1, 100_000)) < FALSE_ALARM


def test_a_tally_knows_what_is_drawn_together():
    tally = Tally()
    tally.add(torch.tensor([[True, False, False, True]]))
    assert tally.counts.tolist() == [2, 4, 4]
    tally.add(torch.ones(2, 5, dtype=torch.bool), together=5)
    assert tally.counts.tolist() == [2, 14, 4 + 2 * 25]


@pytest.mark.parametrize("reentrant", (False, True))
def test_what_is_recomputed_is_counted_once(reentrant):
    counts = []
    for checkpointing in (False, True):
        model = attached("llama", RECIPE)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**batch("llama")).loss.backward()
        sites = hiddenkey.find_attachment(model).sites
        counts.append([tally.counts.tolist() for _, site in sites for tally in site.tallies])
    assert counts[0] == counts[1]


# The watch by itself.


def watched(recipe=RECIPE):
    model = attached("llama", recipe)
    return model, RateWatch(hiddenkey.find_attachment(model))


@pytest.mark.parametrize("pattern", ("element", "column", "span"))
def test_all_is_well(pattern):
    model, watch = watched(f"logits[:]:{pattern}@0.3 + hidden[:]:{pattern}@0.3")
    for seed in range(20):
        torch.manual_seed(seed)
        model(**batch("llama"))
        assert watch.look() == []


@pytest.mark.parametrize("pattern", ("element", "column"))
def test_a_rate_that_is_no_chance(pattern, monkeypatch):
    model, watch = watched(f"logits[:]:{pattern}@0.3 + hidden[:]:{pattern}@0.3")
    model(**batch("llama"))
    assert watch.look() == []
    draw_at(0.6)(model, monkeypatch)
    for _ in range(2):
        model(**batch("llama"))
    said = watch.look()
    assert len(said) == 2
    assert all("that is no chance" in sentence for sentence in said)


def test_few_draws_prove_little(monkeypatch):
    """Three examples, one vector each: nine draws at twice the rate may be chance."""
    model, watch = watched("output:column@0.3")
    draw_at(0.6)(model, monkeypatch)
    model(**{name: value[:, :3] for name, value in batch("llama").items()})
    assert watch.look() == []


@pytest.fixture
def all_or_nothing():
    """Whole rows fall together."""

    @register_pattern("all-or-nothing")
    def pattern(grid, p):
        return grid.lay(random_keep((*grid.lead, 1), p, grid.device).expand(*grid.lead, grid.places))

    yield
    PATTERNS.remove("all-or-nothing")


def test_what_falls_together_is_one_draw(all_or_nothing):
    """Three rows of twelve tokens: all or none of them fall in a quarter of all passes."""
    model, watch = watched("hidden[3:]:all-or-nothing@0.5")
    for seed in range(20):
        torch.manual_seed(seed)
        model(**batch("llama"))
        assert watch.look() == []


def test_spans_are_rounded_and_prove_nothing():
    """round(0.04 x 12) is none, in as many rows as it takes to be no chance at a rate of 0.04."""
    model, watch = watched("hidden[:]:span@0.04")
    model(**{name: value.repeat(40, 1) for name, value in batch("llama").items()})
    assert surprise(0.0, 0.04, 4 * 120) < FALSE_ALARM / 2
    assert watch.look() == []


@pytest.mark.parametrize("look", (1, 2, 5))
@pytest.mark.parametrize("times", (0.99, 1.01))
def test_what_a_look_may_spend(look, times, monkeypatch):
    """One k(k + 1)-th of the false alarms, shared by two drops."""
    model, watch = watched("logits[:]:column@0.3 + hidden[:]:element@0.3")
    model(**batch("llama"))
    watch.looks = look - 1
    monkeypatch.setattr(rate_monitor, "surprise", lambda *_: times * FALSE_ALARM / (look * (look + 1) * 2))
    assert len(watch.look()) == (2 if times < 1 else 0)


def test_another_recipe_is_watched_anew():
    model, trainer = attached("llama", RECIPE, depth=1), types.SimpleNamespace()
    for recipe in (None, "hidden[:]:element@0.2"):
        if recipe is not None:
            hiddenkey.find_attachment(model).detach()
            hiddenkey.attach(model, recipe)
        model(**batch("llama"))
        log_what_is_wrong(trainer, hiddenkey.find_attachment(model))
        assert trainer._rate_watch.attachment is hiddenkey.find_attachment(model)


def test_silence_is_told_once_and_only_since_the_last_look():
    model, watch = watched()
    model(**batch("llama"))
    assert watch.look() == []
    model.model.layers[1].mlp.eval()
    model(**batch("llama"))
    (sentence,) = watch.look()
    assert sentence.startswith("hidden model.layers.1.mlp drew nothing since the last log")
    model(**batch("llama"))
    assert watch.look() == []


# In the log of a trainer.


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="hiddenkey")
    return caplog


def test_a_trainer_with_nothing_to_say(said, tmp_path):
    drop_trainer("llama", tmp_path).train()
    assert not said.records


def test_a_trainer_that_loses_a_site_on_the_way(said, tmp_path):
    """From the third step on a layer's drop is left out; the log of the fourth says so."""

    class Bypass(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                (dense,) = (m for name, m in model.named_modules() if name.endswith("layer.1.output.dense"))
                dense.eval()
                dense.train = lambda mode=True: dense

    trainer = drop_trainer("bert", tmp_path)
    trainer.add_callback(Bypass())
    trainer.train()
    (record,) = said.records
    assert "layer.1.output.dense drew nothing since the last log" in record.message
