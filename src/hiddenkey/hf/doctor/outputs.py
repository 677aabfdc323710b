"""What can be seen in outputs: evaluation has nothing of drops, and no output looks ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..preserve import inference
from .findings import Finding
from .made_up_batches import positions
from .model_under_test import (
    REFUSALS,
    SEED,
    Batch,
    ModelUnderTest,
    main_output,
    only_our_drops,
    outputs_of,
    seed_all,
    tensors_in,
)

TOKENS = 6
# Kernels may add up in another order when a later token differs, so equal means equal to so many digits.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUGH = 3e-2


def close(dtype: torch.dtype) -> float:
    """The relative difference below which two tensors of a dtype are the same."""
    return CLOSE.get(dtype, ROUGH)


def difference(first: Tensor, second: Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm."""
    dtype = torch.promote_types(second.dtype, torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    return float((first - second).norm() / second.norm().clamp(min=1e-30))


def check_evaluation(tested: ModelUnderTest) -> Iterator[Finding]:
    """In evaluation mode the attached model gives, bit for bit, what the plain one gives; `generate` too."""
    ours, plain = (tested.evaluate(model, tested.batch) for model in (tested.attachment.model, tested.twin))
    same = torch.equal(ours, plain)
    reason = "outputs are bit for bit those of the plain model"
    if not same:
        reason = f"outputs differ from the plain model's by {difference(ours, plain):.3g} of their norm"
    yield Finding("evaluation", "ok" if same else "wrong", reason)
    yield _check_generate(tested)


def _check_generate(tested: ModelUnderTest) -> Finding:
    transformer = tested.transformer
    generates = transformer.can_generate() and hasattr(tested.attachment.model, "generate")
    if not generates or transformer.main_input_name != "input_ids":
        return Finding("generate", "skipped", "this model generates no text")
    limit = positions(transformer)
    room = None if limit is None else max(limit - TOKENS - 2, 1)  # some begin to count at 2
    names = (name for name in ("input_ids", "attention_mask") if name in tested.batch)
    prompt = {name: tested.batch[name][:1, :room] for name in names}
    try:
        wanted = _generated(tested.twin, prompt)
    except REFUSALS as error:
        return Finding("generate", "skipped", f"the plain model generates nothing from a prompt alone: {error}")
    same = torch.equal(_generated(tested.attachment.model, prompt), wanted)
    reason = f"{TOKENS} tokens are those of the plain model" if same else "tokens differ from the plain model's"
    return Finding("generate", "ok" if same else "wrong", reason)


def _generated(model: Any, prompt: Mapping[str, Tensor]) -> Tensor:
    """Token ids (1, T). Their number is forced, or an early end mark would compare nothing."""
    seed_all(SEED)
    with inference(model):
        return model.generate(**prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)


def check_causality(tested: ModelUnderTest) -> Iterator[Finding]:
    """With the same draws, another later token leaves the earlier outputs as they are."""
    stack = tested.attachment.plan.structure.last
    if stack is None or not stack.causal:
        yield Finding("causality", "skipped", "the model is not causal")
        return
    changed = _later_tokens_changed(tested)
    if changed is None:
        yield Finding("causality", "skipped", "the batch has no text of which a later token could be changed")
        return
    batch, place = changed
    before, after = (_last_states(tested, tested.model, inputs) for inputs in (tested.batch, batch))
    apart = difference(after[:, :place], before[:, :place])
    moved = difference(after[:, place:], before[:, place:])
    values = {"before": apart, "after": moved}
    reason = f"other tokens from place {place} on change the states there by {moved:.3g}, before it by {apart:.3g}"
    if apart <= close(before.dtype):
        yield Finding("causality", "ok", reason, values=values)
        return
    plain, plainly = (_last_states(tested, tested.twin, inputs)[:, :place] for inputs in (tested.batch, batch))
    if difference(plainly, plain) > close(plain.dtype):
        reason = "the plain model, or its adapter, looks ahead by itself"
        yield Finding("causality", "skipped", reason, values=values)
    else:
        yield Finding("causality", "wrong", reason, values=values)


def _later_tokens_changed(tested: ModelUnderTest) -> tuple[dict[str, Any], int] | None:
    """The batch with other tokens in the last third of the decoder's text, taken from the text itself."""
    batch = dict(tested.batch)
    pair = tested.transformer.config.is_encoder_decoder
    name = next((n for n in (("decoder_input_ids", "labels") if pair else ("input_ids",)) if n in batch), None)
    if name is None or "pixel_values" in batch or batch[name].dim() != 2:
        return None
    ids = batch[name]
    # The labels of an encoder-decoder model enter its decoder one place later.
    place = ids.shape[1] - max(ids.shape[1] // 3, 1)
    later = torch.roll(ids[:, place:], 1, dims=1)
    if torch.equal(later, ids[:, place:]):
        return None
    return batch | {name: torch.cat([ids[:, :place], later], 1)}, place


def _last_states(tested: ModelUnderTest, model: nn.Module, batch: Batch) -> Tensor:
    """What the last layer puts out, or where that is no tensor, what the model does."""
    inner = tested.attachment.model if model is tested.model else model
    with torch.no_grad(), only_our_drops(inner), outputs_of(inner, tested.layers[-1:]) as seen:
        output = main_output(tested.run(model, batch))
    return [output, *tensors_in(seen)][-1]
