"""Virtual tokens lengthen the sequence, a prefix only the keys: what is compared, what is drawn, what may be seen."""

import peft
import pytest
import torch

import hiddenkey
from hiddenkey import attention_paths
from hiddenkey.consistency import consistency_loss
from hiddenkey.hf import compared_outputs as pooling
from hiddenkey.hf import training_step as step_module
from hiddenkey.hf.attachment import step_state
from hiddenkey.hf.compared_outputs import labels_of

from .adapters import adapt, batch_for, build, moved
from .tiny import BATCH, LENGTH, batch, decoder, make
from .tools import draws, logits_of, quiet

VIRTUAL = 5
LONGER = {"prompt tuning": 5, "multitask prompt tuning": 5, "P-tuning": 5, "CPT": 4}
PREFIXES = ("prefix tuning", "cartridges")
STEP = "logits[1:]:column@0.3 + hidden[1:]:element@0.3 ~ kl*1.0"


@pytest.mark.parametrize("tuner", (*LONGER, *PREFIXES, "LoRA"))
def test_the_consistency_compares_the_labels_positions(tuner, monkeypatch):
    """The virtual tokens, the padding and whatever has no label are left out, at the shift of the task loss."""
    model, inputs = build(tuner, "llama"), batch_for(tuner, "llama")
    attachment = hiddenkey.attach(model, STEP)
    step_state(attachment).dense = step_state(attachment).shares_lower = True  # as an earlier step has seen
    views = []
    monkeypatch.setattr(step_module, "compared", lambda *args: views.append(args[1]["logits"]) or compared(*args))
    compared = hiddenkey.hf.compared_outputs.compared
    found = hiddenkey.consistency_step(model, inputs).consistency
    virtual = LONGER.get(tuner, 0)
    assert [view.shape[1] for view in views] == [LENGTH + virtual] * 2
    first, second = views
    values = []
    for row in range(BATCH):
        for place in range(LENGTH):
            before = place + virtual - 1  # The position that predicts this token.
            if inputs["labels"][row, place] != -100 and before >= 0:
                values.append(consistency_loss("kl", first[row, before][None], second[row, before][None]))
    torch.testing.assert_close(found, torch.stack(values).mean())


@pytest.mark.parametrize("tuner", ("prompt tuning", "P-tuning", *PREFIXES))
def test_chunks_of_tokens_give_the_same_as_whole_logits(tuner):
    losses, gradients = [], []
    for dense in (False, True):
        model = build(tuner, "llama")
        attachment = hiddenkey.attach(model, STEP)
        step_state(attachment).dense = dense
        torch.manual_seed(0)
        step = hiddenkey.consistency_step(model, batch_for(tuner, "llama"))
        assert step_state(attachment).dense is dense
        step.total.backward()
        losses.append(torch.stack([step.total, step.task, step.consistency]))
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tuner", ("AdaLoRA", "CPT", "ShadowPEFT"))
def test_a_tuner_with_a_loss_of_its_own_is_not_computed_in_chunks(tuner):
    """Its loss is added in a forward with labels, which chunks do without."""
    model = build(tuner, "llama")
    attachment = hiddenkey.attach(model, STEP)
    assert hiddenkey.hf.chunked_loss.frozen_head(attachment) is None


def test_both_views_with_gradient():
    model, inputs = build("prompt tuning", "llama"), batch_for("prompt tuning", "llama")
    hiddenkey.attach(model, STEP.replace("kl", "kl-rdrop"))
    step = hiddenkey.consistency_step(model, inputs)
    assert step.consistency > 0
    step.total.backward()


def test_a_disabled_prompt_adds_no_token():
    model, inputs = build("prompt tuning", "llama"), batch("llama")
    hiddenkey.attach(model, STEP)
    with model.disable_adapter():
        step = hiddenkey.consistency_step(model, inputs)
        assert labels_of(inputs, LENGTH, model) is inputs["labels"]
    assert step.total.isfinite()


def prompted_regression(padding):
    torch.manual_seed(0)
    model = decoder("Llama")(head="ForSequenceClassification", num_labels=1)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL)
    model = moved(peft.get_peft_model(model, config))
    hiddenkey.attach(model, STEP)
    return model, {**batch("llama", padding=padding), "labels": torch.tensor([0.5, -1.0, 2.0])}


LAST = {"left": (12, 12, 12), "none": (12, 12, 12), "right": (12, 9, 5)}


@pytest.mark.parametrize("padding", LAST)
def test_the_last_real_token_behind_virtual_ones(padding):
    model, inputs = prompted_regression(padding)
    attachment = hiddenkey.find_attachment(model)
    last = torch.arange(BATCH * (VIRTUAL + LENGTH)).view(BATCH, -1, 1)
    assert pooling._places(last, inputs, attachment).tolist() == [VIRTUAL + n - 1 for n in LAST[padding]]
    if padding != "right":  # which is refused
        assert pooling.pooled(last, inputs, attachment).flatten().tolist() == [
            row * (VIRTUAL + LENGTH) + VIRTUAL + n - 1 for row, n in enumerate(LAST[padding])
        ]


@pytest.mark.parametrize("padding", ("left", "none"))
def test_a_regression_from_the_last_real_token_behind_virtual_ones(padding):
    model, inputs = prompted_regression(padding)
    assert hiddenkey.consistency_step(model, inputs).total.isfinite()


