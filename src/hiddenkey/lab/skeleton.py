"""The structure of a model without its weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

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
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{name} ({config.model_type}) cannot be a {auto.__name__}: {error}") from error


def load_config(name: str, trust_remote_code: bool, **options: Any) -> Any:
    """The configuration of a model.

    Raises:
        OSError: no such model.
        ConfigError: transformers does not know its kind, or it wants to run code of its own and may not.
    """
    require_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (ValueError, ImportError) as error:
        own = any(word in str(error) for word in ("trust_remote_code", "model type"))
        option = " Here that option is --trust-remote-code." if own else ""
        raise ConfigError(f"{name} cannot be read: {error}{option}") from error
    except OSError as error:
        raise OSError(f"model = {name!r}: here is no folder of that name, and from the hub: {error}") from error


def published_class(config: Any) -> str:
    """The class a model was published as, or a sequence classifier where that has no head."""
    published = (config.architectures or [""])[0]
    headless = not hasattr(transformers, published) or published.endswith("Model")
    return "AutoModelForSequenceClassification" if headless else published
