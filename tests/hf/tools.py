"""What several test files need: module paths written by hand, recorded draws, snapshots, LoRA, packed batches."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import hiddenkey
from hiddenkey import attention_paths, dropout
from hiddenkey.masks import draw

from .tiny import DECODERS, DEPTH, FAMILIES, VOCABULARY, batch, make

TEXT = tuple(family for family in FAMILIES if family != "vit")
PACKABLE = tuple(family for family in DECODERS if family != "opt")
DOCUMENTS = (7, 5)

# Every position at once, in every layer.
ALL = "input:element@0.2 + logits[:]:column@0.4 + weights[:]:element@0.3 + hidden[:]:element@0.3 + output:element@0.2"
POSITIONS = {
    "input": "input:element@0.4",
    "logits": "logits[:]:column@0.4",
    "weights": "weights[:]:element@0.4",
    "hidden": "hidden[:]:element@0.4",
    "output": "output:element@0.4",
}


@dataclass(frozen=True)
class Stack:
    """One stack as its model's source has it: `{}` stands for the layer's index."""

    path: str
    attentions: tuple[str, ...]
    feed_forward: str


@dataclass(frozen=True)
class Paths:
    stacks: tuple[Stack, ...]
    head: str


def _one(path: str, attention: str, feed_forward: str, head: str) -> Paths:
    return Paths((Stack(path, (attention,), feed_forward),), head)


LLAMA = _one("model.layers", "self_attn", "mlp", "lm_head")
PATHS = {
    "bert": _one("bert.encoder.layer", "attention.self", "output.dense", "classifier"),
    "roberta": _one("roberta.encoder.layer", "attention.self", "output.dense", "classifier"),
    "mpnet": _one("mpnet.encoder.layer", "attention.attn", "output.dense", "classifier"),
    "distilbert": _one("distilbert.transformer.layer", "attention", "ffn", "pre_classifier"),
    "gpt2": _one("transformer.h", "attn", "mlp", "lm_head"),
    "opt": _one("model.decoder.layers", "self_attn", "fc2", "lm_head"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), LLAMA),
    "t5": Paths(
        (
            Stack("encoder.block", ("layer.0.SelfAttention",), "layer.1.DenseReluDense"),
            Stack("decoder.block", ("layer.0.SelfAttention", "layer.1.EncDecAttention"), "layer.2.DenseReluDense"),
        ),
        "lm_head",
    ),
    "vit": _one("vit.layers", "attention", "mlp", "classifier"),
}

# The options of each config that turn its own dropouts off.
BERT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OFF: dict[str, dict[str, float]] = {
    **dict.fromkeys(("bert", "roberta", "mpnet", "vit"), BERT_OFF),
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def quiet(family: str, **options: Any) -> Any:
    """The same weights, built without dropouts of its own."""
    return make(family, **OFF.get(family, {}), **options)


def sites_of(family: str, position: str, indices: range | None = None) -> list[str]:
    """The module paths at which `position` drops in the given layers (None: all), in order."""
    paths = PATHS[family]
    if position == "output":
        return [paths.head]
    if position == "input":
        return [f"{stack.path}.0" for stack in paths.stacks]
    found = []
    for stack in paths.stacks:
        parts = (stack.feed_forward,) if position == "hidden" else stack.attentions
        found += [f"{stack.path}.{i}.{part}" for i in indices or range(DEPTH) for part in parts]
    return found


def lora(model: Any, targets: Any = "all-linear", **options: Any) -> Any:
    """LoRA around the model, with weights B that are not zero."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.train()


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def inputs_for(family: str, layout: str) -> dict[str, Any]:
    """A batch without labels; layout: none, right, left (padding) or packed (two documents, no attention mask)."""
    if layout == "packed":
        ids = batch(family, padding="none", labels=False)["input_ids"]
        # With a cache, transformers does not look for documents in the positions.
        return {"input_ids": ids, "position_ids": positions().expand_as(ids), "use_cache": False}
    return with_decoder(family, batch(family, padding=layout, labels=False))


def with_decoder(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """T5: a decoder that sees as many tokens as the encoder, with the same padding."""
    if family != "t5":
        return inputs
    return {**inputs, "decoder_attention_mask": inputs["attention_mask"]}


def positions() -> torch.Tensor:
    """Position ids that start again with each document."""
    return torch.cat([torch.arange(length) for length in DOCUMENTS])


def real_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool (B, T): which tokens are no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def shown(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits that mean something: all of a classifier, those of real tokens of a language model."""
    return logits[real_of(inputs)] if logits.dim() == 3 else logits


def other_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Other ordinary tokens everywhere."""
    return 3 + (ids - 3 + 17) % (VOCABULARY - 3)


@dataclass
class Drawn:
    """One draw: which drop, on what grid, with what result."""

    drop: Any
    grid: Any
    keep: torch.Tensor


@contextmanager
def draws(monkeypatch: Any, replay: list[Drawn] | None = None) -> Any:
    """Record every draw in the order of the forward pass, or hand out recorded masks again."""
    record: list[Drawn] = []
    queue = iter(replay or ())

    def recorded(drop: Any, grid: Any) -> torch.Tensor:
        keep = draw(drop, grid) if replay is None else next(queue).keep
        record.append(Drawn(drop, grid, keep))
        return keep

    with monkeypatch.context() as patch:
        patch.setattr(attention_paths, "draw", recorded)
        patch.setattr(dropout, "draw", recorded)
        yield record


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a plan may not change and a detach must give back."""
    modules = dict(model.named_modules())
    return {
        "keys": {path: tuple(vars(module)) for path, module in modules.items()},
        "hooks": {
            f"{path} {name}": len(value)
            for path, module in modules.items()
            for name, value in vars(module).items()
            if "hook" in name and hasattr(value, "__len__")
        },
        "plain": {
            f"{path} {name}": value
            for path, module in modules.items()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, tuple, type(None)))
        },
        "configs": {
            path: (str(module.config.to_dict()), str(module.config._attn_implementation))
            for path, module in modules.items()
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
        },
        "implementations": {
            path: str(vars(module.config).get("_attn_implementation_internal"))
            for path, module in modules.items()
            if hasattr(module, "config")
        },
        "forwards": {path: module.forward.__qualname__ for path, module in modules.items()},
        "state": list(model.state_dict()),
    }


def same_state(first: nn.Module, second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.state_dict().items())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first: dict[str, Any], second: dict[str, Any], **tolerance: float) -> None:
    assert set(first) == set(second)
    assert first
    assert any(value.abs().max() > 0 for value in first.values())
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def arguments(folder: Any, kind: Any = TrainingArguments, **options: Any) -> Any:
    """Settings of a trainer of tiny models; kind: their class."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **options,
    }
    return kind(output_dir=str(folder), **settings)


class Gradients(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append(gradients(model))


def one_epoch(
    cls: Any,
    folder: Any,
    micro: int,
    accumulation: int,
    *,
    kind: Any = TrainingArguments,
    options: dict[str, Any],
    **made: Any,
) -> list[dict[str, torch.Tensor]]:
    """The gradients of every optimizer step of one epoch of the trainer `cls`, in micro-batches of plain SGD.

    options: further settings, of the class `kind`; made: the trainer's other arguments.
    """
    seen = Gradients()
    cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    plain = {"max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0, "optim": "sgd"}
    cls(args=arguments(folder, kind, **plain, **cut, **options), callbacks=[seen], **made).train()
    return seen.steps


def attached(family: str, recipe: str, **options: Any) -> Any:
    """A model with a recipe attached for good."""
    model = make(family, **options)
    hiddenkey.attach(model, recipe)
    return model
