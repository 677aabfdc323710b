"""TRL's trainers: what is dropped, compared and refused, against hand computation."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hiddenkey
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.hf.attachment import step_state
from hiddenkey.hf.capture import Capture
from hiddenkey.hf.compared_outputs import ComparedTokens
from hiddenkey.hf.training_step import HiddenViews

from .test_step import CLEAN, divergence
from .test_trainer import InOrder
from .tiny import batch, make
from .tools import assert_same_gradients, draws, gradients, lora, quiet
from .words import texts, tokenizer

trl = pytest.importorskip("trl")

WEIGHT = 0.7
DROPS = "logits:column@0.3 + hidden:element@0.3"
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


class DropSFT(hiddenkey.ConsistencyMixin, trl.SFTTrainer):
    _get_train_sampler = InOrder._get_train_sampler


class DropDPO(hiddenkey.ConsistencyMixin, trl.DPOTrainer):
    _get_train_sampler = InOrder._get_train_sampler


def adapted(family="llama", **options):
    return lora(make(family, **options), ["q_proj", "v_proj"])


def sft(folder, recipe, model=None, *, kind="text", cls=DropSFT, **options):
    """An SFT trainer; a stock one has the recipe attached to its model."""
    model = adapted() if model is None else model
    extra = {"recipe": recipe} if issubclass(cls, hiddenkey.ConsistencyMixin) else {}
    trainer = cls(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **{**SETTINGS, **options}),
        train_dataset=texts(kind, 16),
        processing_class=tokenizer(),
        **extra,
    )
    if not extra:
        hiddenkey.attach(trainer.model, recipe)
    return trainer


def first_batch(trainer):
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer, batch, num_items=None):
    torch.manual_seed(5)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    return loss, found


def views_by_hand(model, inputs, consistency):
    """Logits of two forward passes, the second with gradient for R-Drop alone."""
    torch.manual_seed(5)
    with hiddenkey.find_attachment(model).watch.step():
        first = model(**inputs).logits
        with torch.set_grad_enabled(consistency == "kl-rdrop"):
            model.train(consistency not in CLEAN)
            second = model(**inputs).logits
            model.train()
    return first, second


KINDS = {
    "text": {},
    "completion": {},
    "messages": {"assistant_only_loss": True},
    "packed": {"packing": True, "max_length": 12},
    "padding-free": {"padding_free": True, "max_length": None},
}
CASES = [
    *(("llama", "kl", kind) for kind in KINDS),
    *(("llama", consistency, "completion") for consistency in ("kl-clean", "js", "kl-rdrop")),
    ("gemma2", "kl", "packed"),  # caps its logits
    ("gemma2", "kl-rdrop", "completion"),
    ("full", "kl", "completion"),  # its head learns
]


@pytest.mark.parametrize(("family", "consistency", "kind"), CASES)
def test_sft_is_two_views_at_the_labels(family, consistency, kind, tmp_path):
    options = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = make("llama") if family == "full" else adapted(family, **options)
    data = kind if kind in ("completion", "messages") else "text"
    recipe = f"{DROPS} ~ {consistency}*{WEIGHT}"
    trainer = sft(tmp_path, recipe, model, kind=data, gradient_checkpointing=False, **KINDS[kind])
    batch = first_batch(trainer)
    labels = batch["labels"][:, 1:]
    valid = labels != -100
    assert valid.sum() < (batch["input_ids"][:, 1:] != 0).sum() or kind == "text"
    items = valid.sum() + 7
    loss, ours = loss_and_gradients(trainer, batch, items)

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    first, second = (z[:, :-1] for z in views_by_hand(trainer.model, {**inputs, "use_cache": False}, consistency))
    task = F.cross_entropy(first[valid], labels[valid], reduction="sum")
    if consistency == "kl-rdrop":
        task = (task + F.cross_entropy(second[valid], labels[valid], reduction="sum")) / 2
    term = divergence(consistency.replace("-rdrop", ""), first[valid], second[valid]).sum()
    assert term > 0.02
    total = (task + WEIGHT * term) / items
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    assert_same_gradients(ours, gradients(trainer.model), rtol=1e-3, atol=1e-4)


def test_the_denominators_of_what_is_compared():
    labels = torch.tensor([[5, -100, 6, 7, -100], [-100, -100, 3, -100, -100], [4, -100, -100, -100, -100]])
    valid = torch.tensor([[False, True, True, False], [False, True, False, False], [False] * 4])
    for items, denominator in ((None, 3), (torch.tensor(11), 11)):
        [(found, divisor)] = ComparedTokens(labels, by_sequence=False).groups(items)
        assert torch.equal(found, valid)
        assert int(divisor) == denominator
    groups = ComparedTokens(labels, by_sequence=True).groups(None)
    for row, (found, divisor) in enumerate(groups):
        assert torch.equal(found[row], valid[row])
        assert found.sum() == valid[row].sum()
        assert int(divisor) == 3 * max(1, int(valid[row].sum()))
    assert len(groups) == 3


def runs(positions):
    """(first place, length) of the documents in a packed row."""
    starts = (positions == 0).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


@pytest.mark.parametrize("kind", ("packed", "padding-free"))
def test_no_drop_crosses_a_packed_document(kind, tmp_path, monkeypatch):
    """Spans count each document's own length, no row is emptied, and a document does not see the others."""
    recipe = "logits[:]:span@0.4 + hidden[:]:span@0.4"
    trainer = sft(tmp_path, recipe, gradient_checkpointing=False, **KINDS[kind])
    batch = first_batch(trainer)
    documents = [run for row in batch["position_ids"] for run in runs(row)]
    assert len(documents) > 2
    with draws(monkeypatch) as record:
        trainer.compute_loss(trainer.model, dict(batch))
    assert len(record) == 8
    for drawn in record:
        keep = drawn.keep.reshape(-1, batch["input_ids"].shape[1])
        for row in keep:
            for start, length in documents:
                gone = (~row[start : start + length]).nonzero().flatten().tolist()
                assert len(gone) == int(length * 0.4 + 0.5)
                assert gone == list(range(gone[0], gone[0] + len(gone))) if gone else True

    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    other = batch["input_ids"].clone()
    start, length = documents[1]
    other[0, start : start + length] = 3 + (other[0, start : start + length] + 11) % 60
    with draws(monkeypatch, replay=record):
        one = trainer.model(**inputs).logits
    with draws(monkeypatch, replay=record):
        two = trainer.model(**{**inputs, "input_ids": other}).logits
    changed = (one != two).any(-1)[0]
    assert changed[start : start + length].any()
    changed[start : start + length] = False
    assert not changed.any()
    assert torch.isfinite(one).all()


