"""Adapters of several kinds at once, and what is done to them while a recipe is attached: it works, or it is said."""

import inspect

import peft
import pytest
import torch
import transformers

import hiddenkey
from hiddenkey.hf.shared_layers import LowerLayers
from hiddenkey.hf.structure import find_transformer

from .adapters import LINEARS, adapt, moved, skip_where_peft_is_behind
from .tiny import batch, make
from .tools import logits_of, quiet, same_state, sites_of

STEP = "logits[1:]:column@0.3 + hidden[1:]:element@0.3 ~ kl*1.0"
ZEROS = "hidden[:]:element@0.9999999"
FAMILIES = ("bert", "llama")


def config(family, **options):
    return peft.LoraConfig(**{"r": 2, "target_modules": LINEARS.get(family), **options})


def two(family):
    """A model with two adapters, the first of them active."""
    model = peft.get_peft_model(quiet(family), config(family))
    model.add_adapter("other", config(family, r=4))
    model.base_model.set_adapter(["default", "other"])
    moved(model)
    model.set_adapter("default")
    return model


def step(model, family):
    """A step, and the names of the weights that got a gradient."""
    model.zero_grad()
    hiddenkey.consistency_step(model, batch(family)).total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    return {name for name, grad in grads.items() if grad.any()}


def feed_forward_outputs(model, family):
    """What the feed-forward blocks put out in a training pass."""
    root, outputs = find_transformer(model)[0], []
    handles = [
        model.get_submodule(f"{root}.{path}").register_forward_hook(lambda *args: outputs.append(args[-1]))
        for path in sites_of(family, "hidden")
    ]
    logits_of(model, batch(family, labels=False))
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_between_adapters(family):
    model = two(family)
    with hiddenkey.attach(model, STEP):
        assert not any(".other." in name for name in step(model, family))
        model.set_adapter("other")
        assert any("lora_B.other." in name for name in step(model, family))
        assert not any("lora_B.default." in name for name in step(model, family))
    with hiddenkey.attach(model, ZEROS):
        for name in ("default", "other"):
            model.set_adapter(name)
            assert not any(output.any() for output in feed_forward_outputs(model, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_at_once(family):
    model = two(family)
    model.base_model.set_adapter(["default", "other"])
    with hiddenkey.attach(model, STEP):
        reached = step(model, family)
    assert {name.split(".")[-2] for name in reached if "lora_" in name} == {"default", "other"}


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters(family):
    """The drops stay, the adapter's part goes: the base model with a recipe."""
    model, plain = two(family), two(family).unload()
    recipe = STEP.partition(" ~ ")[0]
    hiddenkey.attach(model, recipe)
    hiddenkey.attach(plain, recipe)
    found = []
    for attached, context in ((model, model.disable_adapter()), (plain, torch.enable_grad())):
        with context:
            torch.manual_seed(0)
            found.append(logits_of(attached, batch(family, labels=False)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_added_after_attach(family):
    """It learns and is dropped with the others; what it draws is not shared between the views."""
    model = peft.get_peft_model(quiet(family), config(family))
    with hiddenkey.attach(model, "logits[2:]:column@0.3 ~ kl*1.0") as attachment:
        assert len(LowerLayers(attachment, constant=True).layers) == 2
        model.add_adapter("other", config(family, r=4, lora_dropout=0.25))
        assert LowerLayers(attachment, constant=True).layers == []
        model.set_adapter("other")
        moved(model)
        assert any("lora_B.other." in name for name in step(model, family))
        model.delete_adapter("default")
        assert any("lora_B.other." in name for name in step(model, family))
    with hiddenkey.attach(model, ZEROS):
        model.add_adapter("third", config(family))
        model.set_adapter("third")
        assert not any(output.any() for output in feed_forward_outputs(model, family))


@pytest.mark.parametrize("change", ("unload", "merge_and_unload"))
def test_unloading_while_attached(change):
    """Where the site sits on the adapter's layer itself, it goes with it; that is said, and detach still works."""
    model, plain = two("bert"), two("bert")
    attachment = hiddenkey.attach(model, STEP)
    unloaded, wanted = getattr(model, change)(), getattr(plain, change)()
    inputs = batch("bert", labels=False)
    assert torch.equal(logits_of(unloaded.eval(), inputs), logits_of(wanted.eval(), inputs))
    with pytest.raises(RuntimeError, match=r"another module now, a Linear.*would miss it; detach"):
        model.train()(**inputs)
    attachment.detach()
    assert same_state(unloaded, wanted.state_dict())
    assert torch.equal(logits_of(unloaded.train(), inputs), logits_of(wanted.train(), inputs))
    assert str(unloaded.config._attn_implementation) == "sdpa"


def test_unloading_gives_the_models_dropouts_back():
    """Those of PEFT's copy of the classifier too, which stands elsewhere by then."""
    model = adapt(make("roberta"), "LoRA on attention", "bert")
    attachment = hiddenkey.attach(model, STEP)
    unloaded = model.unload()
    attachment.detach()
    assert {module.p for name, module in unloaded.named_modules() if name.endswith("dropout")} == {0.1}


def test_what_is_put_around_a_site_after_attach():
    around = (config("bert"), config("bert", target_modules=["query"], modules_to_save=["output.dense"]))
    for adapter in around:
        model = quiet("bert")
        attachment = hiddenkey.attach(model, STEP)
        adapted = peft.get_peft_model(model, adapter)
        with pytest.raises(RuntimeError, match=r"an adapter was put around .*get_peft_model first"):
            model.train()(**batch("bert"))
        attachment.detach()
        assert hiddenkey.find_attachment(adapted) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_of_transformers_itself(family):
    """`model.add_adapter` of transformers puts PEFT's layers in without a wrapper."""
    skip_where_peft_is_behind()
    model = quiet(family)
    model.add_adapter(config(family))
    moved(model)
    plan = hiddenkey.plan(model, "hidden[:]:element@0.1")
    assert [site.path for site in plan.sites] == sites_of(family, "hidden")
    assert plan.adapters == ("default",)
    with hiddenkey.attach(model, STEP):
        assert any("lora_B.default." in name for name in step(model, family))


def test_a_mixed_model():
    model = peft.get_peft_model(quiet("llama"), config("llama"), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["down_proj"], module_dropout=0.25))
    model.set_adapter(["default", "other"])
    moved(model)
    attachment = hiddenkey.attach(model, STEP)
    assert attachment.plan.adapters == ("default", "other")
    assert {own.name for own in attachment.plan.adapter_dropouts} == {"module_dropout.other"}
    reached = step(model, "llama")
    assert any("hada" in name for name in reached)
    assert any("lora" in name for name in reached)


SAVED = {
    "bert": (["output.dense"], ["intermediate.dense", "output.dense"], ["classifier"], ["word_embeddings"]),
    "gpt2": (["c_proj"],),
    "llama": (["down_proj"], ["mlp"], ["lm_head"], ["embed_tokens"], ["norm"], ["self_attn"]),
}


@pytest.mark.parametrize(
    ("family", "names"), [(family, names) for family in SAVED for names in SAVED[family]], ids=str
)
def test_modules_to_save(family, names):
    """PEFT trains a copy and keeps the original beside it: the drop is at work on the one that is called."""
    targets = {"bert": ["query"], "gpt2": ["c_attn"], "llama": ["q_proj"]}[family]
    if names == ["self_attn"]:
        targets = ["gate_proj"]
        if "x" in inspect.signature(peft.utils.ModulesToSaveWrapper.forward).parameters:
            pytest.skip("this PEFT calls what it saves with one tensor, and attention takes names")
    model = moved(peft.get_peft_model(quiet(family), config(family, target_modules=targets, modules_to_save=names)))
    with hiddenkey.attach(model, ZEROS):
        assert not any(output.any() for output in feed_forward_outputs(model, family))
        with model.disable_adapter():
            assert not any(output.any() for output in feed_forward_outputs(model, family))
    with hiddenkey.attach(model, STEP):
        assert any("modules_to_save" in name for name in step(model, family))


def test_modules_to_save_that_hold_a_part_of_a_feed_forward_block():
    model = peft.get_peft_model(quiet("bert"), config("bert", target_modules=["query"], modules_to_save=["output"]))
    with pytest.raises(hiddenkey.PlanError, match=r"layer\.0\.output is one of PEFT's modules_to_save.*the linear"):
        hiddenkey.plan(model, "hidden:element@0.1")


def mixtral():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            pad_token_id=0,
        )
    )
    return model.train()


def test_lora_on_the_experts():
    """`target_parameters`: the site is the block that adds the experts up, the adapter's part included."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = config("llama", target_modules=["q_proj"], target_parameters=names)
    model = moved(peft.get_peft_model(mixtral(), adapter))
    plan = hiddenkey.plan(model, "hidden[:]:element@0.1")
    assert [site.path for site in plan.sites] == [f"base_model.model.model.layers.{i}.mlp" for i in range(4)]
    with hiddenkey.attach(model, STEP):
        reached = step(model, "llama")
    assert sum("experts" in name and "lora_B" in name for name in reached) == 8
    with hiddenkey.attach(model, ZEROS):
        assert not any(output.any() for output in feed_forward_outputs(model, "llama"))


def test_experts_in_modules_to_save():
    """The site is PEFT's wrapper of the block, whichever copy it calls."""
    model = peft.get_peft_model(mixtral(), config("llama", target_modules=["q_proj"], modules_to_save=["mlp"]))
    plan = hiddenkey.plan(model, "hidden[:]:element@0.1")
    assert [site.path for site in plan.sites] == [f"base_model.model.model.layers.{i}.mlp" for i in range(4)]


def test_a_tied_head_under_trainable_tokens():
    """PEFT wraps the head that shares the embedding, so it learns with it and is not taken for frozen."""
    base = quiet("llama", tie_word_embeddings=True)
    model = moved(peft.get_peft_model(base, config("llama", trainable_token_indices={"embed_tokens": [3, 4]})))
    attachment = hiddenkey.attach(model, STEP)
    assert hiddenkey.hf.chunked_loss.frozen_head(attachment) is None
    assert any("trainable_tokens_delta" in name for name in step(model, "llama"))


def test_a_prompt_of_shadow_layers_is_said():
    model = adapt(quiet("llama"), "ShadowPEFT", "llama")
    hiddenkey.attach(model, "input:element@0.2")
    with pytest.raises(hiddenkey.UserError, match=r"input:element@0\.2' needs a tensor, but a ShadowCarrier"):
        model(**batch("llama"))
