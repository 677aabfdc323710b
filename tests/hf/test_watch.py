"""What is trained is what the recipe says, or it is said: a missed consistency, evaluation mode, references."""

import warnings

import peft
import pytest
import torch
from transformers import Trainer

import hiddenkey

from .adapters import build
from .test_trainer import Rows, model_of
from .tiny import FAMILIES, batch, make
from .tools import arguments, attached, draws, logits_of, lora, quiet

TIED = "hiddenkey@0.3 ~ kl*0.5"
FREE = "hiddenkey-@0.3"
MISSED = r"has a consistency, but this loss.*DropTrainer.*ConsistencyMixin.*consistency_step.*attach 'logits"


def test_inputs_of_the_user_are_not_outputs():
    """Embeddings that come back among the hidden states may be learned from by other ways."""
    model, inputs = attached("llama", TIED), batch("llama")
    states = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=states, **inputs, output_hidden_states=True)
    hiddenkey.consistency_step(model, {"inputs_embeds": states, **inputs}).total.backward()
    assert states.grad.any()


def test_a_stock_trainer(tmp_path):
    model = model_of("bert")
    hiddenkey.attach(model, TIED)
    with pytest.raises(ValueError, match=MISSED):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows("bert", 8)).train()


def test_the_mixin_in_the_wrong_place():
    with pytest.raises(TypeError, match=r"a trainer before ConsistencyMixin.*Overruled\(ConsistencyMixin, Trainer\)"):
        type("Overruled", (Trainer, hiddenkey.ConsistencyMixin), {})


def test_a_backward_pass_in_evaluation_mode_is_a_warning():
    """Attribution does it on purpose."""
    model = attached("bert", FREE).eval()
    with pytest.warns(UserWarning, match=r"drops nothing.*evaluation mode.*model\.train\(\)"):
        model(**batch("bert")).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch("bert")).loss.backward()
        with torch.no_grad():
            attached("bert", FREE).eval()(**batch("bert"))


NEVER_SWITCHED = {
    "LoRA": {},
    "head": {"modules_to_save": ["classifier"]},
    "DoRA": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize(
    ("family", "kind", "recipe"),
    [*((family, "LoRA", TIED) for family in FAMILIES), *(("bert", kind, FREE) for kind in NEVER_SWITCHED)],
)
def test_a_model_that_was_never_switched_to_training_drops_nothing(family, kind, recipe):
    """from_pretrained leaves the base in evaluation mode, and PEFT's new layers are in training mode."""
    config = peft.LoraConfig(target_modules="all-linear", **NEVER_SWITCHED[kind])
    model, inputs = peft.get_peft_model(quiet(family).eval(), config), batch(family)
    plain = batch(family, labels=False)
    assert model.training
    assert any(module.training for module in model.get_base_model().modules())
    with torch.no_grad():
        wanted = model(**plain).logits
    handle = hiddenkey.attach(model, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            found = model(**plain).logits
    assert torch.equal(found, wanted)
    with pytest.raises(hiddenkey.UserError, match=r"from_pretrained leaves it.*model\.train\(\)"):
        model(**inputs).loss.backward()
    with pytest.raises(hiddenkey.UserError, match=r"from_pretrained leaves it.*model\.train\(\)"):
        hiddenkey.consistency_step(model, inputs)
    model.train()
    hiddenkey.consistency_step(model, inputs).total.backward()
    assert all(rate > 0 for rate in handle.rates().values())


def reference(model, inputs):
    """In training mode, without gradient, with the adapter disabled: as DPO does it."""
    with torch.no_grad(), model.disable_adapter():
        return logits_of(model, inputs)


@pytest.mark.parametrize("recipe", (TIED, FREE))
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_a_reference_pass_is_the_plain_models(family, recipe, monkeypatch):
    inputs, model = batch(family), lora(make(family), lora_dropout=0.5)
    hiddenkey.attach(model, recipe)
    modes = [module.training for module in model.modules()]
    with draws(monkeypatch) as record:
        found = reference(model, inputs)
    assert not record
    assert torch.equal(found, logits_of(quiet(family).eval(), inputs))
    assert [module.training for module in model.modules()] == modes
    with draws(monkeypatch) as record, torch.no_grad():
        logits_of(model, inputs)
    assert record, "a second view, or Monte Carlo dropout"


@pytest.mark.parametrize("tuner", ("prompt tuning", "prefix tuning"))
def test_a_reference_pass_without_the_prompt(tuner, monkeypatch):
    """A prompt has no layers in the model; disabled, PEFT's model runs the one inside."""
    inputs, model = batch("llama"), build(tuner, "llama")
    hiddenkey.attach(model, FREE)
    with draws(monkeypatch) as record:
        found = reference(model, inputs)
    assert not record
    assert torch.equal(found, logits_of(quiet("llama").eval(), inputs))
    assert all(module.training for module in model.modules())
    for _ in range(2):
        with draws(monkeypatch) as record, torch.no_grad():
            logits_of(model, inputs)
        assert record, "a second view, or Monte Carlo dropout"
        assert logits_of(model, inputs).requires_grad, "it learns"


def test_a_reference_pass_under_another_prompt(monkeypatch):
    model = build("prompt tuning", "llama")
    model.add_adapter("ref", model.peft_config["default"])
    hiddenkey.attach(model, FREE)
    model.set_adapter("ref")
    with draws(monkeypatch) as record, torch.no_grad():
        logits_of(model, batch("llama"))
    assert not record


def test_a_reference_text_from_the_model_inside(monkeypatch):
    """PEFT generates with the model inside."""
    model, inputs = lora(make("llama")), batch("llama", padding="left", labels=False)
    hiddenkey.attach(model, FREE)
    with draws(monkeypatch) as record, torch.no_grad(), model.disable_adapter():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not record
    assert all(module.training for module in model.modules())


def test_a_reference_pass_under_another_adapter(monkeypatch):
    model = lora(make("llama"))
    model.add_adapter("ref", model.peft_config["default"])
    hiddenkey.attach(model, FREE)
    model.set_adapter("ref")
    with draws(monkeypatch) as record:
        with torch.no_grad():
            logits_of(model, batch("llama"))
        assert not record
        logits_of(model, batch("llama"))
        assert record, "this one learns"
    with draws(monkeypatch) as record, torch.no_grad():
        logits_of(model, batch("llama"))
    assert record, "since it learned, it is no reference"


def test_modes_are_given_back_after_an_error():
    model = lora(make("llama"))
    hiddenkey.attach(model, FREE)
    with pytest.raises((TypeError, ValueError)), torch.no_grad(), model.disable_adapter():
        model(nonsense=1)
    assert all(module.training for module in model.modules())


def test_ctrl_c_in_a_softmax_of_the_models_own_leaves_no_drop_behind():
    """torch calls no hook after it."""
    model = make("mpnet")
    attachment = hiddenkey.attach(model, "hiddenkey-[:]@0.5")
    plain = make("mpnet").eval()(**batch("mpnet")).logits
    inside = next(module for name, module in model.named_modules() if name.endswith("attention.attn.o"))

    def interrupt(*_):
        raise KeyboardInterrupt

    for end in (lambda: None, attachment.detach):
        handle = inside.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.train()(**batch("mpnet"))
        handle.remove()
        end()
        assert torch.equal(model.eval()(**batch("mpnet")).logits, plain)
    assert torch.equal(make("mpnet").eval()(**batch("mpnet")).logits, plain)


@pytest.mark.parametrize("learns", (False, True))
def test_ctrl_c_in_a_reference_pass_undoes_no_evaluation_mode(learns):
    """torch calls no hook after it, so the pass leaves the model in evaluation mode."""
    model = lora(make("llama"), ["q_proj"])
    hiddenkey.attach(model, "hiddenkey-[:]@0.5")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_submodule("base_model.model.model.norm").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), model.disable_adapter():
        model(**batch("llama"))
    handle.remove()
    if learns:
        model(**batch("llama")).loss.backward()
        assert all(module.training for module in model.modules())
        return
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits_of(model, batch("llama")), logits_of(model, batch("llama")))
    assert not any(module.training for module in model.modules())


