"""Every known way to lose dropout, or to be harmed by it, without being told: one table of what is said of each.

A row is a fault done to an attached model. Its columns are all there is to hear: the error of the next training
forward, the error of its backward pass, the error of a step with the consistency, the warning of any of them, the
sentence in a trainer's log, and the doctor's red lines. What a row does not name must stay silent.
"""

import copy
import pickle
import re
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import hiddenkey

from ..api import (
    attention_backend,
    attention_paths,
    compared_outputs,
    draw,
    dropout,
    find_transformer,
    is_recomputing,
    log_what_is_wrong,
    sites,
    training_step,
)
from .adapters import build
from .tiny import batch, make
from .tools import lora, quiet

RECIPE = "hiddenkey-[:]@0.3"
TIED = "hiddenkey[:]@0.3 ~ kl*0.5"
MISSED = r"has a consistency, but this loss.*DropTrainer.*ConsistencyMixin.*consistency_step.*attach '"
EVALUATION = r"evaluation mode, as from_pretrained leaves it; call model\.train\(\)"
NO_GRADIENT = "does not require grad"
OTHERS = ("fan_in_fan_out", "tie_word_embeddings", "use_reentrant", "None of the inputs have requires_grad")


@dataclass(frozen=True)
class Fault:
    """do(model, monkeypatch): the fault; what it returns, if anything, is run in the model's place.

    error, backward, step, warning, log: a regular expression, None for silence. step: None where `error` stands, too.
    red: check -> what each of its red lines matches, a tuple: one after the other; None: not examined.
    on: makes the model that the recipe is attached to. inputs: besides a batch of the family. loss: what is learned
    from the outputs.
    """

    do: Callable[..., Any]
    recipe: str = RECIPE
    family: str = "llama"
    on: Callable[[], Any] | None = None
    error: str | None = None
    backward: str | None = None
    step: str | None = None
    warning: str | None = None
    log: str | None = None
    red: Mapping[str, str | tuple[str, ...]] | None = field(default_factory=dict)
    loss: Callable[[Any], Any] = lambda outputs: outputs.loss
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.do.__name__}, {self.family}, {self.recipe}"


def in_lora(family="bert", **options):
    return lambda: lora(make(family, depth=2), **options)


# Something takes us off the model after attach.


def remove_the_hooks(model, _):
    model.model.layers[1].mlp._forward_hooks.clear()


def remove_one_handle(model, _):
    hiddenkey.find_attachment(model).handles[0][1].remove()


def swap_the_backend(model, _):
    model.set_attn_implementation("eager")


def load_another_config(model, _):
    plain = copy.deepcopy(model.config)
    plain._attn_implementation_internal = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.config = plain


def replace_the_feed_forward(model, _):
    layer = model.model.layers[1]
    layer.mlp = type(layer.mlp)(model.config)


def replace_the_attention(model, _):
    layer = model.model.layers[1]
    layer.self_attn = type(layer.self_attn)(model.config, 1)


def fuse_it_away(model, _):
    """As kernels that fuse a block into its neighbour do: an identity stays in its place."""
    model.model.layers[1].mlp = nn.Identity()


def set_another_rate(model, _):
    model.hiddenkey_drops[0].p = 0.05


def put_an_adapter_around(model, _):
    return lora(model, ["lm_head"])


def put_an_adapter_of_an_old_peft_around(target, model, monkeypatch):
    """PEFT 0.19 calls the forward of what is inside without its hooks: nothing of ours on the model is called."""
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target]))


def merge_the_adapter_away(model, _):
    """The modules with our hooks are gone, and so is the outer model."""
    return model.merge_and_unload().train()


def replicate(model, _):
    """nn.DataParallel: its modules are the model's own but for parameters, its hooks the very same."""
    return model._replicate_for_data_parallel()


def old_peft(target):
    do = partial(put_an_adapter_of_an_old_peft_around, target)
    do.__name__ = "put_an_adapter_of_an_old_peft_around"
    return do


