"""The doctor: green where all is well, and the model is as it was before."""

import json
import random
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import distributed, nn

import hiddenkey
from hiddenkey.hf import training_step as step
from hiddenkey.hf.attachment import StepState, step_state
from hiddenkey.hf.doctor import examination, surroundings
from hiddenkey.hf.doctor.outputs import difference
from hiddenkey.hf.doctor.model_under_test import ModelUnderTest
from hiddenkey.hf.doctor.surroundings import check_ranks
from hiddenkey.hf.preserve import RandomState
from hiddenkey.hf.training_step import consistency_step
from hiddenkey.patterns import PATTERNS, random_keep, register_pattern

from .adapters import batch_for, build
from .tiny import FAMILIES, batch, make
from .tools import ALL, attached, inputs_for, logits_of, lora, same_state, snapshot

QUICK = {"rounds": 1, "size": 3, "length": 12}
FEW = ("bert", "llama", "t5", "vit", "mpnet")
SPANS = "hidden[:]:span@0.3 + logits[:]:span@0.3"


def examined(model, recipe=None, **options):
    return hiddenkey.doctor(model, recipe, **{**QUICK, **options})


def verdicts(diagnosis, check):
    return [finding.verdict for finding in diagnosis.findings if finding.check == check]


def reason(diagnosis, check):
    return "; ".join(finding.reason for finding in diagnosis.findings if finding.check == check)


@pytest.mark.parametrize("family", [f if f in FEW else pytest.param(f, marks=pytest.mark.full) for f in FAMILIES])
@pytest.mark.parametrize("recipe", ("hiddenkey[:]@0.3", f"{ALL} ~ js"), ids=("hiddenkey", "all"))
def test_every_family_is_green(family, recipe):
    if family != "llama" and recipe != "hiddenkey[:]@0.3":
        pytest.skip("once is enough")
    diagnosis = examined(lora(make(family)), recipe)
    assert diagnosis.ok, str(diagnosis)
    plan = hiddenkey.plan(make(family), recipe)
    assert len(verdicts(diagnosis, "rate")) == len(plan.sites)
    for check in ("effect", "evaluation", "gradients", "saved keys", "adapter keys", "consistency"):
        assert set(verdicts(diagnosis, check)) == {"ok"}, (check, str(diagnosis))
    causal = hiddenkey.plan(make(family), recipe).structure.stacks[-1].causal
    assert verdicts(diagnosis, "recompute") == ["skipped" if family == "mpnet" else "ok"]
    assert verdicts(diagnosis, "causality") == ["ok" if causal else "skipped"]
    assert verdicts(diagnosis, "generate") == ["ok" if causal else "skipped"]


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("bert", {"num_labels": 1})])
def test_made_up_batches_decide_nothing_for_the_training_that_follows(family, options):
    model = make(family, **options)
    with hiddenkey.attach(model, "hiddenkey[1:]@0.3") as attachment:
        assert examined(model).ok
        assert step_state(attachment) == StepState()


def whisper():
    """It hears, and has no function of its own to shift labels with."""
    config = hf.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def clip():
    """It sees and reads, and has no loss without being asked."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**size, "vocab_size": 64, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 4}))


@pytest.mark.parametrize("make_model", (whisper, clip))
def test_sounds_and_images(make_model):
    diagnosis = examined(make_model(), "hiddenkey[:]@0.3")
    assert diagnosis.ok, str(diagnosis)
    assert verdicts(diagnosis, "consistency") == ["ok" if make_model is whisper else "skipped"]
    assert verdicts(diagnosis, "recompute") == ["ok"]


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_what_the_plain_model_cannot_do_is_not_blamed_on_the_recipe(family):
    """PEFT gives Poly its task ids while the model's own forward runs, and at no other time."""
    diagnosis = examined(build("Poly", family), "hiddenkey[:]@0.3", batches=[batch_for("Poly", family)])
    assert diagnosis.ok, str(diagnosis)
    assert verdicts(diagnosis, "recompute") == ["skipped"]
    assert "with the recipe or without: task_ids should not be None" in reason(diagnosis, "recompute")
    assert verdicts(diagnosis, "generate") == ["skipped"]


