"""The adapter folder: a plain PEFT adapter, its tokenizer, its recipe, and a card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiddenkey

from .artifacts import ADAPTER, Metrics, RunResult

_CARD = """---
base_model: {model}
library_name: peft
tags:
- lora
- hiddenkey
---

# {name}

A LoRA adapter for `{model}`, trained on `{data}` ({task}, {rows} rows) with hiddenkey {version}.

- dropout recipe: `{recipe}`
- rank {r}, alpha {alpha}, learning rate {learning_rate}, {epochs} epochs, batch size {batch}, seed {seed}
- the adapter is that of the {keep} epoch
{classes}{chat}
{tables}

The adapter needs PEFT alone; the recipe works in training only and changes nothing here.

```python
from peft import {auto_class}
from transformers import AutoTokenizer

folder = "path/of/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {auto_class}.from_pretrained(folder{options})
# As in training: the model may have been published with another token for padding, or with none.
for config in (model.config, model.config.get_text_config()):
    config.pad_token_id = tokenizer.pad_token_id
```
"""

_NO_TEMPLATE = (
    "- prompts were read as they stand in the data, without the tokenizer's chat template: ask in the same form\n"
)


def save_adapter(model: Any, tokenizer: Any, result: RunResult) -> None:
    """Write `adapter/` beside `result.json`: first under another name, then moved into place.

    Raises:
        OSError: the disk.
    """
    target = Path(result.folder) / ADAPTER
    part = target.with_name(f".{ADAPTER}.part")
    for folder in (part, target):
        if folder.exists():
            shutil.rmtree(folder)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    hiddenkey.save_recipe(part, hiddenkey.parse(result.recipe))
    plain_prompts = bool(tokenizer.chat_template) and result.task == "causal-lm"
    (part / "README.md").write_text(_card(result, _NO_TEMPLATE if plain_prompts else ""), encoding="utf-8")
    part.replace(target)


def _card(result: RunResult, chat: str) -> str:
    config = result.config
    causal = result.task == "causal-lm"
    options = {
        "classification": f", id2label={dict(enumerate(result.label_names))}",
        "regression": ", num_labels=1",
        "causal-lm": "",
    }
    trust = ", trust_remote_code=True" if config["trust_remote_code"] else ""
    return _CARD.format(
        name=Path(result.folder).name,
        model=config["model"],
        data=config["data"],
        task=result.task,
        rows=result.data_rows["train"],
        version=result.versions["hiddenkey"],
        recipe=result.recipe,
        r=config["lora_r"],
        alpha=config["lora_alpha"],
        learning_rate=config["learning_rate"],
        epochs=f"{result.last['epoch']:g}",
        batch=config["batch_size"],
        seed=config["seed"],
        keep=config["keep"],
        classes=_classes(result),
        chat=chat,
        tables="\n\n".join(_tables(result)),
        auto_class="AutoPeftModelForCausalLM" if causal else "AutoPeftModelForSequenceClassification",
        trust=trust,
        options=options[result.task] + trust,
    )


def _classes(result: RunResult) -> str:
    if not result.label_names:
        return ""
    return f"- outputs, in this order: {', '.join(f'`{name}`' for name in result.label_names)}\n"


def _tables(result: RunResult) -> Iterator[str]:
    validation = [
        {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
        for row in (result.last, result.best)
    ]
    yield _table("validation", result.metric, *validation)
    if result.test:
        yield _table("test", result.metric, result.test["last"], result.test["best"])


def _table(part: str, metric: str, last: Metrics, best: Metrics) -> str:
    head = [f"| {part} | last epoch | best epoch by {metric} |", "|---|---|---|"]
    rows = [f"| {name} | {_number(last, name)} | {_number(best, name)} |" for name in {**last, **best}]
    return "\n".join([*head, *rows])


def _number(metrics: Metrics, name: str) -> str:
    return f"{metrics[name]:.4g}" if name in metrics else ""
