"""torch.compile of an attached model: no graph break of ours, fresh draws at every call, gradients as without it."""

import pytest
import torch
from torch._dynamo.utils import counters

import hiddenkey
from hiddenkey import attend, dropout

from .tiny import batch, make
from .tools import assert_same_gradients, gradients, inputs_for

RECIPES = (
    "hiddenkey-[:]@0.2",
    "hidden[:]:column@0.3",
    "hidden[:]:span@0.3",
    "logits[:]:span@0.3",
    "logits[:]:element@0.3",
    "weights[:]:element@0.3",
    "input:column@0.2 + output:element@0.2",
)
CASES = {
    "llama": ("llama", {}),
    "llama, eager attention": ("llama", {"attn_implementation": "eager"}),
    "bert": ("bert", {}),
    "mpnet": ("mpnet", {}),
}
FAST = ("llama", "bert")


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


def mostly_full(case, recipe):
    """In `make test` every recipe once and every case once."""
    marks = [] if case == "llama" or recipe == RECIPES[0] else [pytest.mark.full]
    return pytest.param(case, recipe, marks=marks)


@pytest.mark.parametrize(("case", "recipe"), [mostly_full(case, recipe) for case in CASES for recipe in RECIPES])
def test_no_graph_break(case, recipe):
    family, options = CASES[case]
    model, inputs = make(family, **options), batch(family)
    with hiddenkey.attach(model, recipe) as attachment:
        run = compiled(model)
        run(**inputs).loss.backward()
        assert breaks() == 0
        assert all(0 < rate < 1 for rate in attachment.position_rates().values())


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.full) for case in CASES if case not in FAST)]
)
def test_every_call_draws_anew_at_the_right_rate(case):
    family, options = CASES[case]
    model, inputs = make(family, **options), batch(family)
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


@pytest.mark.parametrize(
    "checkpointing", (None, False, True), ids=("plain", "checkpointed", "checkpointed, reentrant")
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_eager_mode(case, checkpointing, monkeypatch):
    family, options = CASES[case]
    if checkpointing is not None and family == "mpnet":
        pytest.skip("has no activation checkpointing")
    for module in (attend, dropout):
        monkeypatch.setattr(module, "draw", scattered)
    model, inputs = make(family, **options), batch(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with hiddenkey.attach(model, "logits[:]:column@0.3 + hidden[:]:element@0.3"):
        found = []
        for run in (model, compiled(model)):
            model.zero_grad()
            run(**inputs).loss.backward()
            found.append(gradients(model))
    assert_same_gradients(*found, rtol=1e-3, atol=1e-4)


def test_the_consistency_step_of_a_compiled_model():
    model, inputs = make("llama"), inputs_for("llama", "none")
    inputs["labels"] = inputs["input_ids"]
    with hiddenkey.attach(model, "hiddenkey@0.2"):
        found = hiddenkey.consistency_step(compiled(model), inputs)
        found.total.backward()
    assert float(found.consistency.detach()) > 0
