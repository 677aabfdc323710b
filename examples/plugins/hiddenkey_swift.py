"""ms-swift with a recipe:

HIDDENKEY_RECIPE=hiddenkey@0.1 swift sft --external_plugins examples/plugins/hiddenkey_swift.py --attn_impl sdpa …
"""

import os
from typing import Any

from swift.trainers import Seq2SeqTrainer, TrainerFactory

import hiddenkey


class DropSwiftTrainer(hiddenkey.ConsistencyMixin, Seq2SeqTrainer):
    """ms-swift's trainer, with the recipe attached to its model and the consistency in its loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, recipe=os.environ["HIDDENKEY_RECIPE"], **kwargs)


TrainerFactory.TRAINER_MAPPING["causal_lm"] = "hiddenkey_swift.DropSwiftTrainer"
