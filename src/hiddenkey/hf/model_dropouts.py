"""The dropouts a model brings along: found, set to 0 on attach, given back on detach; an adapter's are left."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .peft_layers import is_wrapper, modules
from .sites import DropSwitch
from .source_reading import config_names_in, names_in

RATE_NAME = re.compile(r"dropout|drop_prob|drop_path|pdrop|layerdrop|droprate")


CONFIG = "config."


@dataclass(frozen=True)
class OwnDropout:
    """One rate in the model: the attribute `name` of the module at `path`, at its value `p`.

    A rate that its forward reads from the configuration has the name "config.NAME", one of several adapters'
    "NAME.ADAPTER".
    """

    path: str
    name: str
    p: float


ZeroedRates = Sequence[tuple[nn.Module, OwnDropout]]


def own_dropouts(model: nn.Module) -> Iterator[OwnDropout]:
    """Every dropout of the model itself with a rate above 0 (attention, hidden, embedding, classifier, layers)."""
    for path, module, brought in modules(model):
        if not brought and not is_wrapper(module) and not isinstance(module, DropSwitch):
            yield from (OwnDropout(path, name, p) for name, p in _rates(module))


def adapter_dropouts(model: nn.Module) -> Iterator[OwnDropout]:
    """The adapters' dropouts (`lora_dropout`, `module_dropout`), which the user chose and which stay as they are."""
    for path, module, brought in modules(model):
        if brought or is_wrapper(module):
            yield from (OwnDropout(path, name, p) for name, p in (*_rates(module), *_rates_by_adapter(module)))


def zero_rates(model: nn.Module, dropouts: Sequence[OwnDropout]) -> ZeroedRates:
    """Set the rates to 0; returns what `restore_rates` takes."""
    zeroed = [(model.get_submodule(own.path), own) for own in dropouts]
    for module, own in zeroed:
        _set_rate(module, own.name, 0.0)
    return zeroed


def restore_rates(zeroed: ZeroedRates) -> None:
    """Set the rates to what they were, wherever the modules are by now."""
    for module, own in zeroed:
        _set_rate(module, own.name, own.p)


def rates_in_config(module: nn.Module) -> list[str]:
    """The dropout rates that its forward reads from `self.config` while training, whatever their values.

    One that is read without asking for `training` works in evaluation too (SpeechT5's prenet) and is no such dropout.
    """
    if "training" not in names_in(module):
        return []
    config = vars(module).get("config")
    names = sorted(name for name in config_names_in(module) if RATE_NAME.search(name))
    return [name for name in names if isinstance(getattr(config, name, None), float)]


def _set_rate(module: Any, name: str, p: float) -> None:
    """A configuration is shared, and saved with the model: the module has a view of it while rates differ."""
    if not name.startswith(CONFIG):
        attribute, _, adapter = name.partition(".")
        if adapter:
            getattr(module, attribute)[adapter] = p
        else:
            setattr(module, attribute, p)
        return
    view = ConfigView.of(module.config)
    view.set_rate(name.removeprefix(CONFIG), p)
    module.config = view if view.differs else view.original


def _rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    """(attribute, rate) of a module's own rates above 0."""
    if isinstance(module, _DropoutNd):
        if module.p > 0:
            yield "p", module.p
        return
    # Dropouts of others (OFT's and BOFT's) keep theirs in `p` too.
    is_dropout = "dropout" in type(module).__name__.lower()
    for name, value in vars(module).items():
        if isinstance(value, float) and 0 < value < 1 and (RATE_NAME.search(name) or (is_dropout and name == "p")):
            yield name, value
    for name in rates_in_config(module):
        rate: float = getattr(module.config, name)
        if 0 < rate < 1:
            yield CONFIG + name, rate


def _rates_by_adapter(module: nn.Module) -> Iterator[tuple[str, float]]:
    """The same of a layer of LoHa or LoKr, which keeps a dictionary of rates."""
    for name, value in vars(module).items():
        if RATE_NAME.search(name) and isinstance(value, dict):
            yield from ((f"{name}.{adapter}", p) for adapter, p in value.items() if isinstance(p, float) and p > 0)


class ConfigView:
    """Reads and writes through to `original`, but for the rates that were set here."""

    def __init__(self, original: Any) -> None:
        vars(self)["original"] = original

    @classmethod
    def of(cls, config: Any) -> ConfigView:
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
