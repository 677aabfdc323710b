"""A loop with Accelerate: a classifier. Start it with `python`, or with `accelerate launch` on several devices.

accelerate launch examples/accelerate_loop.py --model FacebookAI/roberta-base
"""

from __future__ import annotations

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from sample_texts import SENTENCES
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import hiddenkey


def main(
    model: str, out: str = "out/accelerate", recipe: str = "hiddenkey@0.1", epochs: int = 5
) -> hiddenkey.Attachment:
    """Train a LoRA adapter on a few sentences and save it with its recipe."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    network = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    attachment = hiddenkey.attach(network, recipe)

    rows = [{**tokenizer(row["text"]), "labels": row["label"]} for row in SENTENCES]
    batches = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=1e-3)
    network, optimizer, batches = accelerator.prepare(network, optimizer, batches)
    set_seed(0, device_specific=True)  # each process draws masks of its own
    network.train()  # from_pretrained returns a model in evaluation mode, where nothing is dropped
    for epoch in range(epochs):
        for batch in batches:
            with accelerator.accumulate(network):  # divides by the two batches of a window
                loss = hiddenkey.consistency_step(network, batch)
                accelerator.backward(loss.total)
                optimizer.step()
                optimizer.zero_grad()
        consistency = "" if loss.consistency is None else f", consistency {loss.consistency:.3g}"
        accelerator.print(f"epoch {epoch + 1}: task {loss.task:.4f}{consistency}")

    accelerator.print(attachment.rates())
    if accelerator.is_main_process:
        accelerator.unwrap_model(network).save_pretrained(out)
        hiddenkey.save_recipe(out, recipe)
    return attachment


if __name__ == "__main__":
    tyro.cli(main)
