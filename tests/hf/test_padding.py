"""Spans never run over padding: what layers are told of it in ways of their own, or not at all."""

import pytest
import torch
import transformers as hf

import hiddenkey

from ..models.shrink import shrink
from .tools import assert_same_gradients, draws, gradients

LENGTHS = (12, 6, 2)
IDS = torch.randint(5, 20, (3, 12), generator=torch.Generator().manual_seed(3))
PADDED = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()


def built(kind, name):
    torch.manual_seed(0)
    return getattr(hf, name)._from_config(shrink(kind)).train()


def dropped_in(model, recipe, monkeypatch, **inputs):
    """Per draw (B, T): which tokens fell."""
    torch.manual_seed(1)
    with hiddenkey.attach(model, recipe), draws(monkeypatch) as record:
        model(input_ids=IDS, attention_mask=PADDED, **inputs)
    return [~drawn.keep.squeeze(-1) for drawn in record]


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("markuplm", "MarkupLMForSequenceClassification", {}),  # 0 and -10,000, written by itself
        (
            "t5gemma2",
            "T5Gemma2ForConditionalGeneration",
            {"decoder_input_ids": IDS, "decoder_attention_mask": PADDED},
        ),
    ],
)
def test_lengths_are_known_by_masks_of_other_kinds(kind, name, more, monkeypatch):
    drops = dropped_in(built(kind, name), "hidden[:]:span@0.25", monkeypatch, **more)
    assert drops
    for fell in drops:
        assert fell.sum(-1).tolist() == [int(length * 0.25 + 0.5) for length in LENGTHS]
        assert not (fell & (PADDED == 0)).any()


def test_a_bool_mask_for_each_example(monkeypatch):
    """CPM-Ant's, (B, T, T), of prompt tokens and the text, whose padding on the left it knows by its ids."""
    real = PADDED.flip(1)
    model = built("cpmant", "CpmAntForCausalLM")
    torch.manual_seed(1)
    with hiddenkey.attach(model, "hidden[:]:span@0.25"), draws(monkeypatch) as record:
        model(input_ids=IDS * real)
    prompt = model.config.prompt_length
    for fell in (~drawn.keep.squeeze(-1) for drawn in record):
        assert fell.sum(-1).tolist() == [int((prompt + length) * 0.25 + 0.5) for length in LENGTHS]
        assert not (fell[:, prompt:] & (real == 0)).any()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("nemotron_h", "NemotronHForCausalLM"),
        ("xlm", "XLMForSequenceClassification"),
        ("funnel", "FunnelForSequenceClassification"),
    ],
)
def test_layers_that_are_not_told_of_padding_take_no_spans_of_padded_batches(kind, name):
    model = built(kind, name)
    with hiddenkey.attach(model, "hidden[:]:span@0.25") as attachment:
        model(input_ids=IDS, attention_mask=torch.ones_like(PADDED))
        assert attachment.rates()
        with pytest.raises(hiddenkey.UserError, match=r"must not run over padding.*is not told where that is"):
            model(input_ids=IDS, attention_mask=PADDED)
    with hiddenkey.attach(model, "hidden[:]:column@0.25"):
        model(input_ids=IDS, attention_mask=PADDED)


def test_a_mask_over_words_and_entities_is_told():
    model = built("luke", "LukeModel")
    entities = {
        "entity_ids": torch.ones(3, 3, dtype=torch.long),
        "entity_attention_mask": torch.ones(3, 3, dtype=torch.long),
        "entity_position_ids": torch.zeros(3, 3, 4, dtype=torch.long),
    }
    with hiddenkey.attach(model, "hidden:span@0.25"):
        with pytest.raises(hiddenkey.UserError, match="12 tokens and a mask of 15, as of words and entities"):
            model(input_ids=IDS, attention_mask=PADDED, **entities)
        model(input_ids=IDS, attention_mask=PADDED)


def test_the_output_is_that_of_the_decoder_wherever_other_towers_stand():
    model = built("inkling2", "Inkling2ForConditionalGeneration")
    with hiddenkey.attach(model, "output:span@0.25") as attachment:
        structure = attachment.plan.structure
        assert "vision" in structure.stacks[-1].path
        assert structure.last == structure.stacks[0]
        model(input_ids=IDS, attention_mask=PADDED)
        assert attachment.rates()


@pytest.mark.parametrize("reentrant", (False, True))
def test_two_batches_before_one_backward_in_layers_without_attention(reentrant):
    options = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "initializer_range": 0.3}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    left = PADDED.flip(1)

    def learned(checkpoints):
        torch.manual_seed(0)
        model = hf.Lfm2ForCausalLM(hf.Lfm2Config(vocab_size=64, pad_token_id=0, **sizes, **options)).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        hiddenkey.attach(model, "hidden[:]:span@0.3")
        torch.manual_seed(5)
        first = model(input_ids=IDS, attention_mask=PADDED).logits
        second = model(input_ids=IDS.flip(0), attention_mask=left).logits
        (first.square().mean() + second.square().mean()).backward()
        return gradients(model)

    assert_same_gradients(learned(False), learned(True), rtol=1e-4, atol=1e-5)
