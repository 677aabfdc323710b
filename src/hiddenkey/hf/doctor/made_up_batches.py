"""Small batches made for a model, from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UserError
from ..outer_forward import arguments, is_own, outermost
from ..source_reading import parameters
from ..structure import find_transformer

Batch = dict[str, Any]
LONGEST_AUDIO = 16000


def make_batches(model: nn.Module, count: int, size: int, length: int) -> list[Batch]:
    """`count` batches of `size` examples: texts of up to `length` tokens (the last one padded), images, or sounds.

    Random content, on the model's device, with labels where the model has a loss; what of it the user's module around
    a transformers model takes. Raises UserError for a model whose inputs can't be made from its configuration.
    """
    transformer = find_transformer(model)[1]
    batches = [_batch(transformer, size, length) for _ in range(count)]
    if not is_own(model):
        return batches
    asked = parameters(outermost(model)).values()
    needed = [p.name for p in asked if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    batches = [{name: value for name, value in batch.items() if name in arguments(model)} for batch in batches]
    missing = [name for name in needed if name not in batches[0]]
    if missing:
        raise UserError(
            f"{type(outermost(model)).__name__} needs {', '.join(missing)}, for which nothing can be made up here; "
            "give batches of your own: hiddenkey.doctor(model, recipe, batches=[…])"
        )
    return batches


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has learned positions for, where its configuration says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _batch(model: PreTrainedModel, size: int, length: int) -> Batch:
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        batch = _text(model, size, length)
    elif name == "pixel_values":
        batch = {name: _image(model, size)}
    elif name == "input_values":
        batch = {name: _noise(model, size, LONGEST_AUDIO)}
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 500)
        batch = {name: _noise(model, size, config.num_mel_bins, frames)}
    else:
        raise UserError(
            f"{type(model).__name__} takes {name!r}, for which no batch can be made up here; give some of your own: "
            "hiddenkey.doctor(model, recipe, batches=[…])"
        )
    return batch | _labels(model, batch, batch[name].shape[0], length)


def _text(model: PreTrainedModel, size: int, length: int) -> Batch:
    config = model.config
    text = config.get_text_config()
    limit = positions(model)
    length = min(length, limit - 4) if limit is not None and limit > 8 else length
    pad = text.pad_token_id if isinstance(getattr(text, "pad_token_id", None), int) else None
    if pad is None and type(model).__name__.endswith("ForSequenceClassification"):
        size = 1  # a decoder finds the token to classify by the padding after it
    ids = _ids(model, size, length)
    mask = torch.ones_like(ids)
    if pad is not None:
        cut = length - length // 4
        ids[-1, cut:], mask[-1, cut:] = pad, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "pixel_values" in parameters(model) and hasattr(config, "vision_config"):
        batch |= {} if model.can_generate() else {"pixel_values": _image(model, size)}
    return batch


def _ids(model: PreTrainedModel, size: int, length: int) -> Tensor:
    """Ordinary tokens: none that the configuration names."""
    text = model.config.get_text_config()
    special = {
        value
        for config in (model.config, text)
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    vocabulary = min(text.vocab_size, 50_000)
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    return ordinary[torch.randint(len(ordinary), (size, length))].to(model.device)


def _image(model: PreTrainedModel, size: int) -> Tensor:
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return _noise(model, size, getattr(config, "num_channels", 3), height, width)


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randn(shape).to(model.device, model.dtype)


def _labels(model: PreTrainedModel, batch: Batch, size: int, length: int) -> Batch:
    """Labels, by what the class is for."""
    kind, config, device = type(model).__name__, model.config, model.device
    if config.is_encoder_decoder:
        ids = _ids(model, size, min(length, 16))
        return {"labels": ids} if "Conditional" in kind else {"decoder_input_ids": ids}
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    if kind.endswith("ForTokenClassification"):
        return {"labels": torch.randint(config.num_labels, batch["input_ids"].shape, device=device)}
    if kind.endswith("ForQuestionAnswering"):
        places = torch.randint(max(batch["input_ids"].shape[1] // 2, 1), (2, size), device=device)
        return {"start_positions": places[0], "end_positions": places[1]}
    if not kind.endswith("Classification"):
        return {}
    if config.num_labels == 1 or config.problem_type == "regression":
        return {"labels": torch.randn(size, device=device)}
    if config.problem_type == "multi_label_classification":
        return {"labels": torch.randint(2, (size, config.num_labels), device=device).float()}
    return {"labels": torch.randint(config.num_labels, (size,), device=device)}