def test_texts_alone_enter_no_vision_tower():
    """Its sites draw nothing then, which is no fault; a stack that is entered may not be silent."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = hf.LlamaConfig(**size, vocab_size=64, max_position_embeddings=64)
    seen = hf.CLIPVisionConfig(**size, image_size=16, patch_size=4)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=seen, text_config=text, image_token_id=63))
    model.train()
    diagnosis = examined(model, "hiddenkey[:]@0.3")
    assert diagnosis.ok, str(diagnosis)
    assert sorted(verdicts(diagnosis, "rate")) == ["ok"] * 4 + ["skipped"] * 4
    assert "enter no layer of this stack" in reason(diagnosis, "rate")


def test_a_prompt_has_room_for_what_is_generated():
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    for length in (16, 24, 64):
        diagnosis = examined(hf.GPT2LMHeadModel(config).train(), "hiddenkey[:]@0.3", length=length)
        assert diagnosis.ok, str(diagnosis)
        assert verdicts(diagnosis, "generate") == ["ok"]


def test_an_answer_in_a_text_of_one_token():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.BertForQuestionAnswering(hf.BertConfig(**size, vocab_size=64)).train()
    diagnosis = hiddenkey.doctor(model, "hidden:element@0.3", rounds=1, size=2, length=1)
    assert "evaluation" in str(diagnosis)


def test_what_differs_in_float64_is_not_rounded_away():
    ones = torch.ones(4, dtype=torch.float64)
    assert difference(ones + 1e-10, ones) == pytest.approx(1e-10, rel=1e-4)
    assert difference(ones.bfloat16(), ones) == 0


def test_a_model_that_draws_in_evaluation_is_not_blamed_on_the_recipe():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    config = hf.ViTMAEConfig(**size, **decoder, decoder_intermediate_size=64, image_size=16, patch_size=4)
    diagnosis = examined(hf.ViTMAEForPreTraining(config).train(), "hidden[:]:element@0.3")
    assert verdicts(diagnosis, "evaluation") == ["ok"], str(diagnosis)


@pytest.mark.parametrize("names", (("math",), ("default", "math")))
def test_adapters_of_any_name(names):
    model = make("llama")
    for name in names:
        config = LoraConfig(target_modules=["q_proj"])
        model = get_peft_model(model, config, name) if name == names[0] else model
        if name != names[0]:
            model.add_adapter(name, config)
    diagnosis = examined(model, "hiddenkey[:]@0.3")
    assert diagnosis.ok, str(diagnosis)
    assert f"{8 * len(names)} keys of a plain PEFT adapter" in reason(diagnosis, "adapter keys")


def count_training(module, args, output):
    if module.training:
        module.running += 1


@pytest.mark.parametrize("adapter", (False, True), ids=("plain", "lora"))
@pytest.mark.parametrize("before", (False, True), ids=("attaches", "attached"))
@pytest.mark.parametrize("family", ("llama", "vit"))
def test_the_model_is_left_as_it_was(family, before, adapter):
    model = lora(make(family)) if adapter else make(family)
    model.register_buffer("running", torch.zeros(3))
    model.register_forward_hook(count_training)
    attachment = hiddenkey.attach(model, "hiddenkey@0.3") if before else None
    inputs = batch(family)
    with attachment.watch.aside() if before else nullcontext():
        model(**inputs).loss.backward()
    next(iter(model.children())).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    shot, rates = snapshot(model), attachment.rates() if before else None
    numpy.random.seed(7)
    randoms = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    diagnosis = examined(model, None if before else "hiddenkey@0.3")
    assert len(diagnosis.findings) > 10
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert numpy.random.get_state()[1].tolist() == randoms[2]
    assert snapshot(model) == shot
    assert same_state(model, state)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        grad, value = gradients[name]
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert hiddenkey.find_attachment(model) is attachment
    if before:
        assert attachment.rates() == rates
        assert not step_state(attachment).dense
        assert not any("draw" in vars(site) for _, site in attachment.sites)
        assert all(switch in attachment.switches for _, site in attachment.sites for switch in site.switches)


def test_what_a_step_would_write_down_is_forgotten(monkeypatch):
    """Of the kind of labels, of a head that does not give the logits, and of the first training forward."""
    model = make("bert", depth=2)
    examined(model, "hiddenkey@0.3")
    assert model.config.problem_type is None
    monkeypatch.setattr(step, "agrees", lambda *_: False)
    model = lora(make("llama", depth=2))
    attachment = hiddenkey.attach(model, "hiddenkey@0.3")
    examined(model)
    assert step_state(attachment) == StepState()


def test_activations_are_kept_or_recomputed_as_before():
    model = attached("llama", "hidden[:]:element@0.3", depth=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shot = snapshot(model)
    assert any(
        module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
    )
    examined(model)
    assert snapshot(model) == shot


def test_the_model_is_left_as_it_was_after_an_error():
    model = attached("llama", "hiddenkey@0.3")
    model.model.layers[0].eval()
    shot, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(IndexError):
        hiddenkey.doctor(model, batches=[{"input_ids": torch.tensor([[999_999]])}])
    assert snapshot(model) == shot
    assert torch.equal(torch.get_rng_state(), state)


def test_own_batches_are_used():
    model, seen = attached("bert", "hiddenkey@0.3"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert hiddenkey.doctor(model, batches=[batch("bert")], rounds=1).ok
    assert (3, 12) in seen
    assert set(seen) <= {(3, 12), (6, 12)}
    with pytest.raises(hiddenkey.UserError, match="batches is empty"):
        hiddenkey.doctor(model, batches=[])
    with pytest.raises(hiddenkey.UserError, match=r"batches is a list of batches.*give \[batch\]"):
        hiddenkey.doctor(model, batches=batch("bert"))


def test_a_model_that_gives_tuples():
    model = attached("bert", "hiddenkey@0.3")
    model.config.return_dict = False
    assert examined(model).ok


@pytest.mark.parametrize("pattern", ("element", "column", "span"))
def test_what_is_counted(pattern):
    """Draws: every entry, every key of a head, or, for spans, a fixed number of places."""
    diagnosis = examined(make("llama"), f"logits[:]:{pattern}@0.3", size=3, length=12, rounds=2)
    finding = next(f for f in diagnosis.findings if f.check == "rate")
    forwards, kv_heads = 2 * 2, 2
    if pattern == "span":
        lengths = (12, 12, 9)
        assert finding.values["must"] == sum(int(n * 0.3 + 0.5) for n in lengths) / sum(lengths)
        assert finding.values["rate"] == finding.values["must"]
    else:
        queries = 12 if pattern == "element" else 1
        assert finding.values["draws"] == forwards * 3 * kv_heads * queries * 12
        assert finding.values["low"] < 0.3 < finding.values["high"]


def test_every_forward_draws_anew():
    """Masks that came twice would count as twice as many draws, at the very same rate."""
    model, one, rates = make("llama", depth=1), batch("llama"), []
    for batches, rounds in (([one], 1), ([one], 2), ([one, one], 1)):
        findings = hiddenkey.doctor(model, "hidden[:]:element@0.3", batches, rounds=rounds).findings
        rates += [finding.values["rate"] for finding in findings if finding.check == "rate"]
    assert rates[0] != rates[1] == rates[2]


def test_a_pattern_of_somebody_else_counts_rows():
    @register_pattern("all-or-nothing")
    def all_or_nothing(grid, p):
        return grid.lay(random_keep((*grid.lead, 1), p, grid.device).expand(*grid.lead, grid.places))

    try:
        diagnosis = examined(make("llama"), "hidden[:]:all-or-nothing@0.5", rounds=8)
        finding = next(f for f in diagnosis.findings if f.check == "rate")
        assert finding.values["draws"] == 8 * 2 * 3
        assert diagnosis.ok, str(diagnosis)
    finally:
        PATTERNS.remove("all-or-nothing")


def test_the_cost_is_that_of_the_step_that_training_takes(monkeypatch):
    """Of a frozen head, in chunks: a step gives only the last token's logits."""
    lengths = []

    def watched(*args):
        found = consistency_step(*args)
        lengths.append(found.outputs["logits"].shape[1])
        return found

    monkeypatch.setattr(surroundings, "consistency_step", watched)
    diagnosis = examined(lora(make("llama")), "hiddenkey@0.3")
    assert set(lengths) == {1}
    (tied,) = (finding for finding in diagnosis.findings if finding.check == "consistency")
    assert tied.values["parameters"] > 0


