"""The command line: one dataclass per command, made into flags by tyro."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import hiddenkey

from .errors import UserError

if TYPE_CHECKING:
    from .lab.config import SweepConfig, TrainConfig

INTERRUPTED = 130
USER_ERROR = 2
FOUND_WRONG = 1
LAB_EXTRA = (
    *("datasets", "sklearn", "scipy", "matplotlib", "sacrebleu", "pycocoevalcap"),
    *("optuna", "sqlalchemy", "pandas", "tabulate", "markdown_it", "pydantic"),
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
    """Compare the methods of your runs with plain LoRA: `hiddenkey report runs/my-sweep`."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of a sweep, or above several; every result.json below it is read."""
    out: str = ""
    """Where report.md, report.html, runs.csv and forest.png are written; FOLDER/report if empty."""


def run_train(config: TrainConfig) -> None:
    """Train and say where the results are."""
    from .lab.run_folder import is_begun

    config.check()
    if not is_begun(config):
        _require_found(config)
    hiddenkey.parse(config.recipe)  # imports torch; what follows imports transformers too
    from .lab.console import quieten
    from .lab.train import train

    quieten()
    result = train(config)
    print("last epoch:", _metrics(result.last))
    print(f"best epoch by {result.metric}:", _metrics(result.best))
    for epoch, metrics in result.test.items():
        print(f"test, {epoch} epoch:", _metrics(metrics))
    print(f"adapter: {result.adapter}\nresult: {config.out}/result.json")


def run_plan(command: PlanCommand) -> None:
    """Print the plan."""
    _require_model(command.model)
    recipe = hiddenkey.parse(command.recipe)
    from .lab.config import MODEL_CLASSES
    from .lab.model import build_skeleton

    skeleton = build_skeleton(command.model, MODEL_CLASSES[command.task], command.trust_remote_code)
    print(hiddenkey.plan(skeleton, recipe))


def run_doctor(command: DoctorCommand) -> None:
    """Print the findings; exits with 1 where one is red."""
    config = _doctors_config(command)
    _require_model(config.model)
    hiddenkey.parse(config.recipe)
    from .lab.doctor_command import examine, show

    task = config.task if command.task == "auto" else command.task
    diagnosis = examine(config, task, rounds=command.rounds, size=command.size, length=command.length)
    show(diagnosis, as_json=command.json)
    if not diagnosis.ok:
        sys.exit(FOUND_WRONG)


def _doctors_config(command: DoctorCommand) -> TrainConfig:
    from .lab.config import TrainConfig, read_fields

    given = read_fields(command.train_args) if command.train_args else {}
    named = {"model": command.model, "recipe": command.recipe}
    own_code = {"trust_remote_code": True} if command.trust_remote_code else {}
    return TrainConfig(**{"data": "none", "out": "none", **given, **named, **own_code})


def _require_found(config: TrainConfig) -> None:
    """Raises what says that the model or the data are not there, before the slow imports."""
    from .lab.data_splits import local_parts
    from .lab.hub import GLUE_SET, ask_hub

    parts = local_parts(config)
    _require_model(config.model)
    if parts is None:
        ask_hub("dataset", GLUE_SET if config.data.startswith("glue/") else config.data)


def _require_model(name: str) -> None:
    from .lab.hub import ask_hub, require_model

    require_model(name)
    if not Path(name).is_dir():
        ask_hub("model", name)


def run_sweep(config: SweepConfig) -> None:
    """Make every run of a sweep file."""
    from .lab.config import require_yaml

    require_yaml(config.file)
    from .lab.sweep import sweep

    sweep(config)


def run_report(command: ReportCommand) -> None:
    """Write the report, print its verdicts, and say where it is."""
    if not Path(command.folder).expanduser().is_dir():
        raise FileNotFoundError(f"{command.folder} is no folder; give that of a sweep, or one above several.")
    from .lab.report import write_report

    page, verdicts = write_report(command.folder, command.out)
    print(*(verdict.replace("**", "") for verdict in verdicts), page, sep="\n")


