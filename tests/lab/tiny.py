"""Tiny models, tokenizers and data, made on the spot: a real BERT and a real LLaMA with weights drawn at random."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ("fine", "bright", "warm", "lively")
BAD = ("dull", "cold", "grey", "flat")
WORDS = ("the", "film", "was", "and", "a", "play", "in", "town", *GOOD, *BAD)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_tokenizer(folder: Path, decoder: bool, longest: int = 64) -> None:
    """One token per word; a decoder's has an end mark and no pad token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
        single, pair = "[CLS] $A", "[CLS] $A $B"
    else:
        names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names).save_pretrained(folder)


def save_bert(folder: Path) -> Path:
    """A BERT of two layers, published without a head."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, decoder=False)
    return folder


def save_llama(folder: Path) -> Path:
    """A LLaMA of four layers with grouped-query attention."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, decoder=True)
    return folder


def labelled_rows(count: int) -> list[dict[str, object]]:
    """Sentences of which one word tells the label."""
    rows = []
    for i in range(count):
        word = (GOOD if i % 2 else BAD)[i // 2 % 4]
        rows.append({"text": f"the film {'in town ' * (i % 3)}was {word}", "label": "good" if i % 2 else "bad"})
    return rows


def paired_rows(count: int) -> list[dict[str, object]]:
    """Prompts and completions."""
    return [
        {"prompt": f"the {WORDS[i % len(WORDS)]}", "completion": f"was {GOOD[i % 4]} and {BAD[i % 3]}"}
        for i in range(count)
    ]


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    """Rows with a header line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
