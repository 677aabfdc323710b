"""However a batch is cut, padded or counted, a step is that of one big batch: task and consistency, every trainer."""

import pytest
import torch
from transformers import Trainer

import hiddenkey
from hiddenkey.patterns import PATTERNS, register_pattern

from .test_trainer import InOrder, Rows
from .tiny import decoder, make
from .tools import arguments, assert_same_gradients, lora, one_epoch

VIEW = [0]
BIG, ROWS = 8, 13
CUTS = [(2, 4), *(pytest.param(*cut, marks=pytest.mark.full) for cut in ((4, 2), (1, 8)))]


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """The pattern `places`: what falls depends on the place and on the view, not on the batch."""

    @register_pattern("places")
    def places(grid, p):
        kept = (torch.arange(grid.places, device=grid.device) + VIEW[0]) % 3 != 0
        return grid.lay(kept.expand(*grid.lead, grid.places))

    monkeypatch.setattr("hiddenkey.hf.training_step.second_view", other_view)
    yield
    PATTERNS.remove("places")


def other_view(*args, **options):
    from hiddenkey.hf.compared_outputs import second_view

    VIEW[0] = 1
    try:
        return second_view(*args, **options)
    finally:
        VIEW[0] = 0


RECIPE = "logits[:]:places@0.3 + hidden[1/2:]:places@0.3 ~ kl*2.0"


class Numbers(Rows):
    """Regression: BERT's rows with numbers as labels."""

    def __init__(self, family, count):
        super().__init__(family, count)
        for i, row in enumerate(self.rows):
            row["labels"] = torch.tensor(0.5 * i - 2, dtype=torch.float64)


class TokenClasses(Rows):
    """A class for every real token."""

    def __init__(self, family, count):
        super().__init__("llama", count)
        for row in self.rows:
            row["labels"] = torch.where(row["labels"] == -100, -100, row["labels"] % 3)


def classifier(head, **options):
    return decoder("Llama")(head=head, initializer_range=0.3, **options)


TASKS = {
    "classification": (Rows, "bert", lambda: lora(make("bert"), ["query", "value"])),
    "regression": (Numbers, "bert", lambda: lora(make("bert", num_labels=1), ["query", "value"])),
    "decoder-classification": (
        Rows,
        "bert",
        lambda: lora(classifier("ForSequenceClassification", num_labels=3), ["q_proj"]),
    ),
    "token-classification": (
        TokenClasses,
        "llama",
        lambda: lora(classifier("ForTokenClassification", num_labels=3), ["q_proj"]),
    ),
    "language": (Rows, "llama", lambda: lora(make("llama"), ["q_proj", "v_proj"])),
    "language-full": (Rows, "llama", lambda: make("llama")),
    "sequence-to-sequence": (Rows, "llama", lambda: lora(make("t5"), ["q", "v"])),
}


def windows(task, folder, micro, accumulation, *, recipe=RECIPE, cls=InOrder, padding=0, **options):
    """The gradients of each optimizer step over one epoch of 13 examples: a window of 8 and one of 5."""
    rows, family, build = TASKS[task]

    def collate(examples):
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        for name, value in batch.items():
            if value.dim() > 1:
                fill = -100 if name == "labels" else 0
                batch[name] = torch.nn.functional.pad(value, (0, padding), value=fill)
        return batch

    torch.manual_seed(0)
    made = {"model": build().double(), "train_dataset": rows(family, ROWS), "data_collator": collate}
    return one_epoch(cls, folder, micro, accumulation, options=options, recipe=recipe, **made)


def assert_same_windows(wanted, found):
    """Up to the float32 inside some models' norms, softmax and rotations."""
    assert len(wanted) == len(found) == 2
    for one, other in zip(wanted, found, strict=True):
        assert_same_gradients(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("micro", "accumulation"), CUTS)
@pytest.mark.parametrize("task", TASKS)
def test_accumulation_is_one_big_batch(task, micro, accumulation, tmp_path):
    wanted = windows(task, tmp_path, BIG, 1)
    assert_same_windows(wanted, windows(task, tmp_path, micro, accumulation))
    without = windows(task, tmp_path, BIG, 1, recipe=RECIPE.partition(" ~ ")[0])
    name = next(name for name, value in wanted[0].items() if value.abs().max() > 0)
    assert not torch.allclose(wanted[0][name], without[0][name], rtol=1e-2)


