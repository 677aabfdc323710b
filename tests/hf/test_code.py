"""Attention code that is not ours: which of it takes drops, which is refused, and that none is silently ignored."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hiddenkey
from hiddenkey import attention_paths
from hiddenkey.hf.attention_softmax import DropAtSoftmax, OwnSoftmax
from hiddenkey.hf.sites import AttentionSite, DropSwitch
from hiddenkey.hf.source_reading import closed_because, uses_own_softmax
from hiddenkey.hf.structure import Modules, feed_forwards, read

from ..models.tiny import build

DROP = hiddenkey.parse("logits:column@0.5").drops


def fresh_site():
    return AttentionSite([DropSwitch(drop) for drop in DROP], by_interface=False)


def weights(function, site=None):
    """What `function` returns while drops are on."""
    torch.manual_seed(0)
    with DropAtSoftmax(site or fresh_site(), "Some") as mode:
        out = function()
    mode.close()
    return out


class TestDropAtSoftmax:
    @pytest.mark.parametrize("shape", [(6, 5, 7), (2, 3, 5, 7), (2, 3, 4, 5, 7)])
    def test_a_key_falls_for_every_query_whatever_comes_before(self, shape):
        logits = torch.randn(shape)
        dropped = weights(lambda: logits.softmax(-1))
        assert dropped.shape == shape
        torch.testing.assert_close(dropped.sum(-1), torch.ones(shape[:-1]))
        columns = (dropped == 0).flatten(0, -3)
        assert (columns == columns[:, :1]).all()
        assert columns.any()
        assert not columns[:, 0].all(0).any(), "each leading index draws by itself"
        kept = (dropped != 0).all(-2, keepdim=True)
        torch.testing.assert_close(dropped, logits.masked_fill(~kept, -torch.inf).softmax(-1))

    @pytest.mark.parametrize("call", [lambda x: F.softmax(x, dim=3), nn.Softmax(dim=-1), lambda x: x.softmax(dim=-1)])
    def test_every_way_to_write_it(self, call):
        logits = torch.randn(2, 2, 4, 9)
        assert (weights(lambda: call(logits)) == 0).any()

    @pytest.mark.parametrize(
        "call",
        (
            lambda x: x.softmax(-1, torch.float32),
            lambda x: torch.softmax(x, -1, torch.float32),
            lambda x: F.softmax(x, -1, 3, torch.float32),
            lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
        ),
    )
    def test_the_dtype_that_it_asks_for_is_kept(self, call):
        logits = torch.randn(2, 2, 4, 9).bfloat16()
        dropped = weights(lambda: call(logits))
        assert dropped.dtype == torch.float32
        kept = (dropped != 0).all(-2, keepdim=True)
        torch.testing.assert_close(dropped, logits.float().masked_fill(~kept, -torch.inf).softmax(-1))

    @pytest.mark.parametrize("low", (-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf))
    def test_hidden_keys_stay_hidden_in_rows_that_a_draw_empties(self, low):
        logits = torch.randn(64, 1, 6, 6)
        future = torch.ones(6, 6, dtype=torch.bool).triu(1)
        dropped = weights(lambda: (logits + torch.where(future, low, 0.0)).softmax(-1))
        assert (dropped[..., future] == 0).all()
        torch.testing.assert_close(dropped.sum(-1), torch.ones(64, 1, 6))

    def test_a_key_with_a_low_bias_is_seen_where_the_others_are_dropped(self, monkeypatch):
        monkeypatch.setattr(
            attention_paths, "draw", lambda drop, grid: grid.lay(torch.tensor([[[True, False, False]]]))
        )
        dropped = weights(lambda: (torch.randn(2, 3, 4, 3) - torch.tensor([4000.0, 0, 0])).softmax(-1))
        assert torch.equal(dropped, torch.tensor([1.0, 0, 0]).expand(2, 3, 4, 3))

    def test_one_draw_per_key_value_head(self):
        torch.manual_seed(0)
        with DropAtSoftmax(fresh_site(), "Some", kv_heads=2):
            dropped = torch.randn(3, 8, 4, 16).softmax(-1) == 0
        groups = dropped.view(3, 2, 4, 4, 16)
        assert (groups == groups[:, :, :1]).all()
        assert not torch.equal(groups[:, 0], groups[:, 1])

    @pytest.mark.parametrize("causal", (False, True))
    def test_torchs_attention_called_directly(self, causal):
        query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        call = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal)  # noqa: E731
        dropped = weights(call)
        torch.manual_seed(0)
        wanted = hiddenkey.attention(query, key, value, "logits:column@0.5", is_causal=causal)
        torch.testing.assert_close(dropped, wanted)
        assert not torch.allclose(dropped, plain)

    def test_other_softmaxes_pass(self):
        logits = torch.randn(2, 3, 4, 5)
        with DropAtSoftmax(fresh_site(), "Some"):
            assert torch.equal(logits.softmax(1), F.softmax(logits, 1))
            assert torch.equal(logits[0, 0].softmax(-1), F.softmax(logits[0, 0], -1))

    def test_a_second_softmax_is_an_error(self):
        logits = torch.randn(2, 3, 4, 5)
        with pytest.raises(RuntimeError, match=r"Some computes a second softmax.*'logits:column@0.5'"):
            weights(lambda: logits.softmax(-1).softmax(-1))

    def test_no_softmax_is_an_error(self):
        with pytest.raises(RuntimeError, match=r"'logits:column@0.5' found no softmax over keys in Some"):
            weights(lambda: None)


def test_an_error_inside_the_attention_is_the_one_that_is_seen():
    class Attention(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    module, own = Attention(), OwnSoftmax(fresh_site())
    module.register_forward_pre_hook(own.before)
    module.register_forward_hook(own.after, always_call=True)
    with pytest.raises(KeyError, match="mine"):
        module(torch.ones(1))
    assert own.active == []


class HelperAttention(nn.Module):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return helper(x)


def helper(x):
    return x.softmax(-1)


class ClosedAttention(nn.Module):
    def forward(self, x):
        return F.multi_head_attention_forward(x)


def test_a_softmax_is_found_in_methods_and_functions_beside_the_forward():
    assert uses_own_softmax(HelperAttention())
    assert not uses_own_softmax(nn.Linear(1, 1))


@pytest.mark.parametrize("module", (ClosedAttention(), nn.MultiheadAttention(4, 2)))
def test_closed_attention(module):
    assert "in one call" in closed_because(module)
    assert not uses_own_softmax(module)


def refused(kind, recipe, *words):
    with pytest.raises(hiddenkey.PlanError) as error:
        hiddenkey.plan(build(kind), recipe)
    for word in words:
        assert word in str(error.value)


def test_closed_attention_is_refused_with_the_reason():
    reason = ("LongformerSelfAttention", "longformer.encoder.layer.0.attention.self", "offsets in a window", "leave")
    refused("longformer", "hiddenkey@0.1", *reason)
    hiddenkey.plan(build("longformer"), "hidden:element@0.1")


def test_a_model_without_layers_of_ours_is_refused():
    refused("resnet", "hidden:element@0.1", "no layer with softmax attention or a feed-forward block")


def test_layers_in_stages_without_attention_drop_once():
    paths = [site.path for site in hiddenkey.plan(build("convnext"), "hidden:element@0.1").sites]
    assert len(paths) == len(set(paths)) == 8
    assert all(".layers." in path for path in paths)


def test_a_layer_that_holds_layers_leaves_them_their_parts():
    stacks = read(build("groupvit")).stacks
    parts = [part for stack in stacks for layer in stack.layers for part in (*layer.attentions, *layer.feed_forwards)]
    assert len(parts) == len(set(parts))
    assert any(other.path.startswith(stack.path + ".") for stack in stacks for other in stacks)


def test_attention_in_a_list_of_its_own_is_no_feed_forward_block():
    plan = hiddenkey.plan(build("xlm"), "hidden:element@0.1")
    assert [site.path for site in plan.sites] == ["transformer.ffns.0.lin2", "transformer.ffns.1.lin2"]
    refused("xlm", "hiddenkey@0.1", "'logits' was not found")


def test_layers_of_a_hybrid_model_keep_their_places():
    plan = hiddenkey.plan(build("jamba"), "logits[:]:column@0.1 + hidden[:]:element@0.1")
    (stack,) = plan.structure.stacks
    assert [bool(layer.attentions) for layer in stack.layers] == [False, True, False, True]
    assert [site.layer[1] for site in plan.sites if site.drop.position == "logits"] == [1, 3]
    assert "4 causal layers in model.layers (2 without attention)" in str(plan)
    refused("jamba", "logits[2:3]:column@0.1", "none of the 1 chosen layers has 'logits', other layers do")
    assert [site.layer[1] for site in hiddenkey.plan(build("jamba"), "logits:column@0.1").sites] == [3]


@pytest.mark.parametrize("padding", (False, True))
def test_runs_of_tokens_in_layers_without_attention(padding):
    model = build("jamba").train()
    inputs = {"input_ids": torch.randint(64, 256, (2, 10)), "use_cache": False}
    if padding:
        inputs["attention_mask"] = torch.ones(2, 10, dtype=torch.long)
        inputs["attention_mask"][1, 6:] = 0
    with hiddenkey.attach(model, "hidden[:]:span@0.4") as attachment:
        model(**inputs)
        # Runs of 4 of 10 tokens, and beside padding of round(0.4 * 6) = 2 of 10.
        wanted = (4 + (2 if padding else 4)) / 20
        assert attachment.rates() == dict.fromkeys(attachment.rates(), pytest.approx(wanted))
        assert len(attachment.rates()) == 4


def test_layers_of_one_kind_each():
    model = build("nemotron_h")
    text = str(hiddenkey.plan(model, "baseline"))
    (stack,) = read(model).stacks
    kinds = [(len(layer.attentions), len(layer.feed_forwards)) for layer in stack.layers]
    assert sorted(kinds) == [(0, 0), (0, 1), (0, 1), (1, 0)]
    assert "(3 without attention, 2 without feed-forward)" in text


@pytest.mark.parametrize("kind", ("gptj", "bloom", "gpt_neo"))
def test_decoders_whose_attention_does_not_say_so_are_decoders(kind):
    (stack,) = read(build(kind)).stacks
    assert stack.latter_half


def block(**parts):
    return nn.ModuleDict(parts)


class Residual(nn.Module):
    """Adds the residual itself, as BLOOM does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x, residual):
        return self.down(self.up(x)) + residual


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 8))


