"""A new pattern, position, compensation or consistency in a dozen lines works everywhere at once."""

import pytest
import torch

import hiddenkey
from hiddenkey.compensations import COMPENSATIONS
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.patterns import PATTERNS
from hiddenkey.positions import POSITIONS

from .hf.tiny import batch, make


@pytest.fixture(autouse=True)
def _as_before():
    """Take out again what a test registered."""
    registries = (PATTERNS, POSITIONS, COMPENSATIONS, CONSISTENCIES)
    before = [registry.names() for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - set(names):
            registry.remove(name)
        assert registry.names() == names


def register_alternate():
    @hiddenkey.register_pattern("alternate")
    def alternate(grid, p):
        """Every second place."""
        keep = torch.arange(grid.places) % 2 == 0
        return grid.lay(keep.expand(*grid.lead, grid.places))


def test_a_pattern_works_at_every_position():
    register_alternate()
    x = torch.ones(2, 6, 3)
    for position in ("input", "hidden", "output"):
        out = hiddenkey.StructuredDropout(f"{position}:alternate@0.5")(x)
        assert torch.equal(out[:, ::2], 2 * x[:, ::2])
        assert not out[:, 1::2].any()
    query, key, value = torch.randn(3, 2, 4, 6, 3)
    even = torch.arange(6) % 2 == 0
    for drop in ("logits:{}@0.5", "weights:{}@0.5", "weights:{}:rescale@0.5"):
        ours = hiddenkey.attention(query, key, value, drop.format("alternate"))
        assert torch.equal(ours, hiddenkey.attention(query, key, value, drop.format("column"), keep=even))


def test_views_share_no_layer_above_a_drop_of_a_position_of_ones_own():
    """It stands before all layers, in no layer itself: replayed from the first view, both views would be equal."""

    @hiddenkey.register_position("embedded", per_layer=False)
    def embedded(model):
        yield "model.embed_tokens", "output"

    model = make("llama").train()
    hiddenkey.attach(model, "embedded:column@0.4 ~ kl")
    assert hiddenkey.consistency_step(model, batch("llama")).consistency > 1e-3


def test_a_position_in_a_space_that_there_is_not():
    with pytest.raises(ValueError, match="space = 'keys' is not allowed: it is one of logits, weights, stream"):
        hiddenkey.register_position("anywhere", space="keys")


def test_a_pattern_works_in_the_language():
    register_alternate()
    assert str(hiddenkey.parse("dropkey:alternate@0.5 ~ kl")) == "logits:alternate@0.5 ~ kl*1.0"
    with pytest.raises(hiddenkey.RecipeError, match="Did you mean 'alternate'"):
        hiddenkey.parse("hidden:alternat@0.5")
    with pytest.raises(ValueError, match="registered already"):
        register_alternate()


def test_what_was_registered_is_gone_again():
    with pytest.raises(hiddenkey.RecipeError, match="unknown pattern 'alternate'"):
        hiddenkey.parse("hidden:alternate@0.5")


def test_a_unit_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="unit = 'cell' is not allowed: it is one of entry, row, fixed"):
        hiddenkey.register_pattern("wrong", unit="cell")


def test_a_pattern_may_ask_for_documents():
    @hiddenkey.register_pattern("first", needs_segments=True)
    def first(grid, p):
        """The first place of every document."""
        segments = grid.segments_over_lead()
        opens = torch.cat([segments[..., :1] > 0, segments[..., 1:] > segments[..., :-1]], -1)
        return grid.lay(~opens.expand(*grid.lead, grid.places))

    assert PATTERNS["first"].needs_segments
    valid = torch.tensor([[False, False, True, True]])
    out = hiddenkey.StructuredDropout("hidden:first:none@0.1")(torch.ones(1, 4, 2), valid)
    assert out[0, :, 0].tolist() == [1, 1, 0, 1]


def test_a_position():
    @hiddenkey.register_position("values", compensation="none")
    def values(layer):
        """The output of every value projection."""
        for path in layer.attentions:
            yield f"{path}.v_proj", "output"

    recipe = hiddenkey.parse("values[1/2:]:element@0.5 + logits:column@0.1")
    assert str(recipe) == "logits:column@0.1 + values[1/2:]:element@0.5"
    assert str(hiddenkey.parse("values:element:rescale@0.5")) == "values:element:rescale@0.5"
    x = torch.randn(2, 6, 3)
    out = hiddenkey.StructuredDropout("values:element@0.5")(x)
    assert torch.equal(out[out != 0], x[out != 0])
    with pytest.raises(hiddenkey.RecipeError, match="Did you mean 'values'"):
        hiddenkey.parse("vales:element@0.5")


