"""No look ahead, no look into padding or another document, no emptied row: with every drop at work."""

import pytest
import torch
import transformers as hf

import hiddenkey
from hiddenkey import find_attachment
from hiddenkey.hf import attention_backend as backend
from hiddenkey.hf import attention_softmax as softmax
from hiddenkey.hf.capture import Capture
from hiddenkey.hf.compared_outputs import last_layer

from .tiny import DECODERS, ENCODERS, LENGTH, make
from .tools import DOCUMENTS, PACKABLE, attached, inputs_for, logits_of, other_tokens, real_of

HARSH = "input:element@0.3 + logits[:]:{0}@0.8 + weights[:]:{0}@0.7 + hidden[:]:{0}@0.3 + output:element@0.3"
RECIPES = {pattern: HARSH.format(pattern) for pattern in ("element", "column", "span")}
LAYOUTS = ("none", "right", "left", "packed")
SEED = 11


def layouts_of(family):
    return [layout for layout in LAYOUTS if layout != "packed" or family in PACKABLE]


CASES = [(family, layout) for family in DECODERS for layout in layouts_of(family)]


def seeded(model, inputs):
    torch.manual_seed(SEED)
    return logits_of(model, inputs)


def changed(inputs, where):
    """The inputs with other tokens where `where` (B, T) is true."""
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": torch.where(where, other_tokens(ids), ids)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_changed_future_changes_nothing_before(family, layout, recipe):
    model, inputs = attached(family, RECIPES[recipe]), inputs_for(family, layout)
    real, place = real_of(inputs), torch.arange(LENGTH)
    with torch.no_grad():
        before = seeded(model, inputs)
        for t in (1, 3, 6, 10):
            after = seeded(model, changed(inputs, (place == t) & real))
            past = real & (place < t)
            assert torch.allclose(before[past], after[past], rtol=1e-5, atol=1e-5), t
            here = real & (place == t)
            assert not torch.allclose(before[here], after[here], atol=1e-4), t


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_no_gradient_from_the_future(family, layout, implementation):
    if family == "gemma2" and implementation == "sdpa":
        pytest.skip("has no sdpa")
    model = attached(family, RECIPES["column"], attn_implementation=implementation)
    inputs = inputs_for(family, layout)
    real = real_of(inputs)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    torch.manual_seed(SEED)
    logits = model(inputs_embeds=embedded, **inputs).logits
    for i in (0, 1, 4, 8):
        (gradient,) = torch.autograd.grad(logits[:, i][real[:, i]].square().sum(), embedded, retain_graph=True)
        assert (gradient[:, i + 1 :] == 0).all()
        assert (gradient[~real] == 0).all()
        if layout == "packed" and i >= DOCUMENTS[0]:
            assert (gradient[:, : DOCUMENTS[0]] == 0).all()
        if real[:, i].any():
            assert (gradient[:, i].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ("right", "left"))
@pytest.mark.parametrize("family", (*DECODERS, "t5", *(family for family in ENCODERS if family != "vit")))
def test_nothing_leaks_from_padding(family, layout, recipe):
    text = RECIPES[recipe]
    if family in ENCODERS:
        text = text.replace("hidden[:]:span", "hidden[:]:element")
    model, inputs = attached(family, text), inputs_for(family, layout)
    real = real_of(inputs)
    with torch.no_grad():
        other = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], torch.tensor(9))}
        if family in ("roberta", "mpnet"):  # positions are counted off the padding token
            other = {**inputs, "input_ids": inputs["input_ids"]}
            other["inputs_embeds"] = noisy(model, other.pop("input_ids"), ~real)
            inputs = {**inputs, "inputs_embeds": noisy(model, inputs["input_ids"], real & False)}
            del inputs["input_ids"]
        before, after = (states_of(model, family, given)[real] for given in (inputs, other))
    assert len(before) > 20
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def states_of(model, family, inputs):
    """(B, T, …): of an encoder the states below its classifier, which takes one place alone."""
    if family not in ENCODERS:
        return seeded(model, inputs)
    with Capture(*last_layer(find_attachment(model))) as last:
        seeded(model, inputs)
    return last.states