def dpo(folder, recipe, *, reference="disabled", cls=DropDPO, **options):
    """reference: the adapter disabled, a copy of it, or another model."""
    model = adapted() if reference == "copy" else make("llama")
    extra = {"recipe": recipe} if issubclass(cls, hiddenkey.ConsistencyMixin) else {}
    if reference == "disabled":
        import peft

        extra["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = cls(
        model=model,
        ref_model=make("llama") if reference == "model" else None,
        args=trl.DPOConfig(output_dir=str(folder), **{**SETTINGS, **options}),
        train_dataset=texts("preference", 16),
        processing_class=tokenizer(),
        **extra,
    )
    if "recipe" not in extra:
        hiddenkey.attach(trainer.model, recipe)
    return trainer


def log_probabilities(logits, labels):
    """(B,) summed over the labels, and per token."""
    valid = labels[:, 1:] != -100
    values = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (values * valid).sum(-1)


def reference_logits(trainer, inputs):
    from contextlib import nullcontext

    model = trainer.ref_model or trainer.model
    model.eval()
    adapters = getattr(model, "peft_config", {})
    context = trainer.model.disable_adapter() if adapters and "ref" not in adapters else nullcontext()
    if "ref" in adapters:
        model.set_adapter("ref")
    with context, torch.no_grad():
        logits = model(**inputs).logits
    if "ref" in adapters:
        model.set_adapter("default")
    trainer.model.train()
    return logits


