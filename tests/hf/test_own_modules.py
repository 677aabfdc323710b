"""Modules of the user's around transformers models: every way to take a batch and to give outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

import hiddenkey

from .tiny import BATCH, CLASSES, VOCABULARY, batch, make
from .tools import arguments, lora, quiet

DROPS = "logits[:]:column@0.3 + hidden[:]:element@0.3"
WEIGHT = 0.7


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Named(NamedTuple):
    loss: Tensor | None
    logits: Tensor


GIVES = {
    "dict": lambda loss, logits: {"logits": logits} if loss is None else {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (logits,) if loss is None else (loss, logits),
    "ModelOutput": lambda loss, logits: SequenceClassifierOutput(loss=loss, logits=logits),
    "dataclass": Output,
    "named tuple": Named,
}


class Pooled(nn.Module):
    """AutoModel and a head of one's own on the first token."""

    def __init__(self, encoder: Any, gives: str = "dict", classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder, self.gives = encoder, GIVES[gives]
        torch.manual_seed(3)
        self.head = nn.Linear(32, classes)

    def outputs(self, hidden: Tensor, labels: Tensor | None) -> Any:
        logits = self.head(hidden[:, 0])
        return self.gives(None if labels is None else F.cross_entropy(logits, labels), logits)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.outputs(self.encoder(input_ids).last_hidden_state, labels)


class Strict(Pooled):
    """That needs its labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return self.outputs(self.encoder(input_ids, attention_mask)[0], labels)


class Open(Pooled):
    """That hands on whatever it is given but the labels."""

    def forward(self, **batch: Any) -> Any:
        labels = batch.pop("labels")
        return self.outputs(self.encoder(**batch)[0], labels)


class Images(Pooled):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return self.outputs(self.encoder(pixel_values).last_hidden_state, labels)


class Regression(Pooled):
    """One number for each row, without an axis of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(input_ids).last_hidden_state[:, 0]).squeeze(-1)
        return self.gives(None if labels is None else F.mse_loss(logits, labels), logits)


