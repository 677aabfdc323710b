"""Reading a configuration from YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .config import FIELD_TYPES, convert
from .errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML, in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises ConstructorError where a key stands twice; what `<<` merges in gives way."""
        own = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", own[index].start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in it.
        OSError: the file cannot be read.
    """
    try:
        return _Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
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
        if name not in FIELD_TYPES:
            raise ConfigError(f"{path}: {_unknown(str(name))}")
    return {name: convert(name, FIELD_TYPES[name], value) for name, value in given.items()}


def _unknown(name: str) -> str:
    return f"unknown name {name!r}{hint(name, FIELD_TYPES)} Allowed: {', '.join(FIELD_TYPES)}."


def hint(name: str, allowed: Iterable[str]) -> str:
    """The end of a sentence: the name that was meant, where one is near."""
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
