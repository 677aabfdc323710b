"""The one look at the test part, after training: by the best epoch's model and by the last epoch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from .checkpoints import require_whole
from .config import Keep
from .summary import TIMES


def load_weights(trainer: Any, step: int) -> None:
    """Give the trainer's model the weights of the checkpoint of `step`.

    Raises:
        RunError: the checkpoint is gone or damaged.
    """
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    require_whole(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))


def final_scores(trainer: Any, rows: Dataset, steps: dict[Keep, int], keep: Keep) -> dict[str, dict[str, float]]:
    """Test metrics of the models that the checkpoints of `steps` hold; the one to `keep` stays in the trainer.

    Raises:
        RunError: a checkpoint is gone or damaged.
    """
    found: dict[int, dict[str, float]] = {}
    for step in sorted(set(steps.values()), key=lambda step: step == steps[keep]):
        load_weights(trainer, step)
        metrics = trainer.predict(rows, metric_key_prefix="test").metrics
        found[step] = {name[len("test_") :]: value for name, value in metrics.items() if not name.endswith(TIMES)}
    return {name: dict(found[step]) for name, step in steps.items()}
