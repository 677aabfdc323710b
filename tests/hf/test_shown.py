"""What Python shows of the library's objects: in a notebook, in `print`, in `dir` and in `help`."""

import inspect

import pytest
from transformers import Trainer

import hiddenkey

from .tiny import batch, make

RECIPE = "logits:column@0.1 + hidden:element@0.1 ~ kl*0.5"


def test_an_attachment_shows_its_recipe_its_model_and_whether_it_is_attached():
    model = make("bert")
    handle = hiddenkey.attach(model, RECIPE)
    said = repr(handle)
    assert str(handle.recipe) in said
    assert f"attached to {type(model).__name__}, {len(handle.plan.sites)} sites" in said
    handle.detach()
    assert "detached from" in repr(handle)


@pytest.mark.parametrize("recipe", (RECIPE, "dropkey@0.1"))
def test_a_step_prints_its_losses_and_no_outputs(recipe):
    model = make("bert").train()
    with hiddenkey.attach(model, recipe):
        step = hiddenkey.consistency_step(model, batch("bert"))
    expected = f"total {step.total.item():.4g}, task {step.task.item():.4g}"
    if step.consistency is not None:
        expected += f", consistency {step.consistency.item():.4g}"
    assert str(step) == expected
    assert "logits" not in repr(step)


def test_dir_has_the_public_names_alone():
    assert dir(hiddenkey) == sorted([*hiddenkey.__all__, "__version__"])


@pytest.mark.parametrize("trainer", (hiddenkey.DropTrainer, hiddenkey.ConsistencyMixin))
def test_a_trainers_signature_has_the_recipe(trainer):
    recipe = inspect.signature(trainer).parameters["recipe"]
    assert (recipe.kind, recipe.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert "Recipe" in recipe.annotation


def test_a_mixin_behind_its_trainer_is_refused_where_the_class_is_written():
    with pytest.raises(TypeError, match=r"write class Mine\(ConsistencyMixin, Trainer\)"):
        type("Mine", (Trainer, hiddenkey.ConsistencyMixin), {})
