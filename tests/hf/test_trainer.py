"""The trainers: what is logged, gradient accumulation, evaluation, checkpoints, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import BertForSequenceClassification, Qwen3_5ForSequenceClassification, Trainer

import hiddenkey
from hiddenkey.hf import compared_outputs as views
from hiddenkey.hf.structure import find_transformer
from hiddenkey.hf.trainer import ConsistencyMixin

from ..models.shrink import shrink
from .tiny import CLASSES, VOCABULARY, batch, make
from .tools import arguments, assert_same_gradients, lora, one_epoch

RECIPE = "hiddenkey@0.2 ~ kl*0.5"


class Rows(Dataset):
    """Unlike examples of one family, padded on the right."""

    def __init__(self, family, count):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for i in range(count):
            ids = torch.randint(3, VOCABULARY, (10,), generator=generator)
            mask = (torch.arange(10) < 10 - (3 * i) % 7).long()
            labels = torch.tensor(i % CLASSES) if family == "bert" else ids.masked_fill(mask == 0, -100)
            self.rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Mixed(hiddenkey.ConsistencyMixin, Trainer):
    """The mixin before another trainer."""


def model_of(family, adapter=True):
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    options = {"task_type": "SEQ_CLS"} if family == "bert" else {}
    return lora(make(family), targets, **options) if adapter else make(family)


def drop_trainer(family, folder, recipe=RECIPE, *, rows=16, cls=hiddenkey.DropTrainer, model=None, **options):
    model = model_of(family) if model is None else model
    data = Rows(family, rows)
    if cls is hiddenkey.DropTrainer:
        return cls(
            model=model, args=arguments(folder, **options), train_dataset=data, eval_dataset=data, recipe=recipe
        )
    if recipe is not None:
        hiddenkey.attach(model, recipe)
    return cls(model=model, args=arguments(folder, **options), train_dataset=data, eval_dataset=data)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop", "js"))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_the_log_adds_up(family, consistency, accumulation, label_smoothing, tmp_path, monkeypatch):
    steps, note = [], ConsistencyMixin._note
    monkeypatch.setattr(ConsistencyMixin, "_note", lambda self, step: (steps.append(step), note(self, step)))
    trainer = drop_trainer(
        family,
        tmp_path,
        f"hiddenkey@0.2 ~ {consistency}*0.5",
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=label_smoothing,
    )
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 2
    for place, entry in enumerate(logs):
        every = len(steps) // len(logs)
        seen = steps[place * every : (place + 1) * every]
        assert every % accumulation == 0
        # transformers sums the shares of an accumulated batch, and averages means over them.
        shares = accumulation if trainer._is_scaled(1) else 1
        for name, values in (("task_loss", "task"), ("consistency_loss", "consistency"), ("loss", "total")):
            mean = sum(float(getattr(step, values)) for step in seen) / every
            assert entry[name] == pytest.approx(mean * shares, rel=1e-4), name
        assert entry["consistency_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["consistency_loss"], rel=1e-4)
        rates = {name: value for name, value in entry.items() if name.startswith("drop_rate/")}
        assert set(rates) == {"drop_rate/logits", "drop_rate/hidden"}
        assert all(0.1 < rate < 0.3 for rate in rates.values())


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_a_recipe_without_a_consistency(family, tmp_path):
    trainer = drop_trainer(family, tmp_path, "hiddenkey-@0.2")
    trainer.train()
    for entry in training_logs(trainer):
        assert "consistency_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["task_loss"], rel=1e-4)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_the_mixin_does_what_the_trainer_does(family, tmp_path):
    results = []
    for cls in (hiddenkey.DropTrainer, Mixed):
        trainer = drop_trainer(family, tmp_path / cls.__name__, cls=cls)
        trainer.train()
        results.append((trainer.model.state_dict(), [e["loss"] for e in training_logs(trainer)]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


class InOrder(hiddenkey.DropTrainer):
    """Examples in their order, so that every way to cut them into batches sees the same ones in a step."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def one_window(family, folder, micro, accumulation, rows, recipe, **options):
    """The gradients of each optimizer step over one epoch, in float64."""
    made = {"model": model_of(family).double(), "train_dataset": Rows(family, rows), "recipe": recipe}
    return one_epoch(InOrder, folder, micro, accumulation, options=options, **made)


