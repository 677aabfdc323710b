"""The recipe language: parse, normal form, presets, bad input, fuzzing."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiddenkey import Drop, Recipe, RecipeError, UserError, parse
from hiddenkey.recipe import LayerSlice

POSITIONS = ("input", "logits", "weights", "hidden", "output")

# Text, and its normal form.
GOOD = {
    "logits:column@0.1": "logits:column@0.1",
    "logits[1/2:]:column@0.1 + hidden[1/2:]:element@0.1 ~ kl*1.0": (
        "logits[1/2:]:column@0.1 + hidden[1/2:]:element@0.1 ~ kl*1.0"
    ),
    "hidden:element@0.1+logits:column@.2~kl": "logits:column@0.2 + hidden:element@0.1 ~ kl*1.0",
    "  hidden:element@0.10  ~  kl  *  2 ": "hidden:element@0.1 ~ kl*2.0",
    "\nhidden:element@1e-1\n": "hidden:element@0.1",
    "hidden:element@1E-5": "hidden:element@1e-05",
    "hidden:element@0": "hidden:element@0.0",
    "hidden:element@0.": "hidden:element@0.0",
    "logits:column:none@0.1": "logits:column@0.1",
    "weights:column:normalize@0.1": "weights:column@0.1",
    "weights:column:normalize-grad@0.1": "weights:column:normalize-grad@0.1",
    "hidden:span:rescale@0.1": "hidden:span@0.1",
    "hidden:span:none@0.1": "hidden:span:none@0.1",
    "output:element@0.1 + weights:span@0.1 + input:column@0.1 + hidden:element@0.1 + logits:element@0.1": (
        "input:column@0.1 + logits:element@0.1 + weights:span@0.1 + hidden:element@0.1 + output:element@0.1"
    ),
    "hidden:span@0.2 + hidden:element@0.1": "hidden:span@0.2 + hidden:element@0.1",
    "hidden[:]:element@0.1": "hidden[:]:element@0.1",
    "hidden[0:]:element@0.1": "hidden[:]:element@0.1",
    "hidden[0:1/1]:element@0.1": "hidden[:]:element@0.1",
    "hidden[ 2/4 : ]:element@0.1": "hidden[1/2:]:element@0.1",
    "hidden[12:24]:element@0.1": "hidden[12:24]:element@0.1",
    "hidden[-4:]:element@0.1": "hidden[-4:]:element@0.1",
    "hidden[1/3:-1]:element@0.1": "hidden[1/3:-1]:element@0.1",
    "hidden[3:4]:element@0.1": "hidden[3:4]:element@0.1",
    "baseline": "baseline",
    "baseline ~ kl*0.5": "baseline ~ kl*0.5",
    "baseline + hidden:element@0.1": "hidden:element@0.1",
    "hidden:element@0.1 ~ kl-rdrop*1e+20": "hidden:element@0.1 ~ kl-rdrop*1e+20",
    "hiddenkey@0.1": "logits:column@0.1 + hidden:element@0.1 ~ kl*1.0",
    "hiddenkey-@0.1": "logits:column@0.1 + hidden:element@0.1",
    "hiddenkey-js@0.1": "logits:column@0.1 + hidden:element@0.1 ~ js*1.0",
    "hiddenkey-input@0.1": "input:element@0.1 + logits:column@0.1 + hidden:element@0.1",
    "hiddenkey-output@0.1": "logits:column@0.1 + hidden:element@0.1 + output:element@0.1",
    "dropout@0.1": "input:element@0.1 + weights:element:rescale@0.1 + hidden:element@0.1 + output:element@0.1",
    "r-drop@0.1": (
        "input:element@0.1 + weights:element:rescale@0.1 + hidden:element@0.1 + output:element@0.1 ~ kl-rdrop*1.0"
    ),
    "r-drop[:]@0.1 ~ kl-rdrop*5": (
        "input:element@0.1 + weights[:]:element:rescale@0.1 + hidden[:]:element@0.1 + output:element@0.1 "
        "~ kl-rdrop*5.0"
    ),
    "dropkey@0.2": "logits:element@0.2",
    "dropkey:column@0.2": "logits:column@0.2",
    "dropattention@0.05": "weights:element@0.05",
    "dropattention:span@0.05": "weights:span@0.05",
    "hiddencut@0.1": "hidden:span@0.1",
    "hiddencut:element@0.1": "hidden:element@0.1",
    "hiddenkey[12:24]@0.1": "logits[12:24]:column@0.1 + hidden[12:24]:element@0.1 ~ kl*1.0",
    "hiddenkey-input[1/2:]@0.1": "input:element@0.1 + logits[1/2:]:column@0.1 + hidden[1/2:]:element@0.1",
    "hiddenkey@0.1 ~ js*0.5": "logits:column@0.1 + hidden:element@0.1 ~ js*0.5",
    "hiddenkey@0.1 + weights:span@0.2": "logits:column@0.1 + weights:span@0.2 + hidden:element@0.1 ~ kl*1.0",
}


@pytest.mark.parametrize("text", GOOD)
def test_normal_form(text):
    recipe = parse(text)
    assert str(recipe) == GOOD[text]
    assert parse(str(recipe)) == recipe
    assert parse(recipe) is recipe


def test_parts_of_a_recipe():
    recipe = parse("weights[1/2:-1]:span:rescale@0.25 ~ jsd*0.3")
    drop = Drop("weights", "span", "rescale", 0.25, LayerSlice(Fraction(1, 2), -1))
    assert recipe == Recipe((drop,), "jsd", 0.3)
    assert parse("baseline") == Recipe(())


@pytest.mark.parametrize(
    ("position", "compensation"),
    [
        ("input", "rescale"),
        ("logits", "none"),
        ("weights", "normalize"),
        ("hidden", "rescale"),
        ("output", "rescale"),
    ],
)
def test_default_compensations(position, compensation):
    assert parse(f"{position}:column@0.1").drops[0].compensation == compensation


SLICES = {
    ":": (range(24), range(3)),
    "1/2:": (range(12, 24), range(1, 3)),
    ":1/2": (range(12), range(1)),
    "1/3:2/3": (range(8, 16), range(1, 2)),
    "12:24": (range(12, 24), range(0)),
    "-4:": (range(20, 24), range(3)),
    ":-1": (range(23), range(2)),
    "1/2:-1": (range(12, 23), range(1, 2)),
    "3:4": (range(3, 4), range(0)),
}


@pytest.mark.parametrize("layers", SLICES)
def test_layer_slices(layers):
    drop = parse(f"hidden[{layers}]:element@0.1").drops[0]
    for count, wanted in zip((24, 3), SLICES[layers], strict=True):
        assert list(drop.layers.resolve(count)) == list(wanted)


PRESETS = ("baseline", "dropkey", "dropattention", "hiddencut", "hiddenkey-", "hiddenkey", "hiddenkey-js")

# A bad recipe, and what its message must name: what was given, what is allowed, the way out.
BAD = {
    "": ["position[layers]:pattern:compensation@rate", "hiddenkey@0.1"],
    " + ": ["can't read ''", "hiddenkey@0.1"],
    "hidden:element@0.1 +": ["can't read ''"],
    "~ kl": ["can't read ''"],
    "hidden:element@0.1 ~ kl ~ js": ["'~' stands once"],
    "hiden:element@0.1": ["'hiden'", "Did you mean 'hidden'?", *POSITIONS, *PRESETS],
    "Logits:column@0.1": ["'Logits'", "Did you mean 'logits'?"],
    "hidenkey@0.1": ["'hidenkey'", "Did you mean 'hiddenkey'?"],
    "nothing@0.1": ["'nothing'", *POSITIONS, *PRESETS],
    "logits:colunm@0.1": ["pattern 'colunm'", "Did you mean 'column'?", "element", "column", "span"],
    "logits:@0.1": ["pattern ''", "element, column, span"],
    "hidden:element:rescal@0.1": ["compensation 'rescal'", "Did you mean 'rescale'?"],
    "logits:column:rescale@0.1": ["'logits'", "'rescale'", "allowed: none"],
    "hidden:column:normalize@0.1": ["'hidden'", "'normalize'", "allowed: none, rescale"],
    "hidden@0.1": ["'hidden@0.1'", "hidden:PATTERN", "element, column, span"],
    "hidden:element:none:none@0.1": ["at most one compensation"],
    "hidden:element": ["'hidden' needs a drop rate", "hidden@0.1"],
    "hiddenkey": ["'hiddenkey' needs a drop rate", "hiddenkey@0.1"],
    "hidden:element@": ["'hidden'", "[0, 1)", "''"],
    "hidden:element@1": ["'hidden'", "[0, 1)", "'1'"],
    "hidden:element@1.0": ["[0, 1)", "'1.0'"],
    "hidden:element@-0.1": ["[0, 1)", "'-0.1'"],
    "hidden:element@1.5": ["[0, 1)", "'1.5'"],
    "hidden:element@nan": ["[0, 1)", "'nan'"],
    "hidden:element@inf": ["[0, 1)", "'inf'"],
    "hidden:element@-inf": ["[0, 1)", "'-inf'"],
    "hidden:element@1e999": ["[0, 1)", "'1e999'"],
    "hidden:element@0.99999999999999999999": ["[0, 1)"],
    "hidden:element@10%": ["[0, 1)", "'10%'"],
    "hidden:element@0.1@0.2": ["[0, 1)", "'0.1@0.2'"],
    "hidden:element@0_1": ["[0, 1)"],
    "hidden:element@0,1": ["[0, 1)", "'0,1'"],
    "hidden:element 0.1": ["can't read"],
    "hidden element@0.1": ["can't read 'hidden element@0.1'"],
    "hidden[]:element@0.1": ["[]", "[1/2:]", "[3:4]"],
    "hidden[3]:element@0.1": ["[3]", "[3:4]"],
    "hidden[1:2:3]:element@0.1": ["[1:2:3]"],
    "hidden[a:]:element@0.1": ["[a:]"],
    "hidden[0.5:]:element@0.1": ["[0.5:]", "[1/2:]"],
    "hidden[5:3]:element@0.1": ["[5:3]", "empty", "start"],
    "hidden[4:4]:element@0.1": ["[4:4]", "empty"],
    "hidden[:0]:element@0.1": ["[:0]", "empty"],
    "hidden[-1:-4]:element@0.1": ["[-1:-4]", "empty"],
    "hidden[1/2:1/3]:element@0.1": ["[1/2:1/3]", "empty"],
    "hidden[1/1:]:element@0.1": ["[1/1:]", "empty"],
    "hidden[1/0:]:element@0.1": ["'1/0'", "between 0 and 1"],
    "hidden[0/0:]:element@0.1": ["'0/0'", "between 0 and 1"],
    "hidden[3/2:]:element@0.1": ["'3/2'", "between 0 and 1"],
    "hidden[1/2:element@0.1": ["can't read"],
    "hidden[1:2][3:4]:element@0.1": ["can't read"],
    "input[1/2:]:element@0.1": ["'input'", "exists once", "[1/2:]"],
    "output[:]:element@0.1": ["'output'", "exists once"],
    "hidden:element@0.1 ~": ["consistency ''", "kl, "],
    "hidden:element@0.1 ~ kll": ["consistency 'kll'", "Did you mean 'kl'?", "kl-rdrop", "mse"],
    "hidden:element@0.1 ~ kl*": ["weight of 'kl'", "positive", "''"],
    "hidden:element@0.1 ~ kl*0": ["positive", "'0'"],
    "hidden:element@0.1 ~ kl*-1": ["positive", "'-1'"],
    "hidden:element@0.1 ~ kl*nan": ["positive", "'nan'"],
    "hidden:element@0.1 ~ kl*inf": ["positive", "'inf'"],
    "hidden:element@0.1 ~ kl*1e999": ["positive", "'1e999'"],
    "hidden:element@0.1 ~ kl*1*2": ["positive", "'1*2'"],
    "hidden:element@0.1 ~ kl@0.1": ["consistency 'kl@0.1'"],
    "baseline@0.1": ["'baseline'", "takes no layers, pattern or rate"],
    "baseline@": ["'baseline'", "takes no layers, pattern or rate"],
    "baseline[:]": ["'baseline'", "takes no layers"],
    "baseline:element": ["'baseline'"],
    "hiddenkey:span@0.1": ["'hiddenkey'", "logits", "column", "write out"],
    "dropkey:column:none@0.1": ["'dropkey'", "write out"],
    "dropkey:colum@0.1": ["Did you mean 'column'?"],
    "hiddenkey@0.1 + hiddenkey-js@0.1": ["'kl'", "'js'", "after '~'"],
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_recipes(text):
    with pytest.raises(RecipeError) as caught:
        parse(text)
    message = str(caught.value)
    assert repr(text) in message
    for word in BAD[text]:
        assert word in message


@pytest.mark.parametrize("length", (9_000, 10**6))
def test_a_long_recipe_is_not_repeated_whole(length):
    for text in ("x" * length + "@0.1", "dropkey@" + "9" * length, "x@0.1 + " * (length // 8) + "x@0.1"):
        with pytest.raises(RecipeError) as caught:
            parse(text)
        assert len(str(caught.value)) < 10_000
        assert "characters" in str(caught.value)


@pytest.mark.parametrize("thing", (None, 3, b"hiddenkey@0.1", ["hiddenkey@0.1"]))
def test_neither_text_nor_recipe(thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}.*hiddenkey@0.1"):
        parse(thing)


def test_recipe_error_is_a_value_error():
    assert issubclass(RecipeError, ValueError)


# By hand instead of by text: what is wrong, and what its message must name.
BAD_OBJECTS = {
    "position": (lambda: Drop("hiden", "element", "rescale", 0.1), ["'hiden'", "Did you mean 'hidden'?"]),
    "pattern": (lambda: Drop("hidden", "colum", "rescale", 0.1), ["'colum'", "Did you mean 'column'?"]),
    "compensation": (lambda: Drop("logits", "column", "rescale", 0.1), ["'logits'", "'rescale'", "allowed: none"]),
    "rate": (lambda: Drop("hidden", "element", "rescale", 1.5), ["'hidden'", "[0, 1)", "1.5"]),
    "no rate": (lambda: Drop("hidden", "element", "rescale", float("nan")), ["[0, 1)", "nan"]),
    "layers": (lambda: Drop("input", "element", "rescale", 0.1, LayerSlice(1, 2)), ["'input'", "once", "[1:2]"]),
    "no layers": (lambda: Drop("hidden", "element", "rescale", 0.1, "1/2:"), ["hiddenkey.LayerSlice", "'1/2:'"]),
    "half a layer": (lambda: LayerSlice(0.5), ["a whole number", "0.5"]),
    "a truth": (lambda: LayerSlice(True), ["a whole number", "True"]),
    "a share below 0": (lambda: LayerSlice(Fraction(-1, 2)), ["between 0 and 1", "Fraction(-1, 2)"]),
    "a share above 1": (lambda: LayerSlice(None, Fraction(3, 2)), ["between 0 and 1", "Fraction(3, 2)"]),
    "two depths": (lambda: LayerSlice(None, Fraction(2)), ["between 0 and 1", "Fraction(2, 1)"]),
    "what cannot be read again": (lambda: LayerSlice(10**10), ["a whole number", "10000000000"]),
    "consistency": (lambda: Recipe((), "kll"), ["'kll'", "Did you mean 'kl'?"]),
    "weight": (lambda: Recipe((), "kl", 0.0), ["'kl'", "positive", "0.0"]),
    "endless weight": (lambda: Recipe((), "kl", float("inf")), ["'kl'", "positive", "inf"]),
}


@pytest.mark.parametrize("wrong", BAD_OBJECTS)
def test_what_no_recipe_can_say_is_refused_by_hand_too(wrong):
    make, words = BAD_OBJECTS[wrong]
    with pytest.raises(UserError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_drops_by_hand_are_put_in_order():
    drops = parse("logits:column@0.1 + hidden:element@0.2").drops
    assert Recipe(drops[::-1]) == Recipe(list(drops)) == parse("logits:column@0.1 + hidden:element@0.2")


def test_a_weight_without_a_consistency_is_none():
    drops = parse("hidden:element@0.1").drops
    assert Recipe(drops, None, 0.5) == parse(str(Recipe(drops, None, 0.5)))


def test_numbers_of_numpy_are_printed_as_numbers():
    drop = Drop("hidden", "element", "rescale", np.float64(0.1))
    assert str(Recipe((drop,), "kl", np.float32(2))) == "hidden:element@0.1 ~ kl*2.0"


# Any recipe there is, and any text there is.

COMPENSATIONS = {"logits": ("none",), "weights": ("none", "rescale", "normalize", "normalize-grad")}
CONSISTENCIES = ("kl", "kl-clean", "kl-rdrop", "js", "jsd", "mse")


@pytest.mark.parametrize("start", (None, 0, Fraction(0)))
@pytest.mark.parametrize("stop", (None, Fraction(1)))
def test_ends_are_ends_however_they_are_written(start, stop):
    made = LayerSlice(start, stop)
    assert (made, str(made), list(made.resolve(4))) == (LayerSlice(), ":", [0, 1, 2, 3])
    assert str(LayerSlice(stop=1)) == ":1"
    assert list(LayerSlice(stop=1).resolve(4)) == [0]


@pytest.mark.parametrize("bounds", ((3, 2), (-1, -4), (Fraction(1, 2), Fraction(1, 3)), (None, 0)))
def test_a_slice_made_by_hand_that_is_empty_in_every_model_is_refused(bounds):
    with pytest.raises(RecipeError, match="are empty in every model: the start must lie before the stop"):
        LayerSlice(*bounds)


@st.composite
def layer_slices(draw):
    """None, or a slice which holds layers in some model."""
    if draw(st.booleans()):
        return None
    if draw(st.booleans()):
        start = draw(st.integers(0, 90))
        stop = draw(st.none() | st.integers(start + 1, 200))
        return LayerSlice(start, stop)
    if draw(st.booleans()):
        start = draw(st.integers(-40, -2))
        return LayerSlice(start, draw(st.none() | st.integers(start + 1, -1)))
    below = draw(st.integers(2, 12))
    start = draw(st.integers(0, below - 2))
    stop = draw(st.integers(start + 1, below))
    return LayerSlice(Fraction(start, below), draw(st.sampled_from([None, -1, Fraction(stop, below)])))


@st.composite
def drops(draw):
    position = draw(st.sampled_from(POSITIONS))
    return Drop(
        position,
        draw(st.sampled_from(("element", "column", "span"))),
        draw(st.sampled_from(COMPENSATIONS.get(position, ("none", "rescale")))),
        draw(st.floats(0, 1, exclude_max=True, allow_nan=False)),
        None if position in ("input", "output") else draw(layer_slices()),
    )


@st.composite
def recipes(draw):
    chosen = draw(st.lists(drops(), max_size=6))
    name = draw(st.none() | st.sampled_from(CONSISTENCIES))
    weight = draw(st.floats(0, 1e300, exclude_min=True)) if name else 1.0
    return Recipe(tuple(sorted(chosen, key=lambda drop: POSITIONS.index(drop.position))), name, weight)


@given(recipes())
def test_every_recipe_survives_its_text(recipe):
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


def parses_or_says_why(text):
    try:
        recipe = parse(text)
    except RecipeError as error:
        assert repr(text)[:400] in str(error)  # a long one is cut in the middle
        assert len(str(error)) > len(repr(text)[:400]) + 20
        return
    assert parse(str(recipe)) == recipe
    assert all(0 <= drop.p < 1 for drop in recipe.drops)
    assert recipe.weight > 0


@given(st.text())
@example("\x00")
@example("hidden:element@\u0660.\u0661")
@example("hidden[²:]:element@0.1")
@example("hidden:element@" + "9" * 5000)
@example("hidden[" + "9" * 5000 + ":]:element@0.1")
@example("\ud800:element@0.1")
def test_any_text_parses_or_says_why(text):
    parses_or_says_why(text)


WORDS = ["1/2", "hidden", "logits", "hiddenkey", "baseline", "column", "span", "kl", "none", "nan", "@0.1"]
PIECES = st.sampled_from([*"[]:@+~*/-. 019eE", *WORDS])


@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_row_of_pieces_parses_or_says_why(text):
    parses_or_says_why(text)


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_recipe_with_slips_of_the_pen_parses_or_says_why(text, data):
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 2))
        text = text[:at] + data.draw(PIECES | st.text(max_size=2)) + text[at + cut :]
    parses_or_says_why(text)


def test_a_consistency_that_is_named_settles_which_of_two_presets():
    text = "hiddenkey[:6]@0.1 + hiddenkey-js[6:]@0.1"
    with pytest.raises(RecipeError, match="name the one you want after '~'"):
        parse(text)
    assert parse(f"{text} ~ kl").consistency == "kl"
