"""Texts, and a tokenizer of one token per word, for trainers that want them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import VOCABULARY

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, … are tokens 3, 4, …"""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def texts(kind: str, rows: int = 8) -> Dataset:
    """Texts of unlike length: `text`, `completion` (with a prompt), `messages` or `preference`."""
    generator = torch.Generator().manual_seed(4)

    def words(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCABULARY, (count,), generator=generator))

    def row(i: int) -> dict[str, Any]:
        question, answer, other = words(2 + i % 3), words(3 + 2 * i % 5), words(2 + i % 4)
        if kind == "text":
            return {"text": f"{question} {answer}"}
        if kind == "completion":
            return {"prompt": question, "completion": f" {answer}"}
        if kind == "preference":
            return {"prompt": question, "chosen": f" {answer}", "rejected": f" {other}"}
        turns = [("user", question), ("assistant", answer), ("user", other), ("assistant", question)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    return Dataset.from_list([row(i) for i in range(rows)])
