"""Messages: a value of any length leaves room for what is said of it."""

import pickle

import pytest

import hiddenkey
from hiddenkey.registry import Registry


@pytest.mark.parametrize("name", ("x" * 10**6, "x " * 10**6))
def test_a_message_cuts_a_long_value_and_keeps_what_follows_it(name):
    registry = Registry("shape")
    registry.add("square", object())
    with pytest.raises(hiddenkey.UnknownNameError) as caught:
        registry[name]
    said = str(caught.value)
    assert said.startswith("unknown shape 'x")
    assert said.endswith("Known: square")
    assert "characters left out" in said
    assert len(said) < 10_000
    assert str(pickle.loads(pickle.dumps(caught.value))) == said


@pytest.mark.parametrize("length", (10, 1_000))
def test_a_message_of_a_usual_length_is_whole(length):
    assert str(hiddenkey.UserError("x" * length)) == "x" * length
