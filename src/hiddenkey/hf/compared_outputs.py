"""The two views of a batch, and what a consistency compares in them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..consistency import Consistency, consistency_loss
from ..errors import UserError
from .attachment import Attachment, step_state
from .capture import Capture
from .outer_forward import arguments, is_own, named_outputs, outermost, without_labels
from .peft_layers import virtual_tokens
from .preserve import evaluation, inference
from .source_reading import parameters, shifts_labels
from .structure import find_transformer

Batch = Mapping[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Compared:
    """What is compared: logits (…, V) of one view, which rows count (bool (…), None: all), and labels per row."""

    logits: Tensor
    valid: Tensor | None
    labels_per_row: int = 1


@dataclass(frozen=True)
class ComparedTokens:
    """Which tokens are compared: labels (B, T), -100 where not. by_sequence: the mean over sequences of the mean over
    the tokens of each; else the sum over tokens by the denominator of the task loss.
    """

    labels: Tensor
    by_sequence: bool

    def groups(self, num_items: Tensor | int | None) -> list[tuple[Tensor, Tensor | int]]:
        """Tokens that predict a label, bool (B, T - 1), with the denominator of their sum."""
        valid = self.labels[:, 1:] != IGNORED
        if not self.by_sequence:
            return [(valid, valid.sum().clamp(min=1) if num_items is None else num_items)]
        rows = torch.eye(len(valid), dtype=torch.bool, device=valid.device)[:, :, None]
        return [(valid & row, (valid & row).sum().clamp(min=1) * len(valid)) for row in rows]


def compared_in(batch: Batch, trainer: str) -> ComparedTokens:
    """What is compared in a trainer's batch: the tokens with labels, or those of DPO's completions.

    Raises UserError where neither is there.
    """
    if batch.get("labels") is not None:
        return ComparedTokens(batch["labels"], by_sequence=False)
    if "completion_mask" in batch and "input_ids" in batch:
        return ComparedTokens(
            batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED), by_sequence=True
        )
    raise UserError(
        f"a consistency compares tokens that have labels, or DPO's completions in 'input_ids'; a batch of {trainer} "
        f"({', '.join(batch)}) has neither, as where a trainer generates its own completions; attach the recipe "
        "without its consistency"
    )


def last_layer(attachment: Attachment) -> list[nn.Module]:
    """The layer whose output the predictions are made from; none in a model without any stack."""
    stack = attachment.plan.structure.last
    return [attachment.model.get_submodule(stack.layers[-1].path)] if stack else []


def second_view(model: nn.Module, batch: Batch, consistency: Consistency, **options: Any) -> Any:
    """The outputs of the second view: the inference pass, or another draw, held constant unless both get gradient.

    options: further arguments of the model.
    """
    inputs = without_labels(model, uncached(model, batch)) | options
    transformer = find_transformer(model)[1]
    if not is_own(model) and _needs_decoder_inputs(transformer, inputs, batch.get("labels")):
        inputs["decoder_input_ids"] = decoder_inputs(transformer, batch["labels"])
    held = inference(model) if consistency.clean else nullcontext() if consistency.both else torch.no_grad()
    with held:
        return model(**copied(inputs))


def copied(batch: Batch) -> dict[str, Any]:
    """A batch that may be written into, as some models do: Whisper masks its features in place (SpecAugment), and the
    other view must neither see that nor lose what its backward pass needs.
    """
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


def uncached(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch, and `use_cache=False` for a model that takes it: with a cache, transformers does not look for packed
    documents in the positions, and the two views would see different ones.
    """
    return {**batch, "use_cache": False} if "use_cache" in arguments(model) else dict(batch)


def named(model: nn.Module, batch: Batch) -> Batch:
    """The batch, so that a transformers model's outputs have names, where it is set to give a tuple."""
    by_default = is_own(model) or getattr(find_transformer(model)[1].config, "return_dict", True)
    return batch if batch.get("return_dict", by_default) else {**batch, "return_dict": True}


def count_labels(model: nn.Module, labels: Tensor) -> Tensor:
    """How many labels count in the loss."""
    return ((labels[..., 1:] if shifts_labels(outermost(model)) else labels) != IGNORED).sum()


