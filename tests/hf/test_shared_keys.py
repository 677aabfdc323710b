"""Models whose upper layers read the keys and values of lower ones: nothing below the drops is left out."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import hiddenkey
from hiddenkey.hf import chunked_loss as language
from hiddenkey.hf import training_step as step
from hiddenkey.hf.attachment import step_state
from hiddenkey.hf.shared_layers import LowerLayers

from ..models.shrink import shrink
from ..models.tiny import enliven
from .test_step import WEIGHT, check, divergence, shifted
from .test_token_loss import one_step
from .tiny import batch
from .tools import assert_same_gradients, lora

RECIPE = f"logits[1/2:]:column@0.3 + hidden[1/2:]:element@0.3 ~ kl*{WEIGHT}"
LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FLAT = {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4}
SHARED = {"num_kv_shared_layers": 2}
KINDS = {
    "gemma3n_text": (hf.Gemma3nForCausalLM, {**LAYERS, **FLAT, **SHARED}),
    "gemma4_text": (hf.Gemma4ForCausalLM, {**LAYERS, **SHARED, "global_head_dim": 16}),
    "mistral_large4_text": (
        None,  # not among the names of transformers, and not in its older versions
        {
            "num_hidden_layers": 4,
            "layer_types": ["indexed_attention"] * 4,
            "mlp_layer_types": ["dense"] * 4,
            "indexer_types": ["full"] * 4,
            "no_rope_layers": [1] * 4,
            "kv_source_layers": [0, 1, 1, 1],
        },
    ),
}


def tiny(kind, **options):
    model_class, fields = KINDS[kind]
    if model_class is None:
        module = pytest.importorskip("transformers.models.mistral_large4.modeling_mistral_large4")
        model_class = module.MistralLarge4TextModel
    torch.manual_seed(0)
    config = {**shrink(kind).to_dict(), **fields, **options}
    config.pop("per_layer_config", None)
    model = model_class(model_class.config_class(**config))
    enliven(model)
    return lora(model.train())


def tokens():
    inputs = batch("llama")
    inputs["labels"][0, :4] = -100
    return inputs


@pytest.mark.parametrize("kind", ("gemma3n_text", "gemma4_text"))
def test_the_step_is_the_models_own(kind):
    model, inputs = tiny(kind), tokens()
    hiddenkey.attach(model, RECIPE)

    def by_hand(first, second):
        rows, labels = shifted(first.logits, inputs["labels"])
        others, _ = shifted(second.logits, inputs["labels"])
        torch.testing.assert_close(first.loss, F.cross_entropy(rows, labels))
        return first.loss, divergence("kl", rows, others).mean()

    check(model, inputs, "kl", by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_read_from_above_run_again(kind):
    with hiddenkey.attach(tiny(kind), RECIPE) as attachment:
        assert LowerLayers(attachment, constant=True).layers == []


@pytest.mark.parametrize("kind", ("gemma3n_text", "gemma4_text"))
def test_without_shared_keys_the_lower_layers_run_once(kind):
    with hiddenkey.attach(tiny(kind, num_kv_shared_layers=0), RECIPE) as attachment:
        assert len(LowerLayers(attachment, constant=True).layers) == 2


@pytest.mark.parametrize("foreseen", (True, False))
def test_a_decoder_that_leaves_tokens_out_takes_the_dense_way(foreseen, monkeypatch):
    """Gemma 4's upper layers compute only the tokens whose logits are asked for."""
    if "logits_to_keep" not in inspect.signature(hf.Gemma4TextModel.forward).parameters:
        pytest.skip("this transformers computes all of them")
    model = tiny("gemma4_text")
    if not foreseen:
        monkeypatch.setattr(language, "_cuts_tokens", lambda transformer: False)
    found, _, attachment = one_step(model, RECIPE, tokens())
    assert (language.frozen_head(attachment) is None) is foreseen
    assert step_state(attachment).dense is not foreseen
    assert found.outputs["logits"].shape[1] > 1


def test_without_shared_keys_chunks_are_the_dense_step():
    model, inputs = tiny("gemma4_text", num_kv_shared_layers=0).double(), tokens()
    found, ours, attachment = one_step(model, RECIPE, inputs)
    assert language.frozen_head(attachment) is not None
    assert found.outputs["logits"].shape[1] == 1
    dense, theirs, _ = one_step(model, RECIPE, inputs, task_loss=step.model_loss)
    assert float(found.total) == pytest.approx(float(dense.total), rel=1e-5)
    assert_same_gradients(ours, theirs, rtol=1e-4, atol=1e-6)
