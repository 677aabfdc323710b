"""Red lines that a check could miss by looking at something else: found by breaking the checks themselves."""

import json
import types
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import hiddenkey
from hiddenkey import dropout
from hiddenkey.hf import attention_backend as backend
from hiddenkey.hf import sites
from hiddenkey.hf import sites as skip
from hiddenkey.hf import training_step as step
from hiddenkey.hf.doctor.rates import FALSE_ALARM
from hiddenkey.hf.rate_monitor import interval
from hiddenkey.hf.structure import find_transformer
from hiddenkey.masks import draw, is_recomputing

from .tiny import batch, make
from .tools import attached, lora


def examined(model, *arguments):
    return hiddenkey.doctor(model, *arguments, rounds=1, size=3, length=12)


def red(model, *arguments):
    return {finding.check: finding.reason for finding in examined(model, *arguments).wrong}


def reasons(diagnosis, check):
    return [finding.reason for finding in diagnosis.findings if finding.check == check]


@pytest.mark.parametrize("tie", ("held constant", "without effect"))
def test_a_term_that_teaches_nothing(tie, monkeypatch):
    real = step.tie

    def broken(*arguments):
        term = real(*arguments)
        return term.detach() if tie == "held constant" else term * 0 + 0.5

    monkeypatch.setattr(step, "tie", broken)
    assert "reaches 0 parameters" in red(attached("bert", "hiddenkey@0.3"))["consistency"]


def test_a_term_that_is_no_number(monkeypatch):
    real = step.tie
    monkeypatch.setattr(step, "tie", lambda *arguments: real(*arguments) * torch.nan)
    assert red(attached("bert", "hiddenkey@0.3"))["consistency"] == (
        "kl*1 is nan, as are the logits of one view or both"
    )


def test_json_has_no_number_for_what_is_not_finite():
    finding = hiddenkey.Finding(
        "recompute", "wrong", "no", values={"gradients": float("inf"), "loss": 0.5, "how": "a"}
    )
    found = hiddenkey.Diagnosis("hiddenkey@0.1", "a model", (finding,)).to_dict()
    [written] = json.loads(json.dumps(found, allow_nan=False))["findings"]
    assert written["values"] == {"gradients": None, "loss": 0.5, "how": "a"}


@pytest.mark.parametrize("number", ("rounds", "size", "length"))
def test_numbers_below_one_are_refused(number):
    with pytest.raises(hiddenkey.UserError, match=f"{number} = 0 is not allowed: it is 1 or more"):
        hiddenkey.doctor(make("bert"), "hiddenkey@0.1", **{number: 0})


def test_the_adapters_dropout_is_no_effect_of_ours():
    """The head's weight is read past our drop; the outputs differ all the same, by `lora_dropout`."""
    model = lora(make("llama"), ["q_proj"], lora_dropout=0.5)
    hiddenkey.attach(model, "output:element@0.3")
    transformer = find_transformer(model)[1]

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits = states @ self.lm_head.weight.T
        return {"loss": logits.square().mean(), "logits": logits}

    transformer.forward = types.MethodType(forward, transformer)
    transformer.generate = lambda **_: torch.zeros(1)
    found = hiddenkey.doctor(model, None, [batch("llama")], rounds=1).wrong
    assert [finding.check for finding in found].count("effect") == 2


def test_a_recomputation_that_fails_with_the_recipe_alone(monkeypatch):
    real = sites.draw_stream

    def once(*arguments):
        if is_recomputing():
            raise ValueError("no draw is left")
        return real(*arguments)

    monkeypatch.setattr(sites, "draw_stream", once)
    found = red(attached("llama", "hidden[:]:element@0.3"))
    assert set(found) == {"recompute"}
    assert "as they can without: no draw is left" in found["recompute"]


def test_one_layer_that_is_recomputed_with_other_masks():
    """Little differs, all of it below that layer, and not in the parameter that comes first."""
    model = make("bert")
    model.first = nn.Parameter(torch.ones(3))
    model.classifier.register_forward_hook(lambda module, args, output: output * model.first)
    hiddenkey.attach(model, "hidden[3:]:element@0.05")
    layer = model.bert.encoder.layer[3]
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    (finding,) = (finding for finding in examined(model).findings if finding.check == "recompute")
    assert finding.verdict == "wrong"
    assert "recomputed as the model is set to" in finding.reason
    assert 0.01 < finding.values["gradients"] < 0.8


def test_nothing_to_train():
    model = attached("bert", "hidden[:]:element@0.3", depth=2).requires_grad_(False)
    diagnosis = examined(model)
    assert {finding.check for finding in diagnosis.wrong} == {"gradients"}
    for check in ("gradients", "recompute", "cost"):
        assert "no parameter is trainable" in reasons(diagnosis, check)[0]


def test_one_entry_that_is_not_finite():
    model = attached("bert", "hidden[:]:element@0.3")
    model.classifier.bias.register_hook(lambda gradient: gradient / torch.tensor([1.0, 0.0, 1.0]))
    assert red(model)["gradients"] == "not finite in classifier.bias"


