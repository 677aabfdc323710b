"""Quantised bases that run on a CPU, each by the library that packs its weights; skipped where that is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from .tiny import DEPTH, VOCABULARY


def llama() -> Any:
    """A LLaMA of widths that quantisers take in groups of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def torchao(folder: Any) -> Any:
    """int8 weights, the head's too: linear layers as ever, whose weights are tensors of another class."""
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda module, name: type(module) is nn.Linear)
    return model


def hqq(folder: Any) -> Any:
    """4 bits, in a class of its own without a weight."""
    quantize = pytest.importorskip("hqq.core.quantize")
    model, config = llama(), quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            packed = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), leaf, packed)
    return model


def bitsandbytes(bits: int) -> Callable[[Any], Any]:
    def load(folder: Any) -> Any:
        pytest.importorskip("bitsandbytes")
        llama().save_pretrained(folder)
        options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    return load


def quanto(folder: Any) -> Any:
    """int8 weights in a subclass of nn.Linear."""
    library = pytest.importorskip("optimum.quanto")
    model = llama()
    library.quantize(model, weights=library.qint8, exclude="lm_head")
    library.freeze(model)
    return model


BASES: dict[str, Callable[[Any], Any]] = {
    "torchao int8": torchao,
    "HQQ 4 bit": hqq,
    "bitsandbytes 8 bit": bitsandbytes(8),
    "bitsandbytes 4 bit": bitsandbytes(4),
    "quanto int8": quanto,
}
