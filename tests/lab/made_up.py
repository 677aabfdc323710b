"""Records of runs that never were, with effects that are known: what the report is tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hiddenkey.lab.sweep.record import RunRecord

RATES = (0.05, 0.1, 0.2)
METHODS = (
    "baseline",
    *(
        f"{name} {pattern}"
        for name in ("hiddencut", "dropkey", "dropattention")
        for pattern in ("element", "column", "span")
    ),
    *("hiddenkey-", "hiddenkey", "hiddenkey-js", "hiddenkey-input", "hiddenkey-output"),
)
RIVALS = ("lora_dropout", "weight decay", "smaller rank", "dropout", "neftune", "label smoothing", "r-drop")


@dataclass(frozen=True)
class World:
    """What is true: how good each method is, and how much chance there is."""

    task: str = "sst2"
    metric: str = "accuracy"
    level: float = 0.85
    effects: Mapping[str, float] = field(default_factory=dict)
    """Gain of a method over the baseline, at its best rate, as a share."""
    rank_effects: Mapping[int, float] = field(default_factory=dict)
    methods: Sequence[str] = METHODS
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    best_rate: float = 0.1
    noise: float = 0.004
    """Of a run."""
    of_a_seed: float = 0.01
    """Shared by all runs of a seed: what pairing takes out."""
    epochs: int = 6
    decline: float = 0.01
    """How far the baseline's last epoch lies below its best."""
    kind: str = "classification"
    model: str = "models/all-MiniLM-L6-v2"
    failing: Sequence[tuple[str, int, int]] = ()
    """Method, trial, seed of the runs that fail."""


def make_records(world: World, chance: int = 0) -> list[RunRecord]:
    """One record for every method, trial, seed and rank."""
    rng = np.random.default_rng(chance)
    shift = {seed: rng.normal(0, world.of_a_seed) for seed in world.seeds}
    return [
        _record(world, method, trial, seed, rank, shift[seed], rng)
        for rank in (None, *world.rank_effects)
        for method in (world.methods if rank is None else ("baseline", "hiddenkey-"))
        for trial in range(len(RATES))
        for seed in world.seeds
    ]


def write_records(records: Sequence[RunRecord], folder: Path) -> Path:
    """Lay them as a sweep does."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / "runs" / f"{record.id}.json").write_text(json.dumps(asdict(record)), encoding="utf-8")
    return folder


def _record(
    world: World, method: str, trial: int, seed: int, rank: int | None, shift: float, rng: np.random.Generator
) -> RunRecord:
    rate = RATES[trial]
    params = {"learning_rate": 1e-3 * rate} if method == "baseline" or method in RIVALS else {"p": rate}
    off = 0.0 if rate == world.best_rate else 0.01
    truth = world.level + shift + world.effects.get(method, 0.0) - off
    truth += world.rank_effects.get(rank, 0.0) if rank is not None and method == "baseline" else 0.0
    decline = world.decline if method == "baseline" else world.decline / 2
    test_best = _share(truth + rng.normal(0, world.noise))
    epochs = _epochs(world, truth, decline, rng)
    best = max(epochs, key=lambda row: row[f"validation_{world.metric}"])
    failed = (method, trial, seed) in world.failing
    slow = {"hiddenkey": 1.5, "hiddenkey-js": 1.5, "r-drop": 2.0}.get(method, 1.04)
    axes = {"seed": seed} | ({} if rank is None else {"lora_r": rank})
    step = 0.2 if method == "baseline" else 0.2 * slow
    extra = _texts(test_best, rng) if world.kind == "causal-lm" else {}
    return RunRecord(
        id=f"{method.replace(' ', '-')}-t{trial}-s{seed}-r{rank or 0}",
        sweep=world.task,
        method=method,
        params=params,
        axes=axes,
        trial=trial,
        config={
            "model": world.model,
            "data": f"data/{world.task}",
            "seed": seed,
            "data_seed": 0,
            "lora_r": rank or 8,
            "lora_alpha": 16,
            "train_size": 250,
        },
        recipe=f"{method}@{rate}",
        status="failed" if failed else "finished",
        failure="loss is nan at step 3" if failed else "",
        task=world.kind,
        metric=world.metric,
        lower_is_better=world.metric == "nll",
        best={} if failed else best,
        last={} if failed else epochs[-1],
        test={}
        if failed
        else {
            "best": {world.metric: test_best, "loss": 0.4} | extra,
            "last": {world.metric: _share(test_best - decline), "loss": 0.6},
        },
        epochs=[] if failed else epochs,
        data_rows={"train": 250, "validation": 250, "test": 872},
        trainable_parameters=73_728,
        drop_rates={},
        step_seconds={"median": step, "p20": step, "p80": step, "steps": world.epochs * 8},
        seconds=step * world.epochs * 8 + 10,
        started="2026-11-24T15:20:11Z",
        versions={"python": "3.11.2", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
        commit="0123456789abcdef0123456789abcdef01234567",
    )


def _epochs(world: World, truth: float, decline: float, rng: np.random.Generator) -> list[dict[str, float]]:
    peak, rows = 0.7 * world.epochs, []
    for epoch in range(1, world.epochs + 1):
        behind = 0.15 * max(0.0, 1 - epoch / peak) ** 2 + decline * max(0.0, (epoch - peak) / (world.epochs - peak))
        value = _share(truth - behind + rng.normal(0, world.noise / 2))
        row = {"epoch": float(epoch), "step": epoch * 8, "validation_loss": round(0.5 - value / 4, 4)}
        rows.append(row | {f"validation_{world.metric}": value, "train_loss": round(0.6 * 0.7**epoch, 4)})
    return rows


def _texts(quality: float, rng: np.random.Generator) -> dict[str, float]:
    return {
        "bleu": round(0.6 * quality + rng.normal(0, 0.003), 5),
        "nist": round(8 * quality, 3),
        "meteor": round(0.45 * quality, 5),
        "rouge_l": round(0.7 * quality, 5),
        "cider": round(2.2 * quality, 3),
        "ter": round(0.5 * (1 - quality), 5),
        "nll": round(3.8 - quality, 4),
    }


def _share(value: float) -> float:
    return round(float(np.clip(value, 0, 1)), 4)
