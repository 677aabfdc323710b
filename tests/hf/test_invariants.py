"""What holds for every family: nothing changes outside training, nothing is left behind, every position works."""

import math

import pytest
import torch

import hiddenkey
from hiddenkey import attention_paths, dropout
from hiddenkey.hf import sites
from hiddenkey.hf import sites as skip

from .tiny import DECODERS, FAMILIES, batch, make
from .tools import ALL, POSITIONS, attached, draws, inputs_for, logits_of, lora, quiet, same_state, shown, snapshot

LAYOUTS = ("none", "right", "left")
GENERATORS = (*DECODERS, "t5")
RECIPES = ("hiddenkey@0.3", ALL)


def inputs_of(family: str, layout: str = "right"):
    return inputs_for(family, layout)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_that_of_the_plain_model(family, layout, recipe):
    inputs = inputs_of(family, layout)
    plain, model = make(family).eval(), attached(family, recipe).eval()
    assert torch.equal(logits_of(plain, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_detached_model_is_the_plain_model(family, recipe):
    inputs = inputs_of(family)
    plain, model = make(family), make(family)
    with hiddenkey.attach(model, recipe):
        logits_of(model, inputs)
    for mode in (True, False):
        torch.manual_seed(7)
        wanted = logits_of(plain.train(mode), inputs)
        torch.manual_seed(7)
        assert torch.equal(wanted, logits_of(model.train(mode), inputs))


@pytest.mark.parametrize("around", ("plain", "lora"))
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_gives_everything_back(family, around):
    model = make(family) if around == "plain" else lora(make(family))
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    attachment = hiddenkey.attach(model, ALL)
    logits_of(model, inputs_of(family)).sum().backward()
    model.zero_grad()
    assert list(model.state_dict()) == list(state)
    assert snapshot(model) != before
    attachment.detach()
    assert snapshot(model) == before
    assert same_state(model, state)
    attachment.detach()
    assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_state_are_untouched_while_attached(family):
    plain, model = make(family), attached(family, ALL)
    assert same_state(model, plain.state_dict())
    assert list(plain.state_dict()) == list(model.state_dict())
    ours = [name for name, _ in model.named_modules() if not name.startswith("hiddenkey_drops")]
    assert [name for name, _ in plain.named_modules()] == ours


@pytest.mark.parametrize("recipe", [recipe.split("@")[0] + "@0" for recipe in POSITIONS.values()] + ["baseline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rate_zero_is_the_plain_model_without_dropouts(family, recipe):
    inputs = inputs_of(family)
    model = attached(family, recipe)
    assert torch.equal(logits_of(quiet(family), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_keep_everything_change_nothing(family, layout, implementation, monkeypatch):
    if family in ("mpnet", "gemma2") and implementation == "sdpa":
        pytest.skip("has no sdpa")
    inputs = inputs_of(family, layout)
    plain = quiet(family, attn_implementation=implementation)
    model = attached(family, ALL, attn_implementation=implementation)
    for module in (attention_paths, dropout):
        monkeypatch.setattr(module, "draw", lambda drop, grid: torch.ones(grid.shape, dtype=torch.bool))
    for module in (sites, skip):
        monkeypatch.setattr(module, "drop_stream", lambda x, drop, keep: x)
    ours, theirs = (shown(logits_of(m, inputs), inputs) for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_has_an_effect_by_itself(family, position):
    inputs = inputs_of(family)
    wanted, model = logits_of(quiet(family), inputs), attached(family, POSITIONS[position])
    torch.manual_seed(1)
    first, second = logits_of(model, inputs), logits_of(model, inputs)
    torch.manual_seed(1)
    again = logits_of(model, inputs)
    assert not torch.allclose(first, wanted, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_drops_once_in_a_forward(family, monkeypatch):
    model = make(family)
    attachment = hiddenkey.attach(model, ALL)
    with draws(monkeypatch) as record:
        logits_of(model, inputs_of(family))
    assert len(record) == len(attachment.plan.sites)
    assert {(d.drop.position, d.drop.pattern, d.drop.p) for d in record} == {
        (d.position, d.pattern, d.p) for d in attachment.recipe.drops
    }
    assert not any(math.isnan(rate) for rate in attachment.rates().values())


def test_a_position_rate_is_that_of_the_drops_that_are_on():
    model, inputs = make("llama"), inputs_of("llama")
    attachment = hiddenkey.attach(model, "logits[:2]:column@0.2 + logits[2:]:column@0.6")
    logits_of(model, inputs)
    both = attachment.position_rates()["logits"]
    first = next(switch for switch in attachment.switches if switch.p == 0.2)
    first.p = 0.0
    counts = [tally.counts for _, site in attachment.sites for tally in site.tallies]
    later = [rate for path, rate in attachment.rates().items() if ".2." in path or ".3." in path]
    assert len(counts) == 4
    assert len(later) == 2
    assert attachment.position_rates()["logits"] == pytest.approx(sum(later) / 2)
    assert both < min(later)


@pytest.mark.parametrize("pattern", ("element", "column"))
@pytest.mark.parametrize("family", FAMILIES)
def test_realised_rates_are_near_p(family, pattern):
    model, inputs = make(family), inputs_of(family)
    recipe = " + ".join(
        f"{position}{'' if position in ('input', 'output') else '[:]'}:{pattern}@0.3" for position in POSITIONS
    )
    attachment = hiddenkey.attach(model, recipe)
    assert all(math.isnan(rate) for rate in attachment.rates().values())
    torch.manual_seed(3)
    for _ in range(12):
        logits_of(model, inputs)
    rates = attachment.position_rates()
    assert set(rates) == set(POSITIONS)
    for position, rate in rates.items():
        few = pattern == "column" and position in ("input", "output")
        assert abs(rate - 0.3) < (0.2 if few else 0.03), (position, rate)
    assert len(attachment.rates()) == len(attachment.plan.sites)
    frozen = dict(attachment.rates())
    logits_of(model.eval(), inputs)
    assert attachment.rates() == frozen


@pytest.mark.parametrize("family", GENERATORS)
@pytest.mark.parametrize("options", ({}, {"num_beams": 2}, {"use_cache": False}), ids=("greedy", "beams", "no cache"))
def test_generate_is_that_of_the_plain_model(family, options):
    inputs = inputs_of(family, "left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain, model = make(family).eval(), attached(family, ALL).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    wanted, found = (m.generate(**inputs, **settings, **options) for m in (plain, model))
    assert torch.equal(wanted.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(wanted.scores, found.scores, strict=True))


@pytest.mark.parametrize("family", DECODERS)
def test_a_forward_with_a_cache_is_that_of_the_plain_model(family):
    inputs = inputs_of(family, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def steps(model):
        first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        second = model(
            input_ids=ids[:, 8:10], attention_mask=mask[:, :10], past_key_values=first.past_key_values, use_cache=True
        )
        third = model(input_ids=ids[:, 10:11], attention_mask=mask[:, :11], past_key_values=second.past_key_values)
        return first.logits, second.logits, third.logits

    with torch.no_grad():
        wanted, found = steps(make(family).eval()), steps(attached(family, ALL).eval())
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("family", ("bert", "llama", "mpnet", "t5"))
def test_attach_twice_names_the_recipe(family):
    model = attached(family, "hiddenkey@0.25")
    with pytest.raises(ValueError, match=r"logits:column@0\.25 \+ hidden:element@0\.25 ~ kl\*1\.0.*detach"):
        hiddenkey.attach(model, "dropkey@0.1")


def test_attach_twice_around_and_inside():
    inner = make("bert")
    outer = lora(inner)
    attachment = hiddenkey.attach(outer, "hiddenkey@0.25")
    with pytest.raises(ValueError, match="already"):
        hiddenkey.attach(outer, "baseline")
    assert hiddenkey.find_attachment(outer) is attachment
    attachment.detach()
    assert hiddenkey.find_attachment(outer) is None
    with hiddenkey.attach(inner, "hiddenkey@0.25"), pytest.raises(ValueError, match="already"):
        hiddenkey.attach(outer, "baseline")
    with hiddenkey.attach(outer, "dropkey@0.1") as third:
        assert str(third.recipe) == "logits:element@0.1"


@pytest.mark.parametrize("inside", ("base_model", "bert"))
def test_attach_to_the_inside_of_an_attached_model_is_an_error(inside):
    outer = lora(make("bert")) if inside == "base_model" else make("bert")
    hiddenkey.attach(outer, "hiddenkey@0.25")
    with pytest.raises(ValueError, match="already"):
        hiddenkey.attach(getattr(outer, inside), "dropkey@0.1")


@pytest.mark.parametrize("family", ("gpt2", "mpnet"))
def test_the_context_detaches_after_an_error(family):
    model = make(family)
    before = snapshot(model)
    with pytest.raises(KeyError, match="on purpose"), hiddenkey.attach(model, ALL) as attachment:
        assert hiddenkey.find_attachment(model) is attachment
        raise KeyError("on purpose")
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ("mpnet", "bert", "gemma2"))
def test_a_forward_that_fails_leaves_no_drop_behind(family):
    """The drop at a softmax is switched on before the attention's code and must go off after an error in it."""
    model, inputs = attached(family, POSITIONS["logits"]), inputs_of(family)
    value = next(m for name, m in model.named_modules() if name.endswith((".v", ".value", ".3.self_attn.v_proj")))

    def fail(*_):
        raise KeyError("on purpose")

    handle = value.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        logits_of(model, inputs)
    handle.remove()
    ones = torch.zeros(1, 1, 200, 5)
    assert torch.equal(torch.softmax(ones, -1), torch.full_like(ones, 0.2))
    assert torch.equal(logits_of(model.eval(), inputs), logits_of(make(family).eval(), inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_in_evaluation_mode_do_not_drop(family):
    """A frozen part that the user put in evaluation mode stays exact, whatever the rest does."""
    model = attached(family, ALL)
    for child in model.children():
        child.eval()
    inputs = inputs_of(family)
    torch.manual_seed(0)
    first = logits_of(model, inputs)
    assert torch.equal(first, logits_of(model, inputs))


def test_a_batch_of_labels_runs_in_every_family():
    for family in FAMILIES:
        assert attached(family, ALL)(**batch(family)).loss.isfinite()
