"""Checkpoints that a kill at any moment leaves usable: only those marked as whole, and unchanged since, count."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerState

from ..errors import DamagedFileError, UnfitFolderError
from .run_folder import CHECKPOINT, write_text
from .stored import read_json

_MARK = "complete"
_WAYS_BACK = "Bring the files back, or start anew with --overwrite."


def mark_complete(folder: Path, step: int) -> None:
    """Note that the checkpoint of `step` has been written to its end, and what is in it."""
    checkpoint = folder / f"checkpoint-{step}"
    write_text(checkpoint / _MARK, json.dumps(_contents(checkpoint), indent=1) + "\n")


def unmark(folder: Path, step: int) -> None:
    """Note that the checkpoint of `step` is about to be written, perhaps once more."""
    (folder / f"checkpoint-{step}" / _MARK).unlink(missing_ok=True)


def last_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; those a kill cut short are deleted, damaged ones told of.

    Raises:
        RunError: there are whole checkpoints, and all of them are damaged.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        found = CHECKPOINT.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue  # somebody's own
        if (path / _MARK).exists():
            whole[int(found[1])] = path
        else:
            shutil.rmtree(path)
    faults = []
    for step in sorted(whole, reverse=True):
        fault = _fault(whole[step])
        if not fault:
            return whole[step]
        faults.append(fault)
        tell(fault)
    if faults:
        raise UnfitFolderError("\n".join(faults) + f"\nNo other checkpoint is left to continue from. {_WAYS_BACK}")
    return None


def require_whole(checkpoint: Path) -> None:
    """Raises UnfitFolderError where a checkpoint that is needed is gone or damaged."""
    if fault := _fault(checkpoint):
        raise UnfitFolderError(f"{fault} {_WAYS_BACK}")


def is_last(checkpoint: Path) -> bool:
    """Whether training had come to its end when a whole checkpoint was written: all steps done, or stopped early."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return bool(state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"])


def _contents(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file: after a crash of the machine a file may have its size and not its bytes."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _MARK:
            with path.open("rb") as file:
                found[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in a sentence; empty where it is whole and as it was written."""
    if not (checkpoint / _MARK).exists():
        return f"{checkpoint} is gone, or was not written to its end."
    try:
        noted, found = read_json(checkpoint / _MARK, dict[str, str]), _contents(checkpoint)
        changed = [name for name, digest in noted.items() if found.get(name) != digest]
    except DamagedFileError:
        changed = [_MARK]
    return f"{checkpoint} is damaged: {', '.join(changed)} changed after it was written." if changed else ""
