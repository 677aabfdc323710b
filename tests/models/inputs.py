"""Inputs for any model: by the names of its forward's arguments and the sizes in its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .exceptions import INPUTS
from .shrink import FIRST_TOKEN, FRAMES, VOCABULARY

BATCH, LENGTH, MELS, SAMPLES = 2, 12, 64, 4000
Inputs = dict[str, Any]


def candidates(kind: str, model: Any) -> Iterator[Inputs]:
    """Inputs to try, the fullest first."""
    generator = torch.Generator().manual_seed(1)
    names = list(inspect.signature(model.forward).parameters)
    if kind in INPUTS:
        yield INPUTS[kind](model.config, generator)
        return
    text = _text(model.config, names, generator)
    seen = _vision(model, names, generator)
    heard = _audio(model.config, names, generator)
    if text and seen:
        with_images = _with_places(model, text, seen)
        if with_images is not None:
            yield with_images
        yield {**text, **seen}
    elif seen:
        yield seen
    if text and heard:
        yield {**text, **heard}
        yield {**heard, **{k: v for k, v in text.items() if k.startswith("decoder")}}
    elif heard:
        yield heard
    if text:
        yield text
    if "inputs_embeds" in names or "hidden_states" in names:
        size = find(model.config, "hidden_size", "d_model", "embed_dim")
        if size:
            name = "inputs_embeds" if "inputs_embeds" in names else "hidden_states"
            yield {name: torch.randn(BATCH, LENGTH, size, generator=generator)}
    if "past_values" in names:
        channels = find(model.config, "num_input_channels") or 1
        length = find(model.config, "context_length") or 32
        yield {"past_values": torch.randn(BATCH, length, channels, generator=generator)}


def find(config: Any, *names: str) -> Any:
    """The first of the fields that the configuration, or one of its parts, has."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    parts += [value for part in parts[1:] for value in vars(part).values() if hasattr(value, "to_dict")]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def tokens(generator: torch.Generator, config: Any, length: int = LENGTH) -> Tensor:
    top = min(find(config, "vocab_size") or VOCABULARY, VOCABULARY)
    return torch.randint(min(FIRST_TOKEN, top // 2), top, (BATCH, length), generator=generator)


def _text(config: Any, names: list[str], generator: torch.Generator) -> Inputs:
    inputs: Inputs = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in names:
            inputs[name] = tokens(generator, config)
    if "bbox" in names and inputs:
        corners = torch.randint(0, 100, (BATCH, LENGTH, 2), generator=generator)
        inputs["bbox"] = torch.cat([corners, corners + 20], -1)
    return inputs


def _vision(model: Any, names: list[str], generator: torch.Generator) -> Inputs:
    config = model.config
    side = find(config, "image_size") or 32
    height, width = (side, side) if isinstance(side, int) else side[-2:]
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    if "pixel_values_videos" in names and "pixel_values" not in names:
        return {"pixel_values_videos": torch.randn(BATCH, FRAMES, channels, height, width, generator=generator)}
    if "pixel_values" not in names:
        return {}
    patch = find(config, "patch_size") or 8
    if "image_grid_thw" in names or "grid_thw" in names:
        temporal = find(config, "temporal_patch_size") or 1
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        rows = torch.randn(BATCH * 16, channels * temporal * patch * patch, generator=generator)
        return {"pixel_values": rows, "image_grid_thw" if "image_grid_thw" in names else "grid_thw": grid}
    frames = find(config, "num_frames", "frames_per_clip")
    shape = (BATCH, channels, height, width) if frames is None else (BATCH, frames, channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _audio(config: Any, names: list[str], generator: torch.Generator) -> Inputs:
    if "input_features" in names:
        bins = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
        length = 2 * (find(config, "max_source_positions") or 32)
        shape = (BATCH, bins or MELS, length)
        if find(config, "input_feat_per_channel", "feature_projection_input_dim"):
            shape = (BATCH, length, bins)
        return {"input_features": torch.randn(shape, generator=generator)}
    if "input_values" in names:
        return {"input_values": torch.randn(BATCH, SAMPLES, generator=generator)}
    return {}


def _with_places(model: Any, text: Inputs, seen: Inputs) -> Inputs | None:
    """The text with as many image tokens before it as the images have features; None where none are wanted."""
    place = find(model.config, "image_token_id", "image_token_index")
    if place is None or not hasattr(model, "get_image_features"):
        return None
    names = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        features = model.get_image_features(**{name: seen[name] for name in seen if name in names})
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        features = list(features) if features.dim() == 3 else list(features.chunk(BATCH))
    count = features[0].shape[-2]
    ids = torch.cat([torch.full((BATCH, count), place), text["input_ids"]], 1)
    extra = {"mm_token_type_ids": (ids == place).int()} if "mm_token_type_ids" in inspect.signature(
        model.forward
    ).parameters else {}
    return {**text, **seen, **extra, "input_ids": ids}


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict) or hasattr(output, "items"):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors(value)]
    return []
