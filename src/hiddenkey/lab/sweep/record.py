"""One run of a sweep, as it is kept: `runs/<id>.json`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hiddenkey

from ..artifacts import GENERATIONS, NOT_OF_THE_RUN, write_json
from ..config import DEFAULTS, TrainConfig
from ..errors import RunError

RUNS = "runs"
OTHER = "other"
WORK = "work"
TEXTS = "texts"

_LONGEST_SLUG = 100


@dataclass(frozen=True)
class RunRecord:
    """One run: what was asked, and what came of it. Names of metrics are those of `RunResult`."""

    id: str
    """Readable, and at its end eight digits of a hash of what makes the run."""
    sweep: str
    """The task's name."""
    method: str
    params: dict[str, Any]
    """What the method varied."""
    axes: dict[str, Any]
    """Seed and the like."""
    trial: int
    """Which of the method's trials on these axes, from 1."""
    config: dict[str, Any]
    """All fields of TrainConfig."""
    recipe: str
    """The recipe in its normal form."""
    status: Literal["finished", "failed"]
    failure: str
    """Why it failed: a loss that is not finite."""
    task: str
    metric: str
    """The validation metric that chooses among epochs and trials."""
    lower_is_better: bool
    best: dict[str, Any]
    last: dict[str, Any]
    test: dict[str, Any]
    """Test metrics of the best epoch's model and of the last one's; empty where there was no test."""
    epochs: list[dict[str, Any]]
    data_rows: dict[str, int]
    trainable_parameters: int
    drop_rates: dict[str, Any]
    step_seconds: dict[str, float]
    seconds: float
    """Wall-clock seconds of the process that finished it."""
    started: str
    """When that process began, in UTC."""
    versions: dict[str, str]
    commit: str | None
    trials: int = 0
    """How many trials the method has on these axes when all are done; 0 in records that do not say."""
    data_digest: str = ""
    """A hash of all rows, part by part; empty in records that do not say."""

    @property
    def value(self) -> float:
        """What a search minimises: the best epoch's metric, negated where higher is better; infinite if failed."""
        metric = self.best.get(f"validation_{self.metric}")
        if self.status == "failed" or metric is None or not math.isfinite(metric):
            return math.inf
        return float(metric if self.lower_is_better else -metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def method_key(name: str) -> str:
    """The name under which a method of a sweep is known to the report: `DropKey:column` is `dropkey column`."""
    plain = " ".join(name.lower().replace(":", " ").split())
    return "lora_dropout" if plain == "lora dropout" else plain


def run_id(method: str, values: dict[str, Any], config: TrainConfig) -> str:
    """The name of a run: method and values, and a hash of all fields that differ from their defaults.

    So a field that a later version adds changes no id. `out` and `overwrite` say nothing about a run.
    """
    made_of = {
        name: value
        for name, value in config.to_dict().items()
        if name not in NOT_OF_THE_RUN and (name not in DEFAULTS or value != DEFAULTS[name])
    }
    made_of["recipe"] = str(hiddenkey.parse(config.recipe))
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]
    words = [method, *(f"{name}{_short(value)}" for name, value in values.items())]
    slug = "-".join(re.sub(r"[^a-z0-9._]+", "-", word.lower()).strip("-") for word in words)
    return f"{slug[:_LONGEST_SLUG].strip('-')}-{digest}"


def write_record(record: RunRecord, folder: Path) -> Path:
    """Write `runs/<id>.json` in the sweep's folder: a reader sees it whole or not at all."""
    path = folder / RUNS / f"{record.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.to_dict())
    return path


def keep_texts(folder: Path, run: str) -> None:
    """Move what the run with this id has generated, if anything, out of its work folder to `texts/<id>.jsonl`."""
    texts = folder / WORK / run / GENERATIONS
    if texts.exists():
        (folder / TEXTS).mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another worker in this folder was quicker
            texts.replace(folder / TEXTS / f"{run}.jsonl")


def read_record(path: Path) -> RunRecord:
    """One record.

    Raises:
        RunError: a file that this version did not write.
    """
    try:
        record = make_record(json.loads(path.read_text(encoding="utf-8")))
        _require_kinds(record)
        return record
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        names = ", ".join(entry.name for entry in fields(RunRecord))
        raise RunError(
            f"{path} is not a record of this version ({error}); it should hold: {names}. "
            "Move it away, and the run is made again."
        ) from error


_HINTS = get_type_hints(RunRecord)
# A whole number may stand for a float, and JSON writes it so.
_KINDS: dict[Any, Any] = {str: str, int: int, float: (int, float), dict: dict, list: list, bool: bool}


def make_record(found: dict[str, Any]) -> RunRecord:
    """A record from its plain values. Raises TypeError where names are missing or unknown."""
    return RunRecord(**found)


def _require_kinds(record: RunRecord) -> None:
    """Raises TypeError where a file that somebody may have changed holds another kind of value."""
    for name, hint in _HINTS.items():
        value = getattr(record, name)
        kind = get_origin(hint) or hint
        if kind in _KINDS and (not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind is not bool)):
            raise TypeError(f"{name} is {value!r}")
        if kind is Literal and value not in get_args(hint):
            raise TypeError(f"{name} is {value!r}")
    if not record.sweep:
        raise TypeError("sweep is empty")
    for name in ("best", "last", "step_seconds", "data_rows"):
        _require_numbers(name, getattr(record, name))
    for part, numbers in record.test.items():
        _require_numbers(f"test.{part}", numbers)
    for row in record.epochs:
        _require_numbers("a row of epochs", row)
    for name, text in record.versions.items():
        if not isinstance(text, str):
            raise TypeError(f"versions.{name} is {text!r}")
    absent = [name for name in ("seed", "data_seed", "model") if name not in record.config]
    if absent:
        raise TypeError(f"config has no {absent[0]}")


def _require_numbers(where: str, found: Any) -> None:
    if not isinstance(found, dict):
        raise TypeError(f"{where} is {found!r}")
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{where}.{name} is {value!r}")


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
