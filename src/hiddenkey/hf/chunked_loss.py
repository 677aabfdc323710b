"""Task loss and consistency of a language model in chunks of tokens, from hidden states and the frozen head.

A vocabulary is large: two views of dense logits and their gradients take more memory than the rest of a step and
fall out of every cache. Here a chunk of tokens goes through the head at once, and a few of its tokens at a time
through the losses and the gradient, which takes the place of the logits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..consistency import Consistency, bidirectional
from .attachment import Attachment
from .compared_outputs import Batch, ComparedTokens
from .outer_forward import is_own
from .peft_layers import adds_to_loss
from .source_reading import parameters, takes_the_stock_loss
from .structure import LANGUAGE_MODELS, find_transformer, reads_lower_keys

# Logits of a chunk, enough for the head's matrix product, and of a few tokens of it, which stay in the cache.
CHUNK_LOGITS = 224 * 49152
CACHED_LOGITS = 16 * 49152
TOKENS = range(16, 225)


Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """A frozen linear head: weight (V, D), bias (V) or None."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) in float32 or float64."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to the hidden states (N, D) from that of the logits (N, V)."""
        return gradient.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True)
class Share:
    """total = (task · Σ nll + consistency · Σ divergence) / count."""

    task: float
    consistency: float
    count: int | Tensor


class TokenLoss(torch.autograd.Function):
    """(first, second) hidden states (N, D), labels (N) -> total, task sum, consistency sum.

    Only the total (see `Share`) carries gradient, which is computed in the forward sweep. For a consistency with
    gradient on both sides the task is the mean of both views.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, labels: Tensor, head: Head, consistency: Consistency, share: Share
    ) -> tuple[Tensor, Tensor, Tensor]:
        # 1,000 tokens and 49,152 words: 224 at a time through the head (44 MB of logits in float32), of these 16 at a
        # time through the losses (3 MB), which leave the gradient where the logits were; whole they would take 200 MB
        # for each view.
        sweep = _sweep_both if consistency.both else _sweep_kl if consistency.divergence is bidirectional else _sweep
        grad_first = torch.empty_like(first)
        grad_second = torch.empty_like(second) if consistency.both else None
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        sums = torch.zeros(2, dtype=dtype, device=first.device)
        size, few = chunk_size(len(head.weight)), few_tokens(len(head.weight), first.device)
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            z1, z2 = head.logits(first[rows]), head.logits(second[rows])
            for parts in zip(z1.split(few), z2.split(few), labels[rows].split(few), strict=True):
                sums += torch.stack(sweep(*parts, consistency, share))
            grad_first[rows] = head.backward(z1)
            if grad_second is not None:
                grad_second[rows] = head.backward(z2)
            del z1, z2, parts  # before the next chunk's are made
        ctx.save_for_backward(grad_first, grad_second)
        ctx.count = share.count
        total = (share.task * sums[0] + share.consistency * sums[1]) / share.count
        task, term = sums.unbind()
        ctx.mark_non_differentiable(task, term)
        return total, task, term

    @staticmethod
    def backward(ctx: Any, total: Tensor, task: Tensor, term: Tensor) -> tuple[Tensor | None, ...]:
        # Shared out only here, after a scaler multiplied the loss: float16 has no number as small as p / count.
        first, second = (scaled(gradient, total / ctx.count) for gradient in ctx.saved_tensors)
        return first, second, *[None] * 4


def scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """Times a factor that the gradient's own type may not hold."""
    if gradient is None:
        return None
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor).to(gradient.dtype)


