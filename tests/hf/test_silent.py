"""Every known way to lose dropout without being told: here it is an error, a warning, or a red line of the doctor."""

import copy
import pickle
import types
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import hiddenkey
from hiddenkey import dropout
from hiddenkey.hf import attention_backend as backend
from hiddenkey.hf import compared_outputs as views
from hiddenkey.hf import sites
from hiddenkey.hf import sites as skip
from hiddenkey.hf.structure import find_transformer
from hiddenkey.masks import draw

from .tiny import batch, make
from .tools import attached, inputs_for, logits_of, lora, quiet, snapshot

RECIPE = "hiddenkey[:]@0.3"


def doctor(model, *arguments):
    return hiddenkey.doctor(model, *arguments, rounds=1, size=3, length=12)


def red(model, *arguments):
    """check -> reasons of the red lines."""
    found = {}
    for finding in doctor(model, *arguments).wrong:
        found.setdefault(finding.check, []).append(f"{finding.where} {finding.reason}")
    return found


def step(model, family="llama"):
    return model(**batch(family))


def disable_dropout(model):
    """What TRL's disable_dropout_in_model does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        yield


# Something takes us off the model after attach: the next training forward is an error.


def remove_the_hooks(model):
    model.model.layers[1].mlp._forward_hooks.clear()


def remove_one_handle(model):
    path, handle = hiddenkey.find_attachment(model).handles[0]
    assert path
    handle.remove()


def swap_the_backend(model):
    model.set_attn_implementation("eager")


def load_another_config(model):
    plain = copy.deepcopy(model.config)
    plain._attn_implementation_internal = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.config = plain


def replace_the_feed_forward(model):
    layer = model.model.layers[1]
    layer.mlp = type(layer.mlp)(model.config)


def replace_the_attention(model):
    layer = model.model.layers[1]
    layer.self_attn = type(layer.self_attn)(model.config, 1)


def fuse_it_away(model):
    """As kernels that fuse a block into its neighbour do: an identity stays in its place."""
    model.model.layers[1].mlp = nn.Identity()


def set_another_rate(model):
    model.hiddenkey_drops[0].p = 0.05


TAKEN_OFF = {
    remove_the_hooks: "a hook of .* was removed from model.layers.1.mlp",
    remove_one_handle: "a hook of .* was removed from model.layers.0.mlp",
    swap_the_backend: "attention implementation was changed to 'eager' after attach",
    load_another_config: "attention implementation was changed to 'sdpa' after attach",
    replace_the_feed_forward: "model.layers.1.mlp is another module now",
    replace_the_attention: "model.layers.1.self_attn is another module",
    fuse_it_away: "model.layers.1.mlp is another module now, a Identity",
    set_another_rate: r"rate of .* was set to 0\.05",
}


@pytest.mark.parametrize("way", TAKEN_OFF, ids=lambda way: way.__name__)
def test_taken_off_is_an_error(way):
    model = attached("llama", RECIPE)
    step(model)
    way(model)
    with pytest.raises(RuntimeError, match=TAKEN_OFF[way]):
        step(model)
    found = red(model)
    assert set(found) == {"attached"}
    step(model.eval())


def test_an_adapter_put_around_a_hooked_module():
    model = attached("llama", RECIPE + " + output:element@0.2")
    adapted = lora(model, ["lm_head"])
    with pytest.raises(RuntimeError, match="an adapter was put around lm_head"):
        step(adapted)
    assert "an adapter was put around lm_head" in red(adapted)["attached"][0]


@pytest.mark.parametrize(
    ("recipe", "target", "wanted"),
    [
        ("hiddenkey@0.3", "q_proj", "a consistency, but this loss was computed without it"),
        ("output:element@0.3", "lm_head", "an adapter was put around lm_head"),
    ],
)
def test_an_adapter_that_calls_a_forward_without_its_hooks(recipe, target, wanted, monkeypatch):
    """As PEFT 0.19 does: nothing of ours on the model itself is called."""
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    model = make("llama")
    hiddenkey.attach(model, recipe)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target]))
    with pytest.raises((RuntimeError, hiddenkey.UserError), match=wanted):
        step(adapted).loss.backward()


def test_an_adapter_that_is_merged_away():
    """After merge_and_unload the modules with our hooks are gone, and so is the outer model."""
    model = lora(make("bert"))
    hiddenkey.attach(model, RECIPE)
    inner = model.merge_and_unload().train()
    with pytest.raises(RuntimeError, match=r"output\.dense is another module now, a Linear"):
        step(inner, "bert")


@pytest.mark.parametrize("way", TAKEN_OFF, ids=lambda way: way.__name__)
def test_detach_works_after_all_that(way):
    model = attached("llama", RECIPE)
    way(model)
    hiddenkey.find_attachment(model).detach()
    model.set_attn_implementation("sdpa")
    assert hiddenkey.find_attachment(model) is None
    assert not hasattr(model, "hiddenkey_drops")
    with hiddenkey.attach(model, "logits[:]:column@0.3") as attachment:
        step(model)
        assert all(rate > 0 for rate in attachment.rates().values())


def test_a_replica_of_data_parallel_is_an_error():
    """Its modules are the model's own but for parameters, and its hooks the very same, in another thread."""
    model = attached("llama", RECIPE)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel.*'logits.*one process per GPU.*CUDA_VISIBLE_DEVICES=0"):
        step(replica)
    step(model)
    model.eval()
    step(model._replicate_for_data_parallel())