RUNNERS: dict[str, Callable[[Any], None]] = {
    "train": run_train,
    "plan": run_plan,
    "doctor": run_doctor,
    "sweep": run_sweep,
    "report": run_report,
}
# Those whose flags are known without the lab.
COMMANDS: dict[str, type] = {"plan": PlanCommand, "doctor": DoctorCommand, "report": ReportCommand}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `hiddenkey`. Mistakes of the user exit with 2 and one message, Ctrl-C with 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"hiddenkey {hiddenkey.__version__}")
        return
    name, command = next(iter(arguments), ""), None
    try:
        command = _parse(arguments)
        RUNNERS[name](command)
        sys.stdout.flush()
    except BrokenPipeError:
        _end_with_the_reader()
    except KeyboardInterrupt:
        sys.stderr.write(f"\nStopped.{_way_on(name, command)}\n")
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in LAB_EXTRA:
            raise
        sys.stderr.write(
            f"hiddenkey: {error.name} is not installed; this command needs the extra hiddenkey[lab]: "
            "pip install '.[lab]' in a checkout\n"
        )
        sys.exit(USER_ERROR)
    except (UserError, OSError) as error:
        sys.stderr.write(f"hiddenkey: {UserError(str(error))}\n")  # cuts what a system error repeats
        sys.exit(USER_ERROR)


def _parse(arguments: list[str]) -> Any:
    config = (tyro.conf.OmitArgPrefixes,)
    name = next(iter(arguments), "")
    if name in COMMANDS:
        return tyro.cli(COMMANDS[name], prog=f"hiddenkey {name}", args=arguments[1:], config=config)
    from .lab.config import SweepConfig, TrainConfig

    if name == "train":
        _refuse_other_names(arguments[1:])
    defaults: dict[str, Any] = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
    if name == "train" and arguments[1:] and not arguments[1].startswith("-"):
        from .lab.config import read_fields

        defaults |= read_fields(arguments.pop(1))
    elif name == "train":
        _require_file_first(arguments[1:])
    train = tyro.conf.subcommand("train", default=TrainConfig(**defaults))
    return tyro.cli(
        Annotated[TrainConfig, train]
        | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
        | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
        | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
        | Annotated[ReportCommand, tyro.conf.subcommand("report")],
        prog="hiddenkey",
        description="Structured dropout and consistency losses for LoRA fine-tuning.",
        args=arguments,
        config=config,
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


def _refuse_other_names(arguments: list[str]) -> None:
    from .errors import ConfigError
    from .lab.config import OTHER_NAMES

    for word in arguments:
        flag = word.partition("=")[0]
        meant = OTHER_NAMES.get(flag.removeprefix("--").replace("-", "_"))
        if flag.startswith("--") and meant:
            raise ConfigError(f"{flag} is not an option of train; it is called --{meant.replace('_', '-')} here.")


def _require_file_first(arguments: list[str]) -> None:
    from .errors import ConfigError
    from .lab.config import FIELD_TYPES

    switches = {f"--{name.replace('_', '-')}" for name, kind in FIELD_TYPES.items() if kind is bool}
    for before, word in pairwise(arguments):
        if word.endswith((".yaml", ".yml")) and (before in switches or not before.startswith("-")):
            raise ConfigError(f"{word}: the file comes first, as in hiddenkey train {word} --seed 1.")


def _way_on(name: str, command: Any) -> str:
    if command is None or name not in ("train", "sweep"):
        return ""
    if name == "sweep":
        return "" if command.dry_run else " The same command continues from the last checkpoints."
    from .lab.run_folder import is_begun

    without = " without --overwrite" if command.overwrite else ""
    if is_begun(command):
        return f" The same command{without} continues from the last checkpoint."
    return " Nothing was deleted yet." if command.overwrite else " Nothing was begun yet."


def _metrics(values: Mapping[str, float | None]) -> str:
    """A number that is not finite is None in `result.json`."""
    return "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in values.items())
