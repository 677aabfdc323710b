"""Imports point one way, importing the package is cheap, files are short, and public names say what they do."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hiddenkey

ROOT = Path(hiddenkey.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# errors <- registry <- positions, patterns, compensations, consistency <- recipe <- masks <- attention_paths, dropout
# <- hf <- lab <- cli
RANKS = {
    "errors": 0,
    "presets": 0,
    "registry": 1,
    "positions": 2,
    "patterns": 2,
    "compensations": 2,
    "consistency": 2,
    "recipe": 3,
    "masks": 4,
    "attention_paths": 7,
    "dropout": 7,
    "hf": 8,
    "lab": 9,
    "cli": 10,
}
CORE = {"torch", "numpy", *sys.stdlib_module_names}
HUGGING_FACE = {"transformers", "peft"}


def room_of(file: Path) -> str:
    """The room of a file: its folder, or its own name."""
    return file.parts[0].removesuffix(".py")


def imports(source: str, package: list[str]) -> set[str]:
    """Every module that `source`, a module of `package`, imports anywhere, by absolute name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x" names a module, "from .x import y" may.
            found |= {module if node.module and node.level == 0 else f"{module}.{alias.name}" for alias in node.names}
    return found


def imports_of(file: Path) -> set[str]:
    return imports((ROOT / file).read_text(), ["hiddenkey", *file.parts[:-1]])


def rooms_entered(file: Path) -> set[str]:
    """Other rooms of the package that `file` imports from; the contents page counts as `hiddenkey`."""
    rooms = set()
    for name in imports_of(file) - {"hiddenkey.__version__"}:
        first, *rest = name.split(".")
        if first == "hiddenkey":
            rooms.add(rest[0] if rest and rest[0] in RANKS else "hiddenkey")
    return rooms - {room_of(file)}


def outsiders(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(file)} - {"hiddenkey"}


def test_the_reader_of_imports_sees_every_form():
    source = """
import os, torch.nn as nn
from transformers import Trainer
from .plan import plan
from . import sites
from ..registry import Registry
from .. import recipe
from hiddenkey.hf.plan import plan
def f():
    from ..lab.run import go
"""
    found = imports(source, ["hiddenkey", "hf"])
    assert {"os", "torch.nn", "transformers", "hiddenkey.hf.plan.plan", "hiddenkey.hf.sites"} <= found
    assert {"hiddenkey.registry.Registry", "hiddenkey.recipe", "hiddenkey.hf.plan", "hiddenkey.lab.run.go"} <= found


def test_every_file_has_a_room():
    assert len(FILES) > 12
    assert {room_of(file) for file in FILES} - {"__init__", "__main__"} <= set(RANKS)


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in RANKS], ids=str)
def test_imports_point_one_way(file):
    allowed = {room for room, rank in RANKS.items() if rank < RANKS[room_of(file)]}
    if RANKS[room_of(file)] > RANKS["hf"]:
        allowed.add("hiddenkey")  # Users of the library may use its front door.
    assert rooms_entered(file) <= allowed


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_hf_and_lab_import_hugging_face(file):
    if room_of(file) == "lab":
        return
    if room_of(file) == "hf":
        assert "datasets" not in outsiders(file)
    elif room_of(file) == "cli":
        assert not outsiders(file) & {*HUGGING_FACE, "datasets", "accelerate"}
    else:
        assert outsiders(file) <= CORE


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_is_longer_than_600_lines(file):
    assert len((ROOT / file).read_text().splitlines()) <= 600


def loaded_after(code):
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    command = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_the_package_loads_next_to_nothing():
    loaded = loaded_after("import hiddenkey; dir(hiddenkey); hiddenkey.__version__")
    assert "hiddenkey" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "peft", "accelerate", "datasets"}


def test_the_core_loads_no_transformers():
    code = "import hiddenkey; hiddenkey.attention, hiddenkey.StructuredDropout, hiddenkey.parse('hiddenkey@0.1')"
    loaded = loaded_after(f"{code}; hiddenkey.consistency_loss")
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft", "accelerate", "datasets"}


def test_no_module_hides_a_public_name():
    """An imported module becomes an attribute of its package: a public name of a module's own name would be lost."""
    modules = {room_of(file) for file in FILES}
    assert not modules & set(hiddenkey.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        hiddenkey.atention  # noqa: B018


def test_the_contents_page_lists_what_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"annotations", "import_module", "TYPE_CHECKING", "Any"} == set(hiddenkey.__all__)
    assert set(hiddenkey.__all__) <= set(dir(hiddenkey))


@pytest.mark.parametrize("name", hiddenkey.__all__)
def test_public_names_have_docstrings(name):
    thing = getattr(hiddenkey, name)
    assert thing.__module__.startswith("hiddenkey.")
    assert len(thing.__doc__ or "") > 20
    assert not thing.__doc__.startswith(f"{name}("), "a docstring that dataclass made"


@pytest.mark.parametrize("file", [file for file in FILES if (ROOT / file).read_text()], ids=str)
def test_every_module_opens_with_what_it_is(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize(
    "room", ["registry", "recipe", "masks", "attention_paths", "dropout", "consistency", "presets"]
)
def test_core_rooms_import_on_their_own(room):
    assert importlib.import_module(f"hiddenkey.{room}").__doc__
