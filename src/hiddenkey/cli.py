"""The command line: one dataclass per command, made into flags by tyro."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import tyro

import hiddenkey

from .lab.artifacts import is_begun
from .lab.bench.config import BenchConfig
from .lab.config import FIELD_TYPES, TrainConfig
from .lab.errors import ConfigError
from .lab.sweep_file import SweepConfig

INTERRUPTED = 130
USER_ERROR = 2
FOUND_WRONG = 1
LAB_EXTRA = (
    *("datasets", "sklearn", "scipy", "matplotlib", "zstandard", "sacrebleu", "pycocoevalcap"),
    *("optuna", "sqlalchemy", "jinja2", "markdown_it"),
)


@dataclass(frozen=True)
class PlanCommand:
    """Show what a recipe would drop where, without weights and without training."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Hub name or local folder of the model."""
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """For instance hiddenkey@0.1."""
    task: Literal["auto", "classification", "causal-lm"] = "auto"
    """Head of the model; auto takes the published one."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""


@dataclass(frozen=True)
class DoctorCommand:
    """Prove that a recipe is at work on a model: load it, add LoRA, attach, and look. Exit status 0 or 1."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Hub name or local folder of the model, with its weights."""
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """For instance hiddenkey@0.1."""
    task: Literal["auto", "classification", "causal-lm"] = "auto"
    """Head of the model; auto takes the published one."""
    train_args: str = ""
    """YAML file of `hiddenkey train`: its task, LoRA, dtype, attention and checkpointing; no model or recipe."""
    rounds: int = 4
    """How often each batch is run to count draws."""
    size: int = 4
    """Examples in a batch."""
    length: int = 32
    """Tokens in an example."""
    json: bool = False
    """Print the findings as JSON."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""


@dataclass(frozen=True)
class ReportCommand:
    """Write tables, figures and a page from the runs of sweeps: `hiddenkey report results/study --out docs`."""

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER ...")]
    """Folders of sweeps, or folders above them; every runs/*.json below them is read."""
    out: str = "docs"
    """Where results.md, results.html and the folder results of tables and figures are written."""


def run_train(config: TrainConfig) -> None:
    """Train and say where the results are."""
    config.check()
    hiddenkey.parse(config.recipe)  # mistakes in these are told before the slow imports
    from .lab.quiet import quieten
    from .lab.run import train

    quieten()
    result = train(config)
    print("last epoch:", _metrics(result.last))
    print(f"best epoch by {result.metric}:", _metrics(result.best))
    for epoch, metrics in result.test.items():
        print(f"test, {epoch} epoch:", _metrics(metrics))
    print(f"adapter: {result.adapter}\nresult: {config.out}/result.json")


def run_plan(command: PlanCommand) -> None:
    """Print the plan."""
    recipe = hiddenkey.parse(command.recipe)  # a mistake in it is told before the slow imports
    from .lab.skeleton import MODEL_CLASSES, build_skeleton

    skeleton = build_skeleton(command.model, MODEL_CLASSES[command.task], command.trust_remote_code)
    print(hiddenkey.plan(skeleton, recipe))


def run_doctor(command: DoctorCommand) -> None:
    """Print the findings; exits with 1 where one is red."""
    hiddenkey.parse(command.recipe)  # a mistake in it is told before the slow imports
    from .lab.doctor import examine, show

    diagnosis = examine(
        command.model,
        command.recipe,
        command.task,
        train_args=command.train_args,
        trust_remote_code=command.trust_remote_code,
        rounds=command.rounds,
        size=command.size,
        length=command.length,
    )
    show(diagnosis, as_json=command.json)
    if not diagnosis.ok:
        sys.exit(FOUND_WRONG)


def run_bench(config: BenchConfig) -> None:
    """Measure, or write the page from what was measured."""
    config.check()
    if config.page:
        from .lab.bench.page import write_page

        print(write_page(config))
        return
    from .lab.bench.run import bench
    from .lab.quiet import quieten

    quieten()
    bench(config)


def run_sweep(config: SweepConfig) -> None:
    """Make every run of a sweep file."""
    from .lab.sweep import sweep

    sweep(config)


def run_report(command: ReportCommand) -> None:
    """Write the report and say where it is."""
    if not command.folders:
        raise hiddenkey.UserError("report needs a folder of runs: hiddenkey report results/study --out docs")
    from .lab.report.write import write_report

    print(write_report(command.folders, command.out))


RUNNERS: dict[type, Callable[[Any], None]] = {
    TrainConfig: run_train,
    PlanCommand: run_plan,
    DoctorCommand: run_doctor,
    BenchConfig: run_bench,
    SweepConfig: run_sweep,
    ReportCommand: run_report,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `hiddenkey`. Mistakes of the user exit with 2 and one message, Ctrl-C with 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"hiddenkey {hiddenkey.__version__}")
        return
    command: Any = None
    try:
        command = _parse(arguments)
        RUNNERS[type(command)](command)
        sys.stdout.flush()
    except BrokenPipeError:
        _end_with_the_reader()
    except KeyboardInterrupt:
        sys.stderr.write(f"\nStopped.{_way_on(command)}\n")
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in LAB_EXTRA:
            raise
        sys.stderr.write(
            f"hiddenkey: {error.name} is not installed; this command needs the extra hiddenkey[lab]: "
            "pip install '.[lab]' in a checkout\n"
        )
        sys.exit(USER_ERROR)
    except (hiddenkey.UserError, OSError) as error:
        sys.stderr.write(f"hiddenkey: {error}\n")
        sys.exit(USER_ERROR)


def _parse(arguments: list[str]) -> Any:
    defaults: dict[str, Any] = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
    if arguments[:1] == ["train"] and arguments[1:] and not arguments[1].startswith("-"):
        from .lab.config_file import read_fields

        defaults |= read_fields(arguments.pop(1))
    elif arguments[:1] == ["train"]:
        _require_file_first(arguments[1:])
    train = tyro.conf.subcommand("train", default=TrainConfig(**defaults))
    commands = (
        Annotated[TrainConfig, train]
        | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
        | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
        | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    )
    return tyro.cli(
        commands,
        prog="hiddenkey",
        description="Structured dropout and consistency losses for LoRA fine-tuning.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _end_with_the_reader() -> None:
    """Where nobody reads our output any more (`hiddenkey plan … | head`), end without a word; tell of other pipes."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    sys.stderr.write("hiddenkey: a pipe to another process broke\n")
    sys.exit(USER_ERROR)


def _require_file_first(arguments: list[str]) -> None:
    switches = {f"--{name.replace('_', '-')}" for name, kind in FIELD_TYPES.items() if kind is bool}
    for before, word in pairwise(arguments):
        if word.endswith((".yaml", ".yml")) and (before in switches or not before.startswith("-")):
            raise ConfigError(f"{word}: the file comes first, as in hiddenkey train {word} --seed 1.")


def _way_on(command: Any) -> str:
    if isinstance(command, SweepConfig) and not command.dry_run:
        return " The same command continues from the last checkpoints."
    if not isinstance(command, TrainConfig):
        return ""
    without = " without --overwrite" if command.overwrite else ""
    if is_begun(command):
        return f" The same command{without} continues from the last checkpoint."
    return " Nothing was deleted yet." if command.overwrite else " Nothing was begun yet."


def _metrics(values: Mapping[str, float | None]) -> str:
    """A number that is not finite is None in `result.json`."""
    return "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in values.items())