def test_a_position_once_in_a_model():
    @hiddenkey.register_position("pooled", per_layer=False)
    def pooled(model):
        """What enters the pooler."""
        yield "pooler", "input"

    assert str(hiddenkey.parse("pooled:element@0.5")) == "pooled:element@0.5"
    with pytest.raises(hiddenkey.RecipeError, match="'pooled' exists once"):
        hiddenkey.parse("pooled[:2]:element@0.5")


@pytest.mark.parametrize(("space", "side"), [("stream", "attention"), ("logits", "output"), ("weights", "input")])
def test_a_position_whose_sides_are_of_another_space(space, side):
    @hiddenkey.register_position("mixed", space=space, compensation="none")
    def mixed(layer):
        """Draws that would drop nothing."""
        for path in layer.attentions:
            yield path, side

    with pytest.raises(hiddenkey.PlanError, match=f"'mixed' drops in the space '{space}'.* yields the side '{side}'"):
        hiddenkey.plan(make("llama"), "mixed:column@0.5")


def test_a_position_at_the_attention_weights():
    @hiddenkey.register_position("late", space="weights", compensation="rescale")
    def late(layer):
        """Another name for the weights, with another default."""
        for path in layer.attentions:
            yield path, "attention"

    query, key, value = torch.randn(3, 2, 4, 6, 3)
    keep = torch.arange(6) < 4
    ours = hiddenkey.attention(query, key, value, "late:column@0.5", keep=keep)
    assert torch.equal(ours, hiddenkey.attention(query, key, value, "weights:column:rescale@0.5", keep=keep))


@pytest.mark.parametrize(("space", "default"), [("logits", "none"), ("weights", "normalize"), ("stream", "rescale")])
def test_a_position_has_the_default_compensation_of_its_space(space, default):
    hiddenkey.register_position("other", space=space)(lambda layer: ())
    assert hiddenkey.parse("other:column@0.5") == hiddenkey.parse(f"other:column:{default}@0.5")


@pytest.mark.parametrize("spaces", (("logits",), ("stream", "logits"), ("attention",)))
def test_a_compensation_that_would_never_be_called(spaces):
    with pytest.raises(ValueError, match=r"'twice' is for the spaces .*; allowed: weights, stream"):
        hiddenkey.register_compensation("twice", spaces=spaces)


def test_a_compensation():
    @hiddenkey.register_compensation("double", spaces=("weights", "stream"))
    def double(erased, p):
        """Twice, whatever the rate."""
        return 2 * erased

    x, keep = torch.randn(2, 6, 3), torch.arange(6)[:, None] < 4
    assert torch.equal(hiddenkey.StructuredDropout("hidden:column:double@0.1")(x, keep=keep), 2 * x * keep)
    query, key, value = torch.randn(3, 2, 4, 6, 3)
    keep = torch.arange(6) < 4
    doubled = hiddenkey.attention(query, key, value, "weights:column:double@0.1", keep=keep)
    plain = hiddenkey.attention(query, key, value, "weights:column:none@0.1", keep=keep)
    torch.testing.assert_close(doubled, 2 * plain)
    with pytest.raises(hiddenkey.RecipeError, match="'logits' has no compensation 'double'; allowed: none"):
        hiddenkey.parse("logits:column:double@0.1")


@pytest.mark.parametrize("both", (False, True))
def test_a_consistency(both):
    @hiddenkey.register_consistency("cosine", both=both, clean=True)
    def cosine(first, second):
        """One minus the cosine of the logits."""
        return 1 - torch.cosine_similarity(first, second, dim=-1)

    assert CONSISTENCIES["cosine"].clean
    assert str(hiddenkey.parse("hiddenkey@0.1 ~ cosine*0.5")).endswith("~ cosine*0.5")
    first, second = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    first.requires_grad_(), second.requires_grad_()
    valid = torch.tensor([True, True, False, True])
    loss = hiddenkey.consistency_loss("cosine", first, second, valid=valid)
    torch.testing.assert_close(loss, (1 - torch.cosine_similarity(first[valid], second[valid])).mean())
    loss.backward()
    assert first.grad.any()
    assert (second.grad is not None) == both
    with pytest.raises(hiddenkey.RecipeError, match="Did you mean 'cosine'"):
        hiddenkey.parse("hiddenkey@0.1 ~ cosin")


