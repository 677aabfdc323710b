"""Losses from hidden states in chunks, and the shared lower layers, equal the dense step of two whole forwards."""

import types
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32

import hiddenkey
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.hf import attachment as attachment_module
from hiddenkey.hf import chunked_loss as token_loss
from hiddenkey.hf import shared_layers as lower
from hiddenkey.hf import training_step as step
from hiddenkey.hf.attachment import StepState, step_state
from hiddenkey.hf.chunked_loss import Head, Share, TokenLoss, frozen_head

from .tiny import batch, decoder, make
from .tools import assert_same_gradients, gradients, lora

DISTRIBUTIONS = ("kl", "kl-clean", "kl-rdrop", "js", "jsd")
CHUNKED = ("llama", "gpt2", "opt", "mistral", "qwen2", "qwen3", "gemma3")


def frozen(family, **options):
    """A model in float64 with LoRA, so that its head is frozen."""
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    return lora(make(family, **options).double(), targets)


def one_step(model, recipe, inputs, **options):
    with hiddenkey.attach(model, recipe) as attachment:
        torch.manual_seed(3)
        model.zero_grad()
        found = hiddenkey.consistency_step(model, inputs, **options)
        found.total.backward()
        return found, gradients(model), attachment


@pytest.mark.parametrize("num_items", (None, 50))
@pytest.mark.parametrize("consistency", DISTRIBUTIONS)
@pytest.mark.parametrize("family", CHUNKED)
def test_chunks_are_the_dense_step(family, consistency, num_items, monkeypatch):
    monkeypatch.setattr(token_loss, "chunk_size", lambda vocabulary: 5)
    monkeypatch.setattr(token_loss, "few_tokens", lambda vocabulary, device: 2)
    model, inputs, recipe = frozen(family), batch(family), f"hiddenkey@0.2 ~ {consistency}*0.7"
    found, ours, attachment = one_step(model, recipe, inputs, num_items=num_items)
    assert frozen_head(attachment) is not None
    assert not step_state(attachment).dense
    dense, theirs, _ = one_step(model, recipe, inputs, num_items=num_items, task_loss=step.model_loss)
    for name in ("total", "task", "consistency"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(dense, name)), rel=1e-5, abs=1e-7)
    assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_scale_before_the_loss_is_noticed():
    model = lora(decoder("Granite")(initializer_range=0.3, logits_scaling=2.0), ["q_proj"])
    found, _, attachment = one_step(model, "hiddenkey@0.2", batch("llama"))
    assert step_state(attachment).dense
    assert found.outputs["logits"].shape[1] > 1


