"""hiddenkey: structured dropout and consistency losses for LoRA fine-tuning (arXiv 2403.00812).

Names are loaded on first use, so that importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

ROOMS = {
    "recipe": ("parse", "Recipe", "Drop", "LayerSlice"),
    "errors": ("UserError", "RecipeError", "PlanError", "AttachError", "SavedRecipeError", "UnknownNameError"),
    "attention_paths": ("attention",),
    "dropout": ("StructuredDropout",),
    "consistency": ("consistency_loss", "register_consistency"),
    "patterns": ("register_pattern",),
    "positions": ("register_position",),
    "compensations": ("register_compensation",),
    "hf.plan": ("plan", "Plan"),
    "hf.attach": ("attach",),
    "hf.attachment": ("find_attachment", "Attachment"),
    "hf.doctor.examination": ("doctor",),
    "hf.doctor.findings": ("Diagnosis", "Finding"),
    "hf.training_step": ("consistency_step", "StepLoss"),
    "hf.trainer": ("DropTrainer", "ConsistencyMixin"),
    "hf.saving": ("save_recipe", "load_recipe"),
}
_room_of = {name: room for room, names in ROOMS.items() for name in names}

__all__ = sorted(_room_of)

if TYPE_CHECKING:
    from .attention_paths import attention as attention
    from .compensations import register_compensation as register_compensation
    from .consistency import consistency_loss as consistency_loss
    from .consistency import register_consistency as register_consistency
    from .dropout import StructuredDropout as StructuredDropout
    from .errors import AttachError as AttachError
    from .errors import PlanError as PlanError
    from .errors import RecipeError as RecipeError
    from .errors import SavedRecipeError as SavedRecipeError
    from .errors import UnknownNameError as UnknownNameError
    from .errors import UserError as UserError
    from .hf.attach import attach as attach
    from .hf.attachment import Attachment as Attachment
    from .hf.attachment import find_attachment as find_attachment
    from .hf.doctor.examination import doctor as doctor
    from .hf.doctor.findings import Diagnosis as Diagnosis
    from .hf.doctor.findings import Finding as Finding
    from .hf.plan import Plan as Plan
    from .hf.plan import plan as plan
    from .hf.saving import load_recipe as load_recipe
    from .hf.saving import save_recipe as save_recipe
    from .hf.trainer import ConsistencyMixin as ConsistencyMixin
    from .hf.trainer import DropTrainer as DropTrainer
    from .hf.training_step import StepLoss as StepLoss
    from .hf.training_step import consistency_step as consistency_step
    from .patterns import register_pattern as register_pattern
    from .positions import register_position as register_position
    from .recipe import Drop as Drop
    from .recipe import LayerSlice as LayerSlice
    from .recipe import Recipe as Recipe
    from .recipe import parse as parse


def __getattr__(name: str) -> Any:
    if name not in _room_of:
        raise AttributeError(f"module 'hiddenkey' has no attribute {name!r}")
    value = getattr(import_module(f".{_room_of[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
