"""Every tuner of PEFT, and none: the same sites, the same promises, gradient for every weight that learns."""

import re

import pytest
import torch

import hiddenkey
from hiddenkey.hf.structure import find_transformer

from .adapters import FULL, TUNERS, batch_for, build, pairs
from .tiny import DEPTH
from .tools import logits_of, same_state, sites_of, snapshot

INSIDE = "logits[:]:column@0.4 + weights[:]:element@0.3 + hidden[:]:element@0.3"
EVERYWHERE = f"input:element@0.2 + {INSIDE}"
STEP = "logits[1:]:column@0.3 + hidden[1:]:element@0.3 ~ kl*1.0"
ALL = (FULL, *TUNERS)
MERGEABLE = pairs(tuner for tuner, case in TUNERS.items() if case.mergeable)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def inside(path: str, tuner: str, root: str) -> str:
    """Where a module of the plain model is under a tuner."""
    if tuner == "ShadowPEFT":  # Around whole layers.
        path = path.replace("self_attn", "base_layer.self_attn").replace("mlp", "base_layer.mlp")
    if tuner == "adaption prompt" and path.endswith(("2.self_attn", "3.self_attn")):
        path += ".model"
    return f"{root}.{path}" if root else path


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL))
def test_the_sites_are_those_of_the_plain_model(tuner, family):
    model = build(tuner, family)
    plan = hiddenkey.plan(model, EVERYWHERE)
    root = find_transformer(model)[0]
    for position in ("input", "logits", "weights", "hidden"):
        found = [site.path for site in plan.sites if site.drop.position == position]
        assert sorted(found) == sorted(inside(path, tuner, root) for path in sites_of(family, position))
    assert plan.own_dropouts == ()
    assert plan.adapter_dropouts == ()


def recipe_for(tuner: str) -> str:
    """Every position; ShadowPEFT puts an object of its own between the layers, where nothing can be dropped."""
    return INSIDE if tuner == "ShadowPEFT" else EVERYWHERE


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL))
def test_training_evaluation_and_detach(tuner, family):
    """Every site drops in training; rate 0, evaluation and a detached model are the plain model."""
    model, inputs = build(tuner, family), batch_for(tuner, family, labels=False)
    torch.manual_seed(0)
    trained, evaluated = logits_of(model, inputs), logits_of(model.eval(), inputs)
    model.train()
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    everywhere = recipe_for(tuner)
    with hiddenkey.attach(model, re.sub(r"@0\.\d", "@0", everywhere)):
        torch.manual_seed(0)
        assert torch.equal(logits_of(model, inputs), trained)
    with hiddenkey.attach(model, everywhere) as attachment:
        torch.manual_seed(0)
        assert not torch.allclose(logits_of(model, inputs), trained, atol=1e-3)
        assert all(0 < rate < 1 for rate in attachment.rates().values())
        assert torch.equal(logits_of(model.eval(), inputs), evaluated)
    assert torch.equal(logits_of(model, inputs), evaluated)
    assert snapshot(model.train()) == before
    assert same_state(model, state)


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL))
def test_the_site_is_at_the_output_of_the_adapted_module(tuner, family):
    """Where everything is dropped, the adapter's part is dropped too."""
    model = build(tuner, family)
    outputs = []
    root = find_transformer(model)[0]
    with hiddenkey.attach(model, "hidden[:]:element@0.9999999"):
        for path in sites_of(family, "hidden"):
            module = model.get_submodule(inside(path, tuner, root))
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(**batch_for(tuner, family))
    assert len(outputs) == DEPTH
    assert not any(output.any() for output in outputs)


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL, ALL))
def test_a_step_reaches_every_weight_that_learns(tuner, family):
    model, inputs = build(tuner, family, own=True), batch_for(tuner, family)
    hiddenkey.attach(model, STEP)
    step = hiddenkey.consistency_step(model, inputs)
    assert step.consistency > 0
    step.total.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if tuner == "ShadowPEFT":  # What its last layer passes on is not looked at.
        learning = {name: grad for name, grad in learning.items() if ".layers.3.shadow_update" not in name}
    assert learning
    assert [name for name, grad in learning.items() if grad is None or not grad.isfinite().all()] == []
    assert [name for name, grad in learning.items() if not grad.any()] == []


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL))
def test_the_task_loss_of_a_step_is_the_models(tuner, family):
    """At rate 0, whatever the tuner adds to the loss or to the sequence; and both views are one."""
    model, inputs = build(tuner, family), batch_for(tuner, family)
    torch.manual_seed(0)
    wanted = model(**inputs).loss
    hiddenkey.attach(model, "logits[1:]:column@0 + hidden[1:]:element@0 ~ kl*1.0")
    torch.manual_seed(0)
    step = hiddenkey.consistency_step(model, inputs)
    torch.testing.assert_close(step.task, wanted, rtol=1e-5, atol=1e-5)
    assert (step.consistency.abs() < 1e-6) != getattr(TUNERS.get(tuner), "draws", False)


@pytest.mark.parametrize(("tuner", "family"), MERGEABLE)
def test_merging_is_that_of_peft_alone(tuner, family):
    plain, model = build(tuner, family), build(tuner, family)
    inputs = batch_for(tuner, family, labels=False)
    hiddenkey.attach(model, STEP)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(plain, change)()
        getattr(model, change)()
        assert same_state(model, plain.state_dict())
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    assert same_state(merged, wanted.state_dict())
    assert torch.equal(logits_of(merged.eval(), inputs), logits_of(wanted.eval(), inputs))


@pytest.mark.parametrize(("tuner", "family"), pairs(ALL, ("ShadowPEFT",)))
def test_the_doctor_finds_nothing_wrong(tuner, family):
    examine(tuner, family)


def examine(tuner: str, family: str) -> str:
    """The doctor's line about causality, once all is green."""
    diagnosis = hiddenkey.doctor(build(tuner, family), "hiddenkey-[:]@0.3", [batch_for(tuner, family)], rounds=1)
    assert diagnosis.ok, str(diagnosis)
    (causality,) = (finding for finding in diagnosis.findings if finding.check == "causality")
    return str(causality)


@pytest.mark.parametrize("tuner", ("LoHa", "LoKr"))
def test_rates_kept_for_every_adapter_are_given_back(tuner):
    model = build(tuner, "bert")
    layers = [module for module in model.modules() if isinstance(vars(module).get("module_dropout"), dict)]
    for layer in layers:
        layer.module_dropout["default"], layer.rank_dropout["default"] = 0.1, 0.2
    diagnosis = hiddenkey.doctor(model, "hiddenkey-[:]@0.3", [batch_for(tuner, "bert")], rounds=1)
    assert layers
    assert diagnosis.ok, str(diagnosis)
    assert "module_dropout" in str(diagnosis)
    assert all(layer.module_dropout == {"default": 0.1} for layer in layers)
    assert all(layer.rank_dropout == {"default": 0.2} for layer in layers)


def test_a_tuner_that_looks_ahead_by_itself_is_no_fault_of_the_drops():
    """Lily weighs its experts by the mean over all tokens."""
    assert "looks ahead by itself" in examine("Lily", "llama")
