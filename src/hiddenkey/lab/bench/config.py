"""The configuration of a bench: what is measured, on what, for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import expanded, plain
from ..errors import ConfigError

Suite = Literal["all", "step", "modes", "attention", "draw", "loss", "startup"]
SUITES = ("step", "modes", "attention", "draw", "loss", "startup")
WITH_MODEL = ("step", "modes")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class BenchConfig:
    """Measure what drops cost, in ratios to plain LoRA or plain attention: `hiddenkey bench [--flags]`.

    Providers take turns in one process, in an order that changes every round. Tables go to the terminal, results
    and bar charts into `out`; `--page` writes a page from the results in `out` instead of measuring.
    """

    suite: Suite = "all"
    """What is measured: LoRA steps, the same compiled or checkpointed, attention alone, drawing alone, the losses
    alone, starting, or all of it."""
    model: tuple[str, ...] = ()
    """Models of the suites step and modes: hub names, local folders, or llama-152k, which is small and random."""
    providers: tuple[str, ...] = ()
    """What the suite step compares, beside plain: names of providers or recipes; none given: a list by task."""
    out: str = "results/bench"
    """Folder of the results: one .json and one .png for each suite and model."""
    page: str = ""
    """Write this page, with its figures in a folder of its name, from the results in `out`; nothing is measured."""
    quick: bool = False
    """Small shapes and few rounds: shows that all works, proves nothing."""

    rounds: int = 0
    """Timed rounds of every provider; 0 = by suite."""
    seconds: float = 0.0
    """A suite measures no case longer than this, but every provider three times; 0 = no limit."""
    threads: int = 0
    """Threads of torch; 0 = its own choice."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of frozen weights, and of the tensors of attention and draw; LoRA and the losses alone stay float32."""
    batch_size: int = 0
    """Examples of a step; 0 = 32 for classification, 4 for language models."""
    length: int = 0
    """Tokens of an example; 0 = 128 for classification, 256 for language models."""
    padding: float = -1.0
    """Share of padding in a batch; -1 = 0.4 for classification, 0 for language models."""
    labelled: float = 1.0
    """Share of positions with a label, for language models."""

    def __post_init__(self) -> None:
        for name in ("out", "page"):
            object.__setattr__(self, name, expanded(getattr(self, name)))

    def check(self) -> None:
        """Check every value on its own.

        Raises:
            ConfigError: a value out of its range, or a suite that lacks its model.
        """
        for name, (holds, allowed) in _RULES.items():
            if not holds(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)!r} is not allowed: {allowed}.")
        if self.suite in WITH_MODEL and not self.model and not self.page:
            raise ConfigError(f"the suite {self.suite} needs a model: --model NAME [NAME …].")
        names = [Path(model).name for model in self.model]
        if len(set(names)) < len(names):
            raise ConfigError(f"model = {self.model} is not allowed: two have one name, and so one file of results.")
        if self.page and Path(self.page).suffix != ".md":
            raise ConfigError(f"page = {self.page!r} is not allowed: it ends in .md; its figures lie beside it.")

    def suites(self) -> tuple[str, ...]:
        """The suites to be run; `all` leaves out those of a model where no model is given."""
        if self.suite != "all":
            return (self.suite,)
        return tuple(suite for suite in SUITES if self.model or suite not in WITH_MODEL)

    def rounds_of(self, usual: int) -> int:
        """Timed rounds, where `usual` is the suite's own number."""
        return self.rounds or (3 if self.quick else usual)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON."""
        return {key: plain(value) for key, value in asdict(self).items()}


def _not_negative(value: float) -> bool:
    return 0 <= value < float("inf")


_RULES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        ("rounds", "threads", "batch_size", "length"), (_not_negative, "it is a whole number of 0 or more")
    ),
    "seconds": (_not_negative, "it is 0 or more"),
    "suite": (lambda value: value in ("all", *SUITES), f"it is one of all, {', '.join(SUITES)}"),
    "device": (lambda value: value in DEVICES, f"it is one of {', '.join(DEVICES)}"),
    "dtype": (lambda value: value in ("float32", "bfloat16"), "it is float32 or bfloat16"),
    "out": (lambda value: bool(value.strip()), "it needs a value"),
    "padding": (lambda value: value == -1 or 0 <= value < 1, "it is -1, or from 0 to below 1"),
    "labelled": (lambda value: 0 < value <= 1, "it is above 0 and at most 1"),
}