# Something goes past our modules: a warning at the first training forward, red lines, and the trainer's log.


def inline_the_feed_forward(model):
    """As fast paths that inline a block do: its code is run, but the module is not called."""
    for layer in model.model.layers:

        def forward(self, hidden_states, position_embeddings=None, **kwargs):
            kwargs = {"position_embeddings": position_embeddings, **kwargs}
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp.forward(self.post_attention_layernorm(hidden_states))

        layer.forward = types.MethodType(forward, layer)


def own_attention(model):
    """As patched attention classes do: their own kernel, without a look at transformers' interface."""
    for layer in model.model.layers:

        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (
                project(hidden_states).view(shape).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None

        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


BYPASSED = {inline_the_feed_forward: "hidden", own_attention: "logits"}


@pytest.mark.parametrize("way", BYPASSED, ids=lambda way: way.__name__)
def test_bypassed_is_a_warning_and_red(way):
    model = attached("llama", RECIPE)
    way(model)
    with pytest.warns(UserWarning, match=rf"{BYPASSED[way]} model\.layers\.0\..* and 1 more drew nothing"):
        step(model)
    found = red(model)
    assert len(found["rate"]) == 4
    assert all(line.startswith(BYPASSED[way]) and "drew nothing" in line for line in found["rate"])


def test_another_function_under_our_name():
    """A kernel registered over ours is called with our sites on the modules, and ignores them."""
    model, name = attached("llama", RECIPE), backend.PREFIX + "sdpa"
    ours = ALL_ATTENTION_FUNCTIONS[name]
    try:
        AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
        assert len(red(model)["rate"]) == 4
    finally:
        AttentionInterface.register(name, ours)
    assert not red(model)


def test_a_fused_loss_that_never_calls_the_head():
    """As fused cross entropies do: they take the weights of the head, and the head is not called."""
    model = attached("llama", "output:element@0.3")

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = states.last_hidden_state @ self.lm_head.weight.T
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=states.past_key_values)

    model.forward = types.MethodType(forward, model)
    assert set(red(model)) == {"rate", "effect"}


def test_a_kernel_that_draws_and_does_not_drop(monkeypatch):
    def ignore(query, key, value, drops, keeps, *, mask, bias=None, scale=None):
        return F.scaled_dot_product_attention(query, key, value, is_causal=mask.causal, scale=scale, enable_gqa=True)

    model = attached("gemma3", "logits[:]:column@0.3")
    monkeypatch.setattr(backend, "attend", ignore)
    monkeypatch.setattr(backend, "known_mask", lambda mask: (backend.Mask(causal=True), None))
    found = red(model)
    assert set(found) >= {"effect"}
    assert "rate" not in found


