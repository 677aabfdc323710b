"""The doctor: green where all is well, and the model is as it was before."""

import json
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import distributed, nn

import hiddenkey
from hiddenkey.patterns import PATTERNS, random_keep, register_pattern

from ..api import (
    StepState,
    difference,
    examination,
    interval,
    rates,
    step_state,
    surroundings,
    training_step,
)
from .adapters import batch_for, build
from .tiny import FAMILIES, batch, make
from .tools import ALL, attached, lora, same_state, snapshot

QUICK = {"rounds": 1, "size": 3, "length": 12}
FEW = ("bert", "llama", "t5", "vit", "mpnet")
SPANS = "hidden[:]:span@0.3 + logits[:]:span@0.3"


def examined(model, recipe=None, **options):
    return hiddenkey.doctor(model, recipe, **{**QUICK, **options})


def verdicts(diagnosis, check):
    return [finding.verdict for finding in diagnosis.findings if finding.check == check]


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


def test_what_differs_in_float64_is_not_rounded_away():
    ones = torch.ones(4, dtype=torch.float64)
    assert difference(ones + 1e-10, ones) == pytest.approx(1e-10, rel=1e-4)
    assert difference(ones.bfloat16(), ones) == 0


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
    monkeypatch.setattr(training_step, "agrees", lambda *_: False)
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


# Models and recipes that are well, and what is said of what cannot be looked at.

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 4}


def whisper():
    """It hears, and has no function of its own to shift labels with."""
    size = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    audio = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(vocab_size=64, **size, **heads, **audio, **tokens))


def clip():
    """It sees and reads, and has no loss without being asked."""
    text = {**SIZE, "vocab_size": 64, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**SIZE, **IMAGE}))


def llava():
    text = hf.LlamaConfig(**SIZE, vocab_size=64, max_position_embeddings=64)
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**SIZE, **IMAGE), text_config=text, image_token_id=63)
    return hf.LlavaForConditionalGeneration(config)


def vit_mae():
    """It draws in evaluation mode."""
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    return hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SIZE, **IMAGE, **decoder, decoder_intermediate_size=64))


def short_gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=24))


def answers():
    return hf.BertForQuestionAnswering(hf.BertConfig(**SIZE, vocab_size=64))


def narrow():
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**SIZE, "num_hidden_layers": 1}, vocab_size=64, num_key_value_heads=1)
    )


def two_adapters():
    model = get_peft_model(make("llama", depth=2), LoraConfig(target_modules=["q_proj"]), "default")
    model.add_adapter("math", LoraConfig(target_modules=["q_proj"]))
    return model


def unreached():
    model = make("llama", depth=2)
    model.unused = nn.Parameter(torch.ones(2))
    return model


def draws_by_itself():
    model = make("llama", depth=2)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + torch.randn(output.shape))
    return model


def with_its_own_dropout():
    model = attached("bert", "hidden[:]:element@0.3", depth=2)
    model.bert.embeddings.dropout.p = 0.5
    return model


def tuples():
    model = make("bert", depth=2)
    model.config.return_dict = False
    return model


ONE = {"input_ids": torch.full((3, 1), 5), "labels": torch.tensor([0, 2, 1])}
FEW_FALL = "logits[:]:column@0.3 + hidden[:]:element@0.3 + input:element@0.000001"
TWO_ALIKE = "2 of {} sites change it by themselves"
STREAM, EVERYWHERE = "hidden[:]:element@0.3", "hiddenkey[:]@0.3"
# (model, recipe, options of the doctor, check -> what its lines match, each with its verdict before it)
GREEN = [
    (whisper, EVERYWHERE, {}, {"consistency": "^ok", "recompute": "^ok"}),
    (clip, EVERYWHERE, {}, {"consistency": "^skipped", "recompute": "^ok"}),
    (llava, EVERYWHERE, {}, {"rate": r"skipped .*enter no layer of this stack(?s:.*)ok"}),
    (vit_mae, STREAM, {}, {"evaluation": "^ok"}),
    *((short_gpt2, EVERYWHERE, {"length": length}, {"generate": "^ok"}) for length in (16, 24, 64)),
    (answers, "hidden:element@0.3", {"size": 2, "length": 1}, {"evaluation": "^ok"}),
    (tuples, "hiddenkey@0.3", {}, {}),
    (lambda: lora(make("llama"), ["q_proj"]), EVERYWHERE, {}, {"adapter keys": "8 keys of a plain PEFT adapter"}),
    (two_adapters, EVERYWHERE, {}, {"adapter keys": "8 keys of a plain PEFT adapter"}),
    *(
        (
            lambda f=family: build("Poly", f),
            EVERYWHERE,
            {"batches": [batch_for("Poly", family)]},
            {
                "recompute": "skipped .*with the recipe or without: task_ids should not be None",
                "generate": "^skipped",
            },
        )
        for family in ("bert", "llama")
    ),
    (lambda: lora(make("llama"), ["q_proj"], lora_dropout=0.05), EVERYWHERE, {}, {"adapter": "4 dropouts of the ad"}),
    (unreached, EVERYWHERE, {}, {"gradients": "ok .*\nnote .*unused, nor does it without the recipe"}),
    *(
        (lambda: make("llama"), recipe, {}, {"effect": "^skipped .*$", "consistency": "^skipped"})
        for recipe in ("baseline", "hiddenkey-@0", "hidden[:]:span@0.01", "hidden[:]:span@0.01 ~ kl")
    ),
    # Spans of 3 of 32 places in the last layer, of which the head sees the first token alone.
    (lambda: make("bert"), "hidden[3:]:span@0.1", {"size": 4, "length": 32}, {"effect": "1 of 1 sites change it"}),
    (
        lambda: make("llama", depth=2),
        "hidden[:]:span@0.97 + logits[:]:column@0.3",
        {},
        {"effect": TWO_ALIKE.format(4)},
    ),
    (
        lambda: make("bert", depth=2),
        "hidden[:]:span@0.99",
        {},
        {"effect": "everything falls at every draw, so there"},
    ),
    (
        draws_by_itself,
        "hiddenkey-[:]@0.3",
        {},
        {"effect": "the model draws by itself, which hides what one site does"},
    ),
    (with_its_own_dropout, None, {"red": {"own dropouts"}}, {"effect": TWO_ALIKE.format(2)}),
    (lambda: lora(make("bert", depth=2), ["query"], lora_dropout=0.5), STREAM, {}, {"effect": TWO_ALIKE.format(2)}),
    # Of a single token the only key is never dropped; of a rate of one in a million nothing falls.
    (lambda: make("bert", depth=2), FEW_FALL, {"batches": [ONE]}, {"effect": TWO_ALIKE.format(5)}),
    # Of a narrow slice at a small rate a few keys fall, and those on later ones or on padding show nowhere.
    *((narrow, f"logits[:]:column@{p} ~ kl", {"seed": s, "red": None}, {}) for p in (0.01, 0.02) for s in range(4)),
    (
        lambda: make("bert", depth=2).requires_grad_(False),
        STREAM,
        {"red": {"gradients"}},
        dict.fromkeys(("gradients", "recompute", "cost"), "no parameter is trainable"),
    ),
]


