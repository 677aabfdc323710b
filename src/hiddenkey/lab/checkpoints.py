"""Checkpoints that a kill at any moment leaves usable: only those marked as whole count."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_MARK = "complete"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path, step: int) -> None:
    """Note that the checkpoint of `step` has been written to its end."""
    (folder / f"checkpoint-{step}" / _MARK).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; those a kill cut short are deleted."""
    whole = {}
    for path in folder.glob("checkpoint-*"):
        found = _NAME.fullmatch(path.name)
        if found and (path / _MARK).exists():
            whole[int(found[1])] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None
