"""hiddenkey.json beside an adapter: there and back, and every way in which it can be wrong."""

import json

import pytest

import hiddenkey

RECIPES = ("baseline", "hiddenkey@0.1", "logits[1/2:]:column@0.1 + hidden[-2:]:span:none@0.25 ~ kl-rdrop*0.3")


@pytest.mark.parametrize("text", RECIPES)
def test_there_and_back(text, tmp_path):
    path = hiddenkey.save_recipe(tmp_path, text)
    assert path == tmp_path / "hiddenkey.json"
    assert hiddenkey.load_recipe(tmp_path) == hiddenkey.parse(text)
    assert hiddenkey.load_recipe(str(tmp_path)) == hiddenkey.parse(text)
    content = json.loads(path.read_text())
    assert content == {"format": 1, "recipe": str(hiddenkey.parse(text)), "hiddenkey": hiddenkey.__version__}
    assert [entry.name for entry in tmp_path.iterdir()] == ["hiddenkey.json"]


def test_a_second_save_replaces_the_first(tmp_path):
    hiddenkey.save_recipe(tmp_path, "hiddenkey@0.1")
    hiddenkey.save_recipe(tmp_path, hiddenkey.parse("dropkey@0.2"))
    assert str(hiddenkey.load_recipe(tmp_path)) == "logits:element@0.2"


def test_a_bad_recipe_is_not_saved(tmp_path):
    with pytest.raises(hiddenkey.RecipeError):
        hiddenkey.save_recipe(tmp_path, "hiddenkey@2")
    assert not list(tmp_path.iterdir())


def test_no_folder_and_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        hiddenkey.save_recipe(tmp_path / "missing", "baseline")
    with pytest.raises(FileNotFoundError, match=r"hiddenkey\.json does not exist: no recipe was saved"):
        hiddenkey.load_recipe(tmp_path)


DAMAGED = {
    "empty": "",
    "half": '{"format": 1, "rec',
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no recipe": '{"format": 1}',
    "no format": '{"recipe": "baseline"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file(content, tmp_path):
    (tmp_path / "hiddenkey.json").write_text(content)
    with pytest.raises(ValueError, match=r"hiddenkey\.json is damaged.*save_recipe"):
        hiddenkey.load_recipe(tmp_path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "hiddenkey.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"hiddenkey\.json is damaged"):
        hiddenkey.load_recipe(tmp_path)


@pytest.mark.parametrize("format_", (2, 0, "1", None))
def test_another_format(format_, tmp_path):
    content = {"format": format_, "recipe": "baseline", "hiddenkey": "9.9"}
    (tmp_path / "hiddenkey.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has format .*reads format 1; it was written by hiddenkey 9\.9"):
        hiddenkey.load_recipe(tmp_path)


@pytest.mark.parametrize("recipe", ("logits:starfish@0.1", "hiddenkey@7", "", 3, None, ["baseline"]))
def test_an_unknown_recipe(recipe, tmp_path):
    (tmp_path / "hiddenkey.json").write_text(json.dumps({"format": 1, "recipe": recipe}))
    with pytest.raises(ValueError, match=r"hiddenkey\.json holds a recipe this hiddenkey does not know"):
        hiddenkey.load_recipe(tmp_path)