def other_weights(monkeypatch):
    """A second view that depends on the example alone: the model's last vectors, scaled by hand."""
    real = views.second_view

    def scaled(module, args, outputs):
        name = "last_hidden_state" if "last_hidden_state" in outputs else "logits"
        outputs[name] = outputs[name] * torch.linspace(0.5, 2, outputs[name].shape[-1]).double()
        return outputs

    def second_view(model, *args, **options):
        base = find_transformer(model)[1].base_model
        handle = base.register_forward_hook(scaled, prepend=True)
        outputs = real(model, *args, **options)
        handle.remove()
        return outputs

    monkeypatch.setattr("hiddenkey.hf.training_step.second_view", second_view)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize(("micro", "accumulation"), [(2, 2), (1, 4), (2, 4)])
def test_accumulation_of_a_language_model_is_one_big_batch(micro, accumulation, smoothing, tmp_path, monkeypatch):
    """No draw differs (p = 0), examples differ in length, and the last window is ragged."""
    other_weights(monkeypatch)
    big, rows = micro * accumulation, 2 * micro * accumulation + micro
    recipe, options = "hiddenkey@0 ~ kl*2.0", {"label_smoothing_factor": smoothing}
    wanted = one_window("llama", tmp_path / "big", big, 1, rows, recipe, **options)
    found = one_window("llama", tmp_path / "cut", micro, accumulation, rows, recipe, **options)
    assert len(wanted) == len(found) == 3
    for one, other in zip(wanted, found, strict=True):
        assert_same_gradients(one, other, rtol=1e-6, atol=1e-8)
    without = one_window("llama", tmp_path / "without", big, 1, rows, "hiddenkey-@0", **options)
    name = next(iter(wanted[0]))
    assert not torch.allclose(wanted[0][name], without[0][name], rtol=1e-3)


