"""The suite `startup`: how long a fresh interpreter takes, and what it loads."""

from __future__ import annotations

import subprocess
import sys

from .config import BenchConfig
from .measure import interleave
from .record import Case, Row

ROUNDS = 15
NOTHING = "nothing"
CODE = {
    NOTHING: ("a Python interpreter that does nothing", "pass"),
    "import hiddenkey": ("the package alone", "import hiddenkey"),
    "hiddenkey --help": (
        "the command line's help",
        "from hiddenkey.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ),
}
HEAVY = ("torch", "transformers", "numpy", "datasets")
REPORT = f"\nimport sys; print('loaded', *[name for name in {HEAVY} if name in sys.modules])"


def startup_case(config: BenchConfig) -> tuple[Case, dict[str, list[str]]]:
    """Wall-clock of each, and the heavy libraries that it loaded."""
    works = {name: lambda code=code: _run(code) for name, (_, code) in CODE.items()}
    times = interleave(works, config.rounds_of(ROUNDS), config.seconds)
    rows = [Row(name, what, times[name]) for name, (what, _) in CODE.items()]
    loaded = {name: _run(code + REPORT).splitlines()[-1].split()[1:] for name, (_, code) in CODE.items()}
    return Case("a fresh process", {"python": sys.version.split()[0]}, NOTHING, rows), loaded


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