def test_the_doctor_looks_at_the_adapter_that_was_set_after_attach():
    model = lora(make("llama"), ["q_proj"])
    hiddenkey.attach(model, "hiddenkey-[:]@0.3")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    diagnosis = hiddenkey.doctor(model.train(), rounds=1, size=3, length=12)
    assert diagnosis.ok, str(diagnosis)


def test_a_cache_in_the_batch_is_refused():
    model = make("llama")
    hiddenkey.attach(model, "hiddenkey@0.3")
    cache = model.eval()(**batch("llama", labels=False), use_cache=True).past_key_values
    with pytest.raises(hiddenkey.UserError, match="would write into its past_key_values"):
        hiddenkey.consistency_step(model.train(), {**batch("llama"), "past_key_values": cache})


def test_an_attach_that_fails_half_way_leaves_nothing(monkeypatch):
    model = make("bert")
    config, plain = model.config._attn_implementation, make("bert").train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]

    def refuse(*_):
        raise hiddenkey.PlanError("not here")

    for name in ("our_name", "saved_copies"):
        with monkeypatch.context() as patch, pytest.raises(hiddenkey.PlanError, match="not here"):
            patch.setattr(f"hiddenkey.hf.attach.{name}", refuse if name == "our_name" else Once(refuse))
            hiddenkey.attach(model, "hiddenkey-[:]@0.5")
        assert hiddenkey.find_attachment(model) is None
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert model.config._attn_implementation == config
        assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == rates
        outputs = []
        for each in (model.train(), plain):
            torch.manual_seed(0)  # its own dropouts are on
            outputs.append(each(**batch("bert")).logits)
        assert torch.equal(*outputs)


class Once:
    """Fails at the first call, and finds nothing at others."""

    def __init__(self, refuse):
        self.refuse, self.calls = refuse, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.refuse() if self.calls == 1 else []


@pytest.mark.parametrize("family", ("llama", "bert", "gpt2", "qwen3"))
def test_attention_weights_may_be_asked_for_after_attach(family, monkeypatch):
    model = make(family, attn_implementation="eager")
    hiddenkey.attach(model, FREE)
    model.config.output_attentions = True
    with draws(monkeypatch) as record:
        outputs = model(**batch(family))
    assert len(outputs.attentions) == 4
    assert record


def test_attention_weights_that_are_asked_for_do_not_keep_a_model_from_being_saved(tmp_path):
    model = make("bert", attn_implementation="eager")
    model.config.output_attentions = True
    with hiddenkey.attach(model, "hiddenkey-[:]@0.3"):
        outputs = model.train()(**batch("bert"))
        assert len(outputs.attentions) == 4
        model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "eager"


@pytest.mark.full
def test_compiled_before_attach():
    """A compiled model that was run before attach is compiled again, or told to be past us."""
    torch._dynamo.reset()
    model = make("llama", depth=1)
    run = torch.compile(model, backend="eager")
    run(**batch("llama"))
    hiddenkey.attach(model, FREE)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        run(**batch("llama"))
    rates = hiddenkey.find_attachment(model).rates()
    torch._dynamo.reset()
    assert all(rate > 0 for rate in rates.values()), rates