HEAD = RECIPE + " + output:element@0.2"
TAKEN_OFF = {
    remove_the_hooks: "a hook of .* was removed from model.layers.1.mlp; take off your own hooks one by one",
    remove_one_handle: "a hook of .* was removed from model.layers.0.mlp",
    swap_the_backend: "attention implementation was changed to 'eager' after attach",
    load_another_config: "attention implementation was changed to 'sdpa' after attach",
    replace_the_feed_forward: "model.layers.1.mlp is another module now, a LlamaMLP",
    replace_the_attention: "model.layers.1.self_attn is another module",
    fuse_it_away: "model.layers.1.mlp is another module now, a Identity",
    set_another_rate: r"rate of .* was set to 0\.05: 0 switches it off",
}
REMOVED = [Fault(do, error=said, red={"attached": f"{said}|a hook of"}) for do, said in TAKEN_OFF.items()]
AROUND = "an adapter was put around lm_head"
REMOVED += [
    Fault(put_an_adapter_around, HEAD, error=AROUND, red={"attached": AROUND}),
    Fault(old_peft("lm_head"), "output:element@0.3", error=AROUND, red={"attached": AROUND}),
    Fault(
        merge_the_adapter_away,
        family="bert",
        on=lambda: lora(make("bert", depth=2)),
        error=r"output\.dense is another module now, a Linear",
        red={"attached": "is another module"},
    ),
    Fault(replicate, error=r"DataParallel.*'logits.*one process per GPU.*CUDA_VISIBLE_DEVICES=0", red=None),
]


# Something goes past our modules.


def inline_the_feed_forward(model, _):
    """As fast paths that inline a block do: its code is run, but the module is not called."""

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        kwargs = {"position_embeddings": position_embeddings, **kwargs}
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp.forward(self.post_attention_layernorm(hidden_states))

    for layer in model.model.layers:
        layer.forward = types.MethodType(forward, layer)


def own_attention(model, _):
    """As patched attention classes do: their own kernel, without a look at transformers' interface."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


def register_over_our_name(_, monkeypatch):
    """A kernel registered over ours is called with our sites on the modules, and ignores them."""
    name = attention_backend.PREFIX + "sdpa"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, ALL_ATTENTION_FUNCTIONS["sdpa"])


def fuse_the_loss(model, _):
    """As fused cross entropies do: they take the weights of the head, and the head is not called."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = states.last_hidden_state @ self.lm_head.weight.T
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=states.past_key_values)

    transformer = find_transformer(model)[1]
    transformer.forward = types.MethodType(forward, transformer)


def attend_without(*positions):
    """A kernel that is given masks, and ignores those at some positions."""

    def ignore_the_mask(_, monkeypatch):
        def without(query, key, value, drops, keeps, **options):
            keeps = [keep | (drop.position in positions) for drop, keep in zip(drops, keeps, strict=True)]
            return attend(query, key, value, drops, keeps, **options)

        attend = attention_backend.attend
        monkeypatch.setattr(attention_backend, "attend", without)

    return ignore_the_mask


def lose_one_site(how):
    """Of many sites one draws and gives on what came, or draws the same mask for ever."""

    def drop_nothing(model, monkeypatch):
        site = dict(hiddenkey.find_attachment(model).sites)["model.layers.1.mlp"]
        monkeypatch.setattr(site, "_drop", lambda x: (site.draw(x), x)[1], raising=False)

    def draw_always_the_same(model, monkeypatch):
        lost, real = dict(hiddenkey.find_attachment(model).sites)["model.layers.1.mlp"], sites.StreamSite.draw

        def same(self, x):
            with torch.random.fork_rng(devices=[], enabled=self is lost):
                if self is lost:
                    torch.manual_seed(0)
                return real(self, x)

        monkeypatch.setattr(sites.StreamSite, "draw", same)

    return {"nothing": drop_nothing, "same": draw_always_the_same}[how]


def activate_no_site(model, monkeypatch):
    for _, site in hiddenkey.find_attachment(model).sites:
        monkeypatch.setattr(site, "is_active", lambda module: False, raising=False)


