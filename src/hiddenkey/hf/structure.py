"""Where a model keeps its layers, attention, feed-forward blocks and heads: found by structure, not by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LM,
)

from ..errors import AttachError, PlanError
from .adapters import is_wrapper
from .adapters import modules as all_modules
from .code import MIXER, closed_because, uses_interface, uses_own_softmax
from .feed_forward import Modules, ancestors, feed_forwards, join

# What sees the whole text unless its configuration says that it decodes; XLNet does so without a permutation.
BOTH_WAYS = frozenset({*MASKED_LM, "xlnet"})
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Layer:
    """One layer: module paths of its attentions and of what yields its feed-forward output; either may be none.

    closed: attentions into which no drop can be put.
    """

    path: str
    attentions: tuple[str, ...]
    feed_forwards: tuple[str, ...]
    closed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """All layers of one list of modules; `latter_half`: the paper's layers for it, those of a decoder-only model."""

    path: str
    layers: tuple[Layer, ...]
    causal: bool
    latter_half: bool


@dataclass(frozen=True)
class Structure:
    """A model as the positions see it. heads: what the last layer's output enters (classifier, LM head)."""

    stacks: tuple[Stack, ...]
    heads: tuple[str, ...]

    @property
    def last(self) -> Stack | None:
        """The stack whose output enters the heads: a decoder where there is one, wherever the towers that see or hear
        stand; None without any stack.
        """
        decoders = [stack for stack in self.stacks if stack.causal]
        return next(reversed(decoders or self.stacks), None)


def read(model: nn.Module) -> Structure:
    """Read the structure of a transformers model, inside a PEFT or other wrapper or not.

    Raises PlanError where there is no transformers model.
    """
    root, transformer = find_transformer(model)
    modules = Modules((path, module) for path, module, brought in all_modules(model) if not brought)
    is_pair = bool(getattr(transformer.config, "is_encoder_decoder", False))
    reader = _Reader(modules)
    return Structure(
        tuple(_stack(path, reader.layers(path), modules, is_pair) for path in reader.stacks()),
        tuple(join(root, head) for head in _heads(transformer)),
    )


