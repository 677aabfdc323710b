"""Names of things: how they are found, and what is said when they are not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from .errors import UnknownNameError

T = TypeVar("T")

NAME = re.compile(r"[a-z][a-z0-9_-]*")
PLUGIN_GROUP = "hiddenkey.plugins"
_failed_plugins: list[str] | None = None
"""One sentence for each installed plugin that does not import; None before the first look."""


class Registry(Generic[T]):
    """Objects of one kind by name, in the order of registration.

    A name that is not there makes the registry import the modules under the entry-point group
    `hiddenkey.plugins`, whose decorators add theirs; only then is the name unknown.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Register `thing` as `name`; raises ValueError for a malformed or taken name."""
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{self.kind} name {name!r} can't be written in a recipe: "
                "use lower-case letters, digits, '-' and '_', a letter first"
            )
        if name in self._objects:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")
        self._objects[name] = thing

    def remove(self, name: str) -> None:
        """Take a registered name out again (for tests and notebooks)."""
        del self._objects[name]

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UnknownNameError(unknown_or_failed(self.kind, name, self.names()))
        return self._objects[name]

    def __contains__(self, name: str) -> bool:
        if name not in self._objects:
            load_plugins()
        return name in self._objects

    def __iter__(self) -> Iterator[T]:
        load_plugins()
        return iter(self._objects.values())

    def rank(self, name: str) -> int | None:
        """The place of a name in the order of registration, None where it is not registered so far."""
        return list(self._objects).index(name) if name in self._objects else None

    def names(self) -> list[str]:
        load_plugins()
        return list(self._objects)


def unknown(kind: str, name: str, allowed: Collection[str]) -> str:
    """The message for a name that does not exist: what was given, what is near, what is allowed."""
    return f"unknown {kind} {name!r}.{nearest(name, allowed)} Known: {', '.join(allowed)}"


def nearest(name: str, allowed: Collection[str]) -> str:
    """A sentence with the name that was meant, after a space; empty where none is near."""
    near = get_close_matches(name.lower(), allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_or_failed(kind: str, name: str, allowed: Collection[str]) -> str:
    """`unknown` for a name that a plugin could add: names the installed plugins that failed to load, too."""
    return ". ".join([unknown(kind, name, allowed), *load_plugins()])


def load_plugins() -> list[str]:
    """Import every installed plugin module once; one sentence for each that failed, whatever others do."""
    global _failed_plugins
    if _failed_plugins is None:
        _failed_plugins = []  # before the imports, whose own look-ups come here again
        for plugin in entry_points(group=PLUGIN_GROUP):
            try:
                plugin.load()
            except Exception as error:  # noqa: BLE001 - a plugin's code may raise anything
                reason = f"{type(error).__name__}: {error}"
                _failed_plugins.append(
                    f"The hiddenkey plugin {plugin.name!r} ({plugin.value}) is installed but failed to load: {reason}"
                )
    return _failed_plugins
