"""What a run leaves behind: `result.json`, and the adapter with its recipe and card."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, Literal

from filelock import FileLock, Timeout
from rich.console import Console

from ..errors import BusyError, ConfigError, DamagedFileError, RunError, UnfitFolderError
from .config import TrainConfig, complete
from .console import say

RESULT = "result.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
GENERATIONS = "generations.jsonl"
# As `hiddenkey.hf.saving` names it, which takes seconds to import.
_RECIPE_FILE = "hiddenkey.json"
_FREE_BYTES = 64 * 2**20
_WAYS_OUT = "Give another folder with --out, or --overwrite to delete that run."

# A folder may be moved, and overwrite says nothing about the run.
NOT_OF_THE_RUN = ("out", "overwrite")

Status = Literal["running", "finished", "failed"]
Metrics = Mapping[str, float | None]
"""By name; None in a file that is read back: not finite."""


@dataclass(frozen=True)
class RunResult:
    """One run, as `result.json` holds it. Losses in nats (squared error for regression), times in seconds."""

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    folder: str
    """Where the run lies."""
    status: Status
    config: dict[str, Any]
    """All fields of TrainConfig."""
    recipe: str
    """The recipe in its normal form."""
    plan: str
    """What was dropped where, as printed."""
    task: str
    versions: dict[str, str]
    commit: str | None
    """Git commit of the hiddenkey sources, with "+" for changes on top; None outside a checkout."""
    data_rows: dict[str, int]
    trainable_parameters: int
    metric: str
    """The metric that chooses the best epoch."""
    last: Metrics
    """Metrics of the last epoch: validation_loss, train_loss (without drops), validation_accuracy, …"""
    best: Metrics
    """Those of the best epoch."""
    epochs: Sequence[Metrics]
    """Those of every epoch."""
    history: Sequence[Metrics]
    """Every log entry of the trainer."""
    drop_rates: dict[str, float | None]
    """Realised drop rate per position since the last start of the process."""
    drop_rates_by_site: dict[str, float | None]
    """Realised drop rate per site since the last start of the process."""
    step_seconds: dict[str, float]
    """Median, 20th and 80th percentile, and number of optimiser steps."""
    seconds: float
    """Wall-clock seconds of this process, from the first check to the adapter."""
    test: Mapping[str, Metrics] = field(default_factory=dict)
    """Metrics on the test part of the "best" and of the "last" epoch's model, those of generated texts of the model
    that is kept; empty where there is no such part."""
    failure: str = ""
    """Why the run failed."""
    data_digest: str = ""
    """Of all rows; a run goes on with the same ones only."""
    label_names: list[str] = field(default_factory=list)
    """The classes in the order of the model's outputs; empty for other tasks."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """name, method, params, axes, trial and trials of a run of a sweep; empty for others."""
    preset: str = ""
    """The preset that was typed as recipe; empty where the drops were written out."""
    task_key: str = ""
    """What names the data, such as glue/rte."""
    is_decoder: bool = False
    """Whether each place of the model sees only what is before it."""
    lower_is_better: bool = False
    """Whether a better model has `metric` lower."""
    started: str = ""
    """When the process that wrote this began, in UTC."""

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return Path(self.folder) / ADAPTER


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part; many may write it at once."""
    # The name is its own for processes of several machines, which may have the same number, and threads of one.
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_result(result: RunResult) -> None:
    """Write `result.json`; NaN and infinities become null."""
    from pydantic import TypeAdapter

    write_text(Path(result.folder) / RESULT, TypeAdapter(RunResult).dump_json(result, indent=1).decode() + "\n")


def read_result(folder: Path) -> RunResult | None:
    """The run in `folder`, or None where there is none.

    Raises:
        UnfitFolderError: a `result.json` that is damaged, or that this version did not write.
    """
    if not (folder / RESULT).exists():
        return None
    try:
        return stored_result(folder / RESULT)
    except DamagedFileError as error:
        raise UnfitFolderError(f"{error}. {_WAYS_OUT}") from error


def stored_result(path: Path) -> RunResult:
    """The run that a `result.json` tells of.

    Raises:
        DamagedFileError: it is damaged, or this version did not write it; the message names the file and the field.
    """
    from .stored import read_json

    found = replace(read_json(path, RunResult), folder=str(path.parent))
    try:
        TrainConfig(**complete(found.config)).check()
    except (ConfigError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: config: {error}") from None
    return found


def make_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"out = {str(folder)!r} cannot be written: {error}. Give another folder.") from error


def open_folder(config: TrainConfig) -> RunResult | None:
    """The earlier state of the same run in its folder, where there is one; with `overwrite` there is none.

    Raises:
        UnfitFolderError: another run lies there.
        RunError: the disk is full, or with `overwrite` there is something that no run wrote.
    """
    folder = Path(config.out)
    require_space(folder, _FREE_BYTES)
    if config.overwrite:
        _require_ours(folder)
        return None
    earlier = _same_run(config)
    if earlier is not None:
        if earlier.status == "finished" and not (folder / ADAPTER / _RECIPE_FILE).is_file():
            raise UnfitFolderError(
                f"{folder / RESULT} says that the run is finished, but its adapter is not in {folder / ADAPTER}. "
                "Bring it back, give another folder with --out, or start anew with --overwrite."
            )
    elif (folder / ADAPTER).exists() or any((folder / CHECKPOINTS).glob("*")):
        raise UnfitFolderError(
            f"{config.out} holds an adapter or checkpoints, but no {RESULT} that tells of which run. {_WAYS_OUT}"
        )
    return earlier


def require_space(folder: Path, needed: int) -> None:
    """Raises RunError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"The disk of {folder} has {free / 2**20:.0f} MiB free, the run needs {needed / 2**20:.0f} MiB. "
            "Free some space or give another folder with --out."
        )