def test_false_alarms_are_shared_by_all_sites():
    """Of four sites each may be red by chance a quarter as often."""
    findings = hiddenkey.doctor(make("llama"), "logits[:]:element@0.3", rounds=1, size=3, length=12).findings
    rates = [finding.values for finding in findings if finding.check == "rate"]
    assert len(rates) == 4
    for values in rates:
        assert (values["low"], values["high"]) == interval(values["rate"], values["draws"], FALSE_ALARM / 4)


def test_a_model_in_evaluation_mode_whose_sites_are_not():
    model = attached("llama", "hidden[:]:element@0.3", depth=2)
    model.training = False
    assert red(model) == {
        "training mode": "the model is in evaluation mode, in which nothing is dropped: call model.train()"
    }


def test_a_key_that_would_be_saved_with_the_adapter(monkeypatch):
    model = lora(make("llama", depth=2), ["q_proj"])
    hiddenkey.attach(model, "hidden[:]:element@0.3")
    real = peft.get_peft_model_state_dict
    ours = {"hiddenkey_drops.count": torch.zeros(1)}
    monkeypatch.setattr(
        peft, "get_peft_model_state_dict", lambda m, **names: real(m, **names) | (ours if m is model else {})
    )
    assert red(model) == {"adapter keys": "keys that plain PEFT does not write"}


@pytest.mark.parametrize("rate", (0.05, 0.75))
def test_spans_that_are_too_short_or_too_long(rate, monkeypatch):
    model = attached("bert", "hidden[:]:span@0.3", depth=2)
    monkeypatch.setattr(dropout, "draw", lambda drop, grid: draw(replace(drop, p=rate), grid))
    assert "round(p x length) is" in red(model)["rate"]


# Drops that do harm, little of it or at few places.


def drop_as(monkeypatch, function, always=False):
    """Another way to apply a mask in every stream, in evaluation too where always."""
    for module in (sites, skip):
        monkeypatch.setattr(module, "drop_stream", lambda x, drop, keep: function(x, keep))
    if always:
        monkeypatch.setattr(sites.StreamSite, "is_active", lambda self, module: True)


def test_a_look_at_the_next_token_alone_and_only_a_little(monkeypatch):
    drop_as(monkeypatch, lambda x, keep: x * keep + 0.02 * x.roll(-1, 1))
    (finding,) = examined(attached("llama", "hidden[3:]:element@0.3")).wrong
    assert finding.check == "causality"
    assert finding.values["before"] < 0.1


def test_evaluation_that_is_only_nearly_the_same(monkeypatch):
    drop_as(monkeypatch, lambda x, keep: x * (1 + 1e-6), always=True)
    assert "outputs differ from the plain model's by" in red(attached("bert", "hidden[:]:element@0.3"))["evaluation"]


def test_drops_in_the_tokens_that_follow_a_first_which_ends_the_text(monkeypatch):
    plain = make("llama").eval()
    prompt = {name: value[:1] for name, value in batch("llama", labels=False).items()}
    first = plain.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    model = attached("llama", "hidden[:]:element@0.3")
    model.generation_config.eos_token_id = int(first)
    drop_as(monkeypatch, lambda x, keep: x if x.shape[1] > 1 else -x, always=True)
    found = {f.check for f in hiddenkey.doctor(model, batches=[batch("llama")], rounds=1).wrong}
    assert "generate" in found
    assert "evaluation" not in found


# The effect of every site, of which one may be lost while others show.


def ignore_the_mask(query, key, value, drops, keeps, *, mask, bias=None, scale=None):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def test_a_kernel_that_ignores_its_mask_is_not_hidden_by_other_drops(monkeypatch):
    model = attached("gemma3", "hiddenkey-[:]@0.3", depth=2)
    monkeypatch.setattr(backend, "attend", ignore_the_mask)
    found = red(model)["effect"]
    assert found.startswith("another draw at logits model.layers.0.self_attn, logits model.layers.1.self_attn alone")


def test_a_kernel_that_ignores_one_of_two_masks(monkeypatch):
    def without_weights(query, key, value, drops, keeps, **options):
        keeps = [keep | (drop.position == "weights") for drop, keep in zip(drops, keeps, strict=True)]
        return attend(query, key, value, drops, keeps, **options)

    attend = backend.attend
    monkeypatch.setattr(backend, "attend", without_weights)
    found = red(attached("llama", "logits[:]:column@0.3 + weights[:]:element@0.3", depth=1))
    assert found["effect"].startswith("another draw at weights model.layers.0.self_attn alone changes nothing")


def drop_nothing(site, monkeypatch):
    """It draws, and gives on what came."""
    monkeypatch.setattr(site, "_drop", lambda x: (site.draw(x), x)[1], raising=False)


def draw_always_the_same(site, monkeypatch):
    real = sites.StreamSite.draw

    def draw(self, x):
        with torch.random.fork_rng(devices=[], enabled=self is site):
            if self is site:
                torch.manual_seed(0)
            return real(self, x)

    monkeypatch.setattr(sites.StreamSite, "draw", draw)


