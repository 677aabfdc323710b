"""Where a result comes from: versions and commit."""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hiddenkey

_PACKAGES = ("hiddenkey", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python, the packages that shape a result (torch with its build, such as +cpu), and the device that computes."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages | {"torch": torch.__version__, "device": _device()}


def commit() -> str | None:
    """Commit of the hiddenkey checkout that runs, with "+" for changes on top; None where it is installed."""
    package = Path(hiddenkey.__file__).resolve().parent
    if _git(package, "rev-parse", "--show-toplevel") != package.parents[1].as_posix():
        return None
    head = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    return head and head + ("+" if _git(package, "status", "--porcelain") else "")


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return _processor() if accelerator is None else str(accelerator)


def _processor() -> str:
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