OTHERS = [("classification", "js"), ("language", "kl-rdrop"), ("language-full", "js")]


@pytest.mark.parametrize(("task", "consistency"), OTHERS)
def test_accumulation_with_other_consistencies(task, consistency, tmp_path):
    recipe = RECIPE.replace("kl", consistency)
    wanted = windows(task, tmp_path, BIG, 1, recipe=recipe)
    assert_same_windows(wanted, windows(task, tmp_path, 2, 4, recipe=recipe))


@pytest.mark.parametrize("task", ("classification", "language"))
def test_accumulation_without_a_consistency_and_with_label_smoothing(task, tmp_path):
    for options in ({"recipe": RECIPE.partition(" ~ ")[0]}, {"label_smoothing_factor": 0.1}):
        wanted = windows(task, tmp_path, BIG, 1, **options)
        assert_same_windows(wanted, windows(task, tmp_path, 2, 4, **options))


@pytest.mark.parametrize("task", ("regression", "token-classification", "language"))
def test_padding_weighs_nothing(task, tmp_path):
    wanted = windows(task, tmp_path, 4, 2)
    assert_same_windows(wanted, windows(task, tmp_path, 4, 2, padding=6))


@pytest.mark.parametrize("task", ("classification", "language"))
def test_counting_over_devices(task, tmp_path, monkeypatch):
    """Of two devices with the same share each loss is divided by twice the labels and multiplied by the devices."""
    rows, family, build = TASKS[task]
    trainer = InOrder(
        model=build().double(), args=arguments(tmp_path), train_dataset=rows(family, BIG), recipe=RECIPE
    )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    one = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    two = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(one, two)
    trainer.args.average_tokens_across_devices = False
    half = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(half, one / 2)


def test_processes_that_share_a_batch_count_once(tmp_path, monkeypatch):
    """Of four processes, two each on one batch; and two devices within one process."""
    rows, _, build = TASKS["language"]
    trainer = InOrder(model=build(), args=arguments(tmp_path), train_dataset=rows("llama", BIG), recipe=RECIPE)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 4)
    assert trainer._consistency_scale(torch.tensor(10)) == 4.0
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    assert trainer._consistency_scale(torch.tensor(10)) == 2.0
    assert trainer._consistency_scale(None) == 1.0
    trainer.args._n_gpu = 3
    assert trainer._consistency_scale(torch.tensor(10)) == 3.0


def test_a_stock_trainer_still_drops(tmp_path):
    """Without a consistency any trainer will do."""
    rows, family, build = TASKS["language"]
    model = build()
    attachment = hiddenkey.attach(model, "hiddenkey-@0.2")
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(family, BIG)).train()
    assert all(0.1 < rate < 0.3 for rate in attachment.rates().values())


def trl_windows(kind, folder, micro, accumulation):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from .words import texts, tokenizer

    base, config = (trl.SFTTrainer, trl.SFTConfig) if kind == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    cls = type("Ordered", (hiddenkey.ConsistencyMixin, base), {"_get_train_sampler": InOrder._get_train_sampler})
    rows = [{k: v.tolist() for k, v in row.items() if k != "attention_mask"} for row in Rows("llama", ROWS).rows]
    return one_epoch(
        cls,
        folder,
        micro,
        accumulation,
        kind=config,
        options={"bf16": False, "gradient_checkpointing": False, "max_length": None},
        model=lora(make("llama"), ["q_proj", "v_proj"]).double(),
        train_dataset=Dataset.from_list(rows) if kind == "sft" else texts("preference", 16),
        processing_class=tokenizer(),
        recipe=RECIPE,
    )


@pytest.mark.parametrize(("micro", "accumulation"), CUTS)
@pytest.mark.parametrize("kind", ("sft", "dpo"))
def test_accumulation_in_trl(kind, micro, accumulation, tmp_path):
    """DPO's own loss is a mean over the pairs of a batch, so its windows are even here."""
    wanted = trl_windows(kind, tmp_path, BIG, 1)
    assert_same_windows(wanted, trl_windows(kind, tmp_path, micro, accumulation))