@pytest.mark.parametrize("lose", (drop_nothing, draw_always_the_same))
def test_one_site_of_many_that_is_lost(lose, monkeypatch):
    model = attached("llama", "hiddenkey-[:]@0.3", depth=3)
    lose(dict(hiddenkey.find_attachment(model).sites)["model.layers.1.mlp"], monkeypatch)
    found = red(model)
    assert set(found) == {"effect"}
    assert found["effect"].startswith("another draw at hidden model.layers.1.mlp alone changes nothing")


def test_masks_that_are_always_the_same_differ_from_none_alone(monkeypatch):
    model = attached("llama", "hidden[1:2]:element@0.3", depth=2)
    draw_always_the_same(hiddenkey.find_attachment(model).sites[0][1], monkeypatch)
    effects = [finding.verdict for finding in examined(model).findings if finding.check == "effect"]
    assert effects == ["ok", "wrong", "wrong"]


def test_drops_that_miss_the_token_a_classifier_reads():
    """Spans of 3 of 32 places in the last layer, of which the head sees the first token alone."""
    diagnosis = hiddenkey.doctor(make("bert"), "hidden[3:]:span@0.1", rounds=1)
    assert diagnosis.ok, str(diagnosis)
    assert "1 of 1 sites change it by themselves" in reasons(diagnosis, "effect")


def test_spans_that_leave_nothing_have_no_other_draw():
    diagnosis = examined(make("llama", depth=2), "hidden[:]:span@0.97 + logits[:]:column@0.3")
    assert diagnosis.ok, str(diagnosis)
    assert reasons(diagnosis, "effect")[-1] == "2 of 4 sites change it by themselves"


def test_where_every_draw_drops_everything_there_is_no_other():
    diagnosis = examined(make("bert", depth=2), "hidden[:]:span@0.99")
    assert diagnosis.ok, str(diagnosis)
    assert "everything falls at every draw, so there is no other" in reasons(diagnosis, "effect")


def test_a_model_that_draws_by_itself_hides_what_a_site_does():
    model = attached("llama", "hiddenkey-[:]@0.3", depth=2)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + torch.randn(output.shape))
    assert "the model draws by itself, which hides what one site does" in reasons(examined(model), "effect")


@pytest.mark.parametrize("whose", ("the model's own", "the adapter's"))
def test_other_dropouts_hide_nothing_of_what_a_site_does(whose):
    model = lora(make("bert", depth=2), ["query"], lora_dropout=0.5 if whose == "the adapter's" else 0.0)
    hiddenkey.attach(model, "hidden[:]:element@0.3")
    if whose == "the model's own":
        find_transformer(model)[1].bert.embeddings.dropout.p = 0.5
    assert reasons(examined(model), "effect")[-1] == "2 of 2 sites change it by themselves"


@pytest.mark.parametrize("seed", range(4))
def test_a_few_keys_that_fall_where_nobody_sees_it_are_no_red_line(seed):
    """Of a narrow slice at a small rate a few keys fall, and those on later ones or on padding show nowhere."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**size, vocab_size=64, num_attention_heads=4, num_key_value_heads=1)
    model = LlamaForCausalLM(config).train()
    for p in (0.01, 0.02):
        assert not {"effect", "consistency"} & red(model, f"logits[:]:column@{p} ~ kl").keys()


def test_two_views_in_which_nothing_is_drawn_are_red(monkeypatch):
    model = attached("bert", "hidden[:]:element@0.3 ~ kl")
    for _, site in hiddenkey.find_attachment(model).sites:
        monkeypatch.setattr(site, "is_active", lambda module: False, raising=False)
    assert {"rate", "consistency"} <= red(model).keys()


def test_a_gradient_that_is_cut_under_a_wrapper_of_ones_own(monkeypatch):
    """The names of the wrapper are not those of the plain model, the parameters are."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.network, self.config = model, model.config

        def forward(self, **inputs):
            return self.network(**inputs)

    model = lora(make("llama"), ["q_proj", "down_proj"])
    hiddenkey.attach(model, "hidden[:]:element@0.3")
    for room in (sites, skip):
        monkeypatch.setattr(room, "drop_stream", lambda x, drop, keep: (x * keep).detach())
    assert "which the plain model does reach" in red(Wrapper(model))["gradients"]


def test_what_falls_where_nobody_can_see_it():
    """Of a single token the only key is never dropped; of a rate of one in a million nothing falls."""
    one = {"input_ids": torch.full((3, 1), 5), "labels": torch.tensor([0, 2, 1])}
    recipe = "logits[:]:column@0.3 + hidden[:]:element@0.3 + input:element@0.000001"
    diagnosis = hiddenkey.doctor(make("bert", depth=2), recipe, [one], rounds=1)
    assert diagnosis.ok, str(diagnosis)
    assert reasons(diagnosis, "effect")[-1] == "2 of 5 sites change it by themselves"