def test_the_cost_is_told_against_the_plain_model(monkeypatch):
    model = attached("llama", "hidden[:]:element@0.3", depth=1)
    patient = ModelUnderTest(model, hiddenkey.find_attachment(model), [batch("llama")], 1, None)
    plain = make("llama", depth=1)(**batch("llama")).loss
    assert torch.equal(surroundings._plain_loss(patient), plain)
    assert not torch.equal(surroundings._our_loss(patient), plain)
    times = {surroundings._plain_loss: iter([9, *[2] * 5]), surroundings._our_loss: iter([1, *[3] * 5])}
    monkeypatch.setattr(surroundings, "_time", lambda patient, step: next(times[step]))
    (finding,) = surroundings.check_cost(patient)
    assert finding.values == {"ratio": 1.5, "seconds": 3}


def test_adapter_dropouts_are_named():
    diagnosis = examined(lora(make("llama"), ["q_proj"], lora_dropout=0.05), "hiddenkey@0.3")
    assert diagnosis.ok, str(diagnosis)
    assert "4 dropouts of the adapter are on" in reason(diagnosis, "adapter")


def test_a_parameter_that_nobody_reaches_is_no_fault_of_ours():
    model = make("llama")
    model.unused = nn.Parameter(torch.ones(2))
    diagnosis = examined(model, "hiddenkey@0.3")
    assert diagnosis.ok
    assert verdicts(diagnosis, "gradients") == ["ok", "note"]
    assert "unused, nor does it without the recipe" in reason(diagnosis, "gradients")


