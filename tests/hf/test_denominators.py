"""The consistency has the denominator of the task loss, so that cutting a step into batches changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

import hiddenkey
from hiddenkey.hf.attachment import step_state
from hiddenkey.hf.compared_outputs import second_view
from hiddenkey.hf.structure import find_transformer

from .test_trainer import InOrder, Rows, model_of, one_epoch, one_window
from .tiny import CLASSES, batch, make
from .tools import assert_same_gradients, lora


def scaled_view(model: Any, *args: Any, **options: Any) -> Any:
    """A second view that depends on the example alone: its pooled vector, scaled by hand."""

    def scale(module: Any, given: Any, outputs: Any) -> Any:
        outputs["pooler_output"] = outputs["pooler_output"] * torch.linspace(0.5, 2, 32).double()
        return outputs

    handle = find_transformer(model)[1].base_model.register_forward_hook(scale)
    outputs = second_view(model, *args, **options)
    handle.remove()
    return outputs


@pytest.mark.parametrize(("micro", "accumulation"), [(2, 2), (1, 4)])
def test_a_classifier_whose_task_loss_is_a_sum_over_labels(
    micro: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hiddenkey.hf.training_step.second_view", scaled_view)
    big, rows = micro * accumulation, 2 * micro * accumulation + micro
    recipe, options = "hiddenkey@0 ~ kl*2.0", {"label_smoothing_factor": 0.1}
    wanted = one_window("bert", tmp_path / "big", big, 1, rows, recipe, **options)
    found = one_window("bert", tmp_path / "cut", micro, accumulation, rows, recipe, **options)
    assert len(wanted) == len(found) == 3
    for one, other in zip(wanted, found, strict=True):
        assert_same_gradients(one, other, rtol=1e-6, atol=1e-8)
    without = one_window("bert", tmp_path / "without", big, 1, rows, "hiddenkey-@0", **options)
    name = next(iter(wanted[0]))
    assert not torch.allclose(wanted[0][name], without[0][name], rtol=1e-3)


WEIGHTS = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


class Weighted(transformers.Trainer):
    """Class weights, as the documentation of transformers writes them: a mean."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, reduction="none").mul(WEIGHTS[labels]).mean()
        return (loss, outputs) if return_outputs else loss


class Passing(transformers.Trainer):
    """A mean of its own, though it hands on the number."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class Focal(transformers.Trainer):
    """Inside of transformers' loss, of which BERT's is a mean."""

    def compute_loss(self, *args, **kwargs):
        loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
        return (loss**2, outputs) if kwargs.get("return_outputs") else loss**2


class Summed(transformers.Trainer):
    """A sum that is divided by the number, taken as a Python number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / num_items_in_batch.item()
        return (loss, outputs) if return_outputs else loss


class ByHand(Weighted):
    """A mean that is divided by the accumulated batches by hand."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class ByCurrent(Weighted):
    """The same by the number that transformers keeps for the last step of an epoch too."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Told(Weighted):
    """That says of itself that it is a mean, so that transformers divides it by the steps."""

    loss_is_scaled_for_ga = False


def mean_function(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels)


