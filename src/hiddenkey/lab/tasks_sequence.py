"""Classification and regression: one or two texts in, one label or score out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import DataCollatorWithPadding, EvalPrediction

from .errors import ConfigError
from .skeleton import MODEL_CLASSES


class _Sequence:
    """What classification and regression share."""

    lower_is_better: tuple[str, ...] = ("loss",)
    peft_type = "SEQ_CLS"
    model_class = MODEL_CLASSES["classification"]

    def tokenise(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Token ids of one text or of a pair, cut to `max_length` tokens.

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
            return {**tokens, "labels": batch["label"]}

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
