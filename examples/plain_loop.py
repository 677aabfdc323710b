"""A loop in plain PyTorch: a language model, gradient accumulation with every token weighing the same.

python examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

from itertools import cycle, islice

import torch
import tyro
from peft import LoraConfig, get_peft_model
from sample_texts import PAIRS
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import hiddenkey


def main(model: str, out: str = "out/plain", recipe: str = "hiddenkey@0.1", steps: int = 20) -> hiddenkey.Attachment:
    """Train a LoRA adapter on a few texts and save it with its recipe."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = get_peft_model(network, LoraConfig(target_modules=["q_proj", "v_proj"]))
    attachment = hiddenkey.attach(network, recipe)
    print(attachment.plan)

    texts = [tokenizer(pair["prompt"] + pair["completion"]) for pair in PAIRS]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batches = cycle(DataLoader(texts, batch_size=2, shuffle=True, collate_fn=collate))
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=1e-3)
    network.train()  # from_pretrained returns a model in evaluation mode, where nothing is dropped
    for step in range(steps):
        window = list(islice(batches, 2))
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        for batch in window:
            loss = hiddenkey.consistency_step(network, batch, num_items=tokens)
            loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        consistency = "" if loss.consistency is None else f", consistency {loss.consistency:.3g}"
        print(f"step {step + 1}: task {loss.task:.4f}{consistency}")

    print(attachment.rates())
    network.save_pretrained(out)
    hiddenkey.save_recipe(out, recipe)
    return attachment


if __name__ == "__main__":
    tyro.cli(main)
