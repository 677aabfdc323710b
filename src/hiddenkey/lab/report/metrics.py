"""How metrics are shown: their names, units and digits."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """One metric as the report shows it."""

    name: str
    label: str
    scale: float = 1.0
    """Values of the records are multiplied by it; shares become points."""
    lower_is_better: bool = False
    digits: int = 2

    @property
    def in_points(self) -> bool:
        """Whether it is a share of 0 to 1 shown in points, so that differences of several tasks may be averaged."""
        return self.scale == 100.0


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", 100),
        Metric("matthews", "Matthews", 100),
        Metric("f1", "F1", 100),
        Metric("pearson", "Pearson", 100),
        Metric("spearman", "Spearman", 100),
        Metric("token_accuracy", "token accuracy", 100),
        Metric("bleu", "BLEU", 100),
        Metric("nist", "NIST", digits=3),
        Metric("meteor", "METEOR", 100),
        Metric("rouge_l", "ROUGE-L", 100),
        Metric("cider", "CIDEr", digits=3),
        Metric("ter", "TER", 100, lower_is_better=True),
        Metric("nll", "NLL", lower_is_better=True, digits=3),
        Metric("perplexity", "perplexity", lower_is_better=True),
        Metric("loss", "loss", lower_is_better=True, digits=3),
    )
}


def metric(name: str, lower_is_better: bool = False) -> Metric:
    """The metric of that name, `bleu_seen` and the like included; an unknown one is shown as it is."""
    known = METRICS.get(name.removesuffix("_seen").removesuffix("_unseen"))
    return replace(known, name=name) if known else Metric(name, name, lower_is_better=lower_is_better, digits=3)
