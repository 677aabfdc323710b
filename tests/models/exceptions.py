"""What no rule gets right: by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fields = dict[str, Any]


def _each(kinds: str, fields: Fields) -> dict[str, Fields]:
    return {kind: dict(fields) for kind in kinds.split()}


HYBRID = ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"]
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

# Arguments of a config class that can't be built without any.
START: dict[str, Fields] = {}
# Fields of the tiny configuration, by the model type of the (sub-)configuration they belong to.
FIELDS: dict[str, Fields] = {
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    **_each("gptj codegen", {"rotary_dim": 8}),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    **_each("hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl_text ministral", {"head_dim": 16}),
    **_each("nemotron qwen4_exp qwen4_exp_text", {"num_key_value_heads": 2}),
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    **_each("chameleon emu3", {"vocabulary_map": {"<image>": 5, "IMGIMG": 6}}),
    **_each("zamba zamba2", {"num_hidden_layers": 6, "layer_types": HYBRID}),
    **_each("qwen2_vl_text qwen2_5_vl_text glm4v_text glm_ocr_text", {"rope_parameters": SECTIONS}),
    "qwen2_5_omni_text": {"rope_parameters": SECTIONS},
    "glm4v_moe_text": {"rope_parameters": {**SECTIONS, "mrope_section": [2, 1, 1]}},
    **_each("autoformer informer time_series_transformer", {"prediction_length": 4, "num_time_features": 2}),
    **_each("blip-2 instructblip instructblipvideo", {"image_token_index": 5, "video_token_index": 5}),
    "glm_image_text": {"rope_parameters": SECTIONS},
    **_each("swin donut-swin", {"image_size": 64, "patch_size": 2}),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "lilt": {"hidden_size": 96},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "reformer": {"axial_pos_shape": [3, 4], "axial_pos_embds_dim": [32, 32]},
}
# What can't be examined, and why.
UNFIT = {"xcodec": "its output is that of a vector quantiser, in which a drop need not show"}


def _series(config: Any, generator: torch.Generator) -> Fields:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length

    def values(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    return {
        "past_values": values(past),
        "past_time_features": values(past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": values(future),
        "future_time_features": values(future, config.num_time_features),
    }


def _seen_regions(config: Any, generator: torch.Generator) -> Fields:
    return {
        "input_ids": torch.randint(64, config.vocab_size, (2, 12), generator=generator),
        "visual_feats": torch.randn(2, 6, config.visual_feat_dim, generator=generator),
        "visual_pos": torch.rand(2, 6, config.visual_pos_dim, generator=generator),
    }


def _question(config: Any, generator: torch.Generator) -> Fields:
    ids = torch.randint(64, config.vocab_size, (2, 12), generator=generator)
    ids[:, 3] = config.question_token_id
    return {"input_ids": ids}


def _patches(config: Any, generator: torch.Generator) -> Fields:
    vision = getattr(config, "vision_config", config)
    return {
        "pixel_values": torch.randn(2, 16, vision.num_channels * vision.patch_size**2, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


# Inputs of a model type: a function of (configuration, generator).
INPUTS: dict[str, Callable[[Any, torch.Generator], Fields]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _series),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), _patches),
    "lxmert": _seen_regions,
    "splinter": _question,
}
