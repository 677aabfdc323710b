"""Spans know the true lengths: padding, packing, T5's two stacks, flat streams, recomputation."""

import pytest
import torch
import transformers
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForSequenceClassification

import hiddenkey
from hiddenkey import PlanError
from hiddenkey.hf.document_bounds import documents as documents_of

from ..models.shrink import shrink
from .tiny import DECODERS, LENGTH, batch, make
from .tools import (
    DOCUMENTS,
    PACKABLE,
    TEXT,
    assert_same_gradients,
    attached,
    draws,
    gradients,
    inputs_for,
    logits_of,
    quiet,
    real_of,
)

RATE = 0.3
LAYOUTS = ("none", "right", "left", "packed")
# Causal language models and T5 have a head that takes a sequence; most classifiers take one vector.
SEQUENCE_HEADS = (*DECODERS, "t5")


def runs(layout):
    """Per example the (first place, length) of its documents."""
    lengths = (LENGTH, 9, 5)
    if layout == "none":
        return [[(0, LENGTH)]] * 3
    if layout == "packed":
        return [[(0, DOCUMENTS[0]), (DOCUMENTS[0], DOCUMENTS[1])]] * 3
    return [[(0 if layout == "right" else LENGTH - length, length)] for length in lengths]


def check_rows(keep, layout):
    """keep: (B, …, places): one run of round(p · length) in every document, none elsewhere."""
    flat = keep.reshape(3, -1, LENGTH)
    for example, documents in zip(flat, runs(layout), strict=True):
        for row in example:
            rest = row.clone()
            for first, length in documents:
                gone = (~row[first : first + length]).nonzero().flatten().tolist()
                assert len(gone) == int(length * RATE + 0.5)
                assert gone == list(range(gone[0], gone[0] + len(gone)))
                rest[first : first + length] = True
            assert rest.all()


def cases(families, layouts=LAYOUTS):
    return [(f, layout) for f in families for layout in layouts if layout != "packed" or f in PACKABLE]


@pytest.mark.parametrize("position", ("logits", "weights"))
@pytest.mark.parametrize(("family", "layout"), cases(TEXT))
def test_in_attention(family, layout, position, monkeypatch):
    model = attached(family, f"{position}[:]:span@{RATE}")
    torch.manual_seed(0)
    with draws(monkeypatch) as record:
        logits_of(model, inputs_for(family, layout))
    assert len(record) == (12 if family == "t5" else 4)
    for drawn in record:
        check_rows(drawn.keep.squeeze(-2), layout)


def test_packed_positions_without_a_mask():
    """Flash attention is given no mask for packed texts."""
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    layer = make("llama").model.layers[0].self_attn
    states = torch.zeros(2, 9, 32)
    shape, segments = documents_of(layer, (states,), {"position_ids": packed})
    assert shape == (2, 9)
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3, 3]] * 2
    assert documents_of(layer, (states,), {"position_ids": torch.arange(9)[None]})[1].unique().tolist() == [1]
    assert documents_of(layer, (states,), {"position_ids": torch.arange(4)[None]})[1] is None
    assert documents_of(layer, (states,), {})[1] is None


def test_a_mask_that_is_no_tensor_is_told():
    model = make("llama")
    model.set_attn_implementation("flex_attention")
    with hiddenkey.attach(model, "hidden[:]:span@0.3"), pytest.raises(hiddenkey.UserError, match="given a BlockMask"):
        model(**batch("llama"))


@pytest.mark.parametrize("position", ("input", "hidden"))
@pytest.mark.parametrize(("family", "layout"), cases(TEXT))
def test_in_streams(family, layout, position, monkeypatch):
    model = attached(family, f"{position}:span@{RATE}" if position == "input" else f"{position}[:]:span@{RATE}")
    torch.manual_seed(0)
    with draws(monkeypatch) as record:
        logits_of(model, inputs_for(family, layout))
    stacks = 2 if family == "t5" else 1
    assert len(record) == stacks * (1 if position == "input" else 4)
    for drawn in record:
        assert drawn.keep.shape == (3, LENGTH, 1)
        check_rows(drawn.keep.squeeze(-1), layout)


@pytest.mark.parametrize(("family", "layout"), cases(SEQUENCE_HEADS))
def test_before_the_head(family, layout, monkeypatch):
    model = attached(family, f"output:span@{RATE}")
    torch.manual_seed(0)
    with draws(monkeypatch) as record:
        logits_of(model, inputs_for(family, layout))
    (drawn,) = record
    check_rows(drawn.keep.squeeze(-1), layout)