@pytest.mark.parametrize("recipe", ("baseline", "hiddenkey-@0", "hidden[:]:span@0.01", "hidden[:]:span@0.01 ~ kl"))
def test_recipes_that_drop_nothing(recipe):
    diagnosis = examined(make("llama"), recipe)
    assert diagnosis.ok, str(diagnosis)
    assert verdicts(diagnosis, "effect") == ["skipped"]
    assert verdicts(diagnosis, "consistency") == ["skipped"]


def test_the_report():
    diagnosis = examined(make("bert"), "hiddenkey@0.3")
    plain = json.loads(json.dumps(diagnosis.to_dict()))
    assert plain["ok"] is True
    assert plain["model"] == "BertForSequenceClassification"
    assert [finding["values"] for finding in plain["findings"]] == [dict(f.values) for f in diagnosis.findings]
    assert plain["recipe"] == "logits:column@0.3 + hidden:element@0.3 ~ kl*1.0"
    assert len(plain["findings"]) == len(diagnosis.findings)
    text = str(diagnosis)
    assert "none red" in text
    assert "RED" not in text
    assert len(text.splitlines()) == len(diagnosis.findings) + 5


def test_what_is_refused():
    with pytest.raises(hiddenkey.AttachError, match="no recipe is attached"):
        hiddenkey.doctor(make("bert"))
    with pytest.raises(hiddenkey.AttachError, match=r"'logits:column@0\.3.*not 'baseline'"):
        hiddenkey.doctor(attached("bert", "hiddenkey@0.3"), "baseline")
    assert hiddenkey.doctor(attached("bert", "hiddenkey@0.3"), "hiddenkey@0.3", **QUICK).ok
    with torch.device("meta"):
        empty = FAMILIES["bert"]()
    with pytest.raises(hiddenkey.UserError, match="no weights"):
        hiddenkey.doctor(empty, "hiddenkey@0.3")