class Tagger(Pooled):
    """A class for each token, compared where it is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(input_ids, attention_mask).last_hidden_state)
        return self.gives(None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


class Language(Pooled):
    """A language model with a head and a shift of its own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(input_ids, attention_mask).last_hidden_state)
        if labels is None:
            return self.gives(None, logits)
        return self.gives(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Around(nn.Module):
    """Around a whole language model, which computes the loss."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels).to_tuple()


def base(family: str) -> Any:
    return quiet(family).base_model


def tokens(**labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": batch("bert")["input_ids"], **labels}


CASES = {
    **{f"bert, {gives}": (lambda gives=gives: Pooled(base("bert"), gives), batch("bert")) for gives in GIVES},
    "distilbert": (lambda: Pooled(base("distilbert"), "tuple"), batch("distilbert")),
    "roberta, strict": (lambda: Strict(base("roberta"), "tuple"), batch("roberta")),
    "mpnet, open": (lambda: Open(base("mpnet"), "dataclass"), batch("mpnet")),
    "vit": (lambda: Images(base("vit"), "dict"), batch("vit")),
    "bert, tagger": (
        lambda: Tagger(base("bert"), "tuple"),
        batch("llama") | {"labels": batch("llama")["labels"] % 3},
    ),
    "llama, language": (lambda: Language(base("llama"), "tuple", VOCABULARY), batch("llama")),
    "gpt2, around": (lambda: Around(make("gpt2")), batch("gpt2")),
    "qwen3, around": (lambda: Around(make("qwen3")), batch("qwen3")),
    "t5, around": (lambda: Around(make("t5")), batch("t5")),
}


def given(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a data collator would give this model: Trainer leaves out what the forward does not name."""
    names = type(model).forward.__code__.co_varnames
    return inputs if isinstance(model, Open) else {name: value for name, value in inputs.items() if name in names}


def parts(outputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(outputs, dict):
        return outputs["loss"], outputs["logits"]
    return (outputs.loss, outputs.logits) if hasattr(outputs, "loss") else outputs[:2]


def rows(model: nn.Module, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits at which there is a label, (N, V)."""
    labels = inputs["labels"]
    if isinstance(model, Language) or (isinstance(model, Around) and not model.lm.config.is_encoder_decoder):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


@pytest.mark.parametrize("consistency", ("kl", "kl-clean", "kl-rdrop"))
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_two_forwards(case: str, consistency: str) -> None:
    build, inputs = CASES[case]
    model = build().train()
    inputs = given(model, inputs)
    handle = hiddenkey.attach(model, f"{DROPS} ~ {consistency}*{WEIGHT}")
    torch.manual_seed(5)
    step = hiddenkey.consistency_step(model, inputs)
    step.total.backward()
    torch.manual_seed(5)
    with handle.watch.step():
        task, first = parts(model(**inputs))
        if consistency == "kl-clean":
            model.eval()
        other_task, second = parts(model(**inputs))
    p, q = (rows(model, inputs, logits).log_softmax(-1) for logits in (first, second))
    term = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    task = (task + other_task) / 2 if consistency == "kl-rdrop" else task
    assert term > 1e-4
    torch.testing.assert_close(step.task, task)
    torch.testing.assert_close(step.consistency, term, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step.total, task + WEIGHT * term)


@pytest.mark.parametrize("consistency", ("kl", "mse"))
def test_a_regression_without_an_axis(consistency: str) -> None:
    model, inputs = Regression(base("bert"), "tuple", 1).train(), tokens(labels=torch.tensor([0.5, -1.0, 2.0]))
    hiddenkey.attach(model, f"{DROPS} ~ {consistency}")
    assert hiddenkey.consistency_step(model, inputs).consistency > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_doctor_finds_nothing_wrong(case: str) -> None:
    build, inputs = CASES[case]
    model = build()
    diagnosis = hiddenkey.doctor(model, f"{DROPS} ~ kl*{WEIGHT}", batches=[given(model, inputs)] * 2)
    assert diagnosis.ok, str(diagnosis)
    assert "term is" in str(diagnosis)


def test_a_doctor_makes_up_what_the_module_takes() -> None:
    assert hiddenkey.doctor(Pooled(base("bert")), DROPS).ok
    with pytest.raises(hiddenkey.UserError, match=r"Strict needs labels.*batches of your own"):
        hiddenkey.doctor(Strict(base("bert")), DROPS)


@pytest.mark.parametrize("case", ("bert, dict", "bert, tuple", "roberta, strict", "distilbert", "vit"))
def test_a_trainer(case: str, tmp_path: Any) -> None:
    """At rate 0 it learns what transformers' Trainer does; at others it does not."""
    build, inputs = CASES[case]
    examples = [{name: value[i] for name, value in inputs.items()} for i in range(BATCH)] * 2

    def weights(cls: Any, **options: Any) -> Tensor:
        model = build().train()
        cls(model=model, args=arguments(tmp_path), train_dataset=examples, **options).train()
        return model.head.weight.detach()

    plain = weights(Trainer)
    torch.testing.assert_close(weights(hiddenkey.DropTrainer, recipe="hidden[:]:element@0 ~ kl"), plain)
    assert not torch.allclose(weights(hiddenkey.DropTrainer, recipe=f"{DROPS} ~ kl*{WEIGHT}"), plain)


def test_an_adapter_around_ones_own_module() -> None:
    model = lora(Pooled(base("bert"), "tuple"), targets=["query", "value"])
    hiddenkey.attach(model, "hiddenkey@0.3")
    step = hiddenkey.consistency_step(model, given(model.get_base_model(), batch("bert")))
    step.total.backward()
    assert step.consistency > 0


def test_a_share_of_an_accumulated_batch() -> None:
    """The mean of a module that is told no number of items becomes its share of them."""
    model = Language(base("llama"), "tuple", VOCABULARY).train()
    hiddenkey.attach(model, "hidden[:]:element@0 ~ kl")
    inputs = batch("llama")
    mean = hiddenkey.consistency_step(model, inputs).task
    count = int((inputs["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(hiddenkey.consistency_step(model, inputs, num_items=4 * count).task, mean / 4)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda loss, logits: (logits, loss), r"no loss.*puts out logits.*first of a tuple"),
        (lambda loss, logits: "loss", r"puts out a str.*\(loss, logits\)"),
    ],
)
def test_outputs_that_say_no_loss(gives: Any, message: str) -> None:
    model = Pooled(base("bert")).train()
    model.gives = gives
    hiddenkey.attach(model, "hiddenkey@0.3")
    with pytest.raises(hiddenkey.UserError, match=message):
        hiddenkey.consistency_step(model, tokens(labels=torch.zeros(BATCH, dtype=torch.long)))


def test_a_loss_in_a_dataclass_without_the_consistency_is_noticed() -> None:
    model = Pooled(base("bert"), "dataclass").train()
    hiddenkey.attach(model, "hiddenkey@0.3")
    with pytest.raises(hiddenkey.UserError, match="computed without it"):
        model(**tokens(labels=torch.zeros(BATCH, dtype=torch.long))).loss.backward()