@pytest.mark.parametrize("reference", ("disabled", "copy", "model"))
@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop"))
def test_dpo_is_the_policys_two_views_at_the_completions(consistency, reference, tmp_path, monkeypatch):
    recipe = f"{DROPS} ~ {consistency}*{WEIGHT}"
    trainer = dpo(tmp_path, recipe, reference=reference, gradient_checkpointing=False)
    batch = first_batch(trainer)
    step_state(trainer.attachment).shares_lower = True  # as an earlier step has seen
    with draws(monkeypatch) as record:
        loss, ours = loss_and_gradients(trainer, batch)
    assert len(record) == 8, "two views of two layers with two drops; none in the reference"

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    first, second = views_by_hand(trainer.model, inputs, consistency)
    base = log_probabilities(reference_logits(trainer, inputs), labels)

    def task(policy):
        chosen, rejected = (log_probabilities(policy, labels) - base).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    values = divergence("kl", first[:, :-1], second[:, :-1])
    valid = labels[:, 1:] != -100
    term = ((values * valid).sum(-1) / valid.sum(-1)).mean()
    assert term > 0.05
    learned = (task(first) + task(second)) / 2 if consistency == "kl-rdrop" else task(first)
    total = learned + WEIGHT * term
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    assert_same_gradients(ours, gradients(trainer.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reference", ("disabled", "copy"))
def test_the_reference_of_a_stock_dpo_trainer_has_no_drops(reference, tmp_path):
    trainer = dpo(tmp_path, DROPS, reference=reference, cls=trl.DPOTrainer)
    batch = first_batch(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(found, log_probabilities(reference_logits(trainer, inputs), labels))
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules())
    before = dict(hiddenkey.find_attachment(trainer.model).rates())
    trainer.train()
    assert str(hiddenkey.find_attachment(trainer.model).rates()) != str(before)


@pytest.mark.full
@pytest.mark.parametrize("cls", (trl.DPOTrainer, DropDPO))
@pytest.mark.parametrize("reference", ("disabled", "copy"))
def test_dpo_that_compiles(reference, cls, tmp_path):
    """The reference without drops, the policy with them, and the consistency where the mixin computes it."""
    recipe = DROPS if cls is trl.DPOTrainer else f"{DROPS} ~ kl*{WEIGHT}"
    losses = []
    for compiled in (False, True):
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        torch._dynamo.reset()
        trainer = dpo(tmp_path, recipe, reference=reference, cls=cls, gradient_checkpointing=False, **options)
        trainer.train()
        attachment = hiddenkey.find_attachment(trainer.model)
        assert all(0.1 < rate < 0.5 for rate in attachment.rates().values())
        first = first_batch(trainer)
        labels = first["input_ids"].masked_fill(first["completion_mask"] == 0, -100)
        inputs = {name: first[name] for name in ("input_ids", "attention_mask")}
        found = torch.cat(trainer.compute_ref_log_probs(trainer.model_wrapped, first))
        torch.testing.assert_close(found, log_probabilities(reference_logits(trainer, inputs), labels))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == len(losses[1]) == 2


def test_disable_dropout_switches_off_what_is_attached_before_it(tmp_path):
    """DPO sets every dropout of the model that it is given to 0; what is attached to its model later stays."""
    later = dpo(tmp_path, DROPS, cls=trl.DPOTrainer, disable_dropout=True)
    later.train()
    rates = hiddenkey.find_attachment(later.model).rates()
    assert len(rates) == 4
    assert all(0.1 < rate < 0.5 for rate in rates.values())

    model = adapted()
    attachment = hiddenkey.attach(model, DROPS)
    earlier = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS, disable_dropout=True),
        train_dataset=texts("preference", 16),
        processing_class=tokenizer(),
    )
    with pytest.warns(UserWarning, match="switched off: .*disable_dropout=False"):
        earlier.train()
    assert set(attachment.rates().values()) == {0.0}


@pytest.mark.parametrize("make_trainer", (sft, dpo))
@pytest.mark.parametrize("recipe", (DROPS, f"{DROPS} ~ kl*0.5"))
def test_a_run_logs_its_parts_and_saves_its_recipe(make_trainer, recipe, tmp_path):
    trainer = make_trainer(tmp_path, recipe, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert {"entropy", "num_tokens", "drop_rate/logits", "drop_rate/hidden"} <= set(entry)
        term = entry.get("consistency_loss", 0.0)
        assert (term > 0) is ("~" in recipe)
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * term, rel=1e-4)
    assert hiddenkey.load_recipe(tmp_path / "checkpoint-2") == hiddenkey.parse(recipe)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("make_trainer", (sft, dpo))
def test_a_stock_trainer_drops_or_says_what_it_misses(make_trainer, tmp_path):
    cls = trl.SFTTrainer if make_trainer is sft else trl.DPOTrainer
    make_trainer(tmp_path, DROPS, cls=cls).train()
    with pytest.raises(ValueError, match=r"has a consistency.*ConsistencyMixin.*attach 'logits:column@0\.3"):
        make_trainer(tmp_path, f"{DROPS} ~ kl", cls=cls).train()


