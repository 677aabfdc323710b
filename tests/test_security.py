"""The sources load no pickles, run no shell, evaluate no text, and ask for remote code only where a flag says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hiddenkey

ROOT = Path(hiddenkey.__file__).parent
CHECKOUT = Path(__file__).parents[1]
FILES = sorted([*ROOT.rglob("*.py"), *(CHECKOUT / "demo").glob("*.py")])

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
TEXT_IS_RUN = {"eval", "exec", "compile", "__import__"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}


def name_of(function: ast.expr) -> str:
    """What is called, as it is written: `torch.load`, `eval`."""
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def fault_of_call(call: ast.Call) -> str | None:
    name, options = name_of(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    if name in TEXT_IS_RUN or name.rpartition(".")[2] in SHELLS:
        return name
    if name == "torch.load" and not is_true(options.get("weights_only", ast.Constant(None))):
        return "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return f"{name} in the place of yaml.safe_load"
    wrong = [
        key for key in ("shell", "trust_remote_code", "allow_pickle") if key in options and is_true(options[key])
    ]
    return f"{wrong[0]}=True" if wrong else None


def faults(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and (fault := fault_of_call(node)):
            found.append(fault)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_source_does_what_it_should_not(file: Path):
    assert faults(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_sees(source: str):
    assert len(faults(source)) == 1


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "load(name, shell=False)"])
def test_the_check_lets_pass(source: str):
    assert faults(source) == []


def test_every_asset_of_the_demo_has_its_hash():
    lines = (CHECKOUT / "demo" / "requirements-assets.txt").read_text().splitlines()
    wheels = [line for line in lines if line and not line.startswith("#")]
    assert wheels
    assert all("==" in line and "--hash=sha256:" in line for line in wheels)
    assert "--require-hashes" in (CHECKOUT / "demo" / "download.py").read_text()
