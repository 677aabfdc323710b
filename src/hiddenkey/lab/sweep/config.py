"""The flags of `hiddenkey sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import ConfigError


@dataclass(frozen=True)
class SweepConfig:
    """Run every method, trial and seed that a sweep file asks for; the same command continues after any stop."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The sweep file, in YAML; docs/sweeps.md says what stands in it."""
    workers: int = 1
    """Processes on this machine, each with one run at a time."""
    worker: bool = False
    """Be one worker of a sweep that was started elsewhere, until all runs are done."""
    storage: str = ""
    """Database that all machines share, such as postgresql+psycopg://user@host/db; none given: a file in `out`."""
    threads: int = 0
    """CPU threads of a worker; 0 = the cores of this machine, shared between its --workers; a --worker takes all."""
    grace: int = 120
    """Seconds without a sign of life after which a run is taken from its worker."""
    dry_run: bool = False
    """Check the file, its recipes, data and models, print the plan, and run nothing."""
    out: str = ""
    """In the place of the file's `out`."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of the file's `base`, such as --set model=./tiny; may be given several times."""

    def check(self) -> None:
        """Check every value on its own.

        Raises:
            ConfigError: a value out of its range, or flags that exclude one another.
        """
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers} is not allowed: it is a whole number of 1 or more.")
        if self.threads < 0:
            raise ConfigError(f"threads = {self.threads} is not allowed: it is a whole number of 0 or more.")
        if self.grace < 4:
            raise ConfigError(f"grace = {self.grace} is not allowed: it is 4 seconds or more.")
        if self.worker and self.workers > 1:
            raise ConfigError("--worker is one process; start it several times, or give --workers without --worker.")
        if self.worker and self.dry_run:
            raise ConfigError("--worker and --dry-run exclude one another: give one of them.")
