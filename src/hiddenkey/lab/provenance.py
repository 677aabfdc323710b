"""Where a result comes from: versions and commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hiddenkey

_PACKAGES = ("hiddenkey", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
_SHOWN = ("python", "torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """Python, the packages that shape a result (torch with its build, such as +cpu), and the device that computes."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages | {"torch": torch.__version__, "device": _device()}


def commit() -> str | None:
    """Commit of the hiddenkey checkout that runs, with "+" for changes on top; None where it is installed."""
    package = Path(hiddenkey.__file__).resolve().parent
    root = _git(package, "rev-parse", "--show-toplevel")
    if root is None or Path(root) / "src" / "hiddenkey" != package:
        return None
    head = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git(package, "status", "--porcelain") else "")


def short(found: str | None) -> str:
    """The first digits of a commit, with its "+" for changes on top."""
    return "-" if found is None else found[:10] + ("+" if found.endswith("+") else "")


def shown_versions(found: Mapping[str, str]) -> str:
    """The versions that a page has room for."""
    return ", ".join(f"{name} {found[name]}" for name in _SHOWN if name in found)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return str(accelerator) if accelerator is not None else processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