@pytest.mark.parametrize("first", (False, True), ids=("at once", "after a batch without padding"))
def test_a_regression_behind_virtual_tokens_with_padding_on_the_right(first):
    """transformers takes the last place, padding or not, where it is given embeddings, as PEFT does with a prompt."""
    model, inputs = prompted_regression("right")
    if first:
        hiddenkey.consistency_step(model, prompted_regression("none")[1])
    with pytest.raises(hiddenkey.UserError, match="padding on the left"):
        hiddenkey.consistency_step(model, inputs)


POINTS = ("logits[:]:column@0.4", "logits[:]:element@0.4", "logits[:]:span@0.4", "weights[:]:column@0.4")


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("recipe", POINTS)
def test_a_key_of_a_prefix_is_a_key_like_any_other(recipe, implementation, monkeypatch):
    """It is drawn with the others, and causality stays: a token changes nothing before it."""
    model = adapt(quiet("llama", attn_implementation=implementation), "prefix tuning", "llama")
    inputs = batch("llama", labels=False)
    hiddenkey.attach(model, recipe)
    with draws(monkeypatch) as record:
        first = logits_of(model, inputs)
    assert {draw.grid.shape[-2:] for draw in record} == {(LENGTH, VIRTUAL + LENGTH)}
    assert any(not draw.keep[..., :VIRTUAL].all() for draw in record)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 7] = 3 if inputs["input_ids"][0, 7] != 3 else 4
    with draws(monkeypatch, record):
        second = logits_of(model, changed)
    assert torch.equal(first[0, :7], second[0, :7])
    assert not torch.allclose(first[0, 7:], second[0, 7:], atol=1e-3)


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_both_implementations_agree_behind_a_prefix(family, monkeypatch):
    inputs, found, record = batch(family, labels=False), [], None
    for implementation in ("sdpa", "eager"):
        model = adapt(quiet(family, attn_implementation=implementation), "prefix tuning", family)
        hiddenkey.attach(model, "logits[:]:element@0.4 + hidden[:]:element@0.3")
        with draws(monkeypatch, record) as record_now:
            logits = logits_of(model, inputs)
        record = record or record_now
        found.append(logits if logits.dim() == 2 else logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_prefix_without_an_attention_mask(monkeypatch):
    inputs, found, record = batch("llama", padding="none", labels=False), [], None
    for names in (("input_ids", "attention_mask"), ("input_ids",)):
        model = build("prefix tuning", "llama")
        hiddenkey.attach(model, "logits[:]:column@0.4")
        with draws(monkeypatch, record) as record_now:
            found.append(logits_of(model, {name: inputs[name] for name in names}))
        record = record or record_now
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_a_row_that_would_be_emptied_sees_the_prefix_again(family, monkeypatch):
    inputs = batch(family, labels=False)
    wanted = logits_of(build("prefix tuning", family), inputs)
    model = build("prefix tuning", family)
    hiddenkey.attach(model, "logits[:]:column@0.5")
    monkeypatch.setattr(
        attention_paths, "draw", lambda drop, grid: torch.zeros(*grid.lead, 1, grid.places, dtype=torch.bool)
    )
    shown = inputs["attention_mask"].bool() if family == "llama" else slice(None)
    torch.testing.assert_close(logits_of(model, inputs)[shown], wanted[shown], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuner", ("prefix tuning", "prompt tuning"))
@pytest.mark.parametrize("family", ("llama", "bert"))
def test_runs_of_tokens_stay_inside_the_real_ones(family, tuner, monkeypatch):
    """Where documents are read off the mask, keys of a prefix are no tokens of the stream, virtual tokens are."""
    model, inputs = build(tuner, family), batch(family, labels=False)
    hiddenkey.attach(model, "hidden[:]:span@0.5 + input:span@0.3")
    with draws(monkeypatch) as record:
        logits_of(model, inputs)
    real = inputs["attention_mask"]
    if tuner == "prompt tuning":
        real = torch.cat([torch.ones(BATCH, VIRTUAL, dtype=real.dtype), real], dim=1)
    for draw in record:
        assert torch.equal(draw.grid.segments.bool(), real.bool())
        assert draw.keep.squeeze(-1)[~real.bool()].all()


def test_runs_of_keys_stay_inside_a_document_behind_a_prefix():
    """Two documents that see the prefix: it goes with the first, and the second begins where its own keys do."""
    visible = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    visible[..., :2] = True
    for query, first in enumerate((0, 0, 2, 2)):
        visible[0, 0, query, 2 + first : 3 + query] = True
    assert hiddenkey.masks.documents_in(visible, (1, 1, 4, 6)).tolist() == [[1, 1, 1, 1, 2, 2]]


@pytest.mark.parametrize("config", ("PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"))
def test_an_encoder_decoder(config):
    options = {"encoder_hidden_size": 8} if config == "PromptEncoderConfig" else {}
    options |= {"token_dim": 32, "num_attention_heads": 4}
    kind = getattr(peft, config)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=VIRTUAL, **options)
    model, inputs = moved(peft.get_peft_model(make("t5"), kind)), batch("t5")
    attachment = hiddenkey.attach(model, STEP)
    hiddenkey.consistency_step(model, inputs).total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(0 < rate < 1 for rate in attachment.rates().values())
