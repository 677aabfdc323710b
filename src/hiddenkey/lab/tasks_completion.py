"""Causal language modelling of a completion after a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from ..hf.compared_outputs import IGNORED
from .columns import PLACE, values
from .errors import DataError
from .skeleton import MODEL_CLASSES


@dataclass(frozen=True)
class Completion:
    """The loss is on the completion and the end mark; the prompt is only read."""

    separator: str
    metrics: tuple[str, ...] = ("nll", "perplexity", "token_accuracy")
    lower_is_better: tuple[str, ...] = ("nll", "perplexity", "loss")
    peft_type: str = "CAUSAL_LM"
    model_class: str = MODEL_CLASSES["causal-lm"]

    def model_options(self) -> dict[str, Any]:
        """The head is the pretrained one."""
        return {}

    def tokenise(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Token ids of prompt, separator, completion and end mark, cut at the right to `max_length` tokens.

        A start token or an end mark that stands in the texts is not added once more.

        Raises:
            DataError: a prompt so long that nothing of its completion is left.
        """

        def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
            prompts = [prompt + self.separator for prompt in batch["prompt"]]
            texts = [prompt + completion for prompt, completion in zip(prompts, batch["completion"], strict=True)]
            tokens = tokenizer(texts, return_offsets_mapping=True)
            rows = [
                _row(*_one_start(ids, offsets, tokenizer), len(prompt), tokenizer.eos_token_id, max_length)
                for ids, offsets, prompt in zip(tokens["input_ids"], tokens["offset_mapping"], prompts, strict=True)
            ]
            return {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask", "labels")}

        if not tokenizer.is_fast:
            raise DataError("The tokenizer tells no offsets; causal-lm needs a fast one (a tokenizer.json).")
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        places = zip(values(rows, PLACE), values(encoded, "labels"), strict=True)
        empty = sorted({place for place, labels in places if all(label == IGNORED for label in labels)})
        if empty:
            raise DataError(
                f"In {len(empty)} rows (the first is {empty[0]} of its part, counted from 1) the prompt alone fills "
                f"max_length = {max_length} tokens, so nothing is left to learn; raise max_length or shorten the "
                "prompts."
            )
        return encoded

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads ids with the pad token and labels with -100."""
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Per place (B, T, 2): negative log-likelihood in nats of the token, and whether it was the likeliest.

        Place t holds the prediction of token t; place 0 and those without a label stay 0. The vocabulary goes.
        """
        scores, target = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1], labels[:, 1:]
        valid = target != IGNORED
        kept, truth = scores[valid].float(), target[valid]
        nll = F.cross_entropy(kept, truth, reduction="none")
        found = kept.new_zeros(*target.shape, 2)
        found[valid] = torch.stack([nll, (kept.argmax(-1) == truth).float()], dim=-1)
        return F.pad(found, (0, 0, 1, 0))

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Mean nll in nats, perplexity and accuracy, over all completion tokens alike."""
        valid = prediction.label_ids != IGNORED
        valid[:, 0] = False
        nll, right = prediction.predictions[valid].mean(axis=0, dtype=np.float64)
        return {"nll": float(nll), "perplexity": _exp(float(nll)), "token_accuracy": float(right)}


def prompt_ids(prompts: list[str], separator: str, tokenizer: Any) -> list[list[int]]:
    """Token ids before the completion, as training sees them.

    Some tokenizers join the separator with what follows, so they are read off a text that goes on.
    """
    ends = [len(prompt + separator) for prompt in prompts]
    tokens = tokenizer([prompt + separator + "x" for prompt in prompts], return_offsets_mapping=True)
    found = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    kept = (_one_start(ids, offsets, tokenizer) for ids, offsets in found)
    return [
        ids[: next(i for i, (_, stop) in enumerate(offsets) if stop > end)]
        for (ids, offsets), end in zip(kept, ends, strict=True)
    ]


def _one_start(
    ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids with one start token where a prompt begins with one and the tokenizer adds another."""
    start = tokenizer.bos_token_id
    twice = start is not None and ids[:2] == [start, start]
    return (ids[1:], offsets[1:]) if twice else (ids, offsets)


def _row(
    ids: list[int], offsets: list[tuple[int, int]], boundary: int, end: int | None, max_length: int
) -> dict[str, list[int]]:
    labels = [token if stop > boundary else IGNORED for token, (_, stop) in zip(ids, offsets, strict=True)]
    if end is not None:
        if ids and ids[-1] == end:  # some tokenizers end every text by themselves
            if ids[-2:-1] == [end]:  # beside the one that the completion ends in
                ids, labels = ids[:-1], labels[:-1]
            labels[-1] = end
        else:
            ids, labels = [*ids, end], [*labels, end]
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
