"""The suites `draw` and `loss`: drawing masks alone, and the losses of a language model alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import StructuredDropout, consistency_loss
from ...consistency import CONSISTENCIES
from ...hf.token_loss import Head, Share, TokenLoss
from ...patterns import random_keep
from .config import BenchConfig
from .measure import Work, interleave
from .memory import peak_memory
from .record import Case, Row

RATE = 0.1
ROUNDS = 51
DROPOUT = "F.dropout"
DENSE = "dense task loss"

Apply = Callable[[Tensor], Tensor]


def draw_cases(config: BenchConfig, device: torch.device) -> list[Case]:
    """Draws on a stream of (B, T, D), forward and with backward."""
    shape = (2, 16, 8) if config.quick else (32, 128, 384)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, getattr(torch, config.dtype))
    cells = x.numel()
    modules = {
        f"hidden:{name}": StructuredDropout(f"hidden:{name}@{RATE}").train() for name in ("element", "column", "span")
    }
    ways: dict[str, tuple[str, Apply]] = {
        DROPOUT: ("torch's dropout, draw and multiply", lambda x: F.dropout(x, RATE)),
        "uniform draw": (
            "torch.rand against the rate, mask and scale",
            lambda x: x * (torch.rand_like(x) >= RATE) / (1 - RATE),
        ),
        **{name: (f"ours: {name}@{RATE}, draw and multiply", module) for name, module in modules.items()},
    }
    alone: dict[str, tuple[str, Apply]] = {
        "element, draw alone": (
            "ours: the boolean mask alone",
            lambda x: random_keep(tuple(x.shape), RATE, x.device),
        ),
    }
    forward = {name: (what, _called(way, x)) for name, (what, way) in {**ways, **alone}.items()}
    through = x.clone().requires_grad_()
    both = {name: (what, _through(way, through)) for name, (what, way) in ways.items()}
    about = {"shape": list(shape), "cells": cells, "dtype": config.dtype}
    pairs = (("forward", forward), ("forward and backward", both))
    return [_case(name, about, DROPOUT, works, config, device) for name, works in pairs]


def loss_cases(config: BenchConfig, device: torch.device) -> list[Case]:
    """Losses from last hidden states and a frozen head, over sizes of the vocabulary."""
    vocabularies = (64, 256) if config.quick else (8_192, 49_152, 151_936)
    tokens, width = (16, 8) if config.quick else (1020, 576)
    return [loss_case(tokens, width, size, config, device) for size in vocabularies]


def loss_case(tokens: int, width: int, vocabulary: int, config: BenchConfig, device: torch.device) -> Case:
    """Task loss and consistency, with the gradient with respect to the hidden states, of one vocabulary."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(tokens, width, generator=generator).to(device).requires_grad_() for _ in range(2))
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    head = Head(weight, None)

    def dense(consistency: str, both: bool) -> Tensor:
        z1, z2 = F.linear(first, weight), F.linear(second if both else second.detach(), weight)
        return _task(z1, z2, labels, both) + consistency_loss(consistency, z1, z2)

    def chunked(consistency: str) -> Tensor:
        share = Share(1.0, 1.0, tokens)
        states = first, second if CONSISTENCIES[consistency].both else second.detach()
        return TokenLoss.apply(*states, labels, head, CONSISTENCIES[consistency], share)[0]

    ways: dict[str, tuple[str, Callable[[], Tensor]]] = {
        DENSE: ("head and cross entropy of one view", lambda: F.cross_entropy(F.linear(first, weight), labels)),
        "dense kl": ("two views, whole logits, gradient in one", lambda: dense("kl", False)),
        "chunked kl": ("ours: the same in chunks of tokens", lambda: chunked("kl")),
        "dense kl-rdrop": ("two views, whole logits, gradient in both", lambda: dense("kl-rdrop", True)),
        "chunked kl-rdrop": ("ours: the same in chunks of tokens", lambda: chunked("kl-rdrop")),
    }
    works = {name: (what, _gradient(way, (first, second))) for name, (what, way) in ways.items()}
    about = {"tokens": tokens, "width": width, "vocabulary": vocabulary, "dtype": "float32"}
    return _case(f"vocabulary {vocabulary:,}", about, DENSE, works, config, device, usual=7)


def _task(z1: Tensor, z2: Tensor, labels: Tensor, both: bool) -> Tensor:
    task = F.cross_entropy(z1, labels)
    return (task + F.cross_entropy(z2, labels)) / 2 if both else task


def _case(
    name: str,
    about: dict[str, object],
    reference: str,
    works: dict[str, tuple[str, Work]],
    config: BenchConfig,
    device: torch.device,
    usual: int = ROUNDS,
) -> Case:
    calls = {key: work for key, (_, work) in works.items()}
    times = interleave(calls, config.rounds_of(usual), config.seconds)
    peaks = peak_memory(calls, device)
    rows = [Row(key, what, times[key], peaks[key]) for key, (what, _) in works.items()]
    return Case(name, about, reference, rows)


def _called(way: Apply, x: Tensor) -> Work:
    return lambda: way(x)


def _through(way: Apply, x: Tensor) -> Work:
    ones = torch.ones_like(x)
    return lambda: torch.autograd.grad(way(x), x, ones)


def _gradient(way: Callable[[], Tensor], states: tuple[Tensor, Tensor]) -> Work:
    return lambda: torch.autograd.grad(way(), states, allow_unused=True)
