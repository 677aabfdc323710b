"""A view of a configuration with rates of its own, for a module that reads them there in every forward."""

from __future__ import annotations

from typing import Any


class QuietConfig:
    """Reads and writes through to `original`, but for the rates that were set here."""

    def __init__(self, original: Any) -> None:
        vars(self)["original"] = original

    @classmethod
    def of(cls, config: Any) -> QuietConfig:
        """A view as it is, a view of anything else."""
        return config if isinstance(config, cls) else cls(config)

    def set_rate(self, name: str, p: float) -> None:
        """A rate of this view; one that is the original's is read there again."""
        if p == getattr(self.original, name):
            vars(self).pop(name, None)
        else:
            vars(self)[name] = p

    @property
    def differs(self) -> bool:
        """Whether any rate is this view's own."""
        return len(vars(self)) > 1

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for these of an object that has no `original` yet.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(vars(self)["original"], name, value)