def find_transformer(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """The outermost transformers model inside `model` and its path."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return path, module
    raise PlanError(
        f"{type(model).__name__} holds no transformers model; for your own attention code use "
        "hiddenkey.attention and hiddenkey.StructuredDropout"
    )


def require_model(model: object, taker: str, takes: str = "a model and a recipe, in this order") -> None:
    """Raises AttachError where something else was given in a model's place: its name, or a recipe."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"{taker} takes {takes}; the first is a {type(model).__name__}")


def is_attention(module: nn.Module) -> bool:
    """Whether the module computes attention: through transformers' interface, or with a softmax of its own.

    An adapter's attention around the model's is none: it looks at its own prompt.
    """
    return (uses_interface(module) or uses_own_softmax(module)) and not is_wrapper(module)


def reads_lower_keys(layer: nn.Module) -> bool:
    """Whether the layer takes its keys and values from a layer below it, as the upper ones of Gemma 3n do."""
    return any(getattr(module, "is_kv_shared_layer", False) for module in layer.modules())


class _Reader:
    """Finds the layers among the modules of a model."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.lists: dict[str, None] = {}
        self.attentions = dict.fromkeys(path for path, module in modules.items() if is_attention(module))
        self.closed = dict.fromkeys(path for path, module in modules.items() if closed_because(module))
        known = {*self.attentions, *self.closed}
        around = {path for attention in known for path in ancestors(attention)}
        ours = {path: module for path, module in modules.items() if not is_wrapper(module)}
        named = {path for path, module in ours.items() if MIXER.search(type(module).__name__)}
        self.mixers = known | (named - around)

    def stacks(self) -> list[str]:
        """The lists whose elements are layers: with attention, or where there is none, with feed-forwards."""
        found = [self._stack_of(path) for path in (*self.attentions, *self.closed)]
        stacks = dict.fromkeys(path for path in found if path is not None)
        if not stacks:
            lists = [path for path, module in self.modules.items() if isinstance(module, nn.ModuleList)]
            lists = [path for path in lists if any(map(self._is_feed_forward_layer, self._elements(path)))]
            # Stages hold layers; the layers are meant.
            stages = {outer for path in lists for outer in ancestors(path)}
            stacks = dict.fromkeys(path for path in lists if path not in stages)
        self.lists = dict.fromkeys(path for path in self.modules if path in stacks)
        return list(self.lists)

    def layers(self, stack: str) -> list[Layer]:
        """Every element of the list, so that an index means the same in each of them."""
        return [self._layer(path) for path in self._elements(stack)]

    def _layer(self, path: str) -> Layer:
        parts = (self._inside(path, self.attentions), self.feed_forwards(path), self._inside(path, self.closed))
        return Layer(path, *(self._own(path, part) for part in parts))

    def _own(self, layer: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are not of layers inside this one."""
        inner = tuple(stack + "." for stack in self._inside(layer, self.lists))
        return tuple(path for path in paths if not path.startswith(inner))

    def _is_feed_forward_layer(self, path: str) -> bool:
        return path not in self.attentions and path not in self.closed and bool(self.feed_forwards(path))

    def feed_forwards(self, layer: str) -> tuple[str, ...]:
        return tuple(feed_forwards(layer, list(self._inside(layer, self.mixers)), self.modules))

    def _stack_of(self, attention: str) -> str | None:
        """The list of the innermost element of a list around the attention that also holds a feed-forward.

        Innermost, because vision models nest layers in stages; with a feed-forward block, because T5 keeps the
        parts of a layer in a ModuleList of their own.
        """
        around = (attention, *ancestors(attention))
        elements = [path for path in around if isinstance(self.modules.get(path.rpartition(".")[0]), LISTS)]
        elements = [path for path in elements if path != attention]
        whole = next((path for path in elements if self.feed_forwards(path)), None)
        element = whole or next(iter(elements), None)
        return None if element is None else element.rpartition(".")[0]

    def _elements(self, stack: str) -> list[str]:
        return [f"{stack}.{name}" for name, _ in self.modules[stack].named_children()]

    def _inside(self, layer: str, paths: Collection[str]) -> tuple[str, ...]:
        return tuple(path for path in self.modules.inside(layer) if path in paths)


def _stack(path: str, layers: list[Layer], modules: dict[str, nn.Module], is_pair: bool) -> Stack:
    attentions = [attention for layer in layers for attention in layer.attentions]
    own = [] if is_pair else [path]
    causal = any(_is_causal(module, modules) for module in attentions or own)
    return Stack(path, tuple(layers), causal, causal and not is_pair)


def _is_causal(path: str, modules: dict[str, nn.Module]) -> bool:
    """What the module says of itself, else what the configuration around it is for."""
    own = getattr(modules[path], "is_causal", None)
    if own is not None:
        return bool(own)
    around = (modules[above] for above in (path, *ancestors(path), "") if above in modules)
    config = next((module.config for module in around if hasattr(module, "config")), None)
    kind = getattr(config, "model_type", None)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return kind in CAUSAL and (kind not in BOTH_WAYS or bool(decodes))


def _heads(transformer: PreTrainedModel) -> Iterator[str]:
    """The module that takes the representation: the LM head, else what follows the base model and its pooler."""
    lm_head = transformer.get_output_embeddings()
    if lm_head is not None:
        yield from (path for path, module in transformer.named_modules() if module is lm_head)
        return
    base = transformer.base_model
    if base is transformer:
        return
    after_base = False
    for name, module in transformer.named_children():
        if module is base:
            after_base = True
        elif after_base and any(True for _ in module.parameters()):
            yield name
            return