def clear(folder: Path) -> None:
    """Delete what an earlier run has written, and nothing else."""
    for name in (ADAPTER, CHECKPOINTS):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    (folder / GENERATIONS).unlink(missing_ok=True)
    (folder / RESULT).unlink(missing_ok=True)  # the last: it says whose all this is


def _require_ours(folder: Path) -> None:
    adapter = folder / ADAPTER
    # A kill while an adapter was deleted or written leaves a part of it beside the run's result.
    ours = not adapter.exists() or (adapter / _RECIPE_FILE).exists() or (folder / RESULT).exists()
    there = (path for path in (folder / CHECKPOINTS).glob("*") if not path.name.startswith("."))
    others = [path for path in there if not CHECKPOINT.fullmatch(path.name)]
    if not ours or others:
        raise RunError(
            f"--overwrite would delete {others[0] if others else adapter}, which no run of hiddenkey wrote. Move it "
            "away or give another folder with --out."
        )


def is_begun(config: TrainConfig) -> bool:
    """Whether this run, and no other, has left its first record in its folder."""
    try:
        return _same_run(config) is not None
    except UnfitFolderError:
        return False


def _same_run(config: TrainConfig) -> RunResult | None:
    """What this run left; raises UnfitFolderError where it was another one."""
    found = read_result(Path(config.out))
    if found is None:
        return None
    now, earlier = config.to_dict(), complete(found.config)
    names = [name for name in {**now, **earlier} if name not in NOT_OF_THE_RUN]
    differing = [name for name in names if now.get(name) != earlier.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {earlier.get(name)!r} there, {now.get(name)!r} now" for name in differing)
        raise UnfitFolderError(f"{config.out} holds a run with another configuration:\n{lines}\n{_WAYS_OUT}")
    return found


def require_same_data(earlier: RunResult, digest: str) -> None:
    """Raises UnfitFolderError where an unfinished run was begun with other rows."""
    if earlier.data_digest not in ("", digest):
        raise UnfitFolderError(
            f"the data of {earlier.folder} have changed since that run began, and it cannot go on with others. "
            + _WAYS_OUT
        )


_LOCK = ".lock"


@contextmanager
def hold(folder: Path, console: Console, doing: str = "training") -> Iterator[None]:
    """Keep other processes out of an existing folder.

    Raises:
        BusyError: another process is in it, `doing` the same.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"Another process is {doing} in {folder}. Wait until it ends, or give another folder with --out."
        ) from None
    except NotImplementedError:
        say(console, f"The file system of {folder} has no locks; do not start this run twice.")
    try:
        yield
    finally:
        lock.release()
