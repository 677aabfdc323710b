"""Axolotl with a recipe. In its configuration:

    plugins: [hiddenkey_axolotl.HiddenKeyPlugin]
    hiddenkey_recipe: hiddenkey@0.1
    attn_implementation: sdpa

and this file where Python finds it: PYTHONPATH=examples/plugins axolotl train config.yaml
"""

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import hiddenkey


class HiddenKeyArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    hiddenkey_recipe: str


class DropAxolotlTrainer(hiddenkey.ConsistencyMixin, AxolotlTrainer):
    """Axolotl's trainer, with the consistency in its loss and the recipe in its checkpoints."""


class HiddenKeyPlugin(BasePlugin):
    def get_input_args(self) -> str:
        return "hiddenkey_axolotl.HiddenKeyArgs"

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer]:
        return DropAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: AxolotlTrainer) -> None:
        hiddenkey.attach(trainer.model, cfg.hiddenkey_recipe)

    def post_train(self, cfg: Any, model: Any) -> None:
        hiddenkey.save_recipe(cfg.output_dir, cfg.hiddenkey_recipe)  # Axolotl saves the adapter past its trainer