ALONE = "another draw at {} alone changes nothing: the mask is ignored there, or never another"
UNSEEN = {"effect": "same as|changes nothing"}


def lost(position):
    """What is said where every site of a drop is gone past."""
    silent = rf"{position} model\.layers\.0.*, {position} model\.layers\.1.* drew nothing"
    never = rf"'{position}.*' dropped nothing.*model\.layers\.0\..* is never called as a module"
    signals = {"warning": silent, "log": silent, "backward": never, "step": never}
    return {**signals, "red": {"rate": (f"{position}.*drew nothing: the forward goes past",) * 2}}


HEADLESS = r"output .*lm_head drew nothing"
NEVER = r"'output:element@0\.3' dropped nothing.*lm_head is never called"
SAME = "the output in training is the same as "
FUSED = {"warning": HEADLESS, "log": HEADLESS, "backward": NEVER, "step": NEVER}
FUSED |= {"red": {"rate": "drew nothing", "effect": (SAME + "without drops", SAME + "with another draw")}}
PAST = [
    Fault(inline_the_feed_forward, **lost("hidden")),
    Fault(own_attention, **lost("logits")),
    Fault(register_over_our_name, **lost("logits")),
    Fault(fuse_the_loss, "output:element@0.3", **FUSED),
    Fault(fuse_the_loss, "output:element@0.3", on=in_lora("llama", targets=["q_proj"], lora_dropout=0.5), **FUSED),
    Fault(attend_without("logits"), "logits[:]:column@0.3", "gemma3", red=UNSEEN),
    Fault(
        attend_without("logits"),
        family="gemma3",
        red={"effect": ALONE.format("logits model.layers.0.self_attn, logits model.layers.1.self_attn")},
    ),
    Fault(
        attend_without("weights"),
        "logits[:]:column@0.3 + weights[:]:element@0.3",
        on=lambda: make("llama", depth=1),
        red={"effect": ALONE.format("weights model.layers.0.self_attn")},
    ),
    Fault(lose_one_site("nothing"), red={"effect": ALONE.format("hidden model.layers.1.mlp")}),
    Fault(lose_one_site("same"), red={"effect": ALONE.format("hidden model.layers.1.mlp")}),
    Fault(
        lose_one_site("same"),
        "hidden[1:2]:element@0.3",
        red={"effect": (SAME + "with another draw", ALONE.format("hidden model.layers.1.mlp"))},
    ),
    Fault(
        activate_no_site,
        "hidden[:]:element@0.3 ~ kl",
        "bert",
        warning="drew nothing",
        log="drew nothing",
        backward=MISSED,
        step="dropped nothing",
        red={"rate": "drew nothing", "consistency": "kl\\*1 is 0: the two views are the same", "effect": "same as"},
    ),
]


# Drops are off, or fall at another rate.


def draw_at(rate):
    def draw_at_another_rate(_, monkeypatch):
        for module in (dropout, attention_paths):
            monkeypatch.setattr(module, "draw", lambda drop, grid: draw(replace(drop, p=rate), grid))

    return draw_at_another_rate


