"""Reading a configuration from YAML."""

from __future__ import annotations

import re
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


class _Loader(yaml.SafeLoader):
    """Takes no key twice, and 1e-4 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            keys.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """What a YAML text says; raises YAMLError or ValueError."""
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in it.
        OSError: the file cannot be read.
    """
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {kind}; a YAML file is wanted here, and all else stands behind its flag.")
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields a YAML file sets, in the types of `TrainConfig`.

    Raises:
        ConfigError: not a mapping of known names to values that are allowed.
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
        return {name: convert(name, value) for name, value in given.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
