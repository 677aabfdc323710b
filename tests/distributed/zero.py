"""What runs in each process under DeepSpeed: trainings of tiny models in float32, the widest type it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hiddenkey
from tests.distributed.scenarios import RANKS, build, curve, resumable, same

RECIPES = {name: same(name) for name in ("kl", "kl-rdrop")} | {"none": same("kl").partition(" ~ ")[0]}


def engine(stage: str) -> dict[str, Any]:
    """The configuration that turns DeepSpeed on: the optimizer's state, gradients, parameters in parts."""
    return {
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }


def one(folder: Path, name: str) -> dict[str, Any]:
    """The curve of a recipe in one process without DeepSpeed."""
    return curve(folder, "llama", RECIPES[name], 1, model=build("llama").float())


def zero_curves(out: Path, stage: str) -> dict[str, Any]:
    """Curves with comparable masks for each recipe, and a short one with drawn masks."""

    def run(name: str, recipe: str, **options: Any) -> dict[str, Any]:
        model = build("llama").float()
        return curve(out / name, "llama", recipe, RANKS, model=model, deepspeed=engine(stage), **options)

    return {name: run(name, recipe) for name, recipe in RECIPES.items()} | {
        "drawn": run("drawn", "hiddenkey@0.3", max_steps=2)
    }


def zero_resumable(out: Path, mode: str, stage: str) -> dict[str, Any]:
    """Whole, killed, or resumed; then resumed with another recipe, which is refused."""

    def run(**options: Any) -> dict[str, Any]:
        return resumable(out, mode, model=build("llama").float(), deepspeed=engine(stage), **options)

    found = run()
    del found["weights"]  # of ZeRO-3 they are elsewhere
    if mode == "resumed":
        with pytest.raises(hiddenkey.SavedRecipeError, match="was trained with the recipe"):
            run(recipe="hiddenkey@0.2")
    return found
