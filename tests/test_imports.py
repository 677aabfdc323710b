"""Imports flow one way, and importing the package is cheap."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hiddenkey

ROOT = Path(hiddenkey.__file__).parent
# Each floor imports from those before it. A file of the core is named by itself.
FLOORS = ("core", "hf", "doctor", "lab", "cli")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("hiddenkey", *(part for part in parts if part != "__init__")))


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def floor_of(module):
    parts = module.split(".")[1:]
    if "doctor" in parts[:-1]:
        return "doctor"
    return parts[0] if parts and parts[0] in FLOORS else "cli" if parts == ["__main__"] else "core"


def imported_by(module, source):
    """The modules of the package that `source` imports anywhere: in functions and under TYPE_CHECKING too."""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{full}.{alias.name}"
                yield inner if inner in MODULES else full


def graph():
    """What each module imports. The contents page of the package names everything, and is nobody's dependency."""
    found = {}
    for module, path in MODULES.items():
        names = set(imported_by(module, path.read_text())) & set(MODULES)
        found[module] = names - {module, "hiddenkey"}
    del found["hiddenkey"]
    return found


def test_there_is_no_circle():
    list(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError, which names it


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"hiddenkey"}))
def test_a_module_imports_from_its_floor_and_those_below(module):
    above = FLOORS[FLOORS.index(floor_of(module)) + 1 :]
    assert {name for name in graph()[module] if floor_of(name) in above} == set()


def test_the_reader_sees_what_stands_in_functions_and_in_type_checking():
    source = "def f():\n    from .hf.plan import Plan\nif TYPE_CHECKING:\n    from .hf import attach\n"
    assert set(imported_by("hiddenkey.recipe", source)) == {"hiddenkey.hf.plan", "hiddenkey.hf.attach"}


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, hiddenkey, hiddenkey.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_two_files_share_a_name():
    names = Counter(path.name for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_command_line_imports_the_lab_in_its_commands_alone():
    top = [node for node in ast.parse(MODULES["hiddenkey.cli"].read_text()).body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in top if node.level and (node.module or "").startswith("lab")] == []


def test_the_core_loads_no_transformers():
    code = (
        "import sys, hiddenkey; hiddenkey.attention, hiddenkey.StructuredDropout, hiddenkey.consistency_loss\n"
        "hiddenkey.parse('hiddenkey@0.1')\n"
        "print({'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_module_hides_a_public_name():
    """An imported module becomes an attribute of its package: a public name of a module's own name would be lost."""
    assert not {name.split(".")[1] for name in MODULES if "." in name} & set(hiddenkey.__all__)


def test_the_contents_page_lists_what_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"annotations", "import_module", "TYPE_CHECKING", "Any"} == set(hiddenkey.__all__)


def test_public_names_have_docstrings():
    short = [name for name in hiddenkey.__all__ if len(getattr(hiddenkey, name).__doc__ or "") < 20]
    assert short == []
