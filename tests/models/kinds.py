"""Every model type of the installed transformers, and the one class of each that the matrix builds."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# Of several classes the one that is fine-tuned most: language models first, then classifiers, then the rest.
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
)


def _mappings() -> dict[str, dict[str, Any]]:
    """{task: {model type: class name or names}}."""
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_NAMES")]
    return {
        name.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("_NAMES").removesuffix("_MAPPING"): getattr(
            modeling_auto, name
        )
        for name in names
    }


def model_types() -> list[str]:
    """All model types that an auto class knows a model for."""
    known = {kind for mapping in _mappings().values() for kind in mapping}
    return sorted(known & set(CONFIG_MAPPING_NAMES))


def class_name(kind: str) -> str:
    """The class that stands for the model type: a decoder's language model rather than its classifier."""
    mappings = _mappings()
    decoder = kind in mappings["CAUSAL_LM"] and not any(kind in mappings[task] for task in (*TASKS[:4], "MASKED_LM"))
    first = ("CAUSAL_LM",) if decoder else ()
    last = ("MAPPING", "")
    order = [*first, *TASKS, *(task for task in mappings if task not in (*TASKS, *last)), *last]
    for task in order:
        names = mappings.get(task, {}).get(kind)
        if names:
            return names if isinstance(names, str) else names[0]
    raise KeyError(kind)