def test_a_soft_cap_that_small_logits_do_not_show():
    model = lora(make("gemma2", final_logit_softcapping=30.0), ["q_proj"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    found, _, attachment = one_step(model, "hiddenkey@0.2", batch("gemma2"))
    assert frozen_head(attachment) is None
    assert found.outputs["logits"].shape[1] > 1


@pytest.mark.parametrize("why", ("trained head", "drop before the head", "adapter on the head"))
def test_heads_that_are_not_frozen_maps_take_the_dense_way(why):
    model, recipe = make("llama"), "hiddenkey@0.2"
    model.lm_head.requires_grad_(why == "trained head")
    if why == "adapter on the head":
        model = lora(model, ["lm_head"])
    with hiddenkey.attach(model, recipe + (" + output:element@0.1" if "drop" in why else "")) as attachment:
        assert frozen_head(attachment) is None
        found = hiddenkey.consistency_step(model, batch("llama"))
        assert found.outputs["logits"].shape[1] > 1


@pytest.mark.parametrize("consistency", DISTRIBUTIONS)
def test_gradients_of_the_sweep(consistency, monkeypatch):
    """Against autograd on the whole, for hidden states alone; gradcheck of the hand-written ones."""
    monkeypatch.setattr(token_loss, "few_tokens", lambda vocabulary, device: 3)
    rule = CONSISTENCIES[consistency]
    first, second = (torch.randn(7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    head = Head(torch.randn(11, 4, dtype=torch.float64), torch.randn(11, dtype=torch.float64))
    labels = torch.randint(11, (7,))

    def total(a, b):
        return TokenLoss.apply(a, b if rule.both else b.detach(), labels, head, rule, Share(0.3, 0.8, 2))[0]

    inputs = (first, second) if rule.both else (first,)
    assert torch.autograd.gradcheck(lambda *a: total(a[0], a[1] if rule.both else second), inputs)
    z1, z2 = head.logits(first), head.logits(second)
    task = torch.nn.functional.cross_entropy(z1, labels, reduction="sum")
    if rule.both:
        task = (task + torch.nn.functional.cross_entropy(z2, labels, reduction="sum")) / 2
    term = hiddenkey.consistency_loss(consistency, z1, z2, reduction="sum")
    torch.testing.assert_close(total(first, second), 0.15 * task + 0.4 * term)


@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop"))
def test_gradients_too_small_for_float16(consistency):
    """A scaler multiplies the loss; before that a word's probability over the count is below float16's range."""
    rule, scaler, count = CONSISTENCIES[consistency], 65536, 2**17
    states, weight, labels = torch.randn(2, 40, 16), torch.randn(3000, 16) / 4, torch.randint(3000, (40,))

    def gradient(dtype):
        first, second = (x.to(dtype).requires_grad_() for x in states)
        share = Share(1.0, 1.0, count)
        second = second if rule.both else second.detach()
        total = TokenLoss.apply(first, second, labels, Head(weight.to(dtype), None), rule, share)[0]
        (scaler * total).backward()
        return first.grad.float()

    wanted = gradient(torch.float32)
    assert (gradient(torch.float16) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(
    ("vocabulary", "chunk", "few"), [(64, 224, 12288), (49152, 224, 16), (152_000, 72, 5), (10**7, 16, 1)]
)
def test_fewer_tokens_of_a_larger_vocabulary(vocabulary, chunk, few):
    assert token_loss.chunk_size(vocabulary) == chunk
    assert token_loss.few_tokens(vocabulary, torch.device("cpu")) == few
    assert token_loss.few_tokens(vocabulary, torch.device("cuda")) >= chunk


def test_no_dense_logits(monkeypatch):
    """Nothing with as many numbers as tokens × vocabulary is made; the dense step makes several."""
    monkeypatch.setattr(token_loss, "chunk_size", lambda vocabulary: 4)
    model, inputs = make("llama"), batch("llama")
    model.resize_token_embeddings(101)
    model.lm_head.requires_grad_(False)
    whole = inputs["input_ids"].numel() * model.config.vocab_size
    sizes = {}
    for name, options in {"chunks": {}, "dense": {"task_loss": step.model_loss}}.items():
        with Largest() as largest:
            one_step(model, "hiddenkey@0.2", inputs, **options)
        sizes[name] = largest.last_axis(model.config.vocab_size)
    assert sizes["chunks"] <= whole / 8 < whole * 0.9 <= sizes["dense"]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of entries of the largest tensor made (views left out), by the size of its last axis."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dim() and x.untyped_storage().data_ptr() not in given:
                self.sizes[x.shape[-1]] = max(self.sizes.get(x.shape[-1], 0), x.numel())
        return result

    def last_axis(self, size):
        return self.sizes.get(size, 0)


@pytest.mark.parametrize("family", ("llama", "bert", "gpt2"))
def test_lower_layers_run_once(family):
    """With drops in the upper half, a layer below runs once a step and one above twice, after a first one to see that
    this is the same."""
    model, calls = make(family), []
    stack = hiddenkey.plan(model, "baseline").structure.stacks[0].layers
    for layer in stack:
        attention = model.get_submodule(layer.attentions[0])
        attention.register_forward_hook(lambda m, a, o, path=layer.path: calls.append(path))
    with hiddenkey.attach(model, "hiddenkey[1/2:]@0.2"):
        hiddenkey.consistency_step(model, batch(family))
        assert [calls.count(layer.path) for layer in stack] == [2, 2, 3, 3]
        calls.clear()
        hiddenkey.consistency_step(model, batch(family)).total.backward()
    assert [calls.count(layer.path) for layer in stack] == [1, 1, 2, 2]
    assert "forward" not in vars(model.get_submodule(stack[0].path))


def autocast(model):
    """What accelerate's `prepare` does to a model for mixed precision."""
    forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__))
    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize("size", (1, 5))
@pytest.mark.parametrize("prepare", (autocast, lambda model: add_hook_to_module(model, ModelHook())))
def test_a_model_that_accelerate_prepared_stays_in_chunks(prepare, size):
    """Only the last token's logits are computed by the model itself; autocast rounds them by their size."""
    model = lora(make("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    hiddenkey.attach(model, "hiddenkey@0.2")
    found = hiddenkey.consistency_step(prepare(model), batch("llama"))
    assert found.outputs["logits"].shape[1] == 1
    assert found.consistency > 0


def test_a_forward_of_the_layers_own_stays():
    """As accelerate puts one on modules that it moves between devices."""
    model, calls = make("llama"), []
    layer = model.model.layers[0]
    real = layer.forward
    layer.forward = own = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    with hiddenkey.attach(model, "hiddenkey[1/2:]@0.2"):
        hiddenkey.consistency_step(model, batch("llama"))
        calls.clear()
        hiddenkey.consistency_step(model, batch("llama"))
    assert vars(layer)["forward"] is own
    assert calls == [1]


@pytest.mark.parametrize("consistency", ("kl", "kl-clean", "kl-rdrop", "js"))
@pytest.mark.parametrize("family", ("llama", "bert", "mistral", "gpt2", "opt"))
def test_shared_lower_layers_change_nothing(family, consistency, monkeypatch):
    model, inputs, recipe = make(family), batch(family), f"hiddenkey[1/2:]@0.2 ~ {consistency}"
    with monkeypatch.context() as patch:
        patch.setattr(attachment_module, "StepState", partial(StepState, shares_lower=True))
        shared, ours, _ = one_step(model, recipe, inputs)
    monkeypatch.setattr(lower.LowerLayers, "second", lambda self, model, view, seen: view())
    twice, theirs, _ = one_step(model, recipe, inputs)
    torch.testing.assert_close(shared.consistency, twice.consistency)
    # With gradient in both views the lower layers' is summed in another order.
    assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "recipe", "shared"),
    [
        ("llama", "hiddenkey@0.2", 2),
        ("llama", "hiddenkey[:]@0.2", 0),
        ("llama", "hiddenkey@0.2 + input:column@0.1 ~ kl", 0),
        ("llama", "output:element@0.1 ~ kl", 4),
        ("llama", "hiddenkey@0", 4),
        ("bert", "logits[3:]:column@0.1 ~ kl", 3),
        ("t5", "hiddenkey[1/2:]@0.2", 0),
    ],
)
def test_how_many_layers_are_shared(family, recipe, shared):
    with hiddenkey.attach(make(family), recipe) as attachment:
        assert len(lower.LowerLayers(attachment, constant=True).layers) == shared


def test_an_adapter_that_draws_shares_nothing():
    model = lora(make("llama"), ["q_proj"], lora_dropout=0.1)
    with hiddenkey.attach(model, "hiddenkey@0.2") as attachment:
        assert lower.LowerLayers(attachment, constant=True).layers == []
