"""PyTorch Lightning: a language model.

pip install pytorch-lightning
python examples/lightning_loop.py --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
import tyro
from peft import LoraConfig, get_peft_model
from sample_texts import PAIRS
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import hiddenkey


class Tuner(lightning.LightningModule):
    """A model with a recipe attached."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = hiddenkey.consistency_step(self.network, batch)
        parts = {"task_loss": loss.task, "consistency_loss": loss.consistency}
        self.log_dict({name: value for name, value in parts.items() if value is not None}, prog_bar=True)
        return loss.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def main(model: str, out: str = "out/lightning", recipe: str = "hiddenkey@0.1", steps: int = 20) -> lightning.Trainer:
    """Train a LoRA adapter on a few texts and save it with its recipe."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = get_peft_model(network, LoraConfig(target_modules=["q_proj", "v_proj"]))
    print(hiddenkey.attach(network, recipe).plan)
    network.train()  # Lightning leaves it in the evaluation mode of from_pretrained, where nothing is dropped

    texts = [dict(tokenizer(pair["prompt"] + pair["completion"])) for pair in PAIRS]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(Tuner(network), DataLoader(texts, batch_size=4, shuffle=True, collate_fn=lambda x: dict(collate(x))))

    network.save_pretrained(out)
    hiddenkey.save_recipe(out, recipe)
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
