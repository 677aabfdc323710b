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
    for seen in _vision(model, names, generator):
        with_images = _with_places(model, text, seen) if text else None
        if with_images is not None:
            yield with_images
        yield {**text, **seen}
    for heard in _audio(model.config, names, generator):
        yield {**text, **heard}
        yield {**heard, **{k: v for k, v in text.items() if k.startswith("decoder")}}
    if text:
        yield text
        return
    size = find(model.config, "hidden_size", "d_model", "embed_dim")
    name = next((name for name in ("inputs_embeds", "hidden_states") if name in names), None)
    if size and name:
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
    inputs: Inputs = {"use_cache": False} if "use_cache" in names and "input_ids" in names else {}
    for name in names:
        if name.endswith("input_ids"):
            inputs[name] = tokens(generator, config)
    if "protein_attention_mask" in names:
        inputs["protein_attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if "bbox" in names and inputs:
        corners = torch.randint(0, 100, (BATCH, LENGTH, 2), generator=generator)
        inputs["bbox"] = torch.cat([corners, corners + 20], -1)
    return inputs


def _vision(model: Any, names: list[str], generator: torch.Generator) -> Iterator[Inputs]:
    config = model.config
    side = find(config, "image_size") or 32
    height, width = (side, side) if isinstance(side, int) else side[-2:]
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    name = next((name for name in ("pixel_values", "pixel_values_videos", "hidden_states") if name in names), None)
    grid_name = next((name for name in ("image_grid_thw", "grid_thw") if name in names), None)
    if name is None or (name == "hidden_states" and grid_name is None):
        return
    if grid_name is not None:
        patch = find(config, "patch_size") or 8
        temporal = find(config, "temporal_patch_size") or 1
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        rows = torch.randn(BATCH * 16, channels * temporal * patch * patch, generator=generator)
        yield {name: rows, grid_name: grid}
        return
    frames = FRAMES if name == "pixel_values_videos" else find(config, "num_frames", "frames_per_clip")
    for depth in dict.fromkeys((channels, 3)):
        shape = (BATCH, depth, height, width) if frames is None else (BATCH, frames, depth, height, width)
        yield {name: torch.randn(shape, generator=generator)}


def _audio(config: Any, names: list[str], generator: torch.Generator) -> Iterator[Inputs]:
    bins = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
    length = 2 * (find(config, "max_source_positions") or 32)
    if "input_features" in names:
        for shape in ((BATCH, bins or MELS, length), (BATCH, length, bins or MELS)):
            features = torch.randn(shape, generator=generator)
            masks = {
                name: torch.ones(BATCH, length, dtype=torch.long)
                for name in ("input_features_mask", "feature_attention_mask")
                if name in names
            }
            yield {"input_features": features, **masks}
    if "input_values" in names:
        for shape in ((BATCH, SAMPLES), (BATCH, 1, SAMPLES), (BATCH, find(config, "max_length") or 64, bins or MELS)):
            yield {"input_values": torch.randn(shape, generator=generator)}


def _with_places(model: Any, text: Inputs, seen: Inputs) -> Inputs | None:
    """The text with as many image tokens before it as the images have features; None where none are wanted."""
    place = find(model.config, "image_token_id", "image_token_index")
    if place is None or not hasattr(model, "get_image_features"):
        return None
    names = inspect.signature(model.get_image_features).parameters
    try:
        with torch.no_grad():
            features = model.get_image_features(**{name: seen[name] for name in seen if name in names})
    except Exception:  # noqa: BLE001  (it wants more than pixels: the text alone is tried next)
        return None
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        features = list(features) if features.dim() == 3 else list(features.chunk(BATCH))
    if not isinstance(features, (list, tuple)) or not len(features) or features[0].dim() < 2:
        return None
    count = features[0].shape[-2]
    ids = torch.cat([torch.full((BATCH, count), place), text["input_ids"]], 1)
    extra = (
        {"mm_token_type_ids": (ids == place).int()}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters
        else {}
    )
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
