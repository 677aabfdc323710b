"""transformers' Trainer: a classifier with drops and a consistency.

pip install '.[lab]'
python examples/trainer.py --model FacebookAI/roberta-base
"""

from __future__ import annotations

import tyro
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sample_texts import SENTENCES
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import hiddenkey


def main(
    model: str, out: str = "out/trainer", recipe: str = "hiddenkey@0.1", steps: int = 20
) -> hiddenkey.DropTrainer:
    """Train a LoRA adapter on a few sentences and save it with its recipe."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    network = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    print(hiddenkey.plan(network, recipe))

    data = Dataset.from_list(SENTENCES).map(lambda row: tokenizer(row["text"]), remove_columns="text")
    trainer = hiddenkey.DropTrainer(
        model=network,
        recipe=recipe,
        args=TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
