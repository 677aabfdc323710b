"""What a training may bring that the usual one does not: each is computed rightly, or told."""

import pytest
import torch
import transformers as hf

import hiddenkey
from hiddenkey.errors import UserError
from hiddenkey.hf import shared_layers as lower
from hiddenkey.hf.attachment import step_state

from .test_token_loss import one_step
from .test_trainer import drop_trainer
from .tiny import batch, decoder, make
from .tools import assert_same_gradients, lora


def experts(**options):
    return decoder("Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0)(**options)


def test_a_step_that_falls_back_draws_as_if_it_had_not_tried():
    """A run that goes on in another process tries again, where the run that was not stopped does not."""
    found = []
    for tried_before in (False, True):
        torch.manual_seed(0)
        model, inputs = (
            lora(decoder("Granite")(initializer_range=0.3, logits_scaling=4.0), ["q_proj"]),
            batch("llama"),
        )
        with hiddenkey.attach(model, "hiddenkey@0.3") as attachment:
            if tried_before:
                hiddenkey.consistency_step(model, inputs)
            assert step_state(attachment).dense is (True if tried_before else None)
            torch.manual_seed(5)
            found.append([float(hiddenkey.consistency_step(model, inputs).total.detach()) for _ in range(2)])
            assert step_state(attachment).dense
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("where", ("config", "batch"))
def test_routers_are_balanced_over_all_layers(where, monkeypatch):
    """The lower layers' routers count in the task loss of both views."""
    model, inputs = experts(), batch("llama")
    if where == "batch":
        model.config.output_router_logits = False
        inputs["output_router_logits"] = True
    wanted = float(model(**inputs).loss.detach())
    found, ours, _ = one_step(model, "logits[3:]:column@0.000001 ~ kl-rdrop", inputs)
    assert float(found.task.detach()) == pytest.approx(wanted, rel=1e-4)
    monkeypatch.setattr(lower.LowerLayers, "second", lambda self, model, view, seen: view())
    _, theirs, _ = one_step(model, "logits[3:]:column@0.000001 ~ kl-rdrop", inputs)
    assert_same_gradients(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ("output:element@0.1 ~ kl", "baseline ~ kl"))
def test_routers_of_a_model_whose_layers_could_all_be_shared(recipe):
    found, _, _ = one_step(experts(), recipe, batch("llama"))
    assert found.total.isfinite()


@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop"))
def test_a_task_loss_that_looks_into_a_lower_layer(consistency):
    def task_loss(model, inputs, num_items):
        outputs = model(**inputs, output_hidden_states=True)
        seen.append(outputs.hidden_states[1].detach())
        return outputs.loss + outputs.hidden_states[1].square().mean(), outputs

    model, inputs, seen = make("bert"), batch("bert"), []
    one_step(model, f"hiddenkey[1/2:]@0.2 ~ {consistency}", inputs, task_loss=task_loss)
    assert len(seen) == (2 if consistency == "kl-rdrop" else 1)
    assert all(torch.equal(states, seen[0]) for states in seen)


def test_the_doctor_takes_packed_documents_for_what_they_are():
    ids = torch.randint(3, 64, (1, 12))
    packed = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.tensor([[*range(5), *range(7)]])}
    found = hiddenkey.doctor(make("llama"), "hiddenkey-@0.3", [packed])
    assert [finding for finding in found.findings if finding.verdict == "wrong"] == []


def test_the_doctor_blames_no_mask_for_a_loss_that_is_not_finite():
    inputs = batch("llama")
    found = hiddenkey.doctor(make("llama"), "hiddenkey-@0.3", [{**inputs, "labels": inputs["labels"].fill_(-100)}])
    assert [finding.verdict for finding in found.findings if finding.check == "recompute"] == ["skipped"]


def refuse(model, inputs, recipe, said):
    with hiddenkey.attach(model, recipe), pytest.raises(UserError, match=said):
        hiddenkey.consistency_step(model, inputs)


def test_logits_of_another_layout_are_told():
    """Segmentation has its classes on the second axis; the last one is the image's width."""
    config = hf.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(0, 3, (2, 32, 32))}
    refuse(
        hf.SegformerForSemanticSegmentation(config).train(),
        inputs,
        "hiddenkey@0.3",
        r"logits of shape \(2, 3, 8, 8\)",
    )


def test_outputs_without_logits_are_told():
    config = make("bert").config
    model = hf.BertForPreTraining(config).train()
    ids = torch.randint(3, 64, (2, 8))
    inputs = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.zeros(2, dtype=torch.long)}
    refuse(model, inputs, "hiddenkey@0.3", "outputs are loss, prediction_logits")


def test_a_regression_of_several_numbers():
    model = make("bert", num_labels=3, problem_type="regression").double().train()
    inputs = {**batch("bert"), "labels": torch.randn(3, 3, dtype=torch.float64)}
    refuse(model, inputs, "hiddenkey@0.3 ~ kl", "several predictions, not one distribution.*use 'mse'")
    found, _, _ = one_step(model, "hiddenkey@0.3 ~ mse", inputs)
    assert found.consistency > 0


