"""hiddenkey.json beside an adapter: there and back, and every way in which it can be wrong."""

import json
import subprocess
import sys

import peft
import pytest
import torch

import hiddenkey

from .adapters import FULL, adapt, batch_for, build
from .tiny import batch, make

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
    with pytest.raises(ValueError, match=r"has format .*reads format 1; it was written by hiddenkey 9\.9: install"):
        hiddenkey.load_recipe(tmp_path)


@pytest.mark.parametrize("recipe", ("logits:starfish@0.1", "hiddenkey@7", "", 3, None, ["baseline"]))
def test_an_unknown_recipe(recipe, tmp_path):
    (tmp_path / "hiddenkey.json").write_text(json.dumps({"format": 1, "recipe": recipe}))
    with pytest.raises(ValueError, match=r"hiddenkey\.json holds a recipe this hiddenkey does not know.*plugin"):
        hiddenkey.load_recipe(tmp_path)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SAVED = [
    ("LoRA", "bert"),
    ("DoRA", "llama"),
    ("IA3", "bert"),
    ("VeRA", "llama"),
    ("LN tuning", "llama"),
    ("prompt tuning", "llama"),
    ("prefix tuning", "llama"),
    (FULL, "bert"),
    (FULL, "llama"),
]


@pytest.mark.parametrize(("tuner", "family"), SAVED)
def test_what_an_attached_model_saves_is_what_it_saves_alone(tuner, family, tmp_path):
    """Every byte: weights, configuration, PEFT's card; of a whole model too, its attention's name included."""
    for name in ("alone", "attached"):
        model = build(tuner, family, own=True)
        if name == "attached":
            hiddenkey.attach(model, "hiddenkey@0.3")
            hiddenkey.consistency_step(model, batch_for(tuner, family))
        model(**batch_for(tuner, family))  # Writes the kind of classification into the configuration.
        model.save_pretrained(tmp_path / name)
    assert files(tmp_path / "attached") == files(tmp_path / "alone")
    assert files(tmp_path / "alone")


def test_a_merged_model_saves_what_it_saves_alone(tmp_path):
    for name in ("alone", "attached"):
        model = build("LoRA", "llama")
        if name == "attached":
            hiddenkey.attach(model, "hiddenkey@0.3")
        model.merge_and_unload().save_pretrained(tmp_path / name)
    assert files(tmp_path / "attached") == files(tmp_path / "alone")


CONTINUE = """
import sys
import torch
sys.modules["hiddenkey"] = None  # As on a machine without it.
from peft import AutoPeftModelForCausalLM
folder, inputs = sys.argv[1], torch.load(sys.argv[2])
plain = AutoPeftModelForCausalLM.from_pretrained(folder)
torch.save(plain(**inputs).logits, sys.argv[3])
del sys.modules["hiddenkey"]
import hiddenkey
model = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True).train()
with hiddenkey.attach(model, hiddenkey.load_recipe(folder)) as attachment:
    torch.manual_seed(3)
    step = hiddenkey.consistency_step(model, inputs)
    step.total.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
torch.save((str(attachment.recipe), step.total), sys.argv[4])
"""


def test_another_process_loads_the_adapter_without_hiddenkey_and_goes_on_training(tmp_path):
    base, folder, data = tmp_path / "base", tmp_path / "adapter", tmp_path / "data"
    make("llama").save_pretrained(base)
    model = adapt(type(make("llama")).from_pretrained(base), "LoRA", "llama", lora_dropout=0.0)
    inputs = batch("llama")
    hiddenkey.attach(model, "hiddenkey@0.2 ~ kl*0.5")
    model.save_pretrained(folder)
    hiddenkey.save_recipe(folder, hiddenkey.find_attachment(model).recipe)
    torch.save(inputs, data)
    out = [str(tmp_path / name) for name in ("logits", "step")]
    done = subprocess.run([sys.executable, "-c", CONTINUE, folder, data, *out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(3)
    recipe, total = torch.load(out[1])
    assert recipe == str(hiddenkey.parse("hiddenkey@0.2 ~ kl*0.5"))
    torch.testing.assert_close(total, hiddenkey.consistency_step(model, inputs).total)
    torch.testing.assert_close(torch.load(out[0]), model.eval()(**inputs).logits)


def test_loading_a_recipe_leaves_the_adapter_as_it_was(tmp_path):
    """PEFT does not look at the file, and the adapter loads into the model that it is attached to."""
    model = build("LoRA", "bert")
    model.save_pretrained(tmp_path)
    alone = files(tmp_path)
    hiddenkey.save_recipe(tmp_path, "hiddenkey@0.2")
    assert {name: content for name, content in files(tmp_path).items() if name.name != "hiddenkey.json"} == alone
    again = peft.PeftModel.from_pretrained(make("bert"), tmp_path, is_trainable=True)
    with hiddenkey.attach(again, hiddenkey.load_recipe(tmp_path)):
        assert hiddenkey.consistency_step(again.train(), batch("bert")).total.isfinite()