def disable_dropout(model, _=None):
    """What TRL's disable_dropout_in_model does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def disable_dropout_with_trl(model, _):
    pytest.importorskip("trl.trainer.utils").disable_dropout_in_model(model)


def switch_one_drop_off(model, _):
    model.hiddenkey_drops[0].p = 0


def turn_an_own_dropout_on(model, _):
    model.bert.embeddings.dropout.p = 0.1


OFF = r"switched off: logits.* \+ hidden.*: p was set to 0, as TRL's disable_dropout"
BOTH = "hidden[:]:{0}@0.3 + logits[:]:{0}@0.3"
OWN = r"bert\.embeddings\.dropout\.p 0\.1"
RATES = [
    Fault(draw_at(0.75), BOTH.format("element"), log="that is no chance", red={"rate": ("0.3 is outside",) * 4}),
    Fault(draw_at(0.95), BOTH.format("column"), log="that is no chance", red={"rate": ("0.3 is outside",) * 4}),
    Fault(draw_at(0.75), BOTH.format("span"), red={"rate": ("round.p x length. is",) * 4}),
    Fault(draw_at(0.05), "hidden[:]:span@0.3", "bert", red={"rate": ("round.p x length. is",) * 2}),
    Fault(disable_dropout, warning=OFF, log=OFF, red={"rate": ("switched off",) * 4}),
    Fault(disable_dropout_with_trl, warning=OFF, log=OFF, red={"rate": ("switched off",) * 4}),
    Fault(
        switch_one_drop_off, warning="switched off: logits", log="switched off: logits", red={"rate": ("logits",) * 2}
    ),
    Fault(
        turn_an_own_dropout_on, family="bert", log=f"turned on again after attach: {OWN}", red={"own dropouts": OWN}
    ),
]


# The mode.


def evaluate(model, _):
    model.eval()


def evaluate_a_layer(model, _):
    model.model.layers[1].eval()


def evaluate_the_model_alone(model, _):
    model.training = False


def evaluate_inside(model, _):
    model.base_model.eval()


def run_the_model_inside(model, _):
    model.base_model.eval()
    return model.get_base_model()


def never_switch(model, _):
    """As from_pretrained and get_peft_model leave it."""


def as_published(**options):
    return lambda: peft.get_peft_model(quiet("bert", depth=2).eval(), peft.LoraConfig(**options))


IN_EVALUATION = {"training mode": r"evaluation mode.*call model\.train\(\)"}
ASLEEP = r"layers\.1\.mlp.*layers\.1\.self_attn drew nothing"
NO_STEP = f"training step of .*{EVALUATION}"
BACKWARD = f"drops nothing.*{EVALUATION}"
STEP = {"backward": BACKWARD, "step": NO_STEP, "log": "drew nothing since the last log", "red": IN_EVALUATION}
MODES = [
    Fault(evaluate, family="bert", warning=BACKWARD, log="drew nothing", step=NO_STEP, red=IN_EVALUATION),
    Fault(evaluate, TIED, "bert", warning=BACKWARD, log="drew nothing", step=NO_STEP, red=IN_EVALUATION),
    Fault(
        evaluate,
        "baseline ~ kl-rdrop",
        "bert",
        in_lora(lora_dropout=0.5),
        warning=BACKWARD,
        step=NO_STEP,
        red=IN_EVALUATION,
    ),
    Fault(
        evaluate_a_layer,
        warning=ASLEEP,
        log=ASLEEP,
        red={"training mode": "layers.1", "rate": ("drew nothing: its module is in evaluation mode",) * 2},
    ),
    Fault(
        evaluate_the_model_alone, "hidden[:]:element@0.3", red={"training mode": "the model is in evaluation mode"}
    ),
    Fault(evaluate_inside, on=in_lora("llama"), **STEP),
    Fault(run_the_model_inside, on=in_lora("llama"), **STEP),
    Fault(never_switch, TIED, "bert", as_published(target_modules="all-linear"), **STEP),
    *(
        Fault(never_switch, RECIPE, "bert", as_published(target_modules="all-linear", **kind), **STEP)
        for kind in ({}, {"modules_to_save": ["classifier"]}, {"use_dora": True}, {"use_rslora": True})
    ),
]


# The consistency is not learned from.


def nothing(model, _):
    """A loss of the user's own loop, computed without the consistency."""


def copy_it(model, _):
    return copy.deepcopy(model)


def pickle_it(model, _):
    return pickle.loads(pickle.dumps(model))


def give_the_model_inside(model, _):
    return model.get_base_model()


def tie_as(change):
    def tie_the_views_wrongly(_, monkeypatch):
        real = training_step.tie
        monkeypatch.setattr(training_step, "tie", lambda *arguments: change(real(*arguments)))

    return tie_the_views_wrongly


def compare_a_view_with_itself(_, monkeypatch):
    same = compared_outputs.Compared(torch.ones(3, 2, requires_grad=True), None)
    monkeypatch.setattr(training_step, "compared", lambda *_: same)


