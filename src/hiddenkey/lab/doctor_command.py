"""`hiddenkey doctor`: the model as `hiddenkey train` would train it, under examination."""

from __future__ import annotations

import json

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from torch import nn

import hiddenkey

from .config import MODEL_CLASSES, TrainConfig
from .console import quieten
from .model import (
    add_lora,
    build_skeleton,
    find_targets,
    load_config,
    published_class,
    read_weights,
    require_dtype,
    require_quantizer,
)

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
STYLES = {"ok": "green", "wrong": "bold red", "skipped": "dim", "note": "default"}


def examine(
    config: TrainConfig,
    task: str,
    *,
    rounds: int,
    size: int,
    length: int,
) -> hiddenkey.Diagnosis:
    """Load the model of `config`, put LoRA on it, and let `hiddenkey.doctor` look at it with the recipe.

    Standard error shows what it is at, where that is a terminal. task: that of the head; auto: the published one.

    Raises:
        OSError: no such model.
        UserError: the recipe or the model does not fit.
    """
    quieten()
    with Console(stderr=True).status(f"Reading {escape(config.model)}") as status:

        def progress(finding: hiddenkey.Finding) -> None:
            status.update(f"Examining {escape(config.model)}: {escape(finding.check)} is done")

        model = load(config, MODEL_CLASSES[task])
        status.update(f"Examining {escape(config.model)}")
        kind, dtype = next(model.parameters()).device.type, getattr(torch, config.dtype)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return hiddenkey.doctor(model, config.recipe, rounds=rounds, size=size, length=length, progress=progress)


def load(config: TrainConfig, model_class: str) -> nn.Module:
    """The pretrained model with LoRA, on the accelerator where there is one, and activation checkpointing where the
    configuration wants it. model_class: an Auto class of transformers; empty: the published one.
    """
    require_dtype(config.dtype)
    torch.manual_seed(config.seed)
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    skeleton = build_skeleton(config.model, model_class, config.trust_remote_code, **attention)
    published = published_class(load_config(config.model, config.trust_remote_code))
    require_quantizer(config.model, skeleton.config)
    find_targets(skeleton, config.target_modules)
    model, new = read_weights(getattr(transformers, model_class or published), config, **attention)
    kind = type(model).__name__
    task_type = next((task for end, task in TASK_TYPES.items() if kind.endswith(end)), None)
    adapted = add_lora(model, config, task_type, new)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if torch.accelerator.is_available():  # the kernels there are others
        adapted.to(torch.accelerator.current_accelerator())
    return adapted


def show(diagnosis: hiddenkey.Diagnosis, as_json: bool) -> None:
    """Print the findings: JSON, or a line each, in colour on a terminal."""
    if as_json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"recipe  {diagnosis.recipe}\nmodel   {diagnosis.model}\n", markup=False)
    for finding in diagnosis.findings:
        console.print(str(finding), style=STYLES[finding.verdict], markup=False)
    console.print(f"\n{diagnosis.summary}", style=STYLES["ok" if diagnosis.ok else "wrong"], markup=False)
