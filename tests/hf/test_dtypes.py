"""float32, bfloat16, float16 and autocast: no NaN, padded rows included, no leak through a narrow number range."""

import pytest
import torch

import hiddenkey
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.hf.chunked_loss import Share, _sweep_kl

from .tiny import BATCH, ENCODERS, FAMILIES, LENGTH, VOCABULARY, batch, make
from .tools import ALL, attached, inputs_for, logits_of, lora

HARSH = "logits[:]:column@0.8 + weights[:]:element@0.8 + hidden[:]:element@0.3"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def implementations(family):
    return {"mpnet": ("eager",), "gemma2": ("eager",)}.get(family, ("sdpa", "eager"))


CASES = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]


def check_step(model, inputs):
    outputs = model(**inputs)
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    found = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert found
    for name, gradient in found:
        assert gradient.isfinite().all(), name
    assert sum(gradient.abs().sum() for _, gradient in found) > 0


@pytest.mark.parametrize("padding", ("right", "left"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_a_step_has_finite_loss_and_gradients(family, implementation, dtype, padding):
    torch.manual_seed(1)
    model = attached(family, HARSH, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if dtype == torch.float16 else 1)
    check_step(model.to(dtype), cast(batch(family, padding=padding), dtype))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", ("bert", "mpnet", "gpt2", "llama", "gemma2", "t5", "vit"))
def test_a_step_under_autocast(family, dtype):
    torch.manual_seed(1)
    model = lora(make(family))
    hiddenkey.attach(model, ALL)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(**batch(family))
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "implementation"), [case for case in CASES if case[0] != "vit"])
def test_nothing_leaks_in_any_dtype(family, implementation, dtype):
    """A row whose visible keys are all drawn away must not turn to hidden keys, whatever number hides them."""
    model = attached(family, "logits[:]:column@0.9", attn_implementation=implementation).to(dtype)
    inputs = inputs_for(family, "right")
    name = "decoder_inputs_embeds" if family == "t5" else "inputs_embeds"
    ids = inputs.pop("decoder_input_ids" if family == "t5" else "input_ids")
    real = inputs["attention_mask"].bool()
    # An encoder may not look at padding, a decoder not at later tokens.
    hidden = ~real if family in ENCODERS else torch.arange(LENGTH) >= torch.full((BATCH, 1), 3)
    embedded = model.get_input_embeddings()(ids).detach()

    def seeded(embedded):
        torch.manual_seed(2)
        logits = model(**{**inputs, name: embedded}).logits.float()
        return logits if family in ENCODERS else logits[:, :3]

    before, after = seeded(embedded), seeded(embedded + hidden[..., None].to(dtype))
    assert before.isfinite().all()
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_the_dtype_of_the_output_is_the_models(family):
    for dtype in DTYPES:
        model = attached(family, ALL).to(dtype)
        assert logits_of(model, inputs_for(family, "right")).dtype == dtype


def test_the_loss_in_chunks_is_no_less_exact_under_autocast():
    """The head's product is of half precision there; what is summed over the vocabulary is not."""
    torch.manual_seed(0)
    first, second = (torch.randn(20, VOCABULARY) for _ in range(2))
    labels, share = torch.randint(VOCABULARY, (20,)), Share(1.0, 0.01, 1)
    found = []
    for enabled in (False, True):
        z1, z2 = first.clone(), second.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            sums = _sweep_kl(z1, z2, labels, CONSISTENCIES["kl"], share)
        found.append((*sums, z1))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