@pytest.mark.parametrize("family", ("bert", "distilbert"))
def test_before_a_head_that_takes_one_vector(family):
    model = attached(family, "output:span@0.3")
    with pytest.raises(ValueError, match=r"output:span@0\.3.*needs a sequence of tokens.*element or column"):
        logits_of(model, inputs_for(family, "right"))


@pytest.mark.parametrize(
    ("kind", "name"),
    (("xlnet", "XLNetModel"), ("xlnet", "XLNetLMHeadModel"), ("fsmt", "FSMTForConditionalGeneration")),
)
def test_where_tokens_come_before_the_batch(kind, name):
    """There the second axis of a stream is the batch: a run of it would not be one of tokens."""
    model = getattr(transformers, name)._from_config(shrink(kind))
    for position in ("hidden[:]", "input", "output") if name != "XLNetModel" else ("hidden[:]",):
        with pytest.raises(PlanError, match=rf"{name}.*\(tokens, batch, features\).*element or column"):
            hiddenkey.plan(model, f"{position}:span@0.1")
        hiddenkey.plan(model, f"{position}:column@0.1")
    hiddenkey.plan(model, "logits[:]:span@0.1")


def drawn_by_unequal_stacks(recipe, monkeypatch):
    """T5 with 12 places in the encoder, some padded, and 6 in the decoder: its draws, the encoder's lengths."""
    model, inputs = attached("t5", recipe), inputs_for("t5", "right")
    ids = inputs.pop("decoder_input_ids")[:, :6]
    del inputs["decoder_attention_mask"]
    with draws(monkeypatch) as record:
        model(**inputs, decoder_input_ids=ids)
    return record, inputs["attention_mask"].sum(-1).tolist()


def test_the_own_stack_of_t5_counts(monkeypatch):
    """Every stream and every attention counts its own keys."""
    record, _ = drawn_by_unequal_stacks(f"hidden:span@{RATE} + logits:span@{RATE}", monkeypatch)
    places = [(drawn.drop.position, drawn.grid.places) for drawn in record]
    encoder, decoder = [("logits", 12), ("hidden", 12)], [("logits", 6), ("logits", 12), ("hidden", 6)]
    assert places == encoder * 4 + decoder * 4


def test_the_ends_of_t5_have_the_lengths_of_their_own_stack(monkeypatch):
    """The input of either stack and the decoder's output."""
    record, lengths = drawn_by_unequal_stacks(f"input:span@{RATE} + output:span@{RATE}", monkeypatch)
    assert [(drawn.drop.position, drawn.grid.places) for drawn in record] == [
        ("input", 12),
        ("input", 6),
        ("output", 6),
    ]
    gone = [(~drawn.keep.flatten(1)).sum(-1).tolist() for drawn in record]
    assert gone == [[int(length * RATE + 0.5) for length in lengths], *[[int(6 * RATE + 0.5)] * 3] * 2]
    assert len(set(gone[0])) > 1
    for drawn in record:
        keep = drawn.keep.squeeze(-2 if drawn.drop.position == "logits" else -1).reshape(3, -1, drawn.grid.places)
        lengths = (LENGTH, 9, 5) if drawn.grid.places == LENGTH else (6, 6, 6)
        for example, length in zip(keep, lengths, strict=True):
            assert ((~example).sum(-1) == int(length * RATE + 0.5)).all()
            assert example[:, length:].all()


def test_flat_feed_forward_of_opt(monkeypatch):
    """OPT folds batch and tokens into one axis before its feed-forward block; a span stays in its example."""
    model, inputs = attached("opt", f"hidden[:]:span@{RATE}"), inputs_for("opt", "right")
    fc2, seen = model.model.decoder.layers[1].fc2, []
    fc2.register_forward_hook(lambda module, args, output: seen.append(output))
    with draws(monkeypatch) as record:
        logits_of(model, inputs)
    (output,) = seen
    rows = output.reshape(3, LENGTH, -1)
    assert torch.equal(rows.abs().sum(-1, keepdim=True) > 0, record[1].keep)


def test_element_and_column_in_a_flat_stream():
    for pattern, whole in (("element", False), ("column", True)):
        model = attached("opt", f"hidden[:]:{pattern}@0.5")
        seen = []
        model.model.decoder.layers[0].fc2.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        logits_of(model, inputs_for("opt", "right"))
        gone = seen[0].reshape(3 * LENGTH, -1) == 0
        assert gone.any()
        assert bool((gone.all(-1) == gone.any(-1)).all()) is whole