def noisy(model, ids, where):
    embedded = model.get_input_embeddings()(ids)
    return embedded + where[..., None] * 3.0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_documents_do_not_see_each_other(family, recipe):
    model, inputs = attached(family, RECIPES[recipe]), inputs_for(family, "packed")
    first = torch.arange(LENGTH) < DOCUMENTS[0]
    with torch.no_grad():
        before = seeded(model, inputs)
        for document in (first, ~first):
            after = seeded(model, changed(inputs, document.expand(3, -1)))
            torch.testing.assert_close(before[:, ~document], after[:, ~document], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(before[:, document], after[:, document], atol=1e-3)


@pytest.mark.parametrize("recipe", ("logits[:]:column@0.5", "logits[:]:element@0.5 + weights[:]:column@0.5"))
def test_a_sink_is_no_key_that_a_row_could_keep_alone(recipe):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.3}
    config = hf.GptOssConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes, **experts)
    config._attn_implementation = "eager"
    model, attended = hf.GptOssForCausalLM(config).train(), []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    with hiddenkey.attach(model, recipe), torch.no_grad():
        model(input_ids=torch.randint(1, 64, (32, 6)))
    rows = attended[0].view(32, 6, 4, 8)
    assert (rows.abs().sum(-1) > 0).all()


def window_of(family, index):
    """How many keys back a layer sees, itself included."""
    if family == "mistral" or (family == "gemma2" and index % 2 == 0) or (family == "gemma3" and (index + 1) % 6):
        return 4
    return LENGTH


def visible_of(family, layout, index, inputs):
    """bool (B, 1, Q, K), written from what the layouts mean."""
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    mask = (k <= q) & (k > q - window_of(family, index))
    if layout == "packed":
        mask = mask & ((q < DOCUMENTS[0]) == (k < DOCUMENTS[0]))
    return (mask & real_of(inputs)[:, None, :])[:, None]


def captured_weights(monkeypatch):
    """The weights that meet the values, at every attention, in order."""
    found = []

    def attend(query, key, value, *args, real=backend.attend, **kwargs):
        # Unit vectors as values, as many at a time as the values have features, so that the path stays the same.
        keys, size = key.shape[2], value.shape[3]
        unit = torch.nn.functional.pad(torch.eye(keys), (0, -keys % size)).expand(*key.shape[:3], -1)
        parts = [real(query, key, part, *args, **kwargs) for part in unit.split(size, -1)]
        found.append(torch.cat(parts, -1)[..., :keys])
        return real(query, key, value, *args, **kwargs)

    def drop_weights(*args, real=softmax.drop_weights):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(backend, "attend", attend)
    monkeypatch.setattr(softmax, "drop_weights", drop_weights)
    return found


@pytest.mark.parametrize("position", ("logits", "weights"))
@pytest.mark.parametrize("pattern", ("element", "column", "span"))
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_no_row_is_emptied_and_none_sees_what_is_hidden(family, layout, pattern, position, monkeypatch):
    model, inputs = attached(family, f"{position}[:]:{pattern}@0.9"), inputs_for(family, layout)
    found = captured_weights(monkeypatch)
    logits = seeded(model, inputs)
    assert logits.isfinite().all()
    assert len(found) == 4
    for index, weights in enumerate(found):
        visible = visible_of(family, layout, index, inputs).expand_as(weights)
        assert (weights[~visible] == 0).all()
        sums = weights.sum(-1)[visible.any(-1)]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (weights[visible] == 0).any(), "nothing was dropped"


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_a_cache_in_training_keeps_causality(family, implementation):
    """A forward with a prefix in the cache and several queries: each sees the prefix and what is before it."""
    model = make(family, attn_implementation=implementation)
    ids = inputs_for(family, "none")["input_ids"]
    hiddenkey.attach(model, "logits[:]:column@0.6")

    def second_part(ids):
        with torch.no_grad():
            cache = model.eval()(input_ids=ids[:, :5], use_cache=True).past_key_values
            torch.manual_seed(SEED)
            return model.train()(input_ids=ids[:, 5:], past_key_values=cache).logits

    before = second_part(ids)
    late, early = torch.arange(LENGTH) == 9, torch.arange(LENGTH) == 3
    after = second_part(torch.where(late, other_tokens(ids), ids))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
    assert not torch.allclose(before, second_part(torch.where(early, other_tokens(ids), ids)), atol=1e-3)
