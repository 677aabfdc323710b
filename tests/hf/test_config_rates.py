"""Dropouts read from the configuration in every forward: off while attached, in no file, back afterwards."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch._dynamo.utils import counters

import hiddenkey
from hiddenkey.hf.model_dropouts import rates_in_config

from .tools import lora

LAYERS = 2


def falcon():
    torch.manual_seed(0)
    config = hf.FalconConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        hidden_dropout=0.3,
        attention_dropout=0.2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return hf.FalconForCausalLM(config).train()


def hubert():
    """Every layer is left out with probability 0.5."""
    torch.manual_seed(0)
    config = hf.HubertConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16,),
        conv_kernel=(4,),
        conv_stride=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.5,
        apply_spec_augment=False,
        vocab_size=20,
    )
    return hf.HubertForCTC(config).train()


MODELS = {
    "falcon": (falcon, lambda: torch.arange(2, 26).view(2, 12)),
    "hubert": (hubert, lambda: torch.randn(2, 64, generator=torch.Generator().manual_seed(1))),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, inputs = MODELS[request.param]
    return build(), inputs()


def logits(model, inputs):
    torch.manual_seed(torch.initial_seed() + 1)
    with torch.no_grad():
        return model(inputs).logits


def is_random(model, inputs):
    first = logits(model, inputs)
    return any(not torch.equal(first, logits(model, inputs)) for _ in range(5))


def configs(model):
    return [module.config for module in model.modules() if hasattr(module, "config")]


def test_off_while_attached_and_back_afterwards(case):
    model, inputs = case
    before = configs(model)
    assert is_random(model, inputs)
    with hiddenkey.attach(model, "baseline"):
        assert not is_random(model, inputs)
        assert torch.equal(logits(model, inputs), logits(model.eval(), inputs))
    assert is_random(model.train(), inputs)
    assert all(one is other for one, other in zip(before, configs(model), strict=True))


def test_every_layer_draws(recwarn):
    model, inputs = hubert(), MODELS["hubert"][1]()
    attachment = hiddenkey.attach(model, "hidden[:]:element@0.3")
    model(inputs)
    assert len(attachment.rates()) == 4
    assert all(rate > 0 for rate in attachment.rates().values())
    assert not [warning for warning in recwarn if "drew nothing" in str(warning.message)]


def test_the_plan_names_them():
    text = str(hiddenkey.plan(falcon(), "baseline"))
    assert f"{LAYERS} x config.attention_dropout 0.2" in text
    assert f"{LAYERS} x config.hidden_dropout 0.3" in text
    assert "1 x config.layerdrop 0.5" in str(hiddenkey.plan(hubert(), "baseline"))


def test_one_turned_on_again_is_red():
    model = falcon()
    hiddenkey.attach(model, "hiddenkey[:]@0.2")
    assert hiddenkey.doctor(model, rounds=1, size=3, length=12).ok
    layer = model.transformer.h[1]
    layer.config.hidden_dropout = 0.1
    assert model.config.hidden_dropout == 0.3
    wrong = hiddenkey.doctor(model, rounds=1, size=3, length=12).wrong
    assert any("transformer.h.1.config.hidden_dropout 0.1" in finding.reason for finding in wrong)


def test_other_settings_reach_the_modules():
    model = falcon()
    hiddenkey.attach(model, "baseline")
    quiet = model.transformer.h[0].config
    model.config.hidden_size = 64
    assert quiet.hidden_size == 64
    quiet.hidden_size = 32
    assert model.config.hidden_size == 32
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = quiet.no_such_name


def test_what_is_saved_has_the_rates_of_the_model(tmp_path, case):
    model, _ = case
    rates = model.config.to_dict()
    hiddenkey.attach(model, "baseline")
    model.save_pretrained(tmp_path)
    saved = type(model.config).from_pretrained(tmp_path).to_dict()
    names = [name for name in rates if "drop" in name]
    assert names
    assert {name: saved[name] for name in names} == {name: rates[name] for name in names}


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_copies_go_their_own_way(duplicate):
    model, inputs = falcon(), MODELS["falcon"][1]()
    attachment = hiddenkey.attach(model, "baseline")
    other = duplicate(model)
    attachment.detach()
    assert is_random(model, inputs)
    assert not is_random(other, inputs)
    hiddenkey.find_attachment(other).detach()
    assert is_random(other, inputs)


def test_no_graph_break():
    model, inputs = falcon(), MODELS["falcon"][1]()
    hiddenkey.attach(lora(model, ["query_key_value"]), "hiddenkey-[:]@0.2")
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=inputs, labels=inputs).loss.backward()
    assert sum(counters["graph_break"].values()) == 0


def test_a_rate_that_works_in_evaluation_too_is_left():
    config = hf.SpeechT5Config(speech_decoder_prenet_dropout=0.5, speech_decoder_prenet_units=16)
    prenet = hf.models.speecht5.modeling_speecht5.SpeechT5SpeechDecoderPrenet(config).eval()
    frames = torch.randn(2, 4, config.num_mel_bins)
    assert not torch.equal(prenet(frames), prenet(frames))
    assert rates_in_config(prenet) == []
    assert rates_in_config(falcon().transformer.h[0]) == ["attention_dropout", "hidden_dropout"]
