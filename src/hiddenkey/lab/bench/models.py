"""The models and batches of a bench: copies that share their weights and nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, LlamaConfig

from ...hf.dropouts import RATE_NAME, rates_in_config
from ...hf.views import IGNORED
from ..models import HEADS, find_targets
from ..skeleton import MODEL_CLASSES
from .config import BenchConfig

Task = Literal["classification", "causal-lm"]
# Rates of whole layers are another method.
NOT_A_UNIT = re.compile(r"layer_?drop|drop_path")


def llama_152k() -> LlamaConfig:
    """A small LLaMA whose vocabulary is larger than the rest of it, as in many current models."""
    return LlamaConfig(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


RANDOM: dict[str, Callable[[], LlamaConfig]] = {"llama-152k": llama_152k}


@dataclass(frozen=True)
class StepCase:
    """A model without dropout, a batch for it, and copies of it with LoRA."""

    name: str
    task: Task
    model: nn.Module
    batch: dict[str, Tensor]

    def adapted(self, *, own: float = 0.0, attention: str = "sdpa", lora_dropout: float = 0.0) -> Any:
        """A copy in training mode with LoRA r = 8 on query and value, every own dropout at the rate `own`.

        The frozen weights are those of the base model; adapters, hooks and configuration are the copy's.
        """
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model: Any = copy.deepcopy(self.model, shared)
        set_own_dropouts(model, own)
        model.set_attn_implementation(attention)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=lora_dropout,
            target_modules=find_targets(model),
            modules_to_save=_heads(model) if self.task == "classification" else None,
        )
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted.train()


def load_case(name: str, config: BenchConfig, device: torch.device) -> StepCase:
    """The case of a model: its task as published, its weights, a random batch.

    Raises:
        OSError: no such model.
    """
    settings = RANDOM[name]() if name in RANDOM else AutoConfig.from_pretrained(name)
    published = name in RANDOM or str((settings.architectures or [""])[0]).endswith(("ForCausalLM", "LMHeadModel"))
    task: Task = "causal-lm" if published else "classification"
    auto = getattr(transformers, MODEL_CLASSES[task])
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(0)
    model = auto.from_config(settings, dtype=dtype) if name in RANDOM else auto.from_pretrained(name, dtype=dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    set_own_dropouts(model, 0.0)
    model = model.to(device)
    return StepCase(Path(name).name, task, model, random_batch(model.config.vocab_size, task, config, device))


def set_own_dropouts(model: nn.Module, rate: float) -> None:
    """Set every dropout that the model brings along to one rate, whatever it was."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = rate
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and RATE_NAME.search(name) and not NOT_A_UNIT.search(name):
                setattr(module, name, rate)
        for name in rates_in_config(module):
            if not NOT_A_UNIT.search(name):
                setattr(module.config, name, rate)


def random_batch(vocabulary: int, task: Task, config: BenchConfig, device: torch.device) -> dict[str, Tensor]:
    """Token ids, mask and labels in the shape that the configuration asks for; lengths spread evenly."""
    size, length, padding = shape_of(task, config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (size, length), generator=generator)
    lengths = (length * (1 - 2 * padding * torch.linspace(0, 1, size))).round().clamp(min=2).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    if task == "classification":
        labels = torch.randint(0, 2, (size,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, : round(length * (1 - config.labelled))] = IGNORED
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def shape_of(task: Task, config: BenchConfig) -> tuple[int, int, float]:
    """(examples, tokens, share of padding) of a step."""
    usual = (32, 128, 0.4) if task == "classification" else (4, 256, 0.0)
    size, length, padding = (2, 16, usual[2]) if config.quick else usual
    return config.batch_size or size, config.length or length, padding if config.padding < 0 else config.padding


def _heads(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children() if name in HEADS]