STATES = {"output_hidden_states": True, "output_attentions": True}
EAGER = partial(make, "llama", depth=2, attn_implementation="eager")
TAUGHT_NOTHING = {"consistency": "reaches 0 parameters"}
UNTIED = [
    *(Fault(nothing, TIED, family, backward=MISSED) for family in ("bert", "llama", "t5")),
    Fault(nothing, TIED, backward=MISSED, loss=lambda outputs: outputs.logits.sum() * 2),
    Fault(nothing, TIED, on=EAGER, backward=MISSED, inputs=STATES, loss=lambda out: out.hidden_states[-1].sum()),
    Fault(nothing, TIED, on=EAGER, backward=MISSED, inputs=STATES, loss=lambda out: out.hidden_states[-2].sum()),
    Fault(
        nothing, TIED, on=EAGER, backward=MISSED, inputs=STATES, loss=lambda out: out.attentions[-1].square().sum()
    ),
    Fault(give_the_model_inside, TIED, on=in_lora("llama"), backward=MISSED),
    Fault(nothing, TIED, on=lambda: build("prompt tuning", "llama"), backward=MISSED, red=None),
    Fault(old_peft("q_proj"), TIED, backward=MISSED),
    Fault(copy_it, TIED, "bert", backward=MISSED),
    Fault(pickle_it, TIED, "bert", backward=MISSED),
    *(
        Fault(nothing, recipe, "bert", in_lora(lora_dropout=0.5), backward=MISSED)
        for recipe in ("hiddenkey@0 ~ kl", "baseline ~ kl-rdrop")
    ),
    *(
        Fault(nothing, recipe, "bert", red={"consistency": r"kl\*1 is 0: the two views are the same"})
        for recipe in ("hiddenkey@0 ~ kl", "baseline ~ kl")
    ),
    Fault(tie_as(torch.Tensor.detach), TIED, "bert", backward=MISSED, red=TAUGHT_NOTHING),
    Fault(tie_as(lambda term: term * 0 + 0.5), TIED, "bert", backward=MISSED, red=TAUGHT_NOTHING),
    Fault(
        tie_as(lambda term: term * torch.nan),
        TIED,
        "bert",
        backward=MISSED,
        red={"consistency": r"kl\*0.5 is nan, as are the logits of one view or both"},
    ),
    Fault(
        compare_a_view_with_itself, TIED, "bert", backward=MISSED, red={"consistency": "the two views are the same"}
    ),
    Fault(
        nothing,
        TIED,
        "bert",
        partial(make, "bert", depth=2, problem_type="multi_label_classification"),
        inputs={"labels": torch.eye(3)},
        backward=MISSED,
        step="several yes/no answers",
        red={"consistency": "several yes/no answers"},
    ),
]


# What is recomputed differs, or what is put out or saved.


def recompute(**options):
    def recompute_otherwise(model, _):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, **options)

    return recompute_otherwise


def recompute_one_layer_with_other_masks(model, _):
    """Little differs, all of it below that layer, and not in the parameter that comes first."""
    layer = model.bert.encoder.layer[1]
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def with_a_first_parameter():
    model = make("bert", depth=2)
    model.first = nn.Parameter(torch.ones(3))
    model.classifier.register_forward_hook(lambda module, args, output: output * model.first)
    return model


def draw_only_once(_, monkeypatch):
    real = sites.draw_stream

    def once(*arguments):
        if is_recomputing():
            raise ValueError("no draw is left")
        return real(*arguments)

    monkeypatch.setattr(sites, "draw_stream", once)


def drop_as(function, always=False):
    """Another way to apply a mask in every stream, in evaluation too where always."""

    def drop_otherwise(_, monkeypatch):
        monkeypatch.setattr(sites, "drop_stream", lambda x, drop, keep: function(x, keep))
        if always:
            monkeypatch.setattr(sites.StreamSite, "is_active", lambda self, module: True)

    return drop_otherwise


class Wrapper(nn.Module):
    """The names of its parameters are not those of the plain model, the parameters are."""

    def __init__(self, model):
        super().__init__()
        self.network, self.config = model, model.config

    def forward(self, **inputs):
        return self.network(**inputs)


