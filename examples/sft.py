"""TRL's SFTTrainer: completions, packed, with drops and a consistency.

pip install '.[trl]'
python examples/sft.py --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import tyro
from datasets import Dataset
from peft import LoraConfig
from sample_texts import PAIRS
from trl import SFTConfig, SFTTrainer

import hiddenkey


class DropSFTTrainer(hiddenkey.ConsistencyMixin, SFTTrainer):
    """A recipe without a consistency needs no mixin: `hiddenkey.attach(trainer.model, recipe)` is enough."""


def main(model: str, out: str = "out/sft", recipe: str = "hiddenkey@0.1", steps: int = 20) -> DropSFTTrainer:
    """Train a LoRA adapter on a few completions and save it with its recipe."""
    trainer = DropSFTTrainer(
        model=model,
        recipe=recipe,
        args=SFTConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            packing=True,
            max_length=64,
            bf16=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            logging_steps=2,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(PAIRS * 8),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    print(trainer.attachment.plan)
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