def chunk_size(vocabulary: int) -> int:
    """How many tokens go through the head at a time."""
    return min(max(CHUNK_LOGITS // vocabulary, TOKENS[0]), TOKENS[-1])


def few_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens of a chunk go through the losses at a time: all of them where calls cost more than memory."""
    return max(CACHED_LOGITS // vocabulary, 1) if device.type == "cpu" else TOKENS[-1]


def _sweep(z1: Tensor, z2: Tensor, labels: Tensor, consistency: Consistency, share: Share) -> Sums:
    """(task sum, consistency sum), by autograd; z1 becomes the gradient of total · count with respect to it."""
    with torch.enable_grad():
        x1 = z1.detach().requires_grad_()
        task = F.cross_entropy(x1, labels, reduction="sum")
        term = consistency.by_row(x1, z2).sum()
        (gradient,) = torch.autograd.grad(share.task * task + share.consistency * term, x1)
    z1.copy_(gradient)
    return task.detach(), term.detach()


def _sweep_both(z1: Tensor, z2: Tensor, labels: Tensor, consistency: Consistency, share: Share) -> Sums:
    """The same with gradient on both sides, also in the place of z2, and the task loss averaged over them."""
    with torch.enable_grad():
        x1, x2 = z1.detach().requires_grad_(), z2.detach().requires_grad_()
        task = (F.cross_entropy(x1, labels, reduction="sum") + F.cross_entropy(x2, labels, reduction="sum")) / 2
        term = consistency.by_row(x1, x2).sum()
        gradients = torch.autograd.grad(share.task * task + share.consistency * term, (x1, x2))
    for logits, gradient in zip((z1, z2), gradients, strict=True):
        logits.copy_(gradient)
    return task.detach(), term.detach()


def _sweep_kl(z1: Tensor, z2: Tensor, labels: Tensor, consistency: Consistency, share: Share) -> Sums:
    """The same for the bidirectional KL (eq. 11), its gradient written out; z2 is used up.

    With d = log p - log q: KL(p‖q) = Σ p d, KL(q‖p) = -Σ q d. The gradient of half their sum with respect to z1 is
    ½ (p (d - KL(p‖q)) + p - q), that of the task p - onehot.
    """
    # One token, two words: z1 = (log 4, 0) and z2 = (0, 0) give p = (0.8, 0.2), q = (0.5, 0.5), d = (0.470, -0.916).
    # forth = 0.8 · 0.470 - 0.2 · 0.916 = 0.193, back = -0.5 · (0.470 - 0.916) = 0.223, their mean 0.208.
    # The gradient of that mean is ½ (0.8 · (0.470 - 0.193) + 0.8 - 0.5) = 0.261 and -0.261. Below it is all in z1's
    # memory, with the task's p added: half · (p (d + 1 - forth + task / half) - q), then -task at the label.
    labels = labels[:, None]
    (p, log_sum1), (q, log_sum2) = _softmax(z1), _softmax(z2)
    task = (log_sum1 - z1.gather(1, labels)).sum()
    d = z1.sub_(z2).sub_(log_sum1 - log_sum2)
    with torch.autocast(d.device.type, enabled=False):  # which takes a product of vectors for one of half precision
        forth, back = torch.linalg.vecdot(p, d), -torch.linalg.vecdot(q, d)
    half = share.consistency / 2
    gradient = d.add_(1 - forth[:, None] + share.task / half).mul_(p).sub_(q).mul_(half)
    gradient.scatter_add_(1, labels, p.new_full(labels.shape, -share.task))
    return task, (forth + back).sum() / 2


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax, log of the sum of exponentials) of every row, each exponential taken once."""
    highest = z.amax(-1, keepdim=True)
    weights = (z - highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total), highest + total.log()


# A cap on the model's logits, none inside of its layers.
SOFT_CAP = re.compile("^(?!attn|moe|gate|mlp).*soft_?cap")


def frozen_head(attachment: Attachment) -> Head | None:
    """The model's head where its logits are a frozen linear map of its last hidden states, or None.

    None too where the weight is quantised, or is elsewhere until the head is called; a sharded one is gathered.
    """
    transformer = find_transformer(attachment.model)[1]
    head = transformer.get_output_embeddings()
    fits = (
        type(transformer).__name__.endswith(LANGUAGE_MODELS)
        and "logits_to_keep" in parameters(transformer)
        and getattr(type(head), "forward", None) is nn.Linear.forward
        and _is_plain(head)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not any(site.path in attachment.plan.structure.heads for site in attachment.plan.sites)
        and not _cuts_tokens(transformer)
        and not _caps_logits(transformer)
        and not adds_to_loss(attachment.model)
    )
    return Head(whole(head.weight), whole(head.bias)) if fits else None


def is_next_token_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's loss of the batch is transformers' cross entropy of next tokens, with nothing added."""
    transformer = find_transformer(model)[1]
    routers = batch.get("output_router_logits")
    if routers is None:
        routers = getattr(transformer.config, "output_router_logits", False)
    return (
        takes_the_stock_loss(transformer)
        and not is_own(model)
        and batch.get("shift_labels") is None
        and not routers
        and not getattr(transformer, "z_loss_coefficient", 0)
    )


def _cuts_tokens(transformer: PreTrainedModel) -> bool:
    """Whether the decoder itself leaves tokens out for which no logits are asked, as Gemma 4's upper layers do."""
    takes_it = "logits_to_keep" in parameters(transformer.get_decoder())
    return takes_it and reads_lower_keys(transformer)


def _caps_logits(transformer: PreTrainedModel) -> bool:
    """Whether the configuration caps the logits (Gemma), which small logits do not show."""
    options = vars(transformer.config.get_text_config())
    return any(value for name, value in options.items() if SOFT_CAP.search(name))


def _is_plain(head: Any) -> bool:
    """Whether its weight is numbers in the usual layout, here or in parts on several processes; not quantised.

    DeepSpeed's ZeRO-3 has a weight here only while its module is called.
    """
    plain = type(head.weight) in (nn.Parameter, Tensor) or hasattr(head.weight, "full_tensor")
    layout = head.weight.shape == (head.out_features, head.in_features)
    come_and_go = hasattr(head.weight, "ds_id")
    return plain and layout and not come_and_go and not head.weight.is_meta and head.weight.is_floating_point()


def whole(parameter: Any) -> Any:
    """A frozen parameter as a plain tensor, gathered where processes hold a part each (FSDP2, tensor parallel)."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def agrees(head: Head, states: Tensor, logits: Tensor) -> bool:
    """Whether the model's logits of the last token are the head's: no scale, nothing else in between, one device.

    By the norm of each row, because under autocast every logit is rounded to a part of the largest ones.
    """
    if states.device != head.weight.device:
        return False
    ours = head.logits(states[:, -1].detach())
    apart = torch.linalg.vector_norm(ours - logits[:, -1].to(ours), dim=-1)
    return bool((apart <= 1e-2 * torch.linalg.vector_norm(ours, dim=-1)).all())


def token_losses(
    first: Tensor,
    second: Tensor,
    tokens: ComparedTokens,
    num_items: Tensor | int | None,
    head: Head,
    consistency: Consistency,
    *,
    task: float,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(task · nll + weight · divergence, nll, divergence) from the hidden states (B, T, D) of two views.

    Only the first carries gradient. task: 0 where somebody else computes the task loss.
    """
    tokens = replace(tokens, labels=tokens.labels.to(first.device))
    num_items = num_items.to(first.device) if isinstance(num_items, Tensor) else num_items
    first, second, labels = first[:, :-1], second[:, :-1], tokens.labels[:, 1:]
    parts = []
    for valid, count in tokens.groups(num_items):
        states, share = (first[valid], second[valid]), Share(task, weight, count)
        total, nll, divergence = TokenLoss.apply(*states, labels[valid], head, consistency, share)
        parts.append((total, nll / count, divergence / count))
    total, nll, divergence = (reduce(torch.add, part) for part in zip(*parts, strict=True))
    return total, nll, divergence
