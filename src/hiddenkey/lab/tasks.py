"""What differs between tasks: model class, tokens, batches and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction

from ..errors import ConfigError, DataError
from ..hf.compared_outputs import IGNORED
from .config import MODEL_CLASSES
from .data import Examples
from .data_files import PLACE, TaskName, values


class _Sequence:
    """What classification and regression share."""

    lower_is_better: tuple[str, ...] = ("loss",)
    peft_type = "SEQ_CLS"
    model_class = MODEL_CLASSES["classification"]

    def tokenise(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Token ids of one text or of a pair, cut to `max_length` tokens.

        A start token that stands in the texts is not added once more.

        Raises:
            ConfigError: special tokens alone fill that.
        """
        texts = 2 if "second" in rows.column_names else 1
        special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
        if max_length < special + texts:
            raise ConfigError(
                f"max_length = {max_length} has no room for {'two texts' if texts == 2 else 'a text'} beside "
                f"{special} special tokens; give {special + texts} or more."
            )

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            tokens = tokenizer(batch["first"], batch.get("second"), truncation=True, max_length=max_length)
            extra = [_extra_starts(ids, tokenizer) for ids in tokens["input_ids"]]
            kept = {name: [row[n:] for row, n in zip(rows, extra, strict=True)] for name, rows in tokens.items()}
            return {**kept, "labels": batch["label"]}

        return rows.map(encode, batched=True, remove_columns=rows.column_names)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest row of the batch."""
        return DataCollatorWithPadding(tokenizer)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """The logits alone, where a model returns more."""
        return logits[0] if isinstance(logits, tuple) else logits


@dataclass(frozen=True)
class Classification(_Sequence):
    """One of several classes."""

    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy", "matthews", "f1")

    def model_options(self) -> dict[str, Any]:
        """Number and names of the classes."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
            "problem_type": "single_label_classification",
        }

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy, Matthews correlation, and F1 of class 1 (of all classes alike where there are more than two)."""
        found, truth = prediction.predictions.argmax(-1), prediction.label_ids
        average = "binary" if len(self.label_names) == 2 else "macro"
        return {
            "accuracy": float(accuracy_score(truth, found)),
            "matthews": float(matthews_corrcoef(truth, found)),
            "f1": float(f1_score(truth, found, average=average, zero_division=0)),
        }


@dataclass(frozen=True)
class Regression(_Sequence):
    """One number."""

    metrics: tuple[str, ...] = ("pearson", "spearman")

    def model_options(self) -> dict[str, Any]:
        """A head with one output and the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Pearson and Spearman correlation; 0 where the predictions are all alike and no correlation is defined."""
        found, truth = prediction.predictions.reshape(-1), prediction.label_ids.reshape(-1)
        if found.min() == found.max() or truth.min() == truth.max():
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(pearsonr(truth, found).statistic),
            "spearman": float(spearmanr(truth, found).statistic),
        }


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
                _row(ids[n:], offsets[n:], len(prompt), tokenizer.eos_token_id, max_length)
                for ids, offsets, prompt in zip(tokens["input_ids"], tokens["offset_mapping"], prompts, strict=True)
                for n in [_extra_starts(ids, tokenizer)]
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
    return [
        ids[_extra_starts(ids, tokenizer) : next(i for i, (_, stop) in enumerate(offsets) if stop > end)]
        for ids, offsets, end in zip(tokens["input_ids"], tokens["offset_mapping"], ends, strict=True)
    ]


def start_token(tokenizer: Any) -> str | None:
    """What a tokenizer may begin each text with."""
    token: str | None = tokenizer.bos_token or tokenizer.cls_token
    return token


def _extra_starts(ids: list[int], tokenizer: Any) -> int:
    """1 where a text begins with a start token and the tokenizer adds another, else 0."""
    token = start_token(tokenizer)
    start = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return int(start is not None and ids[:2] == [start, start])


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


Task = Classification | Regression | Completion


def make_task(examples: Examples, separator: str) -> Task:
    """The task of these examples; `separator` stands between prompt and completion."""
    if examples.task == "causal-lm":
        return Completion(separator)
    return Regression() if examples.task == "regression" else Classification(examples.label_names)


def choose_metric(task: Task, asked: str) -> str:
    """The metric of the best epoch.

    Raises:
        ConfigError: the task has no such metric.
    """
    if asked and asked not in (*task.metrics, "loss"):
        raise ConfigError(f"metric = {asked!r} is not one of this task: {', '.join(task.metrics)}, loss.")
    return asked or task.metrics[0]


def refuse_smoothing(task: TaskName, label_smoothing: float) -> None:
    """Raises ConfigError where scores would be smoothed, which have no classes to spread a probability over."""
    if task == "regression" and label_smoothing:
        raise ConfigError(
            f"label_smoothing = {label_smoothing} is for classes and tokens, which regression has not; "
            "give 0 or leave it out."
        )