def cut_the_gradient_in_a_wrapper(model, monkeypatch):
    drop_as(lambda x, keep: (x * keep).detach())(model, monkeypatch)
    return Wrapper(model)


def divide_one_gradient_by_zero(model, _):
    model.classifier.bias.register_hook(lambda gradient: gradient / torch.tensor([1.0, 0.0, 1.0]))


def save_another_key(model, _):
    find_transformer(model)[1].hiddenkey_drops.register_buffer("count", torch.zeros(1))


def save_another_key_with_the_adapter(model, monkeypatch):
    real, ours = peft.get_peft_model_state_dict, {"hiddenkey_drops.count": torch.zeros(1)}
    monkeypatch.setattr(
        peft, "get_peft_model_state_dict", lambda m, **names: real(m, **names) | (ours if m is model else {})
    )


def end_the_text_at_once(model, monkeypatch):
    """The first token that the model writes ends the text; drops are in those that follow it alone."""
    prompt = {name: value[:1] for name, value in batch("llama", labels=False).items()}
    first = make("llama", depth=2).eval().generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    model.generation_config.eos_token_id = int(first)
    drop_as(lambda x, keep: x if x.shape[1] > 1 else -x, always=True)(model, monkeypatch)


def train_nothing(model, _):
    model.requires_grad_(False)
    return model


STREAM = "hidden[:]:element@0.3"
OTHER_MASKS = r"the second forward draws other masks \(is preserve_rng_state off\?\)"
HARM = [
    Fault(
        recompute(use_reentrant=False, preserve_rng_state=False),
        family="bert",
        on=in_lora(),
        red={"recompute": OTHER_MASKS},
    ),
    Fault(
        recompute(use_reentrant=False, preserve_rng_state=False), on=in_lora("llama"), red={"recompute": OTHER_MASKS}
    ),
    Fault(
        recompute(use_reentrant=True),
        on=in_lora("llama", targets=["q_proj", "v_proj"]),
        backward=NO_GRADIENT,
        step=NO_GRADIENT,
        red={"recompute": "no gradient comes through"},
    ),
    Fault(
        recompute_one_layer_with_other_masks,
        "hidden[1:]:element@0.05",
        "bert",
        with_a_first_parameter,
        red={"recompute": rf"recomputed as the model is set to differ by 0\..*{OTHER_MASKS}"},
    ),
    Fault(draw_only_once, STREAM, red={"recompute": "as they can without: no draw is left"}),
    Fault(
        drop_as(lambda x, keep: x * keep, always=True),
        STREAM,
        red={"evaluation": "outputs differ from the plain model's by", "generate": "tokens differ", **UNSEEN},
    ),
    Fault(
        drop_as(lambda x, keep: x * (1 + 1e-6), always=True), STREAM, "bert", red={"evaluation": "differ", **UNSEEN}
    ),
    Fault(end_the_text_at_once, STREAM, red={"generate": "tokens differ", **UNSEEN}),
    Fault(
        drop_as(lambda x, keep: (x * keep).detach()), STREAM, red={"gradients": "mlp.*, which the plain model does"}
    ),
    Fault(
        cut_the_gradient_in_a_wrapper,
        STREAM,
        on=in_lora("llama", targets=["q_proj", "down_proj"]),
        red={"gradients": "which the plain model does reach"},
    ),
    Fault(
        drop_as(lambda x, keep: x * keep / 0.0),
        "hidden[1:]:element@0.3",
        red={"gradients": "not finite", "causality": "nan"},
    ),
    Fault(
        divide_one_gradient_by_zero,
        STREAM,
        "bert",
        red={"gradients": "not finite in classifier.bias", "recompute": "nan"},
    ),
    Fault(drop_as(lambda x, keep: x * keep + x.mean(1, keepdim=True)), STREAM, red={"causality": "before it by"}),
    Fault(
        drop_as(lambda x, keep: x * keep + 0.02 * x.roll(-1, 1)),
        "hidden[1:]:element@0.3",
        red={"causality": r"before it by 0\.0"},
    ),
    Fault(save_another_key, on=in_lora("llama"), red={"saved keys": r"hiddenkey_drops\.count"}),
    Fault(
        save_another_key_with_the_adapter,
        on=in_lora("llama"),
        red={"adapter keys": "keys that plain PEFT does not write"},
    ),
    Fault(
        train_nothing,
        STREAM,
        "bert",
        backward=NO_GRADIENT,
        step="nothing in this model can be trained",
        red={"gradients": "no parameter is trainable; add an adapter"},
    ),
]


