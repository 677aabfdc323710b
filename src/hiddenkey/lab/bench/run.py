"""`hiddenkey bench`: run the suites and write what they found."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hiddenkey

from ..artifacts import make_folder
from ..errors import ConfigError
from ..provenance import commit, versions
from . import memory as bench_memory
from .attention import attention_cases
from .config import WITH_MODEL, BenchConfig
from .measure import TIME, machine
from .models import RANDOM, load_case
from .modes import mode_cases
from .parts import draw_cases, loss_cases
from .record import Case, Record, read_record, write_record
from .report import bar_chart, print_case
from .startup import startup_case
from .step import step_cases

TITLES = {
    "step": "LoRA step",
    "modes": "Compiled and checkpointed",
    "attention": "Attention alone, forward and backward",
    "draw": "Drawing and dropping alone",
    "loss": "Losses of a language model alone",
    "startup": "Starting",
}


def bench(config: BenchConfig) -> list[Path]:
    """Run the suites; the JSON files written, one after each suite and model.

    Raises:
        ConfigError: a value that is not allowed, no GPU where one is asked for, an unknown provider or model, or
            quick results where others lie.
        RunError: a folder that cannot be written.
    """
    config.check()
    device = find_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.out)
    make_folder(folder)
    if config.quick:
        _keep_whole_results(folder)
    return [path for suite in config.suites() for path in _run(suite, config, device, folder)]


def find_device(name: str) -> torch.device:
    """The device asked for; auto: a GPU where there is one.

    Raises:
        ConfigError: cuda, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no GPU here; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _run(suite: str, config: BenchConfig, device: torch.device, folder: Path) -> list[Path]:
    if suite in WITH_MODEL:
        return [_of_model(suite, model, config, device, folder) for model in config.model]
    record = _blank(suite, TITLES[suite], suite, config, device)
    facts: dict[str, Any] = {}
    if suite == "startup":
        case, loaded = startup_case(config)
        cases, facts = [case], {"loaded": loaded}
    else:
        cases = {"attention": attention_cases, "draw": draw_cases, "loss": loss_cases}[suite](config, device)
    return [_finish(record, cases, facts, folder)]


def _of_model(suite: str, model: str, config: BenchConfig, device: torch.device, folder: Path) -> Path:
    record = _blank(f"{suite}-{Path(model).name}", f"{TITLES[suite]}, {Path(model).name}", suite, config, device)
    try:
        case = load_case(model, config, device)
    except hiddenkey.UserError:
        raise
    except (OSError, ValueError) as error:  # the latter of a model that neither classifies nor writes
        raise ConfigError(
            f"the model {model!r} cannot be loaded; give a hub name, a folder, or {', '.join(RANDOM)}: {error}"
        ) from error
    cases = list({"step": step_cases, "modes": mode_cases}[suite](case, config, device))
    return _finish(record, cases, {}, folder)


def _blank(name: str, title: str, suite: str, config: BenchConfig, device: torch.device) -> dict[str, Any]:
    memory = bench_memory.CUDA if device.type == "cuda" else bench_memory.CPU
    how = TIME if suite == "startup" else f"{TIME} {memory}"
    where: dict[str, Any] = {"machine": machine(device), "versions": versions(), "commit": commit()}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "name": name,
        "suite": suite,
        "title": title,
        "how": how,
        **where,
        "date": date,
        "config": config.to_dict(),
    }


def _finish(blank: dict[str, Any], cases: list[Case], facts: dict[str, Any], folder: Path) -> Path:
    record = Record(**blank, cases=cases, facts=facts)
    for case in cases:
        print_case(case)
    path = write_record(record, folder)
    bar_chart(record, path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}")
    return path


def _keep_whole_results(folder: Path) -> None:
    whole = [path for path in sorted(folder.glob("*.json")) if not read_record(path).config.get("quick")]
    if whole:
        raise ConfigError(
            f"quick results would take the place of those in {folder}, such as {whole[0].name}; give another --out."
        )
