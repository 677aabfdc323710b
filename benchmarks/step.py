"""One LoRA training step (forward, backward, AdamW), in ratios to plain LoRA with every dropout off."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
)

import hiddenkey

from .common import Work, measure, parse, parser, positive, write

RATE = 0.1
CHUNKED = "plain, loss in chunks"
LLAMA = partial(LlamaConfig, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
BERT = partial(BertConfig, architectures=["BertModel"])
RANDOM: dict[str, Callable[[], PretrainedConfig]] = {
    "minilm": partial(BERT, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "smollm2": partial(
        LLAMA,
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "llama-152k": partial(
        LLAMA,
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
"""Models of these shapes with random weights."""


@dataclass
class Case:
    """A model, a batch, and copies of the model with LoRA that share its frozen weights."""

    name: str
    flags: Namespace
    bases: dict[float, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = RANDOM[self.name]() if self.name in RANDOM else AutoConfig.from_pretrained(self.name)
        self.writes = str((self.config.architectures or [""])[0]).endswith(("ForCausalLM", "LMHeadModel"))
        size, length = (
            self.flags.batch or (4 if self.writes else 32),
            self.flags.length or (256 if self.writes else 128),
        )
        torch.manual_seed(0)
        ids = torch.randint(10, self.config.vocab_size, (size, length))
        if self.writes:
            self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        else:  # 40 % padding, lengths spread evenly
            lengths = (length * (1 - 0.8 * torch.linspace(0, 1, size))).round().clamp(min=2)
            mask = (torch.arange(length) < lengths[:, None]).long()
            self.batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (size,))}
        self.batch = {name: tensor.to(self.flags.device) for name, tensor in self.batch.items()}
        self.inputs = {name: tensor for name, tensor in self.batch.items() if name != "labels"}

    def base(self, own: float) -> nn.Module:
        """The model with each of its own dropouts at the rate `own`, built once for each rate."""
        if own not in self.bases:
            config = copy.deepcopy(self.config)
            for name, value in config.to_dict().items():
                if "drop" in name and "layer" not in name and isinstance(value, float):
                    setattr(config, name, own)
            auto = AutoModelForCausalLM if self.writes else AutoModelForSequenceClassification
            dtype = getattr(torch, self.flags.dtype)
            torch.manual_seed(0)
            if self.name in RANDOM:
                model = auto.from_config(config, dtype=dtype)
            else:
                model = auto.from_pretrained(self.name, config=config, dtype=dtype)
            self.bases[own] = model.to(self.flags.device)
        return self.bases[own]

    def lora(self, *, own: float = 0.0, lora_dropout: float = 0.0, recipe: str = "") -> Any:
        """A copy in training mode with LoRA r = 8 on PEFT's usual targets."""
        base = self.base(own)
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        kind = "CAUSAL_LM" if self.writes else "SEQ_CLS"
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base, shared), LoraConfig(task_type=kind, lora_dropout=lora_dropout))
        if self.flags.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if recipe:
            hiddenkey.attach(model, recipe)
        if self.flags.compile:
            model.compile()
        return model.train()

    def step(self, model: Any, loss: Callable[[], Tensor]) -> Work:
        """Forward, backward, optimizer and cleared gradients; returns the loss."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def work() -> Tensor:
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()

        return work


def own_loss(case: Case, **options: Any) -> Work:
    """The loss that the model computes by itself, for the options of `Case.lora`."""
    model = case.lora(**options)
    return case.step(model, lambda: model(**case.batch).loss)


def loss_in_chunks(case: Case) -> Work:
    """Plain LoRA that never holds all logits, by torch's own checkpoint: 128 tokens at a time."""
    model = case.lora()
    decoder, head = model.get_base_model().get_decoder(), model.get_output_embeddings()
    labels = case.batch["labels"][:, 1:].flatten()

    def part_loss(states: Tensor, part: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), part, reduction="sum")

    def loss() -> Tensor:
        states = decoder(**case.inputs)[0][:, :-1].flatten(0, 1)
        parts = zip(states.split(128), labels.split(128), strict=True)
        return sum(checkpoint(part_loss, *part, use_reentrant=False) for part in parts) / len(labels)

    return case.step(model, loss)


def whole_rdrop(case: Case) -> Work:
    """R-Drop as in algorithm 1 of arXiv 2106.14448 over the drops of hiddenkey-: two forwards, whole logits."""
    model = case.lora(recipe=f"hiddenkey-@{RATE}")

    def loss() -> Tensor:
        views = [model(**case.batch) for _ in range(2)]
        logits = [view.logits[:, :-1] if case.writes else view.logits for view in views]
        return (views[0].loss + views[1].loss) / 2 + hiddenkey.consistency_loss("kl-rdrop", *logits)

    return case.step(model, loss)


def with_recipe(case: Case, recipe: str) -> Work:
    """A recipe of hiddenkey in its own training step."""
    model = case.lora(recipe=recipe)
    return case.step(model, lambda: hiddenkey.consistency_step(model, case.batch).total)


BASELINES: dict[str, Callable[[Case], Work]] = {
    "plain": own_loss,
    "own dropout": partial(own_loss, own=RATE),
    "lora_dropout": partial(own_loss, lora_dropout=RATE),
    CHUNKED: loss_in_chunks,
    "R-Drop, whole logits": whole_rdrop,
}
RECIPES = (
    "hiddenkey-@0.1",
    "hiddenkey-[:]@0.1",
    "hiddenkey@0.1",
    "hiddenkey-@0.1 ~ kl-rdrop",
    "hidden[:]:column@0.2",
)


def main() -> None:
    """Measure every variant on every model."""
    flags = parser(__doc__)
    flags.add_argument(
        "--model", nargs="+", default=["minilm", "smollm2"], help=f"{', '.join(RANDOM)}, folder or name"
    )
    flags.add_argument(
        "--variants", nargs="+", default=[*BASELINES, *RECIPES], help="recipes, or names of the default"
    )
    flags.add_argument("--compile", action="store_true", help="under torch.compile; peak memory is not measured")
    flags.add_argument("--checkpoint", action="store_true", help="with activation checkpointing")
    flags.add_argument("--batch", type=positive, help="examples; by default 4 for a language model, else 32")
    flags.add_argument("--length", type=positive, help="tokens; by default 256 for a language model, else 128")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    found = parse(flags)
    for recipe in set(found.variants) - set(BASELINES):
        hiddenkey.parse(recipe)
    cases = []
    for name in found.model:
        case = Case(name, found)
        works = {
            variant: BASELINES[variant](case) if variant in BASELINES else with_recipe(case, variant)
            for variant in dict.fromkeys(("plain", *found.variants))
            if variant != CHUNKED or (case.writes and not found.compile)
        }
        cases.append(measure(Path(name).name, works, found, memory=not found.compile))
    write(found, cases)


if __name__ == "__main__":
    main()
