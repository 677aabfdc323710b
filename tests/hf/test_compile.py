"""torch.compile of an attached model: no graph break of ours, fresh draws at every call, gradients as without it."""

import math
import types

import pytest
import torch
from accelerate.utils import is_compiled_module
from torch._dynamo.utils import counters
from transformers import Trainer

import hiddenkey
from hiddenkey import attention_paths, dropout

from .test_trainer import Rows, drop_trainer, training_logs
from .tiny import batch, make
from .tools import arguments, assert_same_gradients, gradients, inputs_for, logits_of, lora, snapshot

RECIPES = (
    "hiddenkey-[:]@0.2",
    "logits[:]:span@0.3 + hidden[:]:column@0.3",
    "logits[:]:element@0.3 + hidden[:]:span@0.3",
    "weights[:]:element@0.3 + input:column@0.2 + output:element@0.2",
)
CASES = {
    "llama": ("llama", {}),
    "llama, eager attention": ("llama", {"attn_implementation": "eager"}),
    "bert": ("bert", {}),
    "mpnet": ("mpnet", {}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model):
    # This backend traces forward and backward and runs them as they are; the compiler behind it is torch's affair.
    return torch.compile(model, backend="aot_eager")


def breaks():
    return sum(counters["graph_break"].values())


def full_but_llama(case, *values):
    """In `make test` one model; the gradients below are those of every model, without a break."""
    return pytest.param(case, *values, marks=[] if case == "llama" else [pytest.mark.full])


@pytest.mark.parametrize(("case", "recipe"), [full_but_llama(case, recipe) for case in CASES for recipe in RECIPES])
def test_no_graph_break(case, recipe):
    family, options = CASES[case]
    model, inputs = make(family, depth=1, **options), batch(family)
    with hiddenkey.attach(model, recipe) as attachment:
        run = compiled(model)
        run(**inputs).loss.backward()
        assert breaks() == 0
        assert all(0 < rate < 1 for rate in attachment.position_rates().values())


@pytest.mark.parametrize("case", map(full_but_llama, CASES))
def test_every_call_draws_anew_at_the_right_rate(case):
    family, options = CASES[case]
    model, inputs = make(family, depth=1, **options), batch(family)
    with hiddenkey.attach(model, "logits[:]:column@0.3 + hidden[:]:element@0.3") as attachment:
        run = compiled(model)
        losses = {float(run(**inputs).loss.detach()) for _ in range(8)}
        assert len(losses) == 8
        assert counters["stats"]["unique_graphs"] <= 2, "compiled again and again"
        assert attachment.position_rates() == {
            "logits": pytest.approx(0.3, abs=0.06),
            "hidden": pytest.approx(0.3, abs=0.02),
        }


def scattered(drop, grid):
    """A mask without chance: about a third of all cells dropped, in no pattern of rows or columns."""
    shape = [*grid.lead, grid.places] if drop.pattern == "column" else grid.shape
    size = torch.Size(shape).numel()
    keep = ((torch.arange(size) * 7919 + 13) % 1009 % 3 != 0).view(*shape)
    return grid.lay(keep) if drop.pattern == "column" else keep


CHECKPOINTING = {"plain": None, "checkpointed": False, "checkpointed, reentrant": True}


def one_checkpointed(case, name):
    """In `make test` every way on one model, and every model without."""
    marks = [] if case == "llama" or name == "plain" else [pytest.mark.full]
    return pytest.param(case, CHECKPOINTING[name], marks=marks, id=f"{case}-{name}")


@pytest.mark.parametrize(
    ("case", "checkpointing"), [one_checkpointed(case, name) for case in CASES for name in CHECKPOINTING]
)
def test_gradients_are_those_of_eager_mode(case, checkpointing, monkeypatch):
    family, options = CASES[case]
    if checkpointing is not None and family == "mpnet":
        pytest.skip("has no activation checkpointing")
    for module in (attention_paths, dropout):
        monkeypatch.setattr(module, "draw", scattered)
    model, inputs = make(family, depth=2, **options), batch(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with hiddenkey.attach(model, "logits[:]:column@0.3 + hidden[:]:element@0.3"):
        found = []
        for run in (model, compiled(model)):
            model.zero_grad()
            run(**inputs).loss.backward()
            found.append(gradients(model))
    assert checkpointing is not None or breaks() == 0
    assert_same_gradients(*found, rtol=1e-3, atol=1e-4)


def test_the_consistency_step_of_a_compiled_model():
    model, inputs = make("llama", depth=2), inputs_for("llama", "none")
    inputs["labels"] = inputs["input_ids"]
    with hiddenkey.attach(model, "hiddenkey@0.2"):
        found = hiddenkey.consistency_step(compiled(model), inputs)
        found.total.backward()
    assert float(found.consistency.detach()) > 0


# What is seen of a whole compiled model: as without the compiler, whichever way and whenever it is compiled.

# With the graph alone, which is what is seen or not.
WAYS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": lambda model: (model.compile(backend="eager"), model)[1],
}
FIRST = ("attached, compiled", "compiled, attached")
ORDERS = [
    pytest.param(way, first, marks=() if (way, first) == ("model.compile", FIRST[0]) else pytest.mark.full)
    for way in WAYS
    for first in FIRST
]


def compiled_and_attached(model, recipe, way, first):
    """The model as it is run; attach is given what was compiled, where that came first."""
    if first == FIRST[0]:
        hiddenkey.attach(model, recipe)
        return WAYS[way](model)
    run = WAYS[way](model)
    hiddenkey.attach(run, recipe)
    return run


@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_a_loss_without_the_consistency(way, first):
    run = compiled_and_attached(make("bert", depth=1), "hiddenkey@0.3", way, first)
    with pytest.raises(ValueError, match="has a consistency, but this loss"):
        run(**batch("bert")).loss.backward()


@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_a_reference_pass_is_the_plain_models(way, first):
    model, inputs = lora(make("llama", depth=1)), batch("llama")
    run = compiled_and_attached(model, "hiddenkey-[:]@0.3", way, first)
    with torch.no_grad(), model.disable_adapter():
        found = logits_of(run, inputs)
    assert all(math.isnan(rate) for rate in hiddenkey.find_attachment(model).rates().values()), "something was drawn"
    torch.testing.assert_close(found, logits_of(make("llama", depth=1).eval(), inputs), rtol=1e-4, atol=1e-4)
    assert all(module.training for module in model.modules())


@pytest.mark.full
@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_a_reference_pass_between_steps(way, first):
    model, inputs = lora(make("llama", depth=1)), batch("llama")
    run = compiled_and_attached(model, "hiddenkey-[:]@0.3", way, first)
    for _ in range(3):
        run(**inputs).loss.backward()
        counts = str(hiddenkey.find_attachment(model).rates())
        with torch.no_grad(), model.disable_adapter():
            logits_of(run, inputs)
        assert str(hiddenkey.find_attachment(model).rates()) == counts
        with torch.no_grad():
            assert not torch.equal(logits_of(run, inputs), logits_of(run, inputs)), "a second view"


@pytest.mark.full
@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_a_drop_whose_module_is_never_called(way, first):
    model = make("llama", depth=1)

    def forward(self, input_ids, **kwargs):
        states = self.model(input_ids=input_ids).last_hidden_state
        return {"logits": states @ self.lm_head.weight.T}

    model.forward = types.MethodType(forward, model)
    run = compiled_and_attached(model, "hiddenkey-[:]@0.3 + output:element@0.3", way, first)
    with (
        pytest.warns(UserWarning, match="output lm_head drew nothing"),
        pytest.raises(ValueError, match=r"'output:element@0\.3' dropped nothing.*lm_head is never called"),
    ):
        run(**inputs_for("llama", "none"))["logits"].sum().backward()


@pytest.mark.full
@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_an_adapter_in_training_mode_around_a_model_in_evaluation_mode(way, first):
    model = lora(make("llama", depth=1))
    model.base_model.eval()
    run = compiled_and_attached(model, "hiddenkey-[:]@0.3", way, first)
    with (
        pytest.warns(UserWarning, match="drew nothing"),
        pytest.raises(ValueError, match=r"drops nothing.*from_pretrained leaves it.*model\.train\(\)"),
    ):
        run(**batch("llama")).loss.backward()


@pytest.mark.full
@pytest.mark.parametrize(("way", "first"), ORDERS)
def test_what_takes_us_off_after_compiling(way, first):
    model, inputs = make("llama", depth=1), batch("llama")
    run = compiled_and_attached(model, "hiddenkey-[:]@0.3", way, first)
    run(**inputs).loss.backward()
    for switch in hiddenkey.find_attachment(model).switches:
        switch.p = 0.0
    with pytest.warns(UserWarning, match="switched off"):
        run(**inputs)
    for switch in hiddenkey.find_attachment(model).switches:
        switch.p = switch.drop.p
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="changed to 'eager' after attach"):
        run(**inputs)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_may_not_break_is_an_error(way):
    """`fullgraph=True` lets us say no more than that."""
    model = make("bert", depth=1)
    hiddenkey.attach(model, "hiddenkey@0.3")
    if way == "torch.compile":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        run = model
        model.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"would not teach what the recipe of hiddenkey says|has a consistency"):
        run(**batch("bert")).loss.backward()
    hiddenkey.consistency_step(run, batch("bert")).total.backward()


