"""What PEFT puts into a model: layers around the model's own, virtual tokens, draws, a share of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

# Under these names a wrapper of PEFT keeps what it is put around; everything else in it is its own.
BASES: dict[type[nn.Module] | type[BaseTunerLayer], tuple[str, ...]] = {
    PeftModel: ("base_model",),
    BaseTuner: ("model", "lora_model"),
    BaseTunerLayer: ("base_layer",),
}
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
# And under these what is put around a layer to compile it, to recompute its activations, or to shard it (FSDP1).
SHELLS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# What tuners do in training by themselves, so that two passes differ in every layer. `MONTECLORA`: a kind of LoRA.
RESTLESS = {
    "PVERA": "draws noise",
    "POLY": "draws its routing",
    "MONTECLORA": "draws noise",
    "XLORA": "passes through the model twice",
}
# LoRA's variants that look at one token at a time.
BY_TOKEN = ("DoraLinearVariant",)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(path, module, whether an adapter brought it along), as `named_modules` walks through the model."""
    return _walk("", model, False, set())


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is an adapter's layer around one of the model's."""
    return isinstance(module, BaseTunerLayer) or _adapted_attention(module)


def inner(module: nn.Module) -> nn.Module:
    """What an adapter, PEFT's wrapper of `modules_to_save`, or a shell around a layer is put around."""
    while True:
        own = "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else "base_layer"
        parts = (getattr(module, name, None) for name in (*SHELLS, own))
        wrapped = next((part for part in parts if isinstance(part, nn.Module)), None)
        if wrapped is None:
            return module
        module = wrapped


def works_by_token(module: nn.Module) -> bool:
    """Whether an adapter in the module treats each token by itself: LoRA does, of other tuners it isn't known."""
    while isinstance(module, BaseTunerLayer):
        variants = getattr(module, "lora_variant", {}).values()
        plain = isinstance(module, LoraLayer) and "forward" not in vars(module)  # X-LoRA writes its own there.
        if not plain or any(type(variant).__name__ not in BY_TOKEN for variant in variants):
            return False
        module = module.base_layer
    return True


def adapters(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of the adapters in a transformers model and around it, by name."""
    found: dict[str, PeftConfig] = {}
    for module in _around(model):
        configs = getattr(module, "peft_config", None)
        found |= configs if isinstance(configs, dict) else {}
    return found


def restless(model: nn.Module) -> tuple[str, ...]:
    """What the tuners in the model do by themselves, such as "PVERA draws noise": two passes differ everywhere."""
    kinds = {
        "MONTECLORA" if getattr(config, "monteclora_config", None) else str(config.peft_type.value)
        for config in adapters(model).values()
    }
    return tuple(f"{kind} {does}" for kind, does in RESTLESS.items() if kind in kinds)


def virtual_tokens(model: nn.Module) -> int:
    """How many tokens the active adapter puts before the sequence; a prefix of keys and values is none."""
    for module in _around(model):
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            config = module.active_peft_config
            return 0 if config.peft_type.value in PREFIXES else int(config.num_virtual_tokens)
    return 0


def adds_to_loss(model: nn.Module) -> bool:
    """Whether a wrapper changes the loss that the model computes (AdaLoRA, ShadowPEFT, CPT)."""
    tuners = [inspect.unwrap(type(module).forward) for module in _around(model) if isinstance(module, BaseTuner)]
    own = any("loss" in forward.__code__.co_names for forward in tuners)
    return own or any(config.peft_type.value == "CPT" for config in adapters(model).values())


def _around(model: nn.Module) -> Iterator[nn.Module]:
    """The modules around a transformers model, outermost first, and itself."""
    for module in model.modules():
        yield module
        if isinstance(module, PreTrainedModel):
            return


def _walk(path: str, module: nn.Module, brought: bool, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, bool]]:
    if module in seen:
        return
    seen.add(module)
    yield path, module, brought
    bases = next((names for kind, names in BASES.items() if isinstance(module, kind)), None)
    bases = ("model",) if _adapted_attention(module) else bases
    for name, child in module.named_children():
        inside = brought or (bases is not None and name not in bases)
        yield from _walk(f"{path}.{name}" if path else name, child, inside, seen)


def _adapted_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "adaption_prompt", None), nn.Parameter)
