"""A consistency beside a loss that somebody else computes: what it needs of that loss."""

import pytest
import torch

import hiddenkey
from hiddenkey.hf.compared_outputs import compared_in
from hiddenkey.hf.training_step import step_around_loss

from .tiny import batch, make

RECIPE = "hiddenkey@0.2 ~ {}*0.5"


def refused(consistency, loss, said):
    model, inputs = make("llama").train(), batch("llama")
    attachment, tokens = hiddenkey.attach(model, RECIPE.format(consistency)), compared_in(inputs, "a trainer")
    with pytest.raises(hiddenkey.UserError, match=said):
        step_around_loss(attachment, model, inputs, tokens, lambda: loss(model, inputs))


def test_a_loss_that_never_asks_the_model():
    refused("kl", lambda *_: torch.zeros((), requires_grad=True), "never calls LlamaModel with gradient")


def test_a_loss_that_asks_it_without_gradient_alone():
    def loss(model, inputs):
        with torch.no_grad():
            return model(**inputs).loss

    refused("kl", loss, "never calls LlamaModel with gradient")


def test_a_loss_over_more_tokens_than_the_batch_has():
    def loss(model, inputs):
        longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], 1)
        return model(input_ids=longer).logits.sum()

    refused("kl", loss, r"works on \(3, 14\) tokens, but the batch has \(3, 12\): an adapter adds its own")


def test_a_consistency_of_predictions():
    refused("mse", lambda model, inputs: model(**inputs).loss, "'mse' compares predictions of a regression")


def test_a_batch_that_names_no_tokens():
    with pytest.raises(
        hiddenkey.UserError,
        match=r"tokens that have labels, or DPO's completions .* a batch of its \(input_ids\) has neither",
    ):
        compared_in({"input_ids": torch.ones(2, 3)}, "its")
