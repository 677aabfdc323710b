"""Trainings of a model that processes hold in parts: FSDP2 by torch, FSDP2 and tensor parallel by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hiddenkey
from hiddenkey.hf.attachment import find_attachment, step_state
from hiddenkey.hf.structure import find_transformer
from tests.distributed.scenarios import RANKS, Views, batches, build, curve, same

SHARDED = [
    (whole, consistency, first, checkpointing)
    for whole in (False, True)
    for consistency in ("kl", "kl-clean", "kl-rdrop")
    for first in ("attach", "shard")
    for checkpointing in (None, False, True)
]


def fsdp2(out: Path) -> dict[str, Any]:
    """Gradients through torch's fully_shard, by hand."""
    distributed.init_process_group("gloo")
    return {str(case): fully_sharded(*case) for case in SHARDED}


def fully_sharded(
    whole: bool, consistency: str, first: str, checkpointing: bool | None, ranks: int = RANKS
) -> dict[str, Any]:
    """Gradients of one step, and whether the dense path was taken. first: what is done first to the model."""
    model = build("llama", whole)
    transformer = find_transformer(model)[1]
    if checkpointing is not None:
        transformer.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        transformer.enable_input_require_grads()
    transformer.register_forward_pre_hook(Views().before)
    if first == "attach":
        hiddenkey.attach(model, same(consistency))
    if ranks > 1:
        for layer in transformer.model.layers:
            fully_shard(layer)
        fully_shard(transformer.lm_head)
        fully_shard(model)
    if first == "shard":
        hiddenkey.attach(model, same(consistency))
    return step(model, batches(distributed.get_rank() if ranks > 1 else 0, ranks, 1)[0], ranks)


def step(model: Any, batch: dict[str, Tensor], scale: float) -> dict[str, Any]:
    """Whole gradients of one step, and whether the dense path was taken."""
    items = (batches(0, 1, 1)[0]["labels"][:, 1:] != -100).sum()
    hiddenkey.consistency_step(model, batch, num_items=items, scale=scale).total.backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    attachment = find_attachment(model)
    assert attachment is not None
    return {"gradients": gradients, "dense": step_state(attachment).dense}


def full(tensor: Any) -> Tensor:
    """A tensor of which every process may hold a part."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def loaded(folder: Path, whole: bool, **sizes: int) -> Any:
    """The model in `folder`, in float64, with the same LoRA in every process."""
    options = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
    if whole:
        return model.train()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = full(parameter).shape
                value = torch.linspace(-0.3, 0.3, size.numel(), dtype=torch.float64).view(size)
                if hasattr(parameter, "placements"):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return model


def tensor_parallel(out: Path) -> dict[str, Any]:
    """Gradients of a model whose heads and features two processes share."""
    return {str(whole): tensor_parallel_step(out, whole, tp_size=RANKS) for whole in (False, True)}


def tensor_parallel_step(out: Path, whole: bool, **sizes: int) -> dict[str, Any]:
    """One step on the whole batch."""
    model = loaded(out / "model", whole, **sizes)
    find_transformer(model)[1].register_forward_pre_hook(Views().before)
    hiddenkey.attach(model, same("kl"))
    return step(model, batches(0, 1, 1)[0], 1.0)


def fsdp_trainer(out: Path) -> dict[str, Any]:
    """Curves through DropTrainer, of a model that transformers sharded."""
    cases = {"same": (same("kl"), 6), "drawn": ("hiddenkey@0.3", 2)}
    return {
        name: curve(
            out / name,
            "llama",
            recipe,
            RANKS,
            model=loaded(out / "model", False, fsdp_size=RANKS),
            max_steps=steps,
            max_grad_norm=0.0,
        )
        for name, (recipe, steps) in cases.items()
    }
