"""The structure of a model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .errors import ConfigError
from .hub import require_model

MODEL_CLASSES = {
    "auto": "",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
"""The Auto class of transformers for each task."""


def build_skeleton(name: str, model_class: str, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The structure of a model without weights, in no time and no memory.

    `model_class` is an Auto class of transformers; empty, the class the model was published as, or a sequence
    classifier where that has no head.

    Raises:
        OSError: no such model.
        ConfigError: the model cannot be built with that head or attention, or wants to run code of its own.
    """
    config = load_config(name, trust_remote_code, **options)
    auto = getattr(transformers, model_class or published_class(config))
    with torch.device("meta"):
        try:
            if hasattr(auto, "from_config"):  # which asks on the terminal where it is not told
                return auto.from_config(config, trust_remote_code=trust_remote_code)
            return auto._from_config(config)
        except Exception as error:  # whatever a wrong value in the configuration runs into
            raise ConfigError(f"{name} ({config.model_type}) cannot be a {auto.__name__}: {reason(error)}") from error


def load_config(name: str, trust_remote_code: bool, **options: Any) -> Any:
    """The configuration of a model.

    Raises:
        OSError: no such model.
        ConfigError: a wrong value, a kind of model that transformers does not know, or code of its own that may not
            run.
    """
    require_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # whatever a wrong value in the file runs into
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise OSError(f"model = {name!r}: here is no folder of that name, and from the hub: {error}") from error
        own = any(word in str(error) for word in ("trust_remote_code", "model type"))
        option = " Here that option is --trust-remote-code." if own else ""
        raise ConfigError(f"The config.json of {name} cannot be read: {reason(error)}{option}") from error


def reason(error: Exception) -> str:
    """What a library's error says in one line, with its type, without which `KeyError: 'x'` reads as `'x'`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def published_class(config: Any) -> str:
    """The class a model was published as, or a sequence classifier where that has no head.

    Raises ConfigError where config.json names something of transformers that is no model.
    """
    published = str((config.architectures or [""])[0])
    found = getattr(transformers, published, None)
    if found is None or published.endswith("Model"):
        return "AutoModelForSequenceClassification"
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ConfigError(
            f"The config.json of {config.name_or_path} has architectures = {config.architectures!r}, and "
            f"transformers.{published} is no model; name the model's class there, for instance "
            "LlamaForCausalLM."
        )
    return published