@pytest.mark.parametrize("recipe", ("output:element@0.1", "output:element@0.1 ~ kl"))
def test_a_drop_that_the_fused_head_passes_by(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"'output:element@0\.1' dropped nothing.*lm_head.*TRL"):
        sft(tmp_path, recipe).train()


def test_a_trainer_without_labels(tmp_path):
    model = adapted()

    class Rewards(hiddenkey.ConsistencyMixin, trl.SFTTrainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            return [{"chosen_ids": batch["input_ids"]} for batch in batches], count

    with pytest.raises(ValueError, match=r"have labels, or DPO's.*Rewards \(chosen_ids\) has neither"):
        sft(tmp_path, f"{DROPS} ~ kl", model, cls=Rewards).train()


def test_a_consistency_of_predictions(tmp_path):
    with pytest.raises(ValueError, match=r"'mse' compares predictions.*use 'kl'"):
        sft(tmp_path, f"{DROPS} ~ mse").train()


def test_the_pass_that_learns_is_kept_whatever_comes_first():
    """A reference or a metric may be computed before the policy's pass as well as after it."""
    model = make("llama")
    ids = torch.randint(3, 60, (2, 5))
    with Capture(model.get_decoder(), until_gradient=True) as kept:
        with torch.no_grad():
            model(input_ids=ids + 1)
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        model(input_ids=ids + 2)
    assert torch.equal(kept.states, wanted)
    assert kept.states.requires_grad


def test_logits_from_what_the_decoder_put_out():
    model, inputs = make("llama"), {"input_ids": torch.randint(3, 60, (2, 5))}
    views = HiddenViews(hiddenkey.attach(model, f"{DROPS} ~ kl"), model, inputs, CONSISTENCIES["kl"])
    model.eval()
    output, wanted = views.first(lambda: model(**inputs).logits)
    assert torch.equal(views.logits(output), wanted)
    assert "forward" not in vars(views.decoder)


ONLINE = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}


def online(kind, folder, recipe, model):
    """A trainer that samples its own completions, four of each prompt."""
    parent, config = ONLINE[kind]
    cls = type("Online", (hiddenkey.ConsistencyMixin, parent), {})
    return cls(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(words.split()))) for words in completions],
        args=config(output_dir=str(folder), **SETTINGS, num_generations=4, max_completion_length=6, temperature=0.7),
        train_dataset=texts("completion", 16).select_columns("prompt"),
        processing_class=tokenizer(),
        recipe=recipe,
    )


@pytest.mark.parametrize("kind", ONLINE)
def test_completions_are_sampled_without_drops(kind, tmp_path, monkeypatch):
    """TRL samples in training mode; what learns from the completions drops all the same."""
    model, seen = adapted(), []

    def generate(*args, **options):
        with draws(monkeypatch) as record:
            completions = type(model).generate(model, *args, **options)
        seen.append((model.training, len(record)))
        return completions

    trainer = online(kind, tmp_path, DROPS, model)
    model.generate = generate
    trainer.train()
    assert seen
    assert set(seen) == {(True, 0)}
    assert all(rate > 0 for rate in trainer.attachment.rates().values())


@pytest.mark.parametrize("kind", ONLINE)
def test_a_consistency_of_completions_that_are_sampled(kind, tmp_path):
    with pytest.raises(ValueError, match=r"have labels.*Online \(.*\) has neither.*without its consistency"):
        online(kind, tmp_path, f"{DROPS} ~ kl", adapted()).train()


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5", "gemma2"))
@pytest.mark.parametrize("options", ({}, {"do_sample": True}, {"num_beams": 2}, {"use_cache": False}))
def test_generation_in_training_mode_is_the_plain_models(family, options):
    model, prompt = quiet(family), batch(family, padding="left", labels=False)
    prompt.pop("decoder_input_ids", None)

    def generate():
        torch.manual_seed(3)
        return model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, **options)

    wanted = generate()
    with hiddenkey.attach(model, DROPS.replace(":", "[:]:", 2)) as handle:
        clone = copy.deepcopy(model)
        assert torch.equal(generate(), wanted)
        assert all(rate != rate for rate in handle.rates().values())  # nothing was drawn
        model(**batch(family)).loss.backward()
        assert all(rate > 0 for rate in handle.rates().values())
        assert model.training
        model, original = clone, model
        assert torch.equal(generate(), wanted)
    model = original
    assert "generate" not in vars(model)
    assert torch.equal(generate(), wanted)
