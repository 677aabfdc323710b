"""What no rule gets right: by model type."""

from __future__ import annotations

from typing import Any

# Arguments of a config class that can't be built without any.
START: dict[str, dict[str, Any]] = {}
# Fields of the tiny configuration, by the model type of the (sub-)configuration they belong to.
FIELDS: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), {"mamba_n_heads": 4, "mamba_d_head": 32}),
    "mamba2": {"num_heads": 4, "head_dim": 32},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), {"head_dim": 16}),
    "nemotron": {"num_key_value_heads": 2},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
}
# Inputs of a model type: a function of (configuration, generator).
INPUTS: dict[str, Any] = {}
