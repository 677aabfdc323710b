"""Where a model keeps its layers, attention, feed-forward blocks and heads: found by structure, not by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LM
from transformers.pytorch_utils import Conv1D

from ..errors import AttachError, PlanError
from ..positions import Side
from ..recipe import Drop
from .peft_layers import inner, is_wrapper
from .peft_layers import modules as all_modules
from .source_reading import MIXER, closed_because, parameters, uses_interface, uses_own_softmax

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
class Site:
    """One place where one drop is at work.

    path: the module; side: its attention, its input or its output. layer: (stack path, index) or None.
    """

    drop: Drop
    path: str
    side: Side
    layer: tuple[str, int] | None


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


# Beside a module of its `modules_to_save` PEFT keeps copies, and calls one of them.
COPIES = ".modules_to_save."


class Modules(dict[str, nn.Module]):
    """Modules by path, in the order of `named_modules`: what is inside a module follows it directly."""

    def __init__(self, found: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__(found)
        self._order = list(self)
        self._place = {path: place for place, path in enumerate(self._order)}

    def inside(self, outer: str) -> Iterator[str]:
        """The paths inside a module, in order; the other modules are not looked at."""
        place = self._place.get(outer, len(self._order)) + 1
        while place < len(self._order) and self._order[place].startswith(outer + "."):
            yield self._order[place]
            place += 1


@dataclass(frozen=True)
class Pair:
    """A way up and the way down that belongs to it: paths of two linear maps, and the width between them."""

    up: str
    down: str
    width: int


def feed_forwards(layer: str, mixers: list[str], modules: Modules) -> Iterator[str]:
    """The modules in `layer` whose output is a feed-forward block's, before the residual add.

    mixers: what in the layer is attention or mixes tokens in another way.
    """
    inside = {path: modules[path] for path in modules.inside(layer) if COPIES not in path}
    taken = [_block_of(mixer, layer, modules) for mixer in mixers]
    free = {path: module for path, module in inside.items() if not any(_holds(block, path) for block in taken)}
    experts = {path if (block := path.rpartition(".")[0]) == layer else block for path in _experts(free)}
    yield from (_not_inside_a_copy(path) for path in inside if path in experts)
    pairs = _pairs({path: module for path, module in free.items() if not any(_holds(e, path) for e in experts)})
    widest = max((pair.width for pair in pairs), default=0)
    pairs = [pair for pair in pairs if pair.width * 2 >= widest]
    blocks = [_output_of(pair, layer, modules) for pair in pairs]
    own = [block for block, pair in zip(blocks, pairs, strict=True) if block != pair.down]
    yield from dict.fromkeys(_not_inside_a_copy(block) for block in own or blocks)


def _not_inside_a_copy(path: str) -> str:
    """The path of a block, which is the wrapper's where PEFT keeps copies of the whole block.

    Raises PlanError for a path inside such a copy: whichever adapter is active, its drop must be at work.
    """
    path = path.removesuffix(".original_module")
    wrapper, found, rest = path.partition(".original_module.")
    if found:
        raise PlanError(
            f"{wrapper} is one of PEFT's modules_to_save and holds a part of a feed-forward block, {rest}; name "
            "the linear layer itself or the whole block in modules_to_save, or put LoRA on it"
        )
    return path


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map (a quantised one is often a class of its own), or an adapter around one."""
    module = inner(module)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, Conv1D) or all(isinstance(size, int) for size in sizes)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear map."""
    linear: Any = inner(module)
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def ancestors(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _holds(block: str, path: str) -> bool:
    return path == block or path.startswith(block + ".")


def _experts(free: dict[str, nn.Module]) -> Iterator[str]:
    """The experts of a mixture: by name, or by weights with one matrix for each of them."""
    found: list[str] = []
    for path, module in free.items():
        inner_part = any(_holds(outer, path) for outer in found)
        if inner_part or isinstance(module, _ConvNd) or "parametrizations" in path:
            continue
        own = module.parameters(recurse=False)
        if path.endswith(".experts") or any(weight.dim() == 3 and min(weight.shape) > 1 for weight in own):
            found.append(path)
    yield from found


def _block_of(mixer: str, layer: str, modules: Modules) -> str:
    """The mixer with its own output projection: the outermost part of the layer that adds at most one map to it."""
    block = mixer
    for path in ancestors(mixer):
        if modules[path] in (modules[layer], inner(modules[layer])) or isinstance(modules[path], nn.ModuleList):
            break
        own, all_of_it = (len(linears(part, modules)) for part in (block, path))
        if own and all_of_it - own > 1:
            break
        block = path
    return block


def linears(block: str, modules: Modules) -> list[str]:
    """The topmost linear maps of a block, in order; the block may be one itself."""
    found: list[str] = []
    for path in (block, *modules.inside(block)):
        if is_linear(modules[path]) and not any(path.startswith(outer + ".") for outer in found):
            found.append(path)
    return found


def _pairs(free: dict[str, nn.Module]) -> list[Pair]:
    """Maps up from the stream and down to it again; the stream is as wide as the last map puts out that has any."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in free.items():
        if is_linear(module) and not any(path.startswith(outer + ".") for outer in sizes):
            sizes[path] = features(module)
    widths = dict.fromkeys(out for _, out in reversed(sizes.values()))
    return next((pairs for width in widths if (pairs := _pairs_of(width, sizes))), [])


def _pairs_of(stream: int, sizes: dict[str, tuple[int, int]]) -> list[Pair]:
    """Pairs are matched by the width between them, which a gate doubles."""
    pairs, ups = [], list[str]()
    for path, (into, out) in sizes.items():
        fitting = [up for up in ups if sizes[up][1] in (into, 2 * into)]
        if out == stream and fitting:
            pairs.append(Pair(fitting[0], path, into))
            ups = []
        elif into == stream:
            ups.append(path)
    return pairs


def _output_of(pair: Pair, layer: str, modules: Modules) -> str:
    """The block around a pair, or the map down where the block is the layer or adds the residual itself."""
    block = _common(pair.up, pair.down)
    module = modules[block]
    whole = module in (modules[layer], inner(modules[layer])) or isinstance(module, nn.ModuleList)
    return pair.down if whole or "residual" in parameters(module) else block


def _common(first: str, second: str) -> str:
    shared = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)
