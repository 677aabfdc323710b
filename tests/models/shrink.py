"""A tiny configuration of any config class: sizes are cut by the names of the fields, sub-configurations too."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .exceptions import FIELDS, START

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, DEPTH, VOCABULARY = 64, 4, 2, 16, 96, 2, 256
EXPERTS, IMAGE, PATCH, FRAMES = 4, 32, 8, 2
# Ordinary tokens have higher numbers, so that a random batch holds no special one.
FIRST_TOKEN, LAST_SPECIAL = 64, 60

Rule = tuple[str, Callable[[int], int]]


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# The first pattern that matches a field's whole name gives its new value.
RULES: tuple[Rule, ...] = (
    # Sparse attention that leaves keys out of a batch as short as ours.
    (r"index_(topk|block_size|kpool)", at_most(4)),
    (r"index_topk_blocks", at_most(1)),
    (r".*(vocab_size|num_embeddings|codebook_size|vocab)", at_most(VOCABULARY)),
    (r".*(num_(key_value|kv)_heads|kv_heads|n_head_kv|num_kv)", lambda v: 1 if v == 1 else KV_HEADS),
    (r".*(index_n_heads)", at_most(2)),
    (r"(num_groups|norm_num_groups)", at_most(4)),
    (r"upsample_groups", at_most(HIDDEN)),
    (r"num_kv_shared_layers", at_most(0)),
    (r"hidden_size_per_layer_input", at_most(8)),
    (r".*(heads|n_head|mamba_n_heads|encoder_attention_heads)", at_most(HEADS)),
    (r".*(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)", at_most(16)),
    (r".*(head_dim|d_kv|dim_head|head_size|d_head|head_width)", at_most(HEAD_DIM)),
    (r".*(qk_rope_head_dim|qk_nope_head_dim|v_head_dim)", at_most(HEAD_DIM)),
    (
        r".*(intermediate_size|ffn_dim|d_ff|mlp_dim|d_inner|dim_ff|dim_feedforward|feedforward_dim|intermediate_dim"
        r"|ffn_hidden_size|mlp_hidden_size|n_inner|hidden_dim_ff)",
        at_most(FEED_FORWARD),
    ),
    (
        r".*(num_hidden_layers|n_layers?|num_layers|_layers|num_blocks|depth|num_block_repeats|layer_num|n_layer)",
        at_most(DEPTH),
    ),
    (r"layers", at_most(DEPTH)),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", at_most(EXPERTS)),
    (
        r".*(experts_per_tok|experts_per_token|moe_topk|moe_k|router_topk|moe_top_k|top_k|num_selected_experts)",
        at_most(2),
    ),
    (r"(n_group|topk_group|num_expert_group)", at_most(1)),
    (r".*max_source_positions", at_most(32)),  # of sound, of which the inputs take all
    (
        r".*(max_position_embeddings|n_positions|n_ctx|max_target_positions|max_seq_len|model_max_length"
        r"|max_sequence_length|max_length)",
        at_most(512),
    ),
    (r".*window_size", lambda v: min(v, 4) if v <= 16 else 32),
    (r".*(sliding_window|attention_chunk_size|local_attention)", at_most(4)),
    (r".*image_size|input_size|pretrain_image_size|resolution|crop_size", at_most(IMAGE)),
    (r"patch_size", at_most(PATCH)),
    (r"(num_frames|frames_per_clip)", at_most(FRAMES)),
    (
        r".*(hidden_size|d_model|embed_dim|n_embd|hidden_dim|embedding_dim|embedding_size|emb_dim|projection_dim"
        r"|projection_size|output_dim|latent_dim|fusion_hidden_size|proj_size|query_dim|output_size|input_dim|dim"
        r"|embed_size|width|hidden_channels|channel_dim|lstm_width|in_channels_dim)",
        at_most(HIDDEN),
    ),
    (r".*(num_(object_)?quer(y_tokens|ies)|num_labels|num_latents)", at_most(8)),
)

TOKEN = re.compile(r".*(token_id|token_ids|token_index|_index|token_idx|_idx)|(bos|eos|pad|unk|mask)_index")


def shrink(kind: str) -> PreTrainedConfig:
    """The tiny configuration of a model type."""
    config_class = CONFIG_MAPPING[kind]
    return _Shrinker().config(config_class(**START.get(kind, {})))


class _Shrinker:
    """Shrinks one configuration; special tokens of the same name get the same small id everywhere in it."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        names = {field.name: field for field in fields(config)}
        values: dict[str, Any] = {}
        for name, field in names.items():
            value = vars(config).get(name)
            default = field.default if field.default is not MISSING else None
            if name == "per_layer_config":
                continue
            if isinstance(value, PreTrainedConfig):
                values[name] = self.config(value)
            elif name == "rope_parameters" and value:
                values[name] = self.rope(value)
            elif value is None or (default is None and field.default_factory is MISSING and name != "layer_types"):
                continue  # It was derived from others and will be again.
            else:
                depth = vars(config).get("num_hidden_layers")
                if isinstance(value, (list, tuple)) and depth and len(value) == depth:
                    value = value[:DEPTH]
                values[name] = self.value(name, value)
        values.update(self.more(config, values))
        return type(config)(**values)

    def more(self, config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
        """What depends on more than one field, and the exceptions by model type."""
        out: dict[str, Any] = {}
        layer_types = values.get("layer_types")
        if isinstance(layer_types, (list, tuple)):
            kinds = list(dict.fromkeys(config.layer_types))
            out["layer_types"] = (kinds * 2)[: max(DEPTH, len(kinds))]
            out["num_hidden_layers"] = len(out["layer_types"])
        if values.get("kv_lora_rank") and "num_key_value_heads" in values:
            out["num_key_value_heads"] = HEADS  # Latent attention has as many of them as heads.
        out.update(FIELDS.get(config.model_type, {}))
        return out

    def rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Rotary sections add up to half of the rotated features."""
        out = {name: self.rope(value) if isinstance(value, dict) else value for name, value in parameters.items()}
        if isinstance(sections := out.get("mrope_section"), (list, tuple)):
            half = int(HEAD_DIM * out.get("partial_rotary_factor", 1.0)) // 2
            rest = [half * section // sum(sections) for section in sections[1:]]
            out["mrope_section"] = [half - sum(rest), *rest]
        for name in ("long_factor", "short_factor"):
            if out.get(name):
                out[name] = out[name][: HEAD_DIM // 2]
        return out

    def value(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, list, tuple, dict)):
            return value
        if isinstance(value, dict):
            return value
        if TOKEN.fullmatch(name):
            if isinstance(value, int):
                return self.token(name, value)
            return [self.token(f"{name} {i}", item) for i, item in enumerate(value)]
        if isinstance(value, int):
            return next((cut(value) for pattern, cut in RULES if re.fullmatch(pattern, name)), value)
        return self.list(name, value)

    def token(self, name: str, value: int) -> int:
        if value < 3:
            return value
        return self.tokens.setdefault(name, 5 + len(self.tokens) % (LAST_SPECIAL - 5))

    def list(self, name: str, value: Any) -> Any:
        if not value or not all(isinstance(item, int) for item in value):
            return value
        if re.fullmatch(r"depths?|num_blocks|layers|encoder_layers|num_layers", name):
            return [min(item, 2) for item in value]
        if re.fullmatch(r".*image_size|resolution", name):
            return [IMAGE] * len(value)
        if re.fullmatch(r".*heads", name):
            return [item // min(value) for item in value]
        if re.fullmatch(r".*(hidden_sizes|channels|embed_dims?|dims?|sizes)", name) and min(value) >= 32:
            factor = 16 / min(value)
            return [int(item * factor) for item in value]
        return value