@pytest.mark.parametrize(
    "mask",
    (
        lambda grid: torch.ones(grid.shape),
        lambda grid: torch.ones((*grid.lead, grid.places), dtype=torch.bool),
        lambda grid: torch.ones((*grid.shape[:-1], 7), dtype=torch.bool),
    ),
    ids=("floats", "not laid", "another size"),
)
def test_a_pattern_that_draws_no_mask(mask):
    @hiddenkey.register_pattern("wrong")
    def wrong(grid, p):
        return mask(grid)

    with pytest.raises(hiddenkey.UserError, match=r"'wrong' must draw a bool mask.*grid\.lay"):
        hiddenkey.StructuredDropout("hidden:wrong@0.5")(torch.ones(2, 6, 3))


def test_a_position_with_a_side_that_there_is_not():
    @hiddenkey.register_position("wrong")
    def wrong(layer):
        yield layer.path, "ouput"

    with pytest.raises(hiddenkey.PlanError, match=r"'ouput'.*attention, input, output"):
        hiddenkey.plan(make("llama"), "wrong:element@0.1")


@pytest.mark.parametrize("function", (lambda a, b: (a - b).square(), lambda a, b: (a - b).square().mean()))
def test_a_consistency_that_gives_no_value_per_row(function):
    hiddenkey.register_consistency("wrong")(function)
    with pytest.raises(ValueError, match=r"'wrong' must give one value per row, \(2, 6\)"):
        hiddenkey.consistency_loss("wrong", *torch.randn(2, 2, 6, 3))


def register_whole():
    @hiddenkey.register_pattern("whole")
    def whole(grid, p):
        """All keys or none: constant along them."""
        return hiddenkey.patterns.random_keep(
            (*grid.lead, *(1,) * (len(grid.shape) - len(grid.lead))), p, grid.device
        )

    @hiddenkey.register_pattern("queries")
    def queries(grid, p):
        """All keys or none, for every query."""
        return hiddenkey.patterns.random_keep((*grid.shape[:-1], 1), p, grid.device)


@pytest.mark.parametrize("pattern", ("whole", "queries"))
@pytest.mark.parametrize("is_causal", (True, False))
def test_a_pattern_that_is_constant_along_the_keys_drops_nothing(pattern, is_causal):
    """A row without any key keeps all it can see."""
    register_whole()
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = hiddenkey.attention(query, key, value, f"logits:{pattern}@0.5", is_causal=is_causal)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("frozen", (True, False))
def test_a_consistency_of_another_shape_is_refused_in_chunks_too(frozen):
    @hiddenkey.register_consistency("mean-mse")
    def mean_mse(first, second):
        """One value for all rows."""
        return (first - second).square().mean()

    model = make("llama").train()
    model.lm_head.requires_grad_(not frozen)
    with (
        hiddenkey.attach(model, "hidden:element@0.2 ~ mean-mse"),
        pytest.raises(ValueError, match="'mean-mse' must give one value per row"),
    ):
        hiddenkey.consistency_step(model, batch("llama"))


def test_a_position_that_is_not_there():
    @hiddenkey.register_position("lost", compensation="none")
    def lost(layer):
        """A slip of the pen."""
        for path in layer.attentions:
            yield f"{path}.v_porj", "output"

    with pytest.raises(hiddenkey.PlanError, match=r"'lost' yields model\.layers\.2\.self_attn\.v_porj, which Llama"):
        hiddenkey.plan(make("llama"), "lost:element@0.5")


def test_a_position_with_the_name_of_a_preset():
    @hiddenkey.register_position("dropkey", compensation="none")
    def dropkey(layer):
        """One name for two things."""
        yield from ()

    with pytest.raises(hiddenkey.RecipeError, match="'dropkey' is a preset and a plugin's position"):
        hiddenkey.parse("dropkey@0.1")