# What looks alike and is no fault: nothing is said.


def patch_a_forward(model, _):
    """Liger and hub kernels give a module another forward; our hooks are around it and stay."""

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)


HARMLESS = [
    Fault(patch_a_forward),
    Fault(nothing, inputs={"use_cache": True}),
    Fault(nothing, "baseline", "bert"),
    Fault(evaluate, "baseline", "bert", red=None),
    *(
        Fault(nothing, recipe, "bert", in_lora(lora_dropout=rate))
        for recipe, rate in (("baseline", 0.5), ("baseline", 0.0))
    ),
    Fault(recompute(use_reentrant=False), on=in_lora("llama")),
]


def matches(found, wanted):
    """Whether something was said as it should be, or nothing."""
    return not found if wanted is None else re.search(wanted, found, re.DOTALL) is not None


@pytest.fixture
def heard():
    """The warnings that are not other libraries'."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        for other in OTHERS:
            warnings.filterwarnings("ignore", f"(?s).*{other}")
        yield caught


def error_of(action):
    """(what it gives, what it says where it fails)."""
    try:
        return action(), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def red_lines(model, inputs):
    """check -> its red lines."""
    lines: dict[str, list[str]] = {}
    for finding in hiddenkey.doctor(model, batches=[inputs], rounds=1).wrong:
        lines.setdefault(finding.check, []).append(f"{finding.where} {finding.reason}")
    return lines


@pytest.mark.parametrize("fault", [*REMOVED, *PAST, *RATES, *MODES, *UNTIED, *HARM, *HARMLESS], ids=str)
def test_what_is_said_of_a_fault(fault, monkeypatch, heard, caplog):
    torch.manual_seed(1)
    model = fault.on() if fault.on else make(fault.family, depth=2)
    hiddenkey.attach(model, fault.recipe)
    model = fault.do(model, monkeypatch) or model
    attachment, inputs = hiddenkey.find_attachment(model), batch(fault.family) | fault.inputs
    outputs, error = error_of(lambda: model(**inputs))
    assert matches(error, fault.error), error
    if fault.error is None:
        log_what_is_wrong(types.SimpleNamespace(), attachment)
        assert matches(caplog.text, fault.log), caplog.text
        _, error = error_of(lambda: fault.loss(outputs).backward())
        assert matches(error, fault.backward), error
    _, error = error_of(lambda: hiddenkey.consistency_step(model, inputs).total.backward())
    assert matches(error, fault.step or fault.error), error
    said = "\n".join(str(warning.message) for warning in heard)
    assert matches(said, fault.warning), said
    if fault.red is not None:
        found = red_lines(model, inputs)
        assert set(found) == set(fault.red), found
        for check, lines in found.items():
            wanted = fault.red[check]
            wanted = (wanted,) * len(lines) if isinstance(wanted, str) else wanted
            assert len(wanted) == len(lines), lines
            assert all(map(re.search, wanted, lines)), lines
    monkeypatch.undo()
    with torch.no_grad():
        model.eval()(**inputs)
    attachment.detach()
    plain = attachment.model
    assert hiddenkey.find_attachment(plain) is None
    assert not any(hasattr(module, "hiddenkey_drops") for module in plain.modules())
    assert not plain._forward_hooks
    assert not plain._forward_pre_hooks
    if fault.backward == MISSED:
        plain.train()(**inputs).loss.backward()
    if fault.error is not None:
        with hiddenkey.attach(plain.train(), "logits[:]:column@0.3") as again:
            plain(**inputs)
            assert all(rate > 0 for rate in again.rates().values())