def compared(
    model: nn.Module,
    outputs: Any,
    last: Tensor | None,
    batch: Batch,
    attachment: Attachment,
    consistency: Consistency,
) -> Compared:
    """What `consistency` compares in the outputs of one view (arXiv 2403.00812, section 3.2).

    Classification: the classifier's logits. Regression: the pooled token's last-layer vector, or the prediction
    itself for a scalar consistency. Generation: the logits at label positions.
    """
    outputs = named_outputs(outputs)
    logits = outputs.get("logits")
    if logits is None or not isinstance(batch["labels"], Tensor):
        raise UserError(
            f"the consistency {consistency.name!r} compares logits at labels, but this model's outputs are "
            f"{', '.join(outputs)} and its labels a {type(batch['labels']).__name__}; leave the consistency out"
        )
    labels = labels_of(batch, logits.shape[1], model) if logits.dim() == 3 else batch["labels"]
    tokens = logits.dim() == 3 and labels.dim() == 2 and logits.shape[:2] == labels.shape
    if tokens and not consistency.scalar:
        return _tokens(logits, labels, batch.get("shift_labels"), model)
    problem = getattr(find_transformer(attachment.model)[1].config, "problem_type", None)
    regression = labels.is_floating_point() and problem != "multi_label_classification"
    if regression and logits.shape == labels.shape and logits.dim() == 1:  # a head of the user's, squeezed
        logits = logits[:, None]
    if consistency.scalar:
        if not regression:
            raise UserError(
                f"the consistency {consistency.name!r} compares predictions of a regression, but this model has "
                f"{logits.shape[-1]} outputs for labels of {labels.dtype}; use 'kl'"
            )
        return Compared(logits, None, labels_per_row=labels.numel() // max(len(labels), 1))
    if regression and logits.shape[-1] == 1:
        if last is None:
            raise UserError(
                f"the consistency {consistency.name!r} compares the last layer's vectors in a regression, but this "
                "model has no layers; use 'mse'"
            )
        return Compared(pooled(last, batch, attachment), None)
    if regression:
        raise UserError(
            f"{logits.shape[-1]} outputs for labels of {labels.dtype} are several predictions, not one distribution, "
            f"so {consistency.name!r} is not defined for them; use 'mse'"
        )
    if labels.is_floating_point():
        several = "several " if logits.shape[-1] > 1 else ""
        raise UserError(
            f"labels of {labels.dtype} for {logits.shape[-1]} outputs are {several}yes/no answers, not one "
            f"distribution, so {consistency.name!r} is not defined for them; leave the consistency out"
        )
    if logits.shape[-1] == 1:
        raise UserError(
            f"one output for labels of {labels.dtype} is no distribution; a regression has labels of float32"
        )
    if logits.shape[:-1].numel() != labels.numel():
        raise UserError(
            f"the consistency {consistency.name!r} compares one distribution, the logits' last axis, per label, but "
            f"here are logits of shape {tuple(logits.shape)} and labels of {tuple(labels.shape)}; leave the "
            "consistency out, or compute it in a loop of your own with hiddenkey.consistency_loss"
        )
    return Compared(logits, labels.view(logits.shape[:-1]) != IGNORED)


def labels_of(batch: Batch, length: int, model: nn.Module) -> Tensor:
    """The batch's labels, (B, length) where an adapter puts virtual tokens first: these do not count."""
    labels: Tensor = batch["labels"]
    virtual = virtual_tokens(model)
    if labels.dim() == 2 and virtual and labels.shape[1] + virtual == length:
        return F.pad(labels, (virtual, 0), value=IGNORED)
    return labels


def _tokens(logits: Tensor, labels: Tensor, shifted: Tensor | None, model: nn.Module) -> Compared:
    if shifted is not None and shifted.shape == labels.shape:  # transformers' loss takes these in their place
        return Compared(logits, shifted != IGNORED)
    if shifts_labels(outermost(model)):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return Compared(logits, labels != IGNORED)


def tie(consistency: Consistency, first: Compared, second: Compared, num_items: Tensor | int | None) -> Tensor:
    """The consistency of the two views, with the denominator of the task loss.

    num_items: labels in the whole accumulated batch, as transformers counts them; None: the mean over the rows of
    this batch.
    """
    if num_items is None:
        return consistency_loss(consistency.name, first.logits, second.logits, valid=first.valid)
    total = consistency_loss(consistency.name, first.logits, second.logits, valid=first.valid, reduction="sum")
    return total * first.labels_per_row / num_items


def token_consistency(
    first: Tensor, second: Tensor, tokens: ComparedTokens, num_items: Tensor | int | None, consistency: Consistency
) -> Tensor:
    """The consistency of two views' logits (B, T, V) at the tokens that are compared."""
    first, second, term = first[:, :-1], second[:, :-1], first.new_zeros(())
    for valid, count in tokens.groups(num_items):
        rows, divisor = valid.to(first.device), count.to(first.device) if isinstance(count, Tensor) else count
        term = term + consistency_loss(consistency.name, first, second, valid=rows, reduction="sum") / divisor
    return term


def _needs_decoder_inputs(transformer: Any, inputs: Batch, labels: Tensor | None) -> bool:
    """Whether the decoder reads the labels, which are tokens, and the second view goes without them."""
    if labels is None or labels.dim() != 2 or labels.is_floating_point() or not transformer.config.is_encoder_decoder:
        return False
    takes_them = "decoder_input_ids" in parameters(transformer)
    writes = transformer.get_output_embeddings() is not None  # else the labels are classes
    return takes_them and writes and {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(inputs)


def decoder_inputs(transformer: Any, labels: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder model reads for these labels: (B, T), one place later than they are."""
    prepare = getattr(transformer, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config = transformer.config
    later = F.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return later.masked_fill(later == IGNORED, config.pad_token_id)


def pooled(last: Tensor, batch: Mapping[str, Any], attachment: Attachment) -> Tensor:
    """(B, D) of the last layer's (B, T, D): the first token of an encoder, the last real token of a decoder.

    Raises UserError for a model that predicts from others, which is looked at once, but again for a batch with
    padding at its end behind a prompt, where transformers takes the last place.
    """
    places = _places(last, batch, attachment)
    prompted = _decodes(attachment) and virtual_tokens(attachment.model) > 0
    state = step_state(attachment)
    if not state.pooling_seen or (prompted and bool((places < last.shape[1] - 1).any())):
        _refuse_other_pooling(batch, attachment)
        state.pooling_seen = True
    return last[torch.arange(len(last), device=last.device), places]


def _places(last: Tensor, batch: Mapping[str, Any], attachment: Attachment) -> Tensor:
    """(B): where the token is, virtual tokens before it or not."""
    if not _decodes(attachment):
        return torch.zeros(len(last), dtype=torch.long, device=last.device)
    real = _real(batch, find_transformer(attachment.model)[1])
    if real is None:
        return torch.full((len(last),), last.shape[1] - 1, device=last.device)
    return (torch.arange(real.shape[1], device=real.device) * real).argmax(-1) + last.shape[1] - real.shape[1]


def _decodes(attachment: Attachment) -> bool:
    stack = attachment.plan.structure.last
    return stack is not None and stack.latter_half


def _real(batch: Mapping[str, Any], transformer: Any) -> Tensor | None:
    """(B, T): which tokens are no padding, as transformers' classifiers see it: by their ids, whatever the mask; None
    where they take the last place.
    """
    pad, ids = transformer.config.get_text_config().pad_token_id, batch.get("input_ids")
    return None if pad is None or ids is None else ids != pad


def _refuse_other_pooling(batch: Mapping[str, Any], attachment: Attachment) -> None:
    last, read = _tokens_read(batch, attachment)
    others = torch.ones_like(read)
    if last.dim() == 3 and len(last) == len(batch["labels"]):
        others[torch.arange(len(last), device=last.device), _places(last, batch, attachment)] = False
    if not (read & others).any() and read.any():
        return
    token = "last real token" if _decodes(attachment) else "first token"
    name = type(find_transformer(attachment.model)[1]).__name__
    raise UserError(
        f"the consistency {attachment.recipe.consistency!r} of a regression compares the last layer's vector of the "
        f"{token}, but {name} does not predict from that alone (rather from a mean over tokens, from <eos>, from "
        "several layers, or behind a prompt from the last place, which needs padding on the left); use 'mse', which "
        "compares the predictions"
    )


def _tokens_read(batch: Mapping[str, Any], attachment: Attachment) -> tuple[Tensor, Tensor]:
    """The last layer's output, and which of its tokens the predictions have gradient at, in a pass without drops.

    Without the compiler: in one of its graphs the one has no gradient at the other.
    """
    model = attachment.model
    with (
        Capture(*last_layer(attachment), cut=True) as last,
        attachment.watch.aside(),
        evaluation(model),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        predictions = named_outputs(model(**without_labels(model, batch)))["logits"]
    (gradient,) = torch.autograd.grad(predictions.sum(), last.states, materialize_grads=True)
    return last.states, gradient.ne(0).any(-1)
