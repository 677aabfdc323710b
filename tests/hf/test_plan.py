"""Recipe × model: which layers, what is printed, what is refused; and that a plan changes nothing."""

import pytest
import torch

import hiddenkey

from .tiny import DECODERS, FAMILIES, decoder, make
from .tools import POSITIONS, lora, quiet, same_state, snapshot


def layers_of(plan, position="logits"):
    """{stack: indices}."""
    found: dict[str, list[int]] = {}
    for site in plan.sites:
        if site.drop.position == position:
            stack, index = site.layer
            if index not in found.setdefault(stack, []):
                found[stack].append(index)
    return found


@pytest.mark.parametrize("position", ("logits", "weights", "hidden"))
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_left_out(family, position):
    plan = hiddenkey.plan(make(family), f"{position}:column@0.1")
    wanted = [2, 3] if family in DECODERS else [0, 1, 2, 3]
    assert set(map(tuple, layers_of(plan, position).values())) == {tuple(wanted)}
    assert len(layers_of(plan, position)) == (2 if family == "t5" else 1)


@pytest.mark.parametrize(("depth", "wanted"), [(1, [0]), (2, [1]), (3, [1, 2]), (5, [2, 3, 4])])
@pytest.mark.parametrize("family", ("gpt2", "llama", "opt"))
def test_latter_half_of_other_depths(family, depth, wanted):
    plan = hiddenkey.plan(make(family, depth=depth), "hiddenkey@0.1")
    assert list(layers_of(plan).values()) == [wanted]
    assert list(layers_of(plan, "hidden").values()) == [wanted]


SLICES = {
    ":": [0, 1, 2, 3, 4],
    "1/2:": [2, 3, 4],
    ":1/2": [0, 1],
    "1/3:2/3": [1, 2],
    "1:3": [1, 2],
    "-2:": [3, 4],
    ":-1": [0, 1, 2, 3],
    "3:99": [3, 4],
}


@pytest.mark.parametrize("layers", SLICES)
@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_slices(family, layers):
    plan = hiddenkey.plan(make(family, depth=5), f"logits[{layers}]:column@0.1")
    assert all(indices == SLICES[layers] for indices in layers_of(plan).values())


def test_two_drops_at_one_position_in_different_layers():
    plan = hiddenkey.plan(make("bert"), "logits[:2]:column@0.1 + logits[2:]:element@0.2")
    assert [(site.drop.pattern, site.layer[1]) for site in plan.sites] == [
        ("column", 0),
        ("column", 1),
        ("element", 2),
        ("element", 3),
    ]


@pytest.mark.parametrize("around", (lambda model: model, lora))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_changes_nothing(family, around):
    model = around(make(family))
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for recipe in POSITIONS.values():
        hiddenkey.plan(model, recipe)
    assert snapshot(model) == before
    assert same_state(model, state)
    assert torch.equal(torch.get_rng_state(), random)