class Plain(nn.Module):
    def __init__(self, inner=16, gates=1):
        super().__init__()
        self.up, self.down = nn.Linear(4, gates * inner), nn.Linear(inner, 4)

    def forward(self, x):
        return x


LAYERS = {
    "one": (block(mlp=Plain()), ["layer.mlp"]),
    "gate and way up in one map": (block(mlp=Plain(gates=2)), ["layer.mlp"]),
    "two": (block(first=Plain(), second=Plain()), ["layer.first", "layer.second"]),
    "maps of the layer itself": (block(fc1=nn.Linear(4, 9), fc2=nn.Linear(9, 4)), ["layer.fc2"]),
    "residual inside": (block(mlp=Residual()), ["layer.mlp.down"]),
    "an adapter beside it": (block(mlp=Plain(), low=Plain(2)), ["layer.mlp"]),
    "experts": (block(mlp=block(router=nn.Linear(4, 3), experts=Experts())), ["layer.mlp"]),
    "experts, and a block for every token": (
        block(moe=block(router=nn.Linear(4, 3), experts=Experts()), shared=Plain()),
        ["layer.moe", "layer.shared"],
    ),
    "experts of the layer itself": (
        block(mlp=Plain(), router=nn.Linear(4, 3), experts=Experts()),
        ["layer.experts", "layer.mlp"],
    ),
    "a convolution is no expert": (block(conv=nn.Conv1d(4, 4, 3), mlp=Plain()), ["layer.mlp"]),
    "none": (block(one=nn.Linear(4, 4), other=nn.Linear(4, 3)), []),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_feed_forward_blocks(layer):
    module, wanted = LAYERS[layer]
    modules = Modules((f"layer.{path}" if path else "layer", part) for path, part in module.named_modules())
    assert list(feed_forwards("layer", [], modules)) == wanted


def test_a_mixer_with_maps_up_and_down_is_no_feed_forward_block():
    module = block(mixer=Plain(), mlp=Plain())
    modules = Modules((f"layer.{path}" if path else "layer", part) for path, part in module.named_modules())
    assert list(feed_forwards("layer", ["layer.mixer"], modules)) == ["layer.mlp"]


def elsewhere(forward, module):
    """The same code as written in another module, as Axolotl puts it into a model's class."""
    names = {**forward.__globals__, "__name__": module}
    return type(forward)(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def test_a_forward_that_another_package_put_into_the_class(monkeypatch):
    model = build("llama")
    sites = str(hiddenkey.plan(model, "hiddenkey[:]@0.3"))
    kind = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(kind, "forward", elsewhere(inspect.unwrap(kind.forward), "some.kernels"))
    assert kind.forward.__module__ == "some.kernels"
    assert str(hiddenkey.plan(model, "hiddenkey[:]@0.3")) == sites


def test_a_forward_that_is_put_in_later_is_read_anew(monkeypatch):
    model = build("llama")
    hiddenkey.plan(model, "hiddenkey[:]@0.3")
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "forward", lambda self, hidden_states, **_: hidden_states
    )
    with pytest.raises(hiddenkey.PlanError, match="its 'logits' was not found"):
        hiddenkey.plan(model, "hiddenkey[:]@0.3")