def test_one_yes_or_no_is_no_regression():
    model = make("bert", num_labels=1, problem_type="multi_label_classification").train()
    inputs = {**batch("bert"), "labels": torch.ones(3, 1)}
    for consistency in ("kl", "mse"):
        refuse(model, inputs, f"hiddenkey@0.3 ~ {consistency}", "yes/no answers|predictions of a regression")


# LLaMA's own head cannot read its decoder where the configuration asks for tuples.
@pytest.mark.parametrize(("family", "where"), (("bert", "config"), ("bert", "batch"), ("llama", "batch")))
@pytest.mark.parametrize("recipe", ("hiddenkey@0.3", "hiddenkey-@0.3"))
def test_outputs_that_are_tuples(family, recipe, where):
    model, inputs = make(family).train(), batch(family)
    named, ours, _ = one_step(model, recipe, inputs)
    if where == "config":
        model.config.return_dict = False
    else:
        inputs["return_dict"] = False
    found, theirs, _ = one_step(model, recipe, inputs)
    assert found.total == named.total
    assert_same_gradients(ours, theirs, rtol=0, atol=0)


def test_logits_to_keep_fails_as_without_us():
    """The model's own loss has no logits for most labels then."""
    model, inputs = lora(make("llama")), {**batch("llama"), "logits_to_keep": 1}
    with pytest.raises(ValueError, match="batch_size") as plain:
        model(**inputs)
    with hiddenkey.attach(model, "hiddenkey@0.3"), pytest.raises(ValueError, match="batch_size") as ours:
        hiddenkey.consistency_step(model, inputs)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("recipe", ("hiddenkey@0.3", "hiddenkey-@0.3"))
def test_a_batch_without_labels_is_told(recipe):
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    refuse(make("bert").train(), inputs, recipe, "needs 'labels'")


def test_labels_in_a_column_are_those_in_a_row():
    model, inputs = make("bert").train(), batch("bert")
    row, ours, _ = one_step(model, "hiddenkey@0.3", inputs)
    column, theirs, _ = one_step(model, "hiddenkey@0.3", {**inputs, "labels": inputs["labels"][:, None]})
    assert column.total == row.total
    assert_same_gradients(ours, theirs, rtol=0, atol=0)


def test_a_trainer_whose_recipe_was_detached_saves_its_model(tmp_path):
    trainer = drop_trainer("bert", tmp_path / "run", "hiddenkey@0.3", max_steps=1)
    trainer.train()
    trainer.attachment.detach()
    trainer.save_model(str(tmp_path / "saved"))
    assert hiddenkey.load_recipe(tmp_path / "saved") == hiddenkey.parse("hiddenkey@0.3")


def test_a_trainer_that_never_logs_keeps_sums(tmp_path):
    trainer = drop_trainer("bert", tmp_path, "hiddenkey@0.3", max_steps=4, logging_strategy="no")
    trainer.train()
    for total, count in trainer._window.values():
        assert (total.dim(), count) == (0, 4)


def test_the_way_out_that_is_told_works_on_what_peft_gives_back():
    model = lora(make("bert"))
    hiddenkey.attach(model, "hiddenkey@0.3")
    inner = model.merge_and_unload()
    with pytest.raises(hiddenkey.AttachError, match=r"hiddenkey\.find_attachment\(model\)"):
        hiddenkey.attach(inner, "hiddenkey@0.1")
    hiddenkey.find_attachment(inner).detach()
    hiddenkey.attach(inner, "hiddenkey@0.1").detach()


def test_a_batch_that_is_no_mapping():
    model = make("llama").train()
    with hiddenkey.attach(model, "hiddenkey@0.3"), pytest.raises(UserError, match=r"mapping.*'labels'.*tuple"):
        hiddenkey.consistency_step(model, (batch("llama")["input_ids"],))


def test_model_and_recipe_exchanged():
    with pytest.raises(hiddenkey.AttachError, match="a model and a recipe, in this order; the first is a str"):
        hiddenkey.attach("hiddenkey@0.1", make("llama"))


def test_what_learns_may_lie_outside_of_the_model():
    model = make("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = batch("llama")
    prompt = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with hiddenkey.attach(model, "hiddenkey@0.3"):
        hiddenkey.consistency_step(model, {**inputs, "inputs_embeds": prompt}).total.backward()
    assert prompt.grad.abs().sum() > 0


@pytest.mark.parametrize("recipe", ("hiddenkey@0.3", "hiddenkey-@0.3"))
def test_an_adapter_that_was_loaded_to_be_used(recipe):
    """PEFT freezes it: torch would say that something does not require grad."""
    model = lora(decoder("Llama")(), ["q_proj"]).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with hiddenkey.attach(model, recipe):
        with pytest.raises(UserError, match="is_trainable=True"):
            hiddenkey.consistency_step(model, batch("llama"))
        with torch.no_grad():
            assert hiddenkey.consistency_step(model, batch("llama")).total > 0
