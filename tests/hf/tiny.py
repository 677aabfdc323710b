"""Tiny models of every family, with random weights that are large enough for differences to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY, LENGTH, BATCH, CLASSES, DEPTH = 64, 12, 3, 3, 4


def encoder(name: str, **extra: Any) -> Callable[..., Any]:
    """A sequence classifier of a BERT-like family."""

    def build(**options: Any) -> Any:
        config = getattr(hf, f"{name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=options.pop("depth", DEPTH),
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=options.pop("num_labels", CLASSES),
            **{**extra, **options},
        )
        return getattr(hf, f"{name}ForSequenceClassification")(config)

    return build


def decoder(name: str, **extra: Any) -> Callable[..., Any]:
    """A causal language model of a LLaMA-like family with grouped-query attention."""

    def build(head: str = "ForCausalLM", **options: Any) -> Any:
        config = getattr(hf, f"{name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=options.pop("depth", DEPTH),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
            **{**extra, **options},
        )
        return getattr(hf, f"{name.removesuffix('Text')}{head}")(config)

    return build


def distilbert(depth: int = DEPTH, **options: Any) -> Any:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=depth, n_heads=4, hidden_dim=48, num_labels=CLASSES, **options
        )
    )


def gpt2(depth: int = DEPTH, **options: Any) -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=depth,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
    )


def opt(depth: int = DEPTH, **options: Any) -> Any:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=depth,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            pad_token_id=0,
            **options,
        )
    )


def t5(depth: int = DEPTH, **options: Any) -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=depth,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            **options,
        )
    )


def vit(depth: int = DEPTH, **options: Any) -> Any:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=CLASSES,
            **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **options},
        )
    )


WINDOW = {"sliding_window": 4}
FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta", pad_token_id=0),
    "mpnet": encoder("MPNet", pad_token_id=0),
    "distilbert": distilbert,
    "gpt2": gpt2,
    "opt": opt,
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", **WINDOW),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3"),
    "gemma2": decoder("Gemma2", **WINDOW),
    "gemma3": decoder("Gemma3Text", **WINDOW),
    "t5": t5,
    "vit": vit,
}
ENCODERS = ("bert", "roberta", "mpnet", "distilbert", "vit")
DECODERS = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def make(family: str, **options: Any) -> Any:
    """The same model at every call, in training mode, in float32; weights scaled up so that every part matters."""
    torch.manual_seed(0)
    model = FAMILIES[family](**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, 0.3)
    return model.train()


def batch(family: str, *, padding: str = "right", labels: bool = True) -> dict[str, torch.Tensor]:
    """A batch with rows of length 12, 9 and 5; padding on the right, the left, or none."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        images = {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}
        return {**images, "labels": torch.tensor([0, 2, 1])} if labels else images
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((LENGTH, 9, 5)):
        if padding == "right":
            mask[row, length:] = 0
        elif padding == "left":
            mask[row, : LENGTH - length] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if not labels:
        return inputs if family != "t5" else {**inputs, "decoder_input_ids": ids}
    if family in ENCODERS:
        return {**inputs, "labels": torch.tensor([0, 2, 1])}
    return {**inputs, "labels": ids.masked_fill(mask == 0, -100)}