def test_a_sharded_model_is_refused(monkeypatch):
    model = attached("bert", "hiddenkey@0.3", depth=1)
    model.classifier.bias.ds_id = 7  # as DeepSpeed marks the parameters that it cuts up
    with pytest.raises(hiddenkey.UserError, match="before it is sharded"):
        hiddenkey.doctor(model)
    del model.classifier.bias.ds_id
    monkeypatch.setattr(examination, "DTensor", nn.Parameter)
    with pytest.raises(hiddenkey.UserError, match="before it is sharded"):
        hiddenkey.doctor(model)


def test_a_model_whose_inputs_are_unknown():
    model = make("bert")
    type(model).main_input_name, kept = "smells", type(model).main_input_name
    try:
        with pytest.raises(hiddenkey.UserError, match=r"takes 'smells'.*batches="):
            hiddenkey.doctor(model, "hiddenkey@0.3")
    finally:
        type(model).main_input_name = kept


def drawn_from(seed, model):
    """A number, and the square of what the model puts out."""
    torch.manual_seed(seed)
    number = float(torch.rand((), dtype=torch.float64))
    torch.manual_seed(seed)
    return number, float(model(**batch("bert")).logits.detach().double().square().sum())


ALIKE, APART = (None, None), (0.25, 0.25)


@pytest.mark.parametrize(
    ("others", "verdict"),
    (
        ([APART], "ok"),
        ([ALIKE], "wrong"),
        ([APART, ALIKE], "wrong"),
        ([(None, 0.25)], "wrong"),  # the same draws of other data
        ([(0.25, None)], "wrong"),  # other random states, from which the drops are not drawn
    ),
)
def test_ranks(others, verdict, monkeypatch):
    """One process plays several; None where another's number or output is the same as this one's."""
    model = attached("bert", "hiddenkey@0.3")
    torch.manual_seed(3)
    found, mine = RandomState(model), drawn_from(3, model)

    def gather(into, value):
        assert value == mine  # from the random states that the doctor found, not from those of its other checks
        into[:] = [value, *(tuple(v if w is None else w for v, w in zip(value, o, strict=True)) for o in others)]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: len(others) + 1)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    torch.manual_seed(4)
    (finding,) = check_ranks(types.SimpleNamespace(model=model, batch=batch("bert"), random_state=found))
    assert finding.verdict == verdict
    assert ("torch.manual_seed(seed + rank)" in finding.reason) == (verdict == "wrong")


@pytest.mark.full
def test_a_compiled_model_is_examined_as_it_is():
    torch._dynamo.reset()
    model = attached("bert", "hiddenkey@0.3")
    diagnosis = examined(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    assert diagnosis.ok, str(diagnosis)


TWO = """
import sys, torch
from torch import distributed
from tests.hf.tiny import make
import hiddenkey
rank, store, apart = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "apart"
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = make("bert")
hiddenkey.attach(model, "hiddenkey@0.3")
torch.manual_seed(5 + rank * apart)
diagnosis = hiddenkey.doctor(model, rounds=1)
print([finding.verdict for finding in diagnosis.findings if finding.check == "ranks"], diagnosis.ok)
distributed.destroy_process_group()
"""


@pytest.mark.full
@pytest.mark.parametrize(("seeds", "said"), (("apart", "['ok'] True"), ("alike", "['wrong'] False")))
def test_two_processes(seeds, said, tmp_path):
    command, root = [sys.executable, "-c", TWO], Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), seeds], stdout=subprocess.PIPE, text=True, cwd=root
        )
        for rank in range(2)
    ]
    for process in running:
        output, _ = process.communicate(timeout=200)
        assert output.strip() == said


def test_evaluation_after_an_examination():
    model, inputs = attached("llama", "hiddenkey@0.3"), inputs_for("llama", "right")
    examined(model)
    assert torch.equal(logits_of(model.eval(), inputs), logits_of(make("llama").eval(), inputs))
