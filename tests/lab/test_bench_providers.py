"""Every provider of the bench does what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hiddenkey
from hiddenkey.hf.attach import find_attachment
from hiddenkey.lab.bench import textbook
from hiddenkey.lab.bench.attention import RIVALS, Tensors
from hiddenkey.lab.bench.config import BenchConfig
from hiddenkey.lab.bench.models import StepCase, load_case
from hiddenkey.lab.bench.providers import RECIPES, Step, choose
from hiddenkey.lab.bench.step import work_of

CPU = torch.device("cpu")


@pytest.fixture
def encoder(bert: Path) -> StepCase:
    return load_case(str(bert), BenchConfig(quick=True, batch_size=4), CPU)


@pytest.fixture
def decoder(llama: Path) -> StepCase:
    return load_case(str(llama), BenchConfig(quick=True, labelled=0.5), CPU)


def build(name: str, case: StepCase) -> Step:
    return choose((name,), case.task)[-1].build(case)


def rates(model: nn.Module) -> tuple[set[float], set[float]]:
    """Rates of the model's own dropout modules, and of the adapter's."""
    found = [(path, module.p) for path, module in model.named_modules() if type(module) is nn.Dropout]
    adapter = {rate for path, rate in found if "lora_dropout" in path}
    return {rate for path, rate in found if "lora_dropout" not in path}, adapter


def same_each_time(step: Step) -> bool:
    return torch.equal(step.loss(), step.loss())


@pytest.mark.parametrize(
    ("name", "own", "adapter", "attention"),
    [
        ("plain", {0.0}, set(), "sdpa"),
        ("own dropout, sdpa", {0.1}, set(), "sdpa"),
        ("own dropout, eager", {0.1}, set(), "eager"),
        ("lora_dropout", {0.0}, {0.1}, "sdpa"),
        ("textbook DropKey", {0.0}, set(), "textbook_dropkey"),
        ("textbook R-Drop", {0.0}, set(), "hiddenkey_sdpa"),
        ("forward alone", {0.0}, set(), "sdpa"),
        ("hiddenkey-@0.1", {0.0}, set(), "hiddenkey_sdpa"),
    ],
)
def test_dropouts_that_are_on(encoder: StepCase, name: str, own: set[float], adapter: set[float], attention: str):
    step = build(name, encoder)
    assert step.model.training
    assert rates(step.model) == (own, adapter)
    assert step.model.config._attn_implementation == attention
    assert same_each_time(step) == (name in ("plain", "lora_dropout", "forward alone"))  # LoRA starts at 0


def test_own_dropout_of_a_decoder_is_its_attention(decoder: StepCase):
    for name, rate in (("plain", 0.0), ("own dropout, sdpa", 0.1), ("own dropout, eager", 0.1)):
        step = build(name, decoder)
        found = {module.attention_dropout for module in step.model.modules() if hasattr(module, "attention_dropout")}
        assert found == {rate}
        assert same_each_time(step) == (rate == 0)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_recipes_are_attached(encoder: StepCase, decoder: StepCase, task: str):
    case = encoder if task == "classification" else decoder
    for recipe in RECIPES[task]:
        attachment = find_attachment(build(recipe, case).model)
        assert attachment is not None
        assert str(attachment.recipe) == str(hiddenkey.parse(recipe))


@pytest.mark.parametrize("causal", [False, True])
def test_textbook_dropkey_is_dropkey(causal: bool):
    q, k, v = (torch.randn(2, 4, 8, 16, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(2, 4, 8, 8) > 0.3
    keep |= torch.eye(8, dtype=torch.bool)  # no row emptied: the textbook has no answer there
    mask = torch.full((8, 8), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1) if causal else None
    ours = hiddenkey.attention(q, k, v, "logits:element@0.3", is_causal=causal, keep=keep)
    theirs = textbook.dropkey(q, k, v, mask, keep)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)  # its softmax is float32


def test_textbook_dropkey_draws_at_its_rate():
    keep = textbook.bernoulli_keep(torch.empty(4, 4, 64, 8), torch.empty(4, 4, 64, 8), 0.1)
    assert abs(1 - keep.float().mean().item() - 0.1) < 0.01


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_textbook_rdrop_is_the_formula(encoder: StepCase, decoder: StepCase, task: str):
    case = encoder if task == "classification" else decoder
    step = build("textbook R-Drop", case)
    torch.manual_seed(3)
    found = step.loss()
    torch.manual_seed(3)
    first, second = step.model(**case.batch), step.model(**case.batch)
    logits = [outputs["logits"] for outputs in (first, second)]
    valid = None
    if task == "causal-lm":
        logits = [view[:, :-1] for view in logits]
        valid = case.batch["labels"][:, 1:] != -100
    term = hiddenkey.consistency_loss("kl-rdrop", *logits, valid=valid)
    torch.testing.assert_close(found, (first["loss"] + second["loss"]) / 2 + term)
    assert term > 0


def test_plain_in_chunks_is_plain(decoder: StepCase):
    steps = [build(name, decoder) for name in ("plain", "plain, loss in chunks")]
    losses = [step.loss() for step in steps]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in step.model.parameters() if p.requires_grad] for step in steps]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_providers_share_frozen_weights_and_do_not_disturb_one_another(
    encoder: StepCase, decoder: StepCase, task: str
):
    case = encoder if task == "classification" else decoder
    alone = build("plain", case)
    before = alone.loss()
    base = {parameter.data_ptr() for parameter in case.model.parameters()}
    for provider in choose((), task):
        step = provider.build(case)
        frozen = {p.data_ptr() for p in step.model.parameters() if not p.requires_grad}
        trained = {p.data_ptr() for p in step.model.parameters() if p.requires_grad}
        assert frozen <= base
        assert not trained & base
        work_of(step)()
        assert all(parameter.grad is None for parameter in step.model.parameters())
    assert torch.equal(alone.loss(), before)
    assert case.model.config._attn_implementation == "sdpa"


def test_a_step_trains(decoder: StepCase):
    step = build("hiddenkey@0.1", decoder)
    before = [parameter.clone() for parameter in step.model.parameters() if parameter.requires_grad]
    work_of(step)()
    after = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["column, boolean mask", "column, one more feature", "textbook DropKey"])
@pytest.mark.parametrize("causal", [False, True])
def test_rivals_of_attention_leave_plain_attention_where_all_is_kept(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
):
    x = Tensors(*(torch.randn(1, 2, 8, 16) for _ in range(3)), causal)
    keep_all = lambda shape, *_: torch.ones(shape, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr("hiddenkey.lab.bench.attention.random_keep", keep_all)
    monkeypatch.setattr(
        "hiddenkey.lab.bench.attention.bernoulli_keep", lambda q, k, _: keep_all((*q.shape[:3], k.shape[2]))
    )
    torch.testing.assert_close(RIVALS[name].attend(x), RIVALS["plain sdpa"].attend(x))


def test_batches_have_the_shape_that_was_asked_for(bert: Path, llama: Path):
    batch = load_case(str(bert), BenchConfig(batch_size=8, length=40, padding=0.25), CPU).batch
    assert batch["input_ids"].shape == (8, 40)
    assert batch["attention_mask"].float().mean().item() == pytest.approx(0.75, abs=0.02)
    labels = load_case(str(llama), BenchConfig(batch_size=2, length=20, labelled=0.5), CPU).batch["labels"]
    assert (labels[:, :10] == -100).all()
    assert (labels[:, 10:] >= 0).all()
