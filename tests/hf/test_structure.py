"""Where the parts of every family are found: exact module paths, with and without LoRA around them."""

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import hiddenkey
from hiddenkey.hf.structure import find_transformer, read

from ..models.shrink import shrink
from .tiny import DECODERS, DEPTH, FAMILIES, decoder, make
from .tools import PATHS, lora, sites_of

AROUND = ("plain", "lora")


def expected(family: str, root: str) -> list[tuple[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]]]:
    """(stack, [(layer, attentions, feed-forwards)])."""
    return [
        (
            root + stack.path,
            [
                (
                    f"{root}{stack.path}.{i}",
                    tuple(f"{root}{stack.path}.{i}.{part}" for part in stack.attentions),
                    (f"{root}{stack.path}.{i}.{stack.feed_forward}",),
                )
                for i in range(DEPTH)
            ],
        )
        for stack in PATHS[family].stacks
    ]


def build(family: str, around: str):
    model = make(family)
    return (model, "") if around == "plain" else (lora(model), "base_model.model.")


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_attentions_and_feed_forwards(family, around):
    model, root = build(family, around)
    found = [
        (stack.path, [(layer.path, layer.attentions, layer.feed_forwards) for layer in stack.layers])
        for stack in read(model).stacks
    ]
    assert found == expected(family, root)


SHELLS = {"_orig_mod": torch.compile, "_checkpoint_wrapped_module": checkpoint_wrapper}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_shells_have_the_sites_that_they_have_without(family, shell):
    """In BERT's and OPT's the feed-forward maps are the layer's own: nothing else tells a shell from a block."""
    model, everywhere = make(family), "logits[:]:element@0.1 + hidden[:]:element@0.1"
    wanted = [(site.path, site.side) for site in hiddenkey.plan(model, everywhere).sites]
    for stack in read(model).stacks:
        layers = model.get_submodule(stack.path)
        for name, layer in list(layers.named_children()):
            layers._modules[name] = SHELLS[shell](layer)
    found = [(site.path, site.side) for site in hiddenkey.plan(model, everywhere).sites]
    assert [(path.replace(f".{shell}", ""), side) for path, side in found] == wanted


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_root(family, around):
    model, root = build(family, around)
    assert read(model).heads == (root + PATHS[family].head,)
    assert find_transformer(model)[0] == root.rstrip(".")


@pytest.mark.parametrize("family", FAMILIES)
def test_which_stacks_are_causal_and_of_a_decoder_only_model(family):
    flags = [(stack.causal, stack.latter_half) for stack in read(make(family)).stacks]
    if family == "t5":
        assert flags == [(False, False), (True, False)]
    else:
        assert flags == [(family in DECODERS, family in DECODERS)]


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_of_a_plan(family, around, implementation):
    if family in ("mpnet", "gemma2") and implementation == "sdpa":
        pytest.skip("has no sdpa")
    model = make(family, attn_implementation=implementation)
    root = ""
    if around == "lora":
        model, root = lora(model), "base_model.model."
    recipe = "input:element@0.1 + logits[:]:column@0.1 + hidden[:]:element@0.1 + output:element@0.1"
    plan = hiddenkey.plan(model, recipe)
    for position in ("input", "logits", "hidden", "output"):
        found = [site.path for site in plan.sites if site.drop.position == position]
        assert sorted(found) == sorted(root + path for path in sites_of(family, position))
    sides = {site.drop.position: site.side for site in plan.sites}
    assert sides == {"input": "input", "logits": "attention", "hidden": "output", "output": "input"}


def test_lora_on_the_head_and_a_saved_classifier():
    model = make("llama")
    adapted = lora(model, ["q_proj", "lm_head"])
    assert read(adapted).heads == ("base_model.model.lm_head",)
    classifier = lora(make("bert"), ["query"], task_type="SEQ_CLS")
    assert read(classifier).heads == ("base_model.model.classifier",)


def test_heads_of_other_tasks():
    assert read(decoder("Llama")(head="ForSequenceClassification")).heads == ("score",)
    assert read(decoder("Llama")(head="ForTokenClassification")).heads == ("score",)
    assert read(make("bert").bert).heads == ()
    assert read(make("llama").model).heads == ()


def test_a_wrapped_transformer_is_found():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(3, 3)
            self.inner = make("bert")

    plan = hiddenkey.plan(Wrapped(), "hidden:element@0.1")
    assert [site.path for site in plan.sites] == ["inner." + path for path in sites_of("bert", "hidden")]


def test_experts_drop_at_the_block_that_adds_them_up():
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    layers = read(model).stacks[0].layers
    for layer in layers:
        assert len(layer.feed_forwards) == 1
        block = model.get_submodule(layer.feed_forwards[0])
        out = block(torch.randn(1, 3, 16))
        assert (out[0] if isinstance(out, tuple) else out).shape == (1, 3, 16)
        assert any("expert" in name for name, _ in block.named_children())


@pytest.mark.parametrize(
    ("name", "decodes", "causal"),
    (
        ("LlamaForCausalLM", False, True),
        ("BloomForCausalLM", False, True),
        ("RwkvForCausalLM", False, True),
        ("BertModel", False, False),
        ("BertLMHeadModel", True, True),
        ("RemBertForCausalLM", False, False),
        ("RemBertForCausalLM", True, True),
        ("RoFormerForCausalLM", True, True),
        ("MvpForCausalLM", False, True),
        ("XLMWithLMHeadModel", False, False),
        ("XLNetLMHeadModel", False, False),
        ("DebertaV2Model", False, False),
    ),
)
def test_decoders_drop_in_their_latter_half(name, decodes, causal):
    kind = getattr(transformers, name)
    config = shrink(kind.config_class.model_type)
    config.is_decoder = decodes
    (stack,) = read(kind._from_config(config)).stacks
    assert (stack.causal, stack.latter_half) == (causal, causal)


@pytest.mark.parametrize("kind", ("t5", "bart", "bigbird_pegasus", "mvp"))
def test_a_pair_has_no_latter_half(kind):
    model = transformers.AutoModelForSeq2SeqLM.from_config(shrink(kind))
    assert not any(stack.latter_half for stack in read(model).stacks)
    assert not read(model).stacks[0].causal


def test_not_a_transformers_model():
    with pytest.raises(ValueError, match=r"Linear holds no transformers model.*hiddenkey\.attention"):
        hiddenkey.plan(nn.Linear(2, 2), "hiddenkey@0.1")
