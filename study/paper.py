"""The numbers that arXiv 2403.00812 prints, and the order of its methods."""

from __future__ import annotations

from collections.abc import Sequence

BASELINE = "baseline"
HIDDENKEY = "hiddenkey"
HIDDENKEY_MINUS = "hiddenkey-"
PATTERNS = ("element", "column", "span")

TABLE1_TASKS = ("rte", "mrpc", "stsb", "sst2")
TASK_LABELS = {
    "rte": "RTE",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "sst2": "SST-2",
    "cola": "CoLA",
    "qnli": "QNLI",
    "e2e": "E2E",
    "webnlg": "WebNLG",
}
PRINTED_METRICS = {
    "rte": "accuracy",
    "mrpc": "accuracy",
    "stsb": "pearson",
    "sst2": "accuracy",
    "cola": "matthews",
    "qnli": "accuracy",
}
"""The metric of the numbers that the paper prints of a task."""

# fmt: off
# Table 1, RoBERTa-large: RTE, MRPC (accuracy), STS-B (Pearson), SST-2 (accuracy), the average as printed.
TABLE1: dict[str, tuple[float, float, float, float, float]] = {
    "full fine-tuning":      (86.60, 90.90, 92.40, 96.40, 91.58),
    "baseline":              (84.48, 89.95, 91.96, 95.99, 90.60),
    "hiddencut element":     (87.00, 90.69, 91.94, 96.10, 91.43),
    "hiddencut column":      (86.64, 90.20, 91.96, 96.22, 91.26),
    "hiddencut span":        (86.64, 90.69, 92.05, 96.10, 91.37),
    "dropkey element":       (87.00, 90.93, 92.21, 96.22, 91.59),
    "dropkey column":        (87.36, 90.93, 92.25, 96.22, 91.69),
    "dropkey span":          (86.28, 90.69, 92.21, 96.22, 91.35),
    "dropattention element": (85.56, 90.20, 92.03, 95.76, 90.89),
    "dropattention column":  (85.56, 90.20, 92.11, 95.87, 90.94),
    "dropattention span":    (86.28, 89.95, 92.21, 96.10, 91.14),
    "hiddenkey-":            (87.70, 90.90, 92.28, 96.22, 91.78),
    "hiddenkey":             (88.10, 91.20, 92.30, 96.44, 92.01),
    "hiddenkey-js":          (87.70, 90.90, 92.24, 96.22, 91.77),
    "hiddenkey-input":       (88.50, 90.70, 92.11, 96.33, 91.16),
    "hiddenkey-output":      (87.70, 90.70, 92.19, 96.22, 90.95),
}
# Its standard deviations.
TABLE1_SD: dict[str, tuple[float, float, float, float]] = {
    "baseline":              (0.98, 0.50, 0.48, 0.25),
    "hiddencut element":     (1.14, 0.42, 0.28, 0.42),
    "hiddencut column":      (0.80, 0.80, 0.11, 0.19),
    "hiddencut span":        (1.63, 0.22, 0.35, 0.30),
    "dropkey element":       (1.08, 1.06, 0.21, 0.25),
    "dropkey column":        (1.70, 0.40, 0.13, 0.24),
    "dropkey span":          (0.94, 0.69, 0.21, 0.25),
    "dropattention element": (11.73, 3.07, 0.27, 0.30),
    "dropattention column":  (1.80, 0.71, 0.28, 0.21),
    "dropattention span":    (0.60, 0.61, 0.36, 0.39),
    "hiddenkey-":            (0.91, 0.72, 0.19, 0.13),
    "hiddenkey":             (1.60, 0.90, 0.11, 0.20),
    "hiddenkey-js":          (1.72, 0.47, 0.21, 0.24),
    "hiddenkey-input":       (2.11, 1.03, 0.14, 0.27),
    "hiddenkey-output":      (2.24, 1.20, 0.11, 0.15),
}
PRINTED_TEXT_METRICS = {"e2e": ("bleu", "nist", "meteor", "rouge_l", "cider"), "webnlg": ("bleu", "meteor", "ter")}
# Table 2, E2E: BLEU, NIST, METEOR, ROUGE-L, CIDEr.
TABLE2: dict[str, dict[str, tuple[float, ...]]] = {
    "GPT2-Medium": {
        "baseline":   (68.50, 8.615, 46.43, 71.08, 2.490),
        "hiddencut":  (69.22, 8.700, 46.66, 71.39, 2.491),
        "dropkey":    (68.78, 8.651, 46.53, 71.40, 2.486),
        "hiddenkey-": (69.35, 8.726, 46.60, 71.61, 2.510),
        "hiddenkey":  (69.76, 8.765, 46.80, 71.78, 2.511),
    },
    "LLaMA2-7B": {
        "baseline":  (66.71, 8.463, 44.82, 70.10, 2.371),
        "hiddenkey": (69.02, 8.725, 45.84, 71.17, 2.456),
    },
}
# Table 3, WebNLG, GPT2-Medium: BLEU, METEOR, TER (the paper prints METEOR and TER as shares; here in points).
TABLE3: dict[str, dict[str, tuple[float, ...]]] = {
    "all":    {"baseline": (54.78, 41.1, 39.5), "hiddenkey": (55.27, 41.3, 38.6)},
    "seen":   {"baseline": (62.30, 42.0, 33.1), "hiddenkey": (62.49, 44.1, 32.6)},
    "unseen": {"baseline": (45.53, 37.6, 46.4), "hiddenkey": (46.48, 38.1, 45.2)},
}
# Table 4, RoBERTa-large (CoLA: Matthews, QNLI: accuracy) and Table 5, LLaMA2-7B (accuracy): mean and sd.
TABLE4 = {
    "cola": {"baseline": (67.96, 0.25), "hiddenkey": (69.91, 0.52)},
    "qnli": {"baseline": (94.23, 0.17), "hiddenkey": (95.04, 0.11)},
}
TABLE5 = {
    "rte":  {"baseline": (88.45, 0.79), "hiddenkey": (90.25, 1.05)},
    "mrpc": {"baseline": (88.73, 0.56), "hiddenkey": (89.46, 0.60)},
}
# fmt: on

