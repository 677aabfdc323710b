"""The PEFT tuners that are tested, each with its configuration for tiny models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version

from .tiny import batch, make
from .tools import quiet

# Linear maps of the attention and of the feed-forward block.
LINEARS = {
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}
ATTENTION = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
FEED_FORWARD = {"bert": ["intermediate.dense", "output.dense"], "llama": ["up_proj", "down_proj"]}
NORMS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm"]}
TASK = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
FULL = "full fine-tuning"


@dataclass(frozen=True)
class Case:
    """A tuner: its configuration's class, options, the targets by family, and the options that switch dropouts on.

    mergeable: into the base weights. draws: by itself in training, so that two passes differ without any dropout.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] | None = field(default_factory=lambda: LINEARS)
    dropout: tuple[str, ...] = ()
    mergeable: bool = True
    draws: bool = False
    families: tuple[str, ...] = ("bert", "llama")


def lora(**options: Any) -> Case:
    targets = options.pop("targets", LINEARS)
    return Case("LoraConfig", {"r": 2, "lora_alpha": 4, **options}, targets, ("lora_dropout",))


def prompt(config: str, *families: str, **options: Any) -> Case:
    return Case(config, options, None, mergeable=False, families=families or ("bert", "llama"))


VECTORS = {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2}
CONTEXT = {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
LYCORIS = ("rank_dropout", "module_dropout")
TUNERS = {
    "LoRA": lora(),
    "LoRA on attention": lora(targets=ATTENTION),
    "LoRA on feed-forward": lora(targets=FEED_FORWARD),
    "LoRA on all-linear": lora(targets=dict.fromkeys(LINEARS, "all-linear")),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "AdaLoRA": Case("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 50}, dropout=("lora_dropout",)),
    "IA3": Case("IA3Config"),
    "VeRA": Case("VeraConfig", {"r": 4}, dropout=("vera_dropout",)),
    "PVeRA": Case("PveraConfig", {"r": 4}, dropout=("pvera_dropout",), draws=True),
    "LoHa": Case("LoHaConfig", {"r": 2}, dropout=LYCORIS),
    "LoKr": Case("LoKrConfig", {"r": 2}, dropout=LYCORIS),
    "OFT": Case("OFTConfig", {"oft_block_size": 4}, dropout=("module_dropout",)),
    "BOFT": Case("BOFTConfig", {"boft_block_size": 4}, dropout=("boft_dropout",)),
    "HRA": Case("HRAConfig", {"r": 2}),
    "RandLoRA": Case("RandLoraConfig", {"r": 2}, dropout=("randlora_dropout",)),
    "FourierFT": Case("FourierFTConfig", {"n_frequency": 20}),
    "WaveFT": Case("WaveFTConfig", {"n_frequency": 20}),
    "VB-LoRA": Case("VBLoRAConfig", VECTORS, dropout=("vblora_dropout",)),
    "Uni-LoRA": Case("UniLoraConfig", {"r": 2, "theta_d_length": 64}, dropout=("unilora_dropout",)),
    "TinyLoRA": Case("TinyLoraConfig", {"r": 2, "u": 4}, dropout=("tinylora_dropout",)),
    "C3A": Case("C3AConfig", {"block_size": 8}),
    "MiSS": Case("MissConfig", {"r": 2}, dropout=("miss_dropout",)),
    "RoAd": Case("RoadConfig", {"group_size": 4}),
    "SHiRA": Case("ShiraConfig", {"r": 2}),
    "OSF": Case("OSFConfig", {"effective_rank": 8}, mergeable=False),
    "DeLoRA": Case("DeloraConfig", {"r": 2}, dropout=("module_dropout",)),
    "GraLoRA": Case("GraloraConfig", {"r": 4, "gralora_k": 2}, dropout=("gralora_dropout",)),
    "HiRA": Case("HiraConfig", {"r": 2}, dropout=("hira_dropout",)),
    "GLoRA": Case("GloraConfig", {"r": 2}),
    "PSOFT": Case("PsoftConfig", {"r": 4}, dropout=("psoft_dropout",)),
    "DEFT": Case("DeftConfig", {"r": 2}, dropout=("deft_dropout",)),
    "FRoD": Case("FrodConfig", {"progressbar": False}, dropout=("frod_dropout",)),
    "AdaMSS": Case("AdamssConfig", {"r": 4, "num_subspaces": 2, "subspace_rank": 1}),
    "Lily": Case("LilyConfig", {"r": 2}, mergeable=False),
    "PEANuT": Case("PeanutConfig", {"r": 2}, mergeable=False),
    "SuperTuning": Case("SupertuningConfig"),
    "BEFT": Case("BeftConfig", families=("bert",)),
    "Poly": Case("PolyConfig", {"r": 2, "n_tasks": 2, "n_skills": 2}, mergeable=False, draws=True),
    "LN tuning": Case("LNTuningConfig", {}, NORMS),
    "trainable tokens": Case("TrainableTokensConfig", {"token_indices": [3, 4, 5]}, None),
    "adaption prompt": prompt("AdaptionPromptConfig", "llama", adapter_len=5, adapter_layers=2),
    "ShadowPEFT": prompt("ShadowConfig", "llama", shadow_dropout=0.0),
    "prompt tuning": prompt("PromptTuningConfig", num_virtual_tokens=5),
    "multitask prompt tuning": prompt("MultitaskPromptTuningConfig", num_virtual_tokens=5, num_tasks=2),
    "P-tuning": prompt("PromptEncoderConfig", num_virtual_tokens=5, encoder_hidden_size=8),
    "CPT": prompt("CPTConfig", "llama", **CONTEXT),
    "prefix tuning": prompt("PrefixTuningConfig", num_virtual_tokens=5),
    "cartridges": prompt("CartridgeConfig", num_virtual_tokens=5),
}
# Two families in `make test`; every other tuner has its second family in the long tests.
BOTH = ("LoRA", "LoRA on feed-forward", "prefix tuning", FULL)
# What `make test` looks at from every side; of the others it takes a step.
COMMON = (
    *BOTH,
    "LoRA on all-linear",
    "DoRA",
    "AdaLoRA",
    "IA3",
    "VeRA",
    "PVeRA",
    "LoHa",
    "LoKr",
    "OFT",
    "Poly",
    "CPT",
)
COMMON = (*COMMON, "LN tuning", "trainable tokens", "adaption prompt", "ShadowPEFT", "prompt tuning", "P-tuning")


def pairs(tuners: Iterable[str], common: tuple[str, ...] = COMMON) -> list[Any]:
    """Each tuner with one family; what is not common, and the other family, is left to the long tests.

    Tuners of linear maps come on the encoder, where the site is the adapter's layer itself; others on the decoder.
    """
    found = []
    for tuner in tuners:
        case = TUNERS.get(tuner)
        families = case.families if case else tuple(TASK)
        first = families[0] if case and case.targets is LINEARS else families[-1]
        for family in families:
            fast = tuner in common and (family == first or tuner in BOTH)
            found.append(pytest.param(tuner, family, marks=() if fast else pytest.mark.full, id=f"{tuner} {family}"))
    return found


def adapt(model: Any, tuner: str, family: str, *, dropout: float = 0.0, **options: Any) -> Any:
    """The tuner around the model, with its weights moved off their start; skips where this PEFT hasn't got it."""
    case = TUNERS[tuner]
    if (tuner, family) == ("prefix tuning", "bert"):
        skip_where_peft_is_behind()
    kind = getattr(peft, case.config, None)
    if kind is None:
        pytest.skip(f"PEFT {peft.__version__} has no {case.config}")
    chosen = {"task_type": TASK[family], **case.options, **dict.fromkeys(case.dropout, dropout)}
    if case.targets is not None:
        chosen["target_modules"] = case.targets[family]
    if tuner == "IA3":
        chosen["feedforward_modules"] = FEED_FORWARD[family][-1:]
    return moved(peft.get_peft_model(model, kind(**{**chosen, **options})))


def skip_where_peft_is_behind() -> None:
    """transformers 5.24 calls a cache `cache`; PEFT before 0.22 looks for `past_key_values`, and is refused by it."""
    if Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22"):
        pytest.skip(f"PEFT {peft.__version__} itself does not work here with transformers {transformers.__version__}")


def moved(adapted: Any) -> Any:
    """Biases and trainable weights a little away from where they start, in training mode."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted.train()


def build(tuner: str, family: str, *, own: bool = False, **options: Any) -> Any:
    """A tiny model with the tuner; own: with the model's own dropouts."""
    model = make(family) if own else quiet(family)
    return moved(model) if tuner == FULL else adapt(model, tuner, family, **options)


def batch_for(tuner: str, family: str, *, labels: bool = True) -> dict[str, torch.Tensor]:
    """The family's batch, with task ids for the tuners that want them."""
    tasks = {"task_ids": torch.tensor([0, 1, 0])} if tuner in ("Poly", "multitask prompt tuning") else {}
    return {**batch(family, labels=labels), **tasks}
