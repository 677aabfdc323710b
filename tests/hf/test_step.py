"""The consistency step against hand computation: two forwards, torch.distributions, autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import hiddenkey
from hiddenkey.hf.training_step import model_loss

from .tiny import CLASSES, DEPTH, batch, decoder, make
from .tools import assert_same_gradients, attached, draws, gradients, inputs_for, logits_of, lora

DROPS = "logits[:]:column@0.3 + hidden[:]:element@0.3"
CONSTANT = ("kl", "kl-clean", "js", "jsd")
CLEAN = ("kl-clean", "js", "jsd")
SITES = 2 * DEPTH
WEIGHT = 0.7


def divergence(name, first, second):
    """Values per row, from torch.distributions."""
    p, q = Categorical(logits=first), Categorical(logits=second)
    if name == "js":
        return kl_divergence(p, q)
    if name == "jsd":
        m = Categorical(probs=(p.probs + q.probs) / 2)
        return (kl_divergence(p, m) + kl_divergence(q, m)) / 2
    return (kl_divergence(p, q) + kl_divergence(q, p)) / 2


def build(family, consistency, **options):
    return attached(family, f"{DROPS} ~ {consistency}*{WEIGHT}", **options)


def views(model, inputs, consistency):
    """Outputs of the first and, held constant, the second view, with the draws that a step under the seed makes."""
    torch.manual_seed(5)
    first = model(**inputs)
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        if consistency in CLEAN:
            second = model.eval()(**plain)
            model.train()
        else:
            second = model(**plain)
    return first, second


def step(model, inputs, **options):
    torch.manual_seed(5)
    return hiddenkey.consistency_step(model, inputs, **options)


def check(model, inputs, consistency, by_hand, **options):
    """by_hand(first outputs, second outputs) -> (task, consistency)."""
    found = step(model, inputs, **options)
    found.total.backward()
    ours = gradients(model)
    model.zero_grad()
    with hiddenkey.find_attachment(model).watch.step():
        task, term = by_hand(*views(model, inputs, consistency))
    (task + WEIGHT * term).backward()
    torch.testing.assert_close(found.task, task)
    torch.testing.assert_close(found.consistency, term, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, task + WEIGHT * term)
    assert term > 1e-4
    assert_same_gradients(ours, gradients(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("consistency", CONSTANT)
@pytest.mark.parametrize("family", ("bert", "roberta", "distilbert", "vit"))
def test_classification(family, consistency):
    model, inputs = build(family, consistency), batch(family)

    def by_hand(first, second):
        task = F.cross_entropy(first.logits, inputs["labels"])
        return task, divergence(consistency, first.logits, second.logits).mean()

    check(model, inputs, consistency, by_hand)


def last_layers(model, path):
    """The outputs of a layer, one per forward."""
    kept = []
    model.get_submodule(path).register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    return kept


@pytest.mark.parametrize("consistency", CONSTANT)
def test_regression_compares_the_first_tokens_last_layer(consistency):
    model = build("bert", consistency, num_labels=1)
    kept = last_layers(model, "bert.encoder.layer.3")
    inputs = {**batch("bert"), "labels": torch.tensor([0.3, -1.0, 2.0])}

    def by_hand(first, second):
        one, two = kept[-2][:, 0], kept[-1][:, 0]
        return F.mse_loss(first.logits[:, 0], inputs["labels"]), divergence(consistency, one, two).mean()

    check(model, inputs, consistency, by_hand)


@pytest.mark.parametrize("padding", ("right", "left", "none"))
def test_regression_of_a_decoder_compares_the_last_real_token(padding):
    model = decoder("Llama")(head="ForSequenceClassification", num_labels=1, initializer_range=0.3).train()
    hiddenkey.attach(model, f"{DROPS} ~ kl*{WEIGHT}")
    kept = last_layers(model, "model.layers.3")
    inputs = {**batch("llama", padding=padding), "labels": torch.tensor([0.3, -1.0, 2.0])}
    last = {"right": [11, 8, 4], "left": [11, 11, 11], "none": [11, 11, 11]}[padding]

    def by_hand(first, second):
        one, two = (states[torch.arange(3), torch.tensor(last)] for states in kept[-2:])
        return first.loss, divergence("kl", one, two).mean()

    check(model, inputs, "kl", by_hand)


def test_mse_compares_predictions():
    model = build("bert", "mse", num_labels=1)
    inputs = {**batch("bert"), "labels": torch.tensor([0.3, -1.0, 2.0])}

    def by_hand(first, second):
        task = F.mse_loss(first.logits[:, 0], inputs["labels"])
        return task, (first.logits - second.logits).square().sum(-1).mean()

    check(model, inputs, "mse", by_hand)


@pytest.mark.parametrize("outputs", (1, 4))
def test_mse_is_the_same_whoever_counts_the_labels(outputs):
    """The Trainer counts every label of a row, of which there are as many as predictions."""
    model = build("bert", "mse", num_labels=outputs, problem_type="regression")
    labels = torch.randn(3, outputs) if outputs > 1 else torch.randn(3)
    inputs, found = {**batch("bert"), "labels": labels}, []
    for num_items in (None, labels.numel()):
        torch.manual_seed(5)
        found.append(hiddenkey.consistency_step(model, inputs, num_items=num_items))
    assert float(found[0].consistency) > 0
    torch.testing.assert_close(found[0].consistency, found[1].consistency)
    torch.testing.assert_close(found[0].task, found[1].task)


def test_a_batch_without_labels_is_nothing_in_half_precision_too():
    """A sum over many logits is infinite there, and no number once it is multiplied by 0."""
    model, items = make("t5"), torch.tensor(7)
    shape = (3, 12, 50_000)

    class Overflowing(type(model)):
        def forward(self, **_):
            logits = torch.full(shape, -5.0, dtype=torch.float16, requires_grad=True)
            return {"loss": logits.sum() * float("nan"), "logits": logits}

    model.__class__ = Overflowing
    loss, _ = model_loss(model, {"labels": torch.full(shape[:2], -100)}, items)
    assert float(loss) == 0
    assert loss.requires_grad


def shifted(logits, labels):
    """The logits that predict a label, and those labels."""
    valid = labels[:, 1:] != -100
    return logits[:, :-1][valid], labels[:, 1:][valid]


@pytest.mark.parametrize("num_items", (None, 50, torch.tensor(50)), ids=("mean", "int", "tensor"))
@pytest.mark.parametrize("consistency", CONSTANT)
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_causal_language_model(family, consistency, num_items):
    model, inputs = build(family, consistency), batch(family)
    inputs["labels"][0, :4] = -100

    def by_hand(first, second):
        rows, labels = shifted(first.logits, inputs["labels"])
        others, _ = shifted(second.logits, inputs["labels"])
        count = len(labels) if num_items is None else 50
        task = F.cross_entropy(rows, labels, reduction="sum") / count
        return task, divergence(consistency, rows, others).sum() / count

    check(model, inputs, consistency, by_hand, num_items=num_items)


@pytest.mark.parametrize("consistency", CONSTANT)
def test_encoder_decoder_without_a_shift(consistency):
    model, inputs = build("t5", consistency), batch("t5")
    inputs["labels"][1, :2] = -100

    def by_hand(first, second):
        valid = inputs["labels"] != -100
        task = F.cross_entropy(first.logits[valid], inputs["labels"][valid])
        return task, divergence(consistency, first.logits[valid], second.logits[valid]).mean()

    decoded = {**inputs, "decoder_input_ids": model._shift_right(inputs["labels"])}
    found = step(model, inputs)
    torch.testing.assert_close(found.consistency, step(model, decoded).consistency)
    check(model, decoded, consistency, by_hand)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_token_classification_without_a_shift(family):
    if family == "bert":
        from transformers import BertForTokenClassification

        model = BertForTokenClassification(make("bert").config).train()
    else:
        model = decoder("Llama")(head="ForTokenClassification", num_labels=CLASSES, initializer_range=0.3).train()
    hiddenkey.attach(model, f"{DROPS} ~ kl*{WEIGHT}")
    inputs = inputs_for(family, "right")
    inputs["labels"] = (inputs["input_ids"] % CLASSES).masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)

    def by_hand(first, second):
        valid = inputs["labels"] != -100
        task = F.cross_entropy(first.logits[valid], inputs["labels"][valid])
        return task, divergence("kl", first.logits[valid], second.logits[valid]).mean()

    check(model, inputs, "kl", by_hand)


@pytest.mark.parametrize("num_items", (None, 50))
@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_rdrop_is_two_forwards_with_gradient(family, num_items):
    if num_items and family != "llama":
        pytest.skip("its loss is a mean")
    model, inputs = build(family, "kl-rdrop"), batch(family)
    found = step(model, inputs, num_items=num_items)
    found.total.backward()
    ours = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    with hiddenkey.find_attachment(model).watch.step():
        outputs = [model(**inputs), model(**inputs)]
    first, second = (out.logits for out in outputs)
    tasks = [out.loss for out in outputs]
    if family == "llama":
        (first, labels), (second, _) = (shifted(logits, inputs["labels"]) for logits in (first, second))
        if num_items:
            tasks = [F.cross_entropy(logits, labels, reduction="sum") / 50 for logits in (first, second)]
    elif family == "t5":
        first, second = first[inputs["labels"] != -100], second[inputs["labels"] != -100]
    values = divergence("kl", first, second)
    term = values.sum() / num_items if num_items else values.mean()
    total = sum(tasks) / 2 + WEIGHT * term
    total.backward()
    torch.testing.assert_close(found.task, sum(tasks) / 2)
    torch.testing.assert_close(found.consistency, term, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, total)
    assert_same_gradients(ours, gradients(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ("bert", "llama"))
@pytest.mark.parametrize("consistency", (*CONSTANT, "kl-rdrop"))
def test_which_views_are_drawn(family, consistency, monkeypatch):
    model = build(family, consistency)
    with draws(monkeypatch) as record:
        step(model, batch(family))
    assert len(record) == (SITES if consistency in CLEAN else 2 * SITES)
    assert all(drawn.grid.shape[0] == 3 for drawn in record)
    if consistency not in CLEAN:
        pairs = zip(record[:SITES], record[SITES:], strict=True)
        assert not all(torch.equal(one.keep, two.keep) for one, two in pairs)


@pytest.mark.parametrize("consistency", (*CONSTANT, "kl-rdrop"))
@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_rate_zero_has_no_consistency(family, consistency):
    model = attached(family, f"hiddenkey@0 ~ {consistency}")
    found = step(model, batch(family))
    assert abs(float(found.consistency)) < 1e-6
    torch.testing.assert_close(found.total, found.task)


@pytest.mark.parametrize("consistency", (*CONSTANT, "kl-rdrop"))
def test_training_flags_are_given_back(consistency):
    model, inputs = build("bert", consistency), batch("bert")
    model.bert.embeddings.eval()
    model.bert.encoder.layer[2].eval()
    flags = [module.training for module in model.modules()]
    step(model, inputs)
    assert [module.training for module in model.modules()] == flags
    broken = {**inputs, "attention_mask": "no mask"}
    with pytest.raises((AttributeError, TypeError, ValueError)):
        step(model, broken)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("consistency", (*CONSTANT, "kl-rdrop"))
def test_training_flags_are_given_back_after_an_error_in_the_second_view(consistency):
    model, inputs = build("bert", consistency), batch("bert")
    model.bert.encoder.layer[2].eval()
    flags = [module.training for module in model.modules()]
    forwards = ["forward" in vars(module) for module in model.modules()]
    calls = []

    def fail(module, args):
        calls.append(module.training)
        if len(calls) == 2:
            raise KeyError("the second view")

    model.bert.encoder.layer[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="the second view"):
        step(model, inputs)
    assert calls == [True, consistency not in CLEAN]
    assert [module.training for module in model.modules()] == flags
    assert ["forward" in vars(module) for module in model.modules()] == forwards


def test_no_hook_is_left_behind():
    model, inputs = build("bert", "kl", num_labels=1), {**batch("bert"), "labels": torch.tensor([0.3, -1.0, 2.0])}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    step(model, inputs)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert set(inputs) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_a_recipe_without_a_consistency(family, monkeypatch):
    model, inputs = attached(family, DROPS), batch(family)
    with draws(monkeypatch) as record:
        found = step(model, inputs)
    assert len(record) == SITES
    assert found.consistency is None
    assert found.total is found.task
    torch.manual_seed(5)
    assert torch.equal(found.total, model(**inputs).loss)


def test_with_an_adapter_only_its_parameters_learn():
    model = lora(make("llama"), ["q_proj", "v_proj"])
    hiddenkey.attach(model, "hiddenkey@0.3 ~ kl*0.7")
    step(model, batch("llama")).total.backward()
    assert all("lora" in name for name in gradients(model))
    assert len(gradients(model)) == 16


def test_the_outputs_are_those_of_the_first_view():
    model, inputs = build("bert", "kl"), batch("bert")
    found = step(model, inputs)
    torch.manual_seed(5)
    assert torch.equal(found.outputs.logits, logits_of(model, inputs))


def test_the_scale_is_for_the_consistency():
    model, inputs = build("bert", "kl"), batch("bert")
    torch.testing.assert_close(step(model, inputs, scale=4.0).consistency, 4 * step(model, inputs).consistency)


def test_nothing_attached():
    with pytest.raises(ValueError, match=r"no recipe is attached.*hiddenkey\.attach"):
        step(make("bert"), batch("bert"))


@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop", "js"))
def test_no_labels(consistency):
    with pytest.raises(ValueError, match=r"needs 'labels'.*input_ids, attention_mask"):
        step(build("bert", consistency), batch("bert", labels=False))


def test_mse_on_classes():
    with pytest.raises(ValueError, match=r"'mse'.*3 outputs.*int64.*'kl'"):
        step(build("bert", "mse"), batch("bert"))


def test_one_output_with_whole_numbers_as_labels():
    model = build("bert", "kl", num_labels=1, problem_type="regression")
    inputs = batch("bert")
    with pytest.raises(hiddenkey.UserError, match=r"one output for labels of torch\.int64 is no distribution"):
        step(model, inputs)


@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop"))
def test_several_yes_no_answers(consistency):
    model = build("bert", consistency, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"yes/no answers.*leave the consistency out"):
        step(model, {**batch("bert"), "labels": torch.ones(3, CLASSES)})


def test_outputs_without_gradient():
    """As of a trainer that computes its loss in one forward pass and its outputs in another."""

    def task_loss(model, inputs, num_items):
        with torch.no_grad():
            outputs = model(**inputs)
        return model(**inputs).loss, outputs

    with pytest.raises(ValueError, match=r"carry no gradient.*one forward pass"):
        step(build("bert", "kl"), batch("bert"), task_loss=task_loss)


@pytest.mark.parametrize("consistency", ("kl", "js", "kl-rdrop"))
def test_packed_documents_are_found_without_asking(consistency):
    """With a cache, transformers does not look for documents in the positions; both views of a step go without."""
    model, inputs = build("llama", consistency), inputs_for("llama", "packed")
    assert inputs.pop("use_cache") is False
    inputs["labels"] = inputs["input_ids"]
    found, asked = step(model, inputs), step(model, {**inputs, "use_cache": False})
    torch.testing.assert_close(found.total, asked.total)


@pytest.mark.parametrize("family", ("llama", "t5"))
@pytest.mark.parametrize("frozen", (True, False))
def test_mse_on_tokens(family, frozen):
    model = make(family).train()
    model.get_output_embeddings().requires_grad_(not frozen)
    with (
        hiddenkey.attach(model, "hidden:element@0.2 ~ mse"),
        pytest.raises(ValueError, match=r"'mse' compares predictions of a regression.*use 'kl'"),
    ):
        step(model, batch(family))


def test_shifted_labels_say_which_tokens_are_compared():
    """As transformers' loss reads them, in the place of the labels."""
    model = attached("llama", "hiddenkey@0.2")
    inputs = batch("llama")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 3:6] = inputs["input_ids"][:, 3:6]
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    found = step(model, {**inputs, "shift_labels": shifted})
    wanted = step(model, {**inputs, "labels": labels})
    assert float(found.task) == pytest.approx(float(wanted.task), rel=1e-5)
    assert float(found.consistency) == pytest.approx(float(wanted.consistency), rel=1e-5)


def test_a_classifiers_batch_without_a_label_teaches_nothing():
    model, inputs = attached("bert", "hiddenkey@0.2"), batch("bert")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    found = step(model, inputs, num_items=4)
    assert float(found.total) == 0
    found.total.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda outputs: outputs.loss, "got Tensor"),
        (lambda outputs: (outputs.loss, outputs.logits), "got Tensor, Tensor"),
        (lambda outputs: (outputs.loss, outputs, 1), "got Tensor, SequenceClassifierOutput, int"),
    ],
)
@pytest.mark.parametrize("recipe", ("hiddenkey@0.2", "hiddenkey-@0.2"))
def test_a_task_loss_that_returns_something_else(returned, got, recipe):
    model = attached("bert", recipe)
    with pytest.raises(hiddenkey.UserError, match=rf"task_loss returns \(loss, outputs\).*{got}$"):
        step(model, batch("bert"), task_loss=lambda model, inputs, num_items: returned(model(**inputs)))
