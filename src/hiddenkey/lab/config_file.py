"""Reading a configuration from YAML."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from .config import FIELD_TYPES, convert
from .errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML, in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises ConstructorError where a key stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in it.
        OSError: the file cannot be read.
    """
    try:
        return _Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
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
        if name not in FIELD_TYPES:
            raise ConfigError(f"{path}: {_unknown(str(name))}")
    return {name: convert(name, FIELD_TYPES[name], value) for name, value in given.items()}


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, FIELD_TYPES, n=1, cutoff=0)
    return f"unknown name {name!r}; did you mean {nearest[0]!r}? Allowed: {', '.join(FIELD_TYPES)}."