def loss(model, inputs):
    logits = logits_of(model, inputs)
    logits = logits[real_of(inputs)] if logits.dim() == 3 else logits
    return logits.square().mean()


SPANS = "input:span@0.3 + hidden[:]:span@0.3 + logits[:]:span@0.4"


@pytest.mark.parametrize("reentrant", (None, False, True))
@pytest.mark.parametrize("family", ("bert", "llama", "opt", "t5"))
def test_two_batches_before_one_backward(family, reentrant, monkeypatch):
    """Recomputing the first batch must find the first batch's lengths, not those of the second."""
    first, second = inputs_for(family, "right"), inputs_for(family, "left")
    if family in ("bert", "llama"):
        second = {name: value[:2, 3:] for name, value in second.items()}

    def together(checkpointing):
        model = attached(family, SPANS)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.manual_seed(5)
        (loss(model, first) + loss(model, second)).backward()
        return gradients(model)

    assert_same_gradients(together(None), together(reentrant), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ("right", "left"))
@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_the_recomputed_draws_are_those_of_the_forward(family, layout, monkeypatch):
    model, inputs = attached(family, SPANS), inputs_for(family, layout)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with draws(monkeypatch) as record:
        value = loss(model, inputs)
        forward = list(record)
        value.backward()
    again = [drawn for drawn in record[len(forward) :] if drawn.drop.position != "input"]
    forward = [drawn for drawn in forward if drawn.drop.position != "input"]  # drawn outside of the recomputation
    assert len(again) == len(forward) > 0
    for drawn in forward:
        assert any(
            other.drop == drawn.drop and other.keep.shape == drawn.keep.shape and torch.equal(other.keep, drawn.keep)
            for other in again
        )


def test_a_rate_too_small_for_the_length_drops_nothing(monkeypatch):
    """And is compensated by its rate all the same, as the other spans are."""
    plain, model = quiet("llama"), attached("llama", "hidden[:]:span@0.04")
    inputs, seen = inputs_for("llama", "right"), []
    for m in (plain, model):
        m.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    logits_of(plain, inputs)
    with draws(monkeypatch) as record:
        logits_of(model, inputs)
    assert all(drawn.keep.all() for drawn in record)
    torch.testing.assert_close(seen[1], seen[0] / 0.96)


def test_hidden_outputs_of_dropped_tokens_are_zero_and_the_rest_is_rescaled():
    plain, model = quiet("llama"), make("llama")
    hiddenkey.attach(model, f"hidden[3:]:span@{RATE}")
    inputs, seen = batch("llama", labels=False), []
    for m in (plain, model):
        m.model.layers[3].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
        logits_of(m, inputs)
    gone = (seen[1] == 0).all(-1)
    assert gone.sum(-1).tolist() == [4, 3, 2]
    torch.testing.assert_close(seen[1][~gone], seen[0][~gone] / (1 - RATE))


@pytest.mark.parametrize("pattern", ("span", "column"))
def test_a_feed_forward_block_before_the_attention_knows_of_no_documents(pattern):
    """It would take those of the batch before."""
    config = Wav2Vec2BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        feature_projection_input_dim=16,
        classifier_proj_size=16,
        add_adapter=False,
    )
    model = Wav2Vec2BertForSequenceClassification(config).train()
    hiddenkey.attach(model, f"hidden[:]:{pattern}@0.3")
    inputs = {"input_features": torch.randn(2, 20, 16), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    for _ in range(2):
        if pattern == "column":
            assert model(**inputs).logits.isfinite().all()
            continue
        with pytest.raises(hiddenkey.UserError, match="learns in its attention, and that comes later"):
            model(**inputs)


@pytest.mark.parametrize("padded", (True, False))
def test_a_feed_forward_in_parts_takes_no_spans(padded):
    """Four calls with four tokens each would draw four runs of their own."""
    model = make("bert", chunk_size_feed_forward=4).train()
    inputs = batch("bert")
    if not padded:
        inputs.pop("attention_mask")
    with (
        hiddenkey.attach(model, "hiddencut@0.25"),
        pytest.raises(hiddenkey.UserError, match=r"parts of 4 tokens.*chunk_size_feed_forward=0"),
    ):
        model(**inputs)
    with hiddenkey.attach(model, "hiddencut:element@0.25"):
        assert model(**inputs).loss.isfinite()