def test_patched_forwards_that_are_harmless():
    """Liger and hub kernels give a module another forward; our hooks are around it and stay."""
    model = attached("llama", RECIPE)
    for layer in model.model.layers:
        mlp = layer.mlp

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

        mlp.forward = types.MethodType(forward, mlp)
    step(model)
    assert doctor(model).ok


# The rates are not what they should be.


def other_rate(monkeypatch, rate):
    for module in (dropout, hiddenkey.attention_paths):
        monkeypatch.setattr(module, "draw", lambda drop, grid: draw(replace(drop, p=rate), grid))


@pytest.mark.parametrize("pattern", ("element", "column", "span"))
def test_another_rate_is_red(pattern, monkeypatch):
    model = attached("llama", f"hidden[:]:{pattern}@0.3 + logits[:]:{pattern}@0.3")
    assert not red(model)
    other_rate(monkeypatch, 0.75)
    found = red(model)
    assert set(found) == {"rate"}
    assert len(found["rate"]) == 8


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("bert", "sdpa"),
        ("llama", "eager"),
        ("mpnet", "eager"),
        pytest.param("llama", "sdpa", marks=pytest.mark.full),
        pytest.param("t5", "sdpa", marks=pytest.mark.full),
        pytest.param("t5", "eager", marks=pytest.mark.full),
    ],
)
def test_dropouts_disabled_from_outside_reach_ours(family, implementation):
    """As TRL does for preference training: all of ours go off, are seen to be off, and come back."""
    options = {} if family == "mpnet" else {"attn_implementation": implementation}
    model, inputs = make(family, **options), inputs_for(family, "right")
    before = snapshot(model)
    recipe = "input:column@0.2 + logits[:]:column@0.3 + weights[:]:element@0.3 + hidden[:]:column@0.3"
    attachment = hiddenkey.attach(model, recipe)
    keys = list(model.state_dict())
    disable_dropout(model)
    with pytest.warns(UserWarning, match="switched off: .*logits.*: p was set to 0, as TRL's disable_dropout"):
        found = logits_of(model, inputs)
    assert torch.equal(found, logits_of(quiet(family, **options), inputs))
    assert set(attachment.rates().values()) == set(attachment.position_rates().values()) == {0.0}
    assert "switched off" in str(find_transformer(model)[1].hiddenkey_drops)
    assert all("switched off" in line for line in red(model)["rate"])
    for switch in attachment.switches:
        switch.p = switch.drop.p
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    assert doctor(model).ok
    assert list(model.state_dict()) == keys == list(make(family).state_dict())
    disable_dropout(model)
    attachment.detach()
    assert snapshot(model) == before


def test_some_drops_off_and_others_on():
    model, inputs = attached("llama", "logits[:]:column@0.4 + weights[:]:element@0.4"), inputs_for("llama", "right")
    other = attached("llama", "weights[:]:element@0.4")
    model.hiddenkey_drops[0].p = 0
    with pytest.warns(UserWarning, match="switched off: logits"):
        torch.manual_seed(1)
        found = logits_of(model, inputs)
    torch.manual_seed(1)
    assert torch.equal(found, logits_of(other, inputs))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", (copy.deepcopy, through_pickle))
def test_the_switches_of_a_copy_are_its_own(way):
    model, inputs = attached("llama", RECIPE), inputs_for("llama", "right")
    other = way(model)
    disable_dropout(other)
    with pytest.warns(UserWarning, match="switched off"):
        assert torch.equal(logits_of(other, inputs), logits_of(other, inputs))
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    assert doctor(model).ok
    assert not doctor(other).ok


def test_trl_itself():
    utils = pytest.importorskip("trl.trainer.utils")
    model = lora(make("llama"))
    attachment = hiddenkey.attach(model, RECIPE)
    utils.disable_dropout_in_model(model)
    assert not any(switch.is_on for switch in attachment.switches)


def test_own_dropouts_turned_on_again():
    model = attached("bert", RECIPE)
    model.bert.embeddings.dropout.p = 0.1
    found = red(model)
    assert set(found) >= {"own dropouts"}
    assert "bert.embeddings.dropout.p 0.1" in found["own dropouts"][0]


# The mode, and what is recomputed.


