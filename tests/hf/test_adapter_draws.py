"""What adapters draw by themselves: reported, left alone, and never shared between two views."""

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import hiddenkey
from hiddenkey.hf.shared_layers import LowerLayers
from hiddenkey.hf.sites import TokenSkip
from hiddenkey.hf.structure import find_transformer

from .adapters import FEED_FORWARD, TUNERS, adapt, batch_for, build, moved, pairs
from .tiny import batch, make
from .tools import draws, logits_of, quiet

DROPPING = [tuner for tuner, case in TUNERS.items() if case.dropout]
STEP = "logits[2:]:column@0.3 ~ kl*1.0"


def shared(model) -> int:
    """How many layers a step would compute once for both views."""
    with hiddenkey.attach(model, STEP) as attachment:
        return len(LowerLayers(attachment, constant=True).layers)


@pytest.mark.parametrize("tuner", DROPPING)
def test_the_dropouts_of_a_tuner_are_the_users(tuner):
    model = build(tuner, "llama", dropout=0.25)
    names = {"default" if name == "module_dropout" else name for name in TUNERS[tuner].dropout}
    plan = hiddenkey.plan(model, STEP)
    assert plan.own_dropouts == ()
    assert {own.p for own in plan.adapter_dropouts} == {0.25}
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert len(plan.adapter_dropouts) == layers * len(names) > 0
    assert "adapter dropout left as it is: " in str(plan)
    torch.manual_seed(0)
    inputs = batch_for(tuner, "llama", labels=False)
    wanted = logits_of(model, inputs)
    with hiddenkey.attach(model, "baseline"):
        torch.manual_seed(0)
        assert torch.equal(logits_of(model, inputs), wanted)
    assert shared(model) == 0


@pytest.mark.parametrize(("tuner", "family"), pairs(TUNERS))
def test_lower_layers_are_computed_once_where_no_adapter_draws(tuner, family):
    model = build(tuner, family)
    assert shared(model) == (0 if TUNERS[tuner].draws else 2)
    assert ("the adapter by itself, in training: " in str(hiddenkey.plan(model, STEP))) is TUNERS[tuner].draws


@pytest.mark.parametrize(("tuner", "said"), [("PVeRA", "PVERA draws noise"), ("Poly", "POLY draws its routing")])
def test_what_an_adapter_draws_by_itself_is_said(tuner, said):
    plan = hiddenkey.plan(build(tuner, "llama"), STEP)
    assert str(plan).endswith(f"the adapter by itself, in training: {said}")


def test_the_doctor_says_so_too():
    found = hiddenkey.doctor(build("PVeRA", "llama"), STEP, [batch("llama")], rounds=1).findings
    assert [f.reason for f in found if f.check == "adapter"] == ["PVERA draws noise in training, by itself"]


def test_the_dropout_of_a_prompt_encoder_is_the_users():
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
        encoder_dropout=0.25,
    )
    model = moved(peft.get_peft_model(make("llama"), config))
    plan = hiddenkey.plan(model, STEP)
    assert plan.own_dropouts == ()
    assert [(own.name, own.p) for own in plan.adapter_dropouts] == [("dropout", 0.25)]
    assert shared(model) == 0


def test_the_dropouts_in_modules_to_save_are_the_models():
    """PEFT's copies of the classifier hold copies of its dropout."""
    model = adapt(make("roberta"), "LoRA on attention", "bert")
    own = [own.path for own in hiddenkey.plan(model, STEP).own_dropouts if "classifier" in own.path]
    assert own == [
        "base_model.model.classifier.original_module.dropout",
        "base_model.model.classifier.modules_to_save.default.dropout",
    ]
    with hiddenkey.attach(model, "baseline"):
        assert all(model.get_submodule(path).p == 0 for path in own)
    assert all(model.get_submodule(path).p == 0.1 for path in own)


def test_noise_in_the_weights_of_lora():
    if not hasattr(peft.tuners.lora, "MontecloraConfig"):
        pytest.skip("this PEFT has no MonteCLoRA")
    options = {"monteclora_config": peft.tuners.lora.MontecloraConfig()}
    model = adapt(quiet("llama"), "LoRA", "llama", **options)
    assert shared(model) == 0
    assert "MONTECLORA draws noise" in str(hiddenkey.plan(model, STEP))


def xlora(tmp_path):
    """X-LoRA over two saved adapters."""
    for name, seed in (("0", 1), ("1", 2)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(quiet("llama"), config).save_pretrained(tmp_path / name)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=2,
        xlora_size=8,
        xlora_dropout_p=0.25,
        adapters={name: str(tmp_path / name) for name in ("0", "1")},
        use_trainable_adapters=True,
    )
    model = quiet("llama")
    model.config.use_cache = False
    return peft.get_peft_model(model, config).train()


def test_xlora_passes_through_the_model_twice(tmp_path):
    """So its lower layers can't be shared; and its scalings are by token, so none can be left out."""
    model = xlora(tmp_path)
    plan = hiddenkey.plan(model, STEP)
    assert {own.p for own in plan.adapter_dropouts} == {0.25}
    assert str(plan).endswith("XLORA passes through the model twice")
    assert shared(model) == 0
    with hiddenkey.attach(model, "hidden[:]:column@0.4 ~ kl*1.0") as attachment:
        assert not any(isinstance(site, TokenSkip) for _, site in attachment.sites)
        hiddenkey.consistency_step(model, batch("llama")).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)


BY_TOKEN = ("LoRA", "DoRA", "LoRA on attention")


@pytest.mark.parametrize("tuner", ("LoRA", "DoRA", "LoRA on attention", "Poly", "OFT", "LoHa"))
def test_tokens_are_left_out_where_the_adapter_works_token_by_token(tuner, monkeypatch):
    """Under LoRA dropped tokens need no feed-forward block; what other tuners look at is not known."""
    inputs, found, record = batch_for(tuner, "llama", labels=False), [], None
    for skips in (True, False):
        model = build(tuner, "llama")
        with monkeypatch.context() as patch:
            if not skips:
                patch.setattr(hiddenkey.hf.attach, "can_skip", lambda module, drop: False)
            attachment = hiddenkey.attach(model, "hidden[:]:column@0.4")
        assert all(isinstance(site, TokenSkip) is (skips and tuner in BY_TOKEN) for _, site in attachment.sites)
        with draws(monkeypatch, record) as record_now:
            torch.manual_seed(0)
            found.append(logits_of(model, inputs))
        record = record or record_now
    if tuner != "Poly":  # It draws by itself, after our draws or between them.
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_lora_that_begins_at_a_word():
    """aLoRA knows the place of a token, so none may be left out before it."""
    config = {"target_modules": FEED_FORWARD["llama"], "alora_invocation_tokens": [3, 4]}
    model = adapt(quiet("llama"), "LoRA", "llama", **config)
    attachment = hiddenkey.attach(model, "hidden[:]:column@0.4 ~ kl*1.0")
    assert not any(isinstance(site, TokenSkip) for _, site in attachment.sites)
    inputs = batch("llama", padding="none")
    inputs["input_ids"][:, 4:6] = torch.tensor([3, 4])
    hiddenkey.consistency_step(model, inputs).total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_model_is_found_inside_every_wrapper():
    model = build("prompt tuning", "llama")
    assert find_transformer(model)[0] == "base_model"
    assert isinstance(model.prompt_encoder, nn.ModuleDict)