@pytest.mark.parametrize("accumulation", (1, 2))
def test_plain_trainer_and_rate_zero_do_the_same(accumulation, tmp_path):
    losses = []
    for recipe in ("hiddenkey@0", None):
        model = model_of("llama")
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        if recipe is None:
            trainer = Trainer(model=model, args=args, train_dataset=Rows("llama", 16))
        else:
            trainer = hiddenkey.DropTrainer(model=model, args=args, train_dataset=Rows("llama", 16), recipe=recipe)
        trainer.train()
        losses.append([entry["loss"] for entry in training_logs(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_evaluation_is_that_of_a_plain_trainer(family, tmp_path):
    ours = drop_trainer(family, tmp_path).evaluate()["eval_loss"]
    plain = Trainer(model=model_of(family), args=arguments(tmp_path), eval_dataset=Rows(family, 16))
    assert ours == plain.evaluate()["eval_loss"]


def test_evaluation_has_one_view_and_no_note(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("a second view was made in evaluation")

    trainer = drop_trainer("bert", tmp_path)
    trainer.model.eval()
    monkeypatch.setattr("hiddenkey.hf.training_step.second_view", fail)
    before = dict(trainer.attachment.rates())
    trainer.evaluate()
    assert "_window" not in vars(trainer)
    assert str(trainer.attachment.rates()) == str(before)


def test_evaluation_during_training(tmp_path):
    trainer = drop_trainer("bert", tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any("task_loss" in entry for entry in evaluations)
    assert evaluations[-1]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("adapter", (True, False), ids=("lora", "full"))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_resume_continues_bit_for_bit(family, adapter, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = drop_trainer(family, tmp_path, model=model_of(family, adapter), **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    content = json.loads((checkpoint / "hiddenkey.json").read_text())
    assert content["recipe"] == str(hiddenkey.parse(RECIPE))
    resumed = drop_trainer(family, tmp_path, model=model_of(family, adapter), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    wanted, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert [e["loss"] for e in training_logs(whole)][1:] == [e["loss"] for e in training_logs(resumed)][1:]


def test_a_checkpoint_is_a_plain_adapter(tmp_path):
    import peft

    trainer = drop_trainer("llama", tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert "hiddenkey" not in (folder / "adapter_config.json").read_text()
    again = peft.PeftModel.from_pretrained(make("llama"), folder).eval()
    inputs = {name: value[None] for name, value in Rows("llama", 1)[0].items()}
    assert torch.equal(again(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_resume_from_another_recipe(tmp_path):
    drop_trainer("bert", tmp_path, save_strategy="steps", save_steps=4).train()
    other = drop_trainer("bert", tmp_path, "dropkey@0.1")
    with pytest.raises(ValueError, match=r"checkpoint-4.*hidden:element@0\.2 ~ kl\*0\.5.*logits:element@0\.1"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resume_from_a_checkpoint_without_a_recipe(tmp_path):
    drop_trainer("bert", tmp_path, save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-4" / "hiddenkey.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="no recipe was saved"):
        drop_trainer("bert", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_save_model_keeps_the_recipe(tmp_path):
    trainer = drop_trainer("bert", tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    assert hiddenkey.load_recipe(tmp_path / "final") == hiddenkey.parse(RECIPE)


def test_load_best_model_at_end(tmp_path):
    trainer = drop_trainer(
        "bert",
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
    )
    worse = iter((0.5, 0.7, 0.9, 1.1))  # the first evaluation is the best, and the last is not
    evaluate = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *args, **kwargs: _with_loss(evaluate(*args, **kwargs), next(worse))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert trainer.state.global_step > 2
    saved, mine = load_file(best / "adapter_model.safetensors"), get_peft_model_state_dict(trainer.model)
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[name], mine[name]) for name in saved)
    attachment = hiddenkey.find_attachment(trainer.model)
    before = attachment.rates()
    hiddenkey.consistency_step(trainer.model.train(), batch("bert"))
    assert attachment.rates() != before


def _with_loss(output, loss):
    return output._replace(metrics=output.metrics | {"eval_loss": loss})


def test_model_init(tmp_path):
    made = []

    def model_init():
        made.append(model_of("bert"))
        return made[-1]

    trainer = hiddenkey.DropTrainer(
        model_init=model_init, args=arguments(tmp_path), train_dataset=Rows("bert", 16), recipe=RECIPE
    )
    trainer.train()
    assert trainer.model is made[-1]
    assert trainer.attachment.model is made[-1]
    assert training_logs(trainer)[0]["consistency_loss"] > 0


def test_a_model_that_has_its_recipe_already(tmp_path):
    model = model_of("bert")
    attachment = hiddenkey.attach(model, RECIPE)
    trainer = drop_trainer("bert", tmp_path, None, model=model)
    assert trainer.attachment is attachment
    with pytest.raises(ValueError, match="already"):
        drop_trainer("bert", tmp_path, "dropkey@0.1", model=model)


@pytest.mark.parametrize("cls", (hiddenkey.DropTrainer, Mixed))
def test_no_recipe_at_all(cls, tmp_path):
    with pytest.raises(ValueError, match=r"no recipe is attached.*hiddenkey\.attach"):
        drop_trainer("bert", tmp_path, None, cls=cls).train()


def test_an_unreadable_recipe(tmp_path):
    with pytest.raises(hiddenkey.RecipeError, match="Did you mean"):
        drop_trainer("bert", tmp_path, "hiddenkye@0.1")


def test_activation_checkpointing_in_the_trainer(tmp_path):
    weights = []
    for reentrant in (None, False, True):
        options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = model_of("llama")
        find_transformer(model)[1].enable_input_require_grads()
        trainer = drop_trainer(
            "llama", tmp_path, model=model, gradient_checkpointing=reentrant is not None, optim="sgd", **options
        )
        trainer.train()
        weights.append(weights_of(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_own_loss_function(tmp_path):
    """compute_loss_func gets the first view's outputs; the consistency is added to what it returns."""
    returned = []

    def total(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels) * 3
        returned.append(loss.item())
        return loss

    trainer = hiddenkey.DropTrainer(
        model=model_of("bert"),
        args=arguments(tmp_path, logging_steps=1),
        train_dataset=Rows("bert", 16),
        recipe=RECIPE,
        compute_loss_func=total,
    )
    trainer.train()
    entries = training_logs(trainer)
    assert [entry["task_loss"] for entry in entries] == pytest.approx(returned, rel=1e-5)
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["consistency_loss"], rel=1e-4)


class Thrice(Trainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        return (found[0] * 3, found[1]) if isinstance(found, tuple) else found * 3


class MixedThrice(hiddenkey.ConsistencyMixin, Thrice):
    """The mixin before it."""


def test_a_trainers_own_loss_is_kept(tmp_path):
    entries = []
    for cls in (MixedThrice, Mixed):
        trainer = drop_trainer("bert", tmp_path, "hiddenkey@0.2 ~ kl*0.5", cls=cls, logging_steps=1, max_steps=1)
        trainer.train()
        entries.append(training_logs(trainer)[0])
    assert entries[0]["task_loss"] == pytest.approx(3 * entries[1]["task_loss"], rel=1e-5)
    assert entries[0]["consistency_loss"] == pytest.approx(entries[1]["consistency_loss"], rel=1e-5)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_the_log_tells_of_every_forward_since_the_last(family, tmp_path, monkeypatch):
    steps, note = [], hiddenkey.DropTrainer._note

    def remember(self, step):
        steps.append((step.task.item(), step.consistency.item()))
        note(self, step)

    monkeypatch.setattr(hiddenkey.DropTrainer, "_note", remember)
    trainer = drop_trainer(family, tmp_path, "hiddenkey@0.2 ~ kl*0.5", gradient_accumulation_steps=2)
    trainer.train()
    logs = training_logs(trainer)
    assert len(steps) == 8
    assert len(logs) == 2
    for entry, window in zip(logs, (steps[:4], steps[4:]), strict=True):
        task, consistency = (sum(parts) for parts in zip(*window, strict=True))
        assert entry["consistency_loss"] / entry["task_loss"] == pytest.approx(consistency / task, rel=1e-5)
        last_task, last_consistency = window[-1]
        assert consistency / task != pytest.approx(last_consistency / last_task, rel=1e-3)


def test_sequence_to_sequence(tmp_path):
    trainer = drop_trainer("t5", tmp_path, model=lora(make("t5"), ["q", "v"]), gradient_accumulation_steps=1)
    trainer.train()
    for entry in training_logs(trainer):
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * entry["consistency_loss"], rel=1e-4)


@pytest.mark.parametrize("family", ("bert", "t5"))
def test_task_and_consistency_weigh_the_same_however_the_window_is_cut(family, tmp_path, monkeypatch):
    """A loss that is a mean per batch: the consistency follows it, so that their ratio stays the recipe's."""
    other_weights(monkeypatch)
    seen = []
    for micro, accumulation in ((4, 1), (4, 2)):
        model = lora(make("t5"), ["q", "v"]) if family == "t5" else model_of("bert")
        trainer = InOrder(
            model=model.double(),
            args=arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                logging_steps=1,
            ),
            train_dataset=SameRows(family),
            recipe="hiddenkey@0 ~ kl*2.0",
        )
        trainer.train()
        entry = training_logs(trainer)[0]
        seen.append(entry["consistency_loss"] / entry["task_loss"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


class SameRows(Rows):
    """One batch of four, twice."""

    def __init__(self, family):
        super().__init__(family, 4)
        self.rows = self.rows * 2


def test_an_adapter_around_a_hooked_module_is_noticed():
    model = make("bert")
    hiddenkey.attach(model, "hiddenkey@0.2")
    adapted = lora(model, ["output.dense"])
    inputs = {name: value[None] for name, value in Rows("bert", 1)[0].items()}
    with pytest.raises(RuntimeError, match=r"an adapter was put around bert\.encoder\.layer\.0\.output\.dense"):
        adapted(**inputs)
    adapted.eval()(**inputs)


def test_an_adapter_elsewhere_does_no_harm():
    model = make("bert")
    hiddenkey.attach(model, "hiddenkey@0.2")
    inputs = {name: value[None] for name, value in Rows("bert", 1)[0].items()}
    assert lora(model, ["query", "value"])(**inputs).loss.isfinite()


@pytest.mark.parametrize("around", (lambda model: model, lora), ids=("plain", "lora"))
def test_a_swapped_attention_implementation_is_noticed(around):
    model = around(make("llama"))
    attachment = hiddenkey.attach(model, "hiddenkey@0.2")
    inputs = {name: value[None] for name, value in Rows("llama", 1)[0].items()}
    find_transformer(model)[1].set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"changed to 'eager' after attach.*detach, change it, and attach again"):
        model(**inputs)
    model.eval()(**inputs)
    attachment.detach()
    hiddenkey.attach(model.train(), "hiddenkey@0.2")
    assert model(**inputs).loss.isfinite()


class Weighted(Trainer):
    """As many write it: what transformers passes by name is left to `**kwargs`."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class OtherOrder(Trainer):
    """The same in another order."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        assert isinstance(return_outputs, bool)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("trainer", (Weighted, OtherOrder))
@pytest.mark.parametrize("recipe", ("hiddenkey@0.2", "hiddenkey-@0.2"))
def test_a_loss_that_takes_the_rest_by_name(trainer, recipe, tmp_path):
    kind = type("Mine", (hiddenkey.ConsistencyMixin, trainer), {})
    mine = drop_trainer("bert", tmp_path, recipe, cls=kind)
    mine.train()
    assert all(entry["task_loss"] > 0 for entry in training_logs(mine))
    plain = trainer(model=mine.model, args=mine.args, eval_dataset=mine.eval_dataset)
    assert mine.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


class Override(BertForSequenceClassification):
    """Takes its labels as Qwen3.5's classifier does."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Around(nn.Module):
    """A user's module that hands on whatever it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **kwargs):
        return self.model(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("kind", ("override", "around", "qwen3_5"))
def test_labels_that_a_model_takes_through_its_keywords(kind, tmp_path):
    plain = make("bert")
    config = plain.config
    if kind == "qwen3_5":
        config = shrink(kind)
        config.num_labels = CLASSES
        config.text_config.pad_token_id = 0
        model = lora(Qwen3_5ForSequenceClassification._from_config(config), ["q_proj"], task_type="SEQ_CLS")
    else:
        override = Override(config)
        override.load_state_dict(plain.state_dict())
        model = override if kind == "override" else Around(plain)
    trainer = drop_trainer("bert", tmp_path, "hiddenkey[:]@0.2 ~ kl*0.5", model=model, max_steps=2)
    assert "labels" in next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert all(entry["task_loss"] > 0 for entry in training_logs(trainer))
    found = trainer.evaluate()["eval_loss"]
    assert found > 0
    if kind != "qwen3_5":
        plain.load_state_dict({name.removeprefix("model."): value for name, value in model.state_dict().items()})
        data = trainer.eval_dataset
        expected = Trainer(model=plain, args=arguments(tmp_path / "plain"), eval_dataset=data).evaluate()
        assert found == pytest.approx(expected["eval_loss"])