def sum_function(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("steps", (2, 4))
@pytest.mark.parametrize(
    ("parent", "function", "adds_up"),
    [
        (Weighted, None, True),
        (Passing, None, True),
        (Focal, None, True),
        (Summed, None, False),
        (ByHand, None, False),
        (ByCurrent, None, False),
        (Told, None, False),
        (transformers.Trainer, mean_function, True),
        (transformers.Trainer, sum_function, False),
    ],
)
def test_a_loss_of_ones_own_and_the_consistency_have_one_denominator(
    parent: Any, function: Any, adds_up: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The weight is the recipe's however a step is cut: what it adds is cut as the task loss is. Means over each
    batch are added up by transformers, which takes them to be divided by the number of labels.
    """
    monkeypatch.setattr("hiddenkey.hf.training_step.second_view", scaled_view)

    class Mixed(hiddenkey.ConsistencyMixin, parent):
        _get_train_sampler = InOrder._get_train_sampler

    def added(micro: int, accumulation: int) -> dict[str, torch.Tensor]:
        """What the consistency adds to the gradients of a step."""
        found = []
        for weight in (2.0, 0.0):
            made = {"model": model_of("bert").double(), "train_dataset": Rows("bert", 4)}
            recipe = f"hiddenkey@0 ~ kl*{weight}" if weight else "hiddenkey-@0"
            made |= {"recipe": recipe, "compute_loss_func": function}
            folder = tmp_path / f"{micro} {weight}"
            found += one_epoch(Mixed, folder, micro, accumulation, options={}, **made)
        return {name: with_it - found[1][name] for name, with_it in found[0].items()}

    times = steps if adds_up else 1
    wanted, found = added(4, 1), added(4 // steps, steps)
    assert any(value.abs().max() > 1e-4 for value in wanted.values())
    assert_same_gradients(found, {name: value * times for name, value in wanted.items()}, rtol=1e-6, atol=1e-8)


SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "divides", "sizes"),
    [
        ("LlamaForCausalLM", True, SIZE),
        ("GPT2LMHeadModel", True, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("ModernBertForMaskedLM", True, SIZE | {"pad_token_id": 0}),
        ("LlamaForSequenceClassification", False, SIZE | {"pad_token_id": 0}),
        ("LlamaForTokenClassification", False, SIZE),
        ("BertForSequenceClassification", False, SIZE),
        ("T5ForConditionalGeneration", False, {"d_model": 32, "num_layers": 2, "decoder_start_token_id": 0}),
    ],
)
def test_a_model_gives_its_share_whether_it_divides_by_the_number_or_not(
    name: str, divides: bool, sizes: dict[str, int]
):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes, vocab_size=64)).train()
    ids = torch.randint(5, 64, (3, 7))
    labels = torch.tensor([0, 1, 1]) if name.endswith("SequenceClassification") else ids % 2
    count = labels[:, 1:].numel() if name.endswith(("CausalLM", "LMHeadModel")) else labels.numel()
    attachment = hiddenkey.attach(model, "hiddenkey-@0")
    mean = hiddenkey.consistency_step(model, {"input_ids": ids, "labels": labels}).task
    share = hiddenkey.consistency_step(model, {"input_ids": ids, "labels": labels}, num_items=4 * count).task
    torch.testing.assert_close(share, mean / 4)
    assert step_state(attachment).divides is divides


def test_trying_the_loss_draws_nothing_and_changes_no_draw():
    found = []
    for tried in (None, True):
        torch.manual_seed(3)
        model = lora(make("llama"), lora_dropout=0.5).train()
        attachment = hiddenkey.attach(model, "hiddenkey-@0.3")
        step_state(attachment).divides = tried
        torch.manual_seed(7)
        loss = hiddenkey.consistency_step(model, batch("llama"), num_items=torch.tensor(5)).total
        counts = [tally.counts.tolist() for _, site in attachment.sites for tally in site.tallies]
        found.append((float(loss.detach()), counts, float(torch.rand(()))))
        assert step_state(attachment).divides
    assert found[0] == found[1]


def test_without_labels_num_items_is_refused():
    """Spans of answers are no labels that could be counted."""
    config = transformers.BertConfig(**SIZE, vocab_size=64)
    model = transformers.BertForQuestionAnswering(config).train()
    answers = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    inputs = {"input_ids": torch.randint(5, 64, (2, 6)), **answers}
    with hiddenkey.attach(model, "hiddenkey-@0.1"):
        assert hiddenkey.consistency_step(model, inputs).total.requires_grad
        with pytest.raises(hiddenkey.UserError, match="start_positions, end_positions has no 'labels' to count"):
            hiddenkey.consistency_step(model, inputs, num_items=8)


def test_a_model_whose_code_cannot_be_read_is_taken_to_return_the_mean():
    """As of a class that was typed into an interpreter."""
    names: dict[str, Any] = {"transformers": transformers}
    code = "class Typed(transformers.BertForSequenceClassification):\n    def forward(self, **inputs):\n"
    exec(f"{code}        return super(Typed, self).forward(**inputs)\n", names)
    model = names["Typed"](make("bert").config).double().train()
    inputs = batch("bert")
    with hiddenkey.attach(model, "hiddenkey-@0"):
        mean = hiddenkey.consistency_step(model, inputs).task
        share = hiddenkey.consistency_step(model, inputs, num_items=2 * len(inputs["labels"])).task
    torch.testing.assert_close(share, mean / 2)


REGRESSION, SEVERAL, ONE = "regression", "multi_label_classification", "single_label_classification"


@pytest.mark.parametrize(
    ("problem", "told"), [(REGRESSION, True), (SEVERAL, True), (SEVERAL, False), (ONE, True), (ONE, False)]
)
def test_an_image_classifier_gives_its_share_whatever_it_learns(problem: str, told: bool):
    """Its loss is given the number of items, and only that of one class each divides by it.

    What it learns stands in the configuration, or is seen in the first labels.
    """
    inputs = batch("vit")
    if problem != ONE:
        inputs["labels"] = torch.rand(3, CLASSES).round()
    count = inputs["labels"].numel()
    plain, model = (make("vit", problem_type=problem if told else None).train() for _ in range(2))
    with hiddenkey.attach(plain, "hiddenkey-@0"):
        mean = plain(**inputs).loss
    hiddenkey.attach(model, "hiddenkey-@0")
    found = hiddenkey.consistency_step(model, inputs, num_items=torch.tensor(4 * count))
    torch.testing.assert_close(found.total, mean / 4)


def test_a_batch_without_a_label_adds_nothing():
    """Of an accumulated window its share is 0, and so is its gradient; a mean over nothing would be NaN."""
    model = transformers.BertForTokenClassification(make("bert").config).train()
    hiddenkey.attach(model, "hiddenkey-@0.2")
    inputs = batch("bert") | {"labels": torch.full((3, 12), -100)}
    found = hiddenkey.consistency_step(model, inputs, num_items=torch.tensor(10))
    found.total.backward()
    assert found.total == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    inputs["labels"][0, 1] = 1
    assert hiddenkey.consistency_step(model, inputs, num_items=torch.tensor(10)).total > 0