OWN = {  # all own dropouts at attach: how many rates above 0
    "bert": 14,
    "roberta": 14,
    "mpnet": 14,
    "distilbert": 10,
    "gpt2": 13,
    "opt": 5,
    "t5": 42,
    "vit": 9,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_own_dropouts_are_listed(family):
    plan = hiddenkey.plan(make(family), "hiddenkey@0.1")
    assert len(plan.own_dropouts) == OWN.get(family, 0)
    assert "own dropouts set to 0: " in str(plan)
    assert ("none there" in str(plan)) == (family not in OWN)
    assert hiddenkey.plan(quiet(family), "baseline").own_dropouts == ()


def test_own_dropouts_that_are_plain_numbers():
    rates = {own.path: own.p for own in hiddenkey.plan(make("opt", dropout=0.3), "baseline").own_dropouts}
    assert rates == {"model.decoder": 0.3, **{f"model.decoder.layers.{i}": 0.3 for i in range(4)}}
    plan = hiddenkey.plan(make("llama", attention_dropout=0.25), "baseline")
    assert {(own.name, own.p) for own in plan.own_dropouts} == {("attention_dropout", 0.25)}
    assert len(plan.own_dropouts) == 4


def test_the_dropout_of_an_adapter_is_the_users():
    plan = hiddenkey.plan(lora(make("bert"), ["query", "value"], lora_dropout=0.2), "hiddenkey@0.1")
    assert len(plan.own_dropouts) == OWN["bert"]
    assert len(plan.adapter_dropouts) == 8
    assert {own.p for own in plan.adapter_dropouts} == {0.2}
    assert "adapter dropout left as it is: 8 x " in str(plan)


def test_printed_plan():
    text = str(hiddenkey.plan(make("bert"), "hiddenkey@0.1 ~ kl*0.5"))
    assert "logits:column@0.1 + hidden:element@0.1 ~ kl*0.5" in text
    assert "BertForSequenceClassification: 4 layers in bert.encoder.layer" in text
    assert "logits:column@0.1       4  attention of bert.encoder.layer.{0-3}.attention.self" in text
    assert "hidden:element@0.1      4  output of bert.encoder.layer.{0-3}.output.dense" in text
    assert "8 x output.dropout 0.1" in text
    text = str(hiddenkey.plan(make("t5"), "logits[2:3]:column@0.1"))
    assert "4 layers in encoder.block; 4 causal layers in decoder.block" in text
    assert "1  attention of decoder.block.{2}.layer.1.EncDecAttention" in text


def test_printed_plan_of_the_baseline():
    assert "nothing      0  the recipe drops nothing" in str(hiddenkey.plan(make("bert"), "baseline"))


def refused(model, recipe, *words):
    with pytest.raises(hiddenkey.PlanError) as error:
        hiddenkey.plan(model, recipe)
    for word in words:
        assert word in str(error.value)
    with pytest.raises(hiddenkey.PlanError):
        hiddenkey.attach(model, recipe)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_no_head_to_drop_before(family):
    model = make(family).base_model
    refused(model, "output:element@0.1", "output:element@0.1", type(model).__name__, "input, logits, weights, hidden")


@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_a_slice_that_is_empty_at_this_depth(family):
    refused(make(family), "hidden[8:]:element@0.1", "hidden[8:]:element@0.1", "[8:]", "4 in ")


def test_one_empty_slice_among_good_drops_is_an_error():
    refused(make("bert"), "logits:column@0.1 + hidden[4:]:element@0.1", "[4:]", "4 in bert.encoder.layer")


@pytest.mark.parametrize("position", ("logits", "hidden"))
def test_overlap(position):
    recipe = f"{position}[:3]:column@0.1 + {position}[2:]:element@0.2"
    refused(make("bert"), recipe, f"{position}[:3]:column@0.1", f"{position}[2:]:element@0.2", "bert.encoder.layer.2")


def test_overlap_of_positions_that_are_there_once():
    refused(make("bert"), "input:column@0.1 + input:element@0.1", "meet at bert.encoder.layer.0")


def test_one_drop_twice_meets_itself():
    (drop,) = hiddenkey.parse("hidden:element@0.1").drops
    refused(make("bert"), hiddenkey.Recipe((drop, drop)), "meet at bert.encoder.layer.0")


@pytest.mark.parametrize("name", ("flash_attention_2", "flex_attention", "somebody/kernels"))
@pytest.mark.parametrize("position", ("logits", "weights"))
def test_a_backend_that_would_ignore_us(name, position):
    model = make("llama")
    model.config._attn_implementation_internal = name
    refused(model, f"{position}:column@0.1", name, "'sdpa' or 'eager'", "model.layers.2.self_attn")
    hiddenkey.plan(model, "hidden:element@0.1")


def test_gpt2_that_bypasses_the_interface():
    model = make("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager")
    refused(model, "logits:column@0.1", "reorder_and_upcast_attn")
    hiddenkey.plan(make("gpt2", reorder_and_upcast_attn=True), "logits:column@0.1")


def test_an_unreadable_recipe():
    with pytest.raises(hiddenkey.RecipeError, match="Did you mean"):
        hiddenkey.plan(make("bert"), "logit:column@0.1")


def test_a_classifier_on_a_decoder():
    model = decoder("Llama")(head="ForSequenceClassification")
    plan = hiddenkey.plan(model, "hiddenkey@0.1 + output:element@0.1")
    assert layers_of(plan) == {"model.layers": [2, 3]}
    assert plan.sites[-1].path == "score"


@pytest.mark.parametrize("function", (hiddenkey.plan, hiddenkey.attach, hiddenkey.doctor))
@pytest.mark.parametrize("given", ("roberta-large", None))
def test_a_name_is_no_model(function, given):
    with pytest.raises(hiddenkey.AttachError, match=f"^{function.__name__} takes.*is a {type(given).__name__}$"):
        function(given, "hiddenkey@0.1")


def test_a_recipe_first():
    with pytest.raises(hiddenkey.AttachError, match="plan takes a model and a recipe, in this order"):
        hiddenkey.plan("hiddenkey@0.1", make("bert"))


@pytest.mark.parametrize("call", (hiddenkey.find_attachment, lambda model: hiddenkey.consistency_step(model, {})))
def test_an_attachment_of_what_is_no_model(call):
    with pytest.raises(hiddenkey.AttachError, match="takes a model; the first is a NoneType"):
        call(None)
