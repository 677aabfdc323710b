"""Models that also see or hear, trained on texts alone: their towers are not run, so nothing there must draw."""

import warnings

import pytest
import torch
import transformers

import hiddenkey
from hiddenkey.hf.rate_monitor import RateWatch

from ..models.shrink import shrink

KINDS = ("llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "idefics3", "paligemma", "mllama", "qwen2_audio")
TEXT = torch.arange(10, 18).repeat(2, 1)


def seeing(kind):
    torch.manual_seed(0)
    return transformers.AutoModelForMultimodalLM.from_config(shrink(kind)).train()


@pytest.fixture(scope="module")
def llava():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(**size, vocab_size=64, max_position_embeddings=64)
    seen = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=4)
    config = transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_id=63)
    with hiddenkey.attach(
        transformers.LlavaForConditionalGeneration(config).train(), "hiddenkey[:]@0.3"
    ) as attachment:
        yield attachment.model, attachment


def image():
    ids = torch.cat([torch.full((2, 16), 63), TEXT], 1)
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def text():
    return {"input_ids": TEXT, "labels": TEXT}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_alone_are_no_reason_to_warn(kind):
    model = seeing(kind)
    with hiddenkey.attach(model, "hidden[:]:element@0.3 + logits[:]:column@0.3") as attachment:
        assert len(attachment.plan.structure.stacks) > 1
        watch = RateWatch(attachment)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*drew nothing.*")
            model(input_ids=TEXT, labels=TEXT, use_cache=False).loss.backward()
        assert watch.look() == []
        drawn = {name for name, rate in attachment.rates().items() if rate == rate}
        assert drawn
        assert len(drawn) < len(attachment.rates())


def test_images_now_and_then(llava):
    """The log looks back to the last look: with texts alone in between, the tower owes nothing."""
    model, attachment = llava
    watch = RateWatch(attachment)
    for batch in (text(), image(), text()):
        model(**batch)
        assert watch.look() == []
    assert all(rate == rate for rate in attachment.rates().values())


def test_evaluation_on_images_is_no_run_of_the_tower(llava):
    model, attachment = llava
    watch = RateWatch(attachment)
    model.eval()(**image())
    model.train()(**text())
    assert watch.look() == []


@pytest.mark.parametrize("part", ("vision_tower.encoder", "language_model"))
def test_a_stack_that_is_run_may_not_be_silent(llava, part):
    model, attachment = llava
    watch = RateWatch(attachment)
    watch.look()
    layers = model.model.get_submodule(part).layers
    for layer in layers:
        layer.mlp.eval()
    try:
        model(**image())
    finally:
        model.train()
    (sentence,) = watch.look()
    assert sentence.startswith(f"hidden model.{part}.layers.0.mlp, hidden model.{part}.layers.1.mlp drew nothing")
