"""Checkpoints that a kill at any moment leaves usable: only those marked as whole, and unchanged since, count."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AliasPath, Field
from pydantic.dataclasses import dataclass

from .artifacts import CHECKPOINT, write_text
from .errors import DamagedFileError, UnfitFolderError
from .stored import read_json

_MARK = "complete"
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class _State:
    """What is read of the Trainer's state: whether it was about to stop."""

    stopped: Annotated[
        bool,
        Field(validation_alias=AliasPath("stateful_callbacks", "TrainerControl", "args", "should_training_stop")),
    ]


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
    damaged = []
    for step in sorted(whole, reverse=True):
        changed = _changed(whole[step])
        if not changed:
            return whole[step]
        damaged.append(f"{whole[step]} is damaged: {', '.join(changed)} changed after it was written.")
        tell(damaged[-1])
    if damaged:
        raise UnfitFolderError(
            "\n".join(damaged) + "\nNo other checkpoint is left to continue from. Bring the files back, or start "
            "anew with --overwrite."
        )
    return None


def require_whole(checkpoint: Path) -> None:
    """Raises UnfitFolderError where a checkpoint that is needed is gone or damaged."""
    if not (checkpoint / _MARK).exists():
        fault = "is gone, or was not written to its end"
    else:
        changed = _changed(checkpoint)
        if not changed:
            return
        fault = f"is damaged: {', '.join(changed)} changed after it was written"
    raise UnfitFolderError(f"{checkpoint} {fault}. Bring the files back, or start anew with --overwrite.")


def is_last(checkpoint: Path) -> bool:
    """Whether training had come to its end when the checkpoint was written: all steps done, or stopped early."""
    return read_json(checkpoint / _STATE, _State).stopped


def _contents(checkpoint: Path) -> dict[str, str]:
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MARK)
    return {path.relative_to(checkpoint).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(checkpoint: Path) -> list[str]:
    """Names of files that are gone or not what they were."""
    try:
        noted = read_json(checkpoint / _MARK, dict[str, str])
    except DamagedFileError:
        return [_MARK]
    found = _contents(checkpoint)
    return [name for name, digest in noted.items() if found.get(name) != digest]
