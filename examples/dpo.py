"""TRL's DPOTrainer: drops in the policy, none in the reference, the policy's two views compared at the completions.

pip install '.[trl]'
python examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import tyro
from datasets import Dataset
from peft import LoraConfig
from sample_texts import PREFERENCES
from trl import DPOConfig, DPOTrainer

import hiddenkey


class DropDPOTrainer(hiddenkey.ConsistencyMixin, DPOTrainer):
    """A recipe without a consistency needs no mixin: `hiddenkey.attach(trainer.model, recipe)` is enough."""


def main(model: str, out: str = "out/dpo", recipe: str = "hiddenkey@0.1", steps: int = 20) -> DropDPOTrainer:
    """Train a LoRA adapter on a few preferences and save it with its recipe."""
    trainer = DropDPOTrainer(
        model=model,
        recipe=recipe,
        args=DPOConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            bf16=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            logging_steps=2,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(PREFERENCES),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    print(trainer.attachment.plan)
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
