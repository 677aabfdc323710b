"""Names of things: registration, did-you-mean, plugins read on a miss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hiddenkey
from hiddenkey import UnknownNameError
from hiddenkey.registry import Registry, unknown


def fruits():
    registry = Registry("fruit")
    for name in ("apple", "pear", "quince-2"):
        registry.add(name, name.upper())
    return registry


def test_names_in_the_order_of_registration():
    registry = fruits()
    assert registry.names() == ["apple", "pear", "quince-2"]
    assert list(registry) == ["APPLE", "PEAR", "QUINCE-2"]
    assert registry["pear"] == "PEAR"
    assert "pear" in registry
    assert "plum" not in registry
    registry.remove("pear")
    assert registry.names() == ["apple", "quince-2"]


def test_an_unknown_name_is_explained():
    with pytest.raises(UnknownNameError, match=r"unknown fruit 'aple'\. Did you mean 'apple'\? Known: apple, pear"):
        fruits()["aple"]
    assert "Did you mean" not in unknown("fruit", "zzz", ["apple"])
    assert issubclass(UnknownNameError, ValueError)


@pytest.mark.parametrize("name", ("", "Apple", "1st", "-x", "a b", "a:b", "a@b", "a+b", "a[b", "a*b", "é"))
def test_a_name_that_no_recipe_can_hold(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        fruits().add(name, None)


def test_a_taken_name():
    registry = fruits()
    with pytest.raises(ValueError, match="fruit 'pear' is registered already"):
        registry.add("pear", None)
    assert registry["pear"] == "PEAR"


PLUGIN = """
from hiddenkey import register_consistency, register_pattern
from hiddenkey.patterns import random_keep

@register_pattern("feature")
def feature(grid, p):
    return random_keep((*grid.lead, 1, grid.shape[-1]), p, grid.device)

@register_consistency("abs")
def absolute(first, second):
    return (first - second).abs().sum(-1)
"""

USE = """
import hiddenkey, torch
print(hiddenkey.parse("hidden:feature@0.5 ~ abs"))
out = hiddenkey.StructuredDropout("hidden:feature@0.5")(torch.ones(4, 50, 20))
assert torch.equal(out, out[:, :1].expand_as(out)) and 0 < int((out == 0).sum()) < out.numel()
print(float(hiddenkey.consistency_loss("abs", torch.ones(1, 3), torch.zeros(1, 3))))
try:
    hiddenkey.parse("hidden:featur@0.5")
except hiddenkey.RecipeError as error:
    print(error)
"""


def install(folder: Path, source: str, name: str = "shape") -> None:
    """A distribution as pip leaves it: a package, and its dist-info with the entry point."""
    (folder / f"{name}_plugin").mkdir()
    (folder / f"{name}_plugin" / "__init__.py").write_text(source)
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hiddenkey.plugins]\n{name}s = {name}_plugin\n")


def python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_plugin_is_found(tmp_path):
    install(tmp_path, PLUGIN)
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    normal_form, value, error = done.stdout.splitlines()
    assert normal_form == "hidden:feature@0.5 ~ abs*1.0"
    assert value == "3.0"
    assert "Did you mean 'feature'?" in error


def test_without_the_plugin_its_name_is_unknown():
    done = python("import hiddenkey; hiddenkey.parse('hidden:feature@0.5')")
    assert done.returncode == 1
    assert "unknown pattern 'feature'" in done.stderr


WITH_A_BROKEN_PLUGIN = """
import hiddenkey
print(hiddenkey.parse("hiddenkey@0.1"))
print(hiddenkey.parse("hidden:feature@0.5"))
for name in ("hidden:wedge@0.5", "blob:column@0.5", "baseline ~ wedge"):
    try:
        hiddenkey.parse(name)
    except hiddenkey.RecipeError as error:
        print(error)
"""


@pytest.mark.parametrize("before", ("", "import hiddenkey\nhiddenkey.register_pattern('x')(print)\n"))
@pytest.mark.parametrize("name", ("a_broken", "z_broken"))
def test_a_broken_plugin_takes_no_other_name_along(before, name, tmp_path):
    """Known recipes and other plugins work; a name that nobody has is reported with the plugin that failed."""
    install(tmp_path, f"{before}import a_module_that_is_not_there\n", name)
    install(tmp_path, PLUGIN)
    done = python(WITH_A_BROKEN_PLUGIN, tmp_path)
    assert done.returncode == 0, done.stderr
    preset, plugin, *errors = done.stdout.splitlines()
    assert preset == str(hiddenkey.parse("hiddenkey@0.1"))
    assert plugin == "hidden:feature@0.5"
    assert len(errors) == 3
    for error, kind in zip(
        errors, ("pattern 'wedge'", "position or preset 'blob'", "consistency 'wedge'"), strict=True
    ):
        assert f"unknown {kind}" in error
        assert f"plugin '{name}s' ({name}_plugin) is installed but failed to load: ModuleNotFoundError" in error
        assert "a_module_that_is_not_there" in error
