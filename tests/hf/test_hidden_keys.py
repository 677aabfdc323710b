"""What counts as hidden from a row: what masks mean to hide by any number, and no bias, however low it is."""

import pytest
import torch
import transformers as hf

import hiddenkey
from hiddenkey import attention_paths
from hiddenkey.masks import hiding, read_mask

LOWEST = torch.finfo(torch.float32).min
FUTURE = torch.ones(6, 6, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("shape", ((6, 6), (3, 6, 6), (2, 1, 6, 6)))
@pytest.mark.parametrize("low", (-50.0, -100.0, -1e4, -1e9))
def test_one_low_number_hides(low, shape):
    mask = torch.where(FUTURE, low, 0.0).expand(shape)
    assert torch.equal(hiding(mask), torch.where(FUTURE, LOWEST, 0.0).expand(shape))
    assert torch.equal(read_mask(hiding(mask))[0].full, ~FUTURE.expand(shape))


BIASES = {
    "none": torch.zeros(6, 6),
    "a constant, which cancels": torch.full((6, 6), -100.0),
    "a little": torch.where(FUTURE, -49.0, 0.0),
    "far keys": -100.0 * torch.arange(6.0).expand(6, 6),
    "relative positions": torch.tensor([0.0, -60.0, -70.0]).repeat(2).expand(6, 6),
    "far keys behind a mask": torch.where(FUTURE, LOWEST, -100.0 * torch.arange(6.0)),
    "minus infinity": torch.where(FUTURE, -torch.inf, 0.0),
    "the lowest number": torch.where(FUTURE, LOWEST, 0.0),
}


@pytest.mark.parametrize("name", BIASES)
def test_everything_else_stays(name):
    assert torch.equal(hiding(BIASES[name]), BIASES[name])


# Windows that are shifted over an image: a corner of four tokens is among twelve of other corners.

WINDOWS = {
    "swin, sdpa": ("Swin", {"attn_implementation": "sdpa"}),
    "swin, eager": ("Swin", {"attn_implementation": "eager"}),
    "swinv2": ("Swinv2", {}),
    "donut-swin": ("DonutSwin", {}),
}


def swin(case):
    family, options = WINDOWS[case]
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(
        image_size=32, patch_size=4, window_size=4, embed_dim=32, depths=[2], num_heads=[2], initializer_range=0.3
    )
    model = getattr(hf, f"{family}Model")(config)
    for name, value in options.items():
        assert name == "attn_implementation"
        model.set_attn_implementation(value)
    return model.train()


def shifted_window(model, attachment):
    """(attention, its input with gradient, its mask) of the layer whose windows are shifted, from a forward pass."""
    seen = {}

    def before(module, args, kwargs):
        given = [*args, *kwargs.values()]
        masks = [x for x in given if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[1] == x.shape[2]]
        seen.update({module: (args[0].detach().requires_grad_(), masks[0])} if masks else {})

    attentions = [model.get_submodule(site.path) for site in attachment.plan.sites]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for module in attentions]
    model(torch.randn(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    ((attention, (states, mask)),) = seen.items()
    return attention, states, mask


@pytest.mark.parametrize("case", WINDOWS)
def test_no_row_looks_into_another_corner_of_its_window(case):
    """A draw that takes every key of a row's own corner gives it the whole corner again, and nothing else."""
    model = swin(case)
    with hiddenkey.attach(model, "logits[:]:column@0.8") as attachment:
        attention, states, mask = shifted_window(model, attachment)
        assert set(mask.unique().tolist()) == {-100.0, 0.0}
        hidden = mask[-1] < 0
        for seed in range(6):
            torch.manual_seed(seed)
            output = attention(states, mask)[0]
            for row in range(len(hidden)):
                (found,) = torch.autograd.grad(output[-1, row].sum(), states, retain_graph=True)
                assert not found[-1, hidden[row]].any()
                assert found[-1, ~hidden[row]].any()


@pytest.mark.parametrize("case", WINDOWS)
def test_a_run_of_keys_counts_the_whole_window(case):
    model = swin(case)
    with hiddenkey.attach(model, "logits[:]:span@0.25 + hidden[:]:span@0.25") as attachment:
        model(torch.randn(2, 3, 32, 32))
        assert set(attachment.rates().values()) == {0.25}
    assert hiddenkey.doctor(swin(case), "logits[:]:span@0.25", [{"pixel_values": torch.randn(2, 3, 32, 32)}]).ok


# ALiBi: a key that is far away has a bias of -150, and is seen where nearer ones are dropped.

LENGTH, HEADS = 600, 8


def alibi(name):
    torch.manual_seed(0)
    if name == "mpt":
        config = hf.MptConfig(vocab_size=64, d_model=32, n_heads=HEADS, n_layers=1, max_seq_len=LENGTH)
        return hf.MptModel(config), "blocks.0.attn.out_proj"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    if name == "bloom":
        sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": HEADS}
        return hf.BloomModel(hf.BloomConfig(**sizes)), "h.0.self_attention.dense"
    config = hf.FalconConfig(**sizes, alibi=True, new_decoder_architecture=False, multi_query=False)
    model = hf.FalconModel(config)
    model.set_attn_implementation(name.partition(", ")[2])
    return model, "h.0.self_attention.dense"


@pytest.mark.parametrize("name", ("bloom", "mpt", "falcon, sdpa", "falcon, eager"))
def test_a_far_key_is_seen_where_nearer_ones_are_dropped(name, monkeypatch):
    """Only the first key is kept, so every row attends to it alone, as the first row does."""
    model, path = alibi(name)
    seen = []
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    monkeypatch.setattr(
        attention_paths, "draw", lambda drop, grid: grid.lay((torch.arange(grid.places) == 0)[None, None])
    )
    with hiddenkey.attach(model.train(), "logits[:]:column@0.5"), torch.no_grad():
        model(torch.randint(3, 64, (1, LENGTH)))
    (context,) = seen
    torch.testing.assert_close(context, context[:, :1].expand_as(context))