def test_evaluation_mode_is_red():
    model = attached("llama", RECIPE).eval()
    assert list(red(model)) == ["training mode"]
    assert not model.training


def test_a_part_in_evaluation_mode_is_a_warning_and_red():
    model = attached("llama", RECIPE)
    model.model.layers[2].eval()
    with pytest.warns(UserWarning, match=r"layers\.2\.mlp.*layers\.2\.self_attn drew nothing"):
        step(model)
    found = red(model)
    assert set(found) == {"training mode", "rate"}
    assert all("evaluation mode" in line for line in found["rate"])


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_recomputing_with_other_masks_is_red(family):
    model = lora(make(family))
    hiddenkey.attach(model, RECIPE)
    find_transformer(model)[1].gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert "preserve_rng_state" in red(model)["recompute"][0]
    find_transformer(model)[1].gradient_checkpointing_enable({"use_reentrant": False})
    assert doctor(model).ok


def test_recomputing_that_loses_every_gradient_is_red():
    model = lora(make("llama"), ["q_proj", "v_proj"])
    hiddenkey.attach(model, RECIPE)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    assert "no gradient comes through" in red(model)["recompute"][0]


# Drops that do harm.


def drop_as(monkeypatch, function):
    """Another way to apply a mask in every stream."""
    for module in (sites, skip):
        monkeypatch.setattr(module, "drop_stream", lambda x, drop, keep: function(x, keep))


def test_drops_in_evaluation_are_red(monkeypatch):
    model = attached("llama", RECIPE)
    monkeypatch.setattr(sites.StreamSite, "is_active", lambda self, module: True)
    assert set(red(model)) >= {"evaluation", "generate"}


def test_a_gradient_that_stops_at_a_drop_is_red(monkeypatch):
    model = attached("llama", "hidden[:]:element@0.3")
    drop_as(monkeypatch, lambda x, keep: (x * keep).detach())
    assert "mlp" in red(model)["gradients"][0]


def test_a_gradient_that_is_not_finite_is_red(monkeypatch):
    model = attached("llama", "hidden[3:]:element@0.3")
    drop_as(monkeypatch, lambda x, keep: x * keep / 0.0)
    assert "not finite" in red(model)["gradients"][0]


def test_a_look_ahead_is_red(monkeypatch):
    model = attached("llama", "hidden[:]:element@0.3")
    drop_as(monkeypatch, lambda x, keep: x * keep + x.mean(1, keepdim=True))
    assert set(red(model)) == {"causality"}


def test_new_keys_are_red():
    model = lora(make("llama"))
    hiddenkey.attach(model, RECIPE)
    find_transformer(model)[1].hiddenkey_drops.register_buffer("count", torch.zeros(1))
    assert "hiddenkey_drops.count" in red(model)["saved keys"][0]


def test_two_views_that_are_one_are_red(monkeypatch):
    model = attached("bert", "hiddenkey@0.3")
    monkeypatch.setattr(
        "hiddenkey.hf.training_step.compared", lambda *_: views.Compared(torch.ones(3, 2, requires_grad=True), None)
    )
    assert "the two views are the same" in red(model)["consistency"][0]


def test_a_consistency_that_does_not_fit_is_red():
    model = make("bert", problem_type="multi_label_classification")
    assert "several yes/no answers" in red(model, "hiddenkey@0.3")["consistency"][0]


# What looks alike and loses nothing.


def test_a_cache_in_training_loses_nothing():
    model = attached("llama", RECIPE)
    model(**batch("llama"), use_cache=True)
    assert all(rate > 0 for rate in hiddenkey.find_attachment(model).rates().values())


@pytest.mark.full
def test_compiled_before_attach():
    """A compiled model that was run before attach is compiled again, or told to be past us."""
    torch._dynamo.reset()
    model = make("llama", depth=1)
    run = torch.compile(model, backend="eager")
    run(**batch("llama"))
    hiddenkey.attach(model, RECIPE)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        run(**batch("llama"))
    rates = hiddenkey.find_attachment(model).rates()
    torch._dynamo.reset()
    assert all(rate > 0 for rate in rates.values()), rates