@pytest.mark.parametrize(("on", "recipe", "options", "said"), GREEN)
def test_what_is_well_is_green(on, recipe, options, said):
    options = {"red": set(), "seed": 0, **options}
    wanted, seed = options.pop("red"), options.pop("seed")
    torch.manual_seed(seed)
    diagnosis = examined(on().train(), recipe, **options)
    found = {finding.check for finding in diagnosis.wrong}
    assert not {"effect", "consistency"} & found if wanted is None else found == wanted, str(diagnosis)
    for check, pattern in said.items():
        lines = "\n".join(f"{f.verdict} {f.reason}" for f in diagnosis.findings if f.check == check)
        assert re.search(pattern, lines), lines


def test_the_cost_is_that_of_the_steps_of_training_and_of_the_plain_model(monkeypatch):
    """By a clock that ticks with every draw. Of a frozen head, a step gives only the last token's logits."""
    lengths, ticks = [], [0]

    def watched(*args):
        found = training_step.consistency_step(*args)
        lengths.append(found.outputs["logits"].shape[1])
        return found

    def clock():
        ticks[0] += 1
        tallies = (tally for _, site in attachment.sites for tally in site.tallies)
        return ticks[0] + sum(int(tally.counts[1]) for tally in tallies if tally.counts is not None)

    model = lora(make("llama", depth=1), ["q_proj"])
    attachment = hiddenkey.attach(model, "hiddenkey@0.3")
    monkeypatch.setattr(surroundings, "consistency_step", watched)
    monkeypatch.setattr(surroundings.time, "perf_counter", clock)
    findings = {finding.check: finding for finding in examined(model).findings}
    assert set(lengths) == {1}
    assert findings["consistency"].values["parameters"] > 0
    values = findings["cost"].values
    assert values["seconds"] == values["ratio"] > 100, "a plain step takes one tick: nothing is drawn in it"


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
    model = attached("bert", "hiddenkey@0.3", depth=2)
    mine = []
    for draw in (lambda: torch.rand((), dtype=torch.float64), lambda: model(**batch("bert")).logits.detach()):
        torch.manual_seed(3)
        drawn = draw().double()
        mine.append(float(drawn.square().sum() if drawn.dim() else drawn))

    def gather(into, value):
        assert value == tuple(mine)  # from the random states that the doctor found, not from those of its checks
        into[:] = [value, *(tuple(v if w is None else w for v, w in zip(value, o, strict=True)) for o in others)]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: len(others) + 1)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    torch.manual_seed(3)
    findings = hiddenkey.doctor(model, batches=[batch("bert")], rounds=1).findings
    (finding,) = (finding for finding in findings if finding.check == "ranks")
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


def test_json_has_no_number_for_what_is_not_finite():
    finding = hiddenkey.Finding(
        "recompute", "wrong", "no", values={"gradients": float("inf"), "loss": 0.5, "how": "a"}
    )
    found = hiddenkey.Diagnosis("hiddenkey@0.1", "a model", (finding,)).to_dict()
    [written] = json.loads(json.dumps(found, allow_nan=False))["findings"]
    assert written["values"] == {"gradients": None, "loss": 0.5, "how": "a"}


@pytest.mark.parametrize("number", ("rounds", "size", "length"))
def test_numbers_below_one_are_refused(number):
    with pytest.raises(hiddenkey.UserError, match=f"{number} = 0 is not allowed: it is 1 or more"):
        hiddenkey.doctor(make("bert"), "hiddenkey@0.1", **{number: 0})


def test_false_alarms_are_shared_by_all_sites():
    """Of four sites each may be red by chance a quarter as often."""
    findings = hiddenkey.doctor(make("llama"), "logits[:]:element@0.3", rounds=1, size=3, length=12).findings
    found = [finding.values for finding in findings if finding.check == "rate"]
    assert len(found) == 4
    for values in found:
        assert (values["low"], values["high"]) == interval(values["rate"], values["draws"], rates.FALSE_ALARM / 4)
