"""How long a fresh interpreter takes to import hiddenkey or to print its help, in ratios to one that does nothing."""

from __future__ import annotations

import subprocess
import sys

from .common import Work, measure, parse, parser, write

CODE = {
    "nothing": "pass",
    "import hiddenkey": "import hiddenkey",
    "hiddenkey --help": "from hiddenkey.cli import main; main(['--help'])",
    "import torch": "import torch",
}


def process(code: str) -> Work:
    """One fresh interpreter that runs the code and has to end well."""
    return lambda: subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Measure every start."""
    found = parse(parser(__doc__))
    works = {name: process(code) for name, code in CODE.items()}
    write(found, [measure("a fresh process", works, found, memory=False)])


if __name__ == "__main__":
    main()