def test_detach_from_what_was_compiled_first():
    model = make("bert", depth=1)
    run = torch.compile(model, backend="aot_eager")
    before = snapshot(model)
    attachment = hiddenkey.attach(run, "hiddenkey-@0.3")
    assert attachment.model is model
    assert not any("_orig_mod" in site.path for site in attachment.plan.sites)
    attachment.detach()
    assert snapshot(model) == before


@pytest.mark.full
@pytest.mark.parametrize("recipe", ("hiddenkey@0.3 ~ kl*0.5", "hiddenkey@0.3 ~ kl-rdrop*0.5", "hiddenkey-@0.3"))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_a_trainer_that_compiles(family, recipe, tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = drop_trainer(family, tmp_path, recipe, **options)
    trainer.train()
    assert is_compiled_module(trainer.model_wrapped)
    logs = training_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        term = entry.get("consistency_loss", 0.0)
        assert (term > 0) is ("~" in recipe)
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * term, rel=1e-4)
        assert all(0.15 < entry[f"drop_rate/{position}"] < 0.45 for position in ("logits", "hidden"))


@pytest.mark.full
def test_a_stock_trainer_that_compiles(tmp_path):
    model = lora(make("llama"))
    hiddenkey.attach(model, "hiddenkey@0.3")
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=Rows("llama", 8))
    with pytest.raises(ValueError, match="has a consistency, but this loss"):
        trainer.train()


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop", "kl-clean"))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_every_step_is_that_of_eager_mode(family, consistency, way, monkeypatch):
    """Hooks of the step come and go; a graph that was compiled with those of the first must not serve the second."""
    for module in (attention_paths, dropout):
        monkeypatch.setattr(module, "draw", scattered)
    found = []
    for compile_it in (lambda model: model, WAYS[way]):
        model, inputs, values = lora(make(family, depth=2)), batch(family), []
        hiddenkey.attach(model, f"hiddenkey@0.3 ~ {consistency}")
        run = compile_it(model)
        for turn in range(3):
            step = hiddenkey.consistency_step(run, {**inputs, "input_ids": inputs["input_ids"].roll(turn, 1)})
            step.total.backward()
            values += [step.task.detach(), step.consistency.detach()]
        found.append((torch.stack(values), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