METHODS = tuple(name for name in TABLE1 if name != "full fine-tuning")
RIVALS = ("lora_dropout", "weight decay", "smaller rank", "dropout", "neftune", "label smoothing", "r-drop")
RIVAL_NOTES = {
    "lora_dropout": "PEFT's dropout on the input of the LoRA branch",
    "weight decay": "AdamW's weight decay",
    "smaller rank": "LoRA of a smaller rank",
    "dropout": "plain element dropout everywhere",
    "neftune": "noise on the embeddings",
    "label smoothing": "softened targets",
    "r-drop": "the consistency loss on ordinary dropout",
}


def paper_task(task_key: str) -> str | None:
    """The paper's task of a record's data, such as `sst2` of `glue/SST-2`; None: none of its tasks."""
    name = task_key.rpartition("/")[2].replace("-", "").lower()
    return name if name in TASK_LABELS else None


def true_average(method: str) -> float:
    """The average of a row of Table 1, from its four numbers."""
    return sum(TABLE1[method][:4]) / 4


def misprinted(method: str) -> bool:
    """Whether the average that is printed differs from the true one by more than rounding."""
    return abs(TABLE1[method][4] - true_average(method)) > 0.02


def gap(first: str, second: str) -> float:
    """How far the first method's true average lies above the second's in Table 1."""
    return true_average(first) - true_average(second)


def printed(task: str | None, method: str) -> float | None:
    """What the paper prints of a method on one of its tasks, with RoBERTa-large; None where it prints nothing."""
    if task in TABLE1_TASKS and method in TABLE1:
        return TABLE1[method][TABLE1_TASKS.index(task)]
    return TABLE4.get(task or "", {}).get(method, (None,))[0]


def gap_on(tasks: Sequence[str | None], first: str, second: str) -> float | None:
    """As `gap`, the mean over these tasks; None where the paper lacks a number of them."""
    numbers = [(printed(task, first), printed(task, second)) for task in tasks]
    gaps = [one - other for one, other in numbers if one is not None and other is not None]
    return sum(gaps) / len(gaps) if gaps and len(gaps) == len(tasks) else None


def method_order(method: str) -> tuple[int, str]:
    """Sort key: the methods of Table 1 in its order, then the rivals, then the rest by name."""
    known = (*METHODS, *RIVALS)
    return (known.index(method) if method in known else len(known)), method
