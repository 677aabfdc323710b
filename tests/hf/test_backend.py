"""The name of the attention implementation while attached: ours in the registries, the wrapped one for the models."""

import copy
import operator
import pickle

import pytest
import torch
import transformers as hf
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hiddenkey
from hiddenkey.hf.attention_backend import OurName, eager_forward, sdpa_forward

from .tools import attached

FORWARDS = {"sdpa": sdpa_forward, "eager": eager_forward}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("duplicate", (lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), OurName))
def test_the_name(name, duplicate):
    ours, other = duplicate(OurName(name)), next(other for other in FORWARDS if other != name)
    assert str(ours) == f"hiddenkey_{name}"
    assert ours == name and name == ours and ours == f"hiddenkey_{name}" and ours in ("flash", name)
    assert ours != other and other != ours
    assert not operator.ne(ours, name) and not operator.ne(name, ours)
    assert ours not in (other, None, f"hiddenkey_{other}")
    assert ALL_ATTENTION_FUNCTIONS.get_interface(ours, None) is FORWARDS[name]
    assert ours in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def sparse(implementation):
    """Attention to the four best keys of each query, which the model makes a mask of for sdpa and eager alone."""
    torch.manual_seed(0)
    config = hf.GlmMoeDsaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        attn_implementation=implementation,
    )
    model = hf.GlmMoeDsaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("implementation", FORWARDS)
def test_sparse_attention_stays_sparse(implementation):
    model, ids = sparse(implementation).eval(), torch.arange(2, 34).view(2, 16)
    wanted = model(ids).logits
    dense = copy.deepcopy(model)
    for layer in dense.model.layers:
        layer.self_attn.indexer.index_topk = 16
    assert not torch.allclose(dense(ids).logits, wanted, atol=1e-2)
    with hiddenkey.attach(model, "logits[:]:column@0.3 + hidden[:]:element@0.1"):
        assert torch.equal(model(ids).logits, wanted)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_other_models_see_a_plain_text():
    """Which torch.compile follows in every version."""
    assert type(attached("llama", "logits:column@0.3").config._attn_implementation) is str
    assert type(hiddenkey.attach(sparse("sdpa"), "logits:column@0.3").model.config._attn_implementation) is OurName
