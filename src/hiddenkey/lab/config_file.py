"""Reading a configuration from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..registry import unknown
from .config import FIELD_TYPES, convert
from .errors import ConfigError

OTHER_NAMES = {
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "output": "out",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "validation_file": "validation",
    "test_file": "test",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "scheduler",
    "logging_steps": "log_steps",
    "rank": "lora_r",
    "alpha": "lora_alpha",
}
"""What transformers and others call our fields."""

_MERGE = "tag:yaml.org,2002:merge"


_MOST_VALUES = 10_000


def _check(node: Any, sizes: dict[int, int | None]) -> int:
    """The number of values in a node, with what its aliases stand for.

    Raises ConstructorError where a key stands twice in a mapping, before `<<` merges others in, and where aliases
    make more of a file than anybody writes by hand.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in sizes:
        return sizes[id(node)] or _MOST_VALUES + 1  # it holds itself
    sizes[id(node)] = None
    size = 1
    keys: set[tuple[str, str]] = set()
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if (key.tag, key.value) in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            keys.add((key.tag, key.value))
        size += _check(value, sizes)
        if size > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MOST_VALUES:,} values", node.start_mark)
    sizes[id(node)] = size
    return size


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not YAML, a key stands twice in it, or it holds more values than anybody writes.
        OSError: the file cannot be read.
    """
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {kind}; a YAML file is wanted here, and all else stands behind its flag.")
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _check(node, {})
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{path} is not YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields a YAML file sets, in the types of `TrainConfig`.

    Raises:
        ConfigError: not a mapping of known names to values of their types.
        OSError: the file cannot be read.
    """
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds {type(given).__name__}, not lines of the form `name: value`.")
    for name in given:
        if name in OTHER_NAMES:
            raise ConfigError(f"{path}: unknown name {name!r}; it is called {OTHER_NAMES[name]} here.")
        if name not in FIELD_TYPES:
            raise ConfigError(f"{path}: {unknown('name', str(name), FIELD_TYPES)}")
    try:
        return {name: convert(name, FIELD_TYPES[name], value) for name, value in given.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
