"""Where a model keeps its layers, attention, feed-forward blocks and heads: found by structure, not by name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PlanError
from .adapters import inner, is_wrapper
from .adapters import modules as all_modules

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Layer:
    """One transformer layer: module paths of its attentions and of what yields its feed-forward output."""

    path: str
    attentions: tuple[str, ...]
    feed_forwards: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """The layers of one `ModuleList`; `latter_half`: the paper's layers for it, those of a decoder-only model."""

    path: str
    layers: tuple[Layer, ...]
    causal: bool
    latter_half: bool


@dataclass(frozen=True)
class Structure:
    """A model as the positions see it. heads: what the last layer's output enters (classifier, LM head)."""

    root: str
    stacks: tuple[Stack, ...]
    heads: tuple[str, ...]


def read(model: nn.Module) -> Structure:
    """Read the structure of a transformers model, inside a PEFT or other wrapper or not.

    Raises PlanError where there is no transformers model.
    """
    root, transformer = find_transformer(model)
    modules = {path: module for path, module, brought in all_modules(model) if not brought}
    is_pair = bool(getattr(transformer.config, "is_encoder_decoder", False))
    layers: dict[str, list[str]] = {}
    for path, module in modules.items():
        if is_attention(module):
            layer = _layer_of(path, modules)
            if layer is not None:
                layers.setdefault(layer, []).append(path)
    stacks: dict[str, list[Layer]] = {}
    for path, attentions in layers.items():
        feed_forwards = tuple(_feed_forwards(path, attentions, modules))
        stacks.setdefault(path.rpartition(".")[0], []).append(Layer(path, tuple(attentions), feed_forwards))
    return Structure(
        root,
        tuple(_stack(path, members, modules, is_pair) for path, members in stacks.items()),
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


def is_attention(module: nn.Module) -> bool:
    """Whether the module computes attention: through transformers' interface, or with a softmax of its own.

    An adapter's attention around the model's is none: it looks at its own prompt.
    """
    return (uses_interface(module) or uses_own_softmax(module)) and not is_wrapper(module)


def uses_interface(module: nn.Module) -> bool:
    """Whether its forward looks its function up in transformers' AttentionInterface."""
    return any(name.startswith("ALL_") and name.endswith("ATTENTION_FUNCTIONS") for name in _names(module))


def uses_own_softmax(module: nn.Module) -> bool:
    """Whether it is an attention class whose forward calls softmax itself."""
    return "attention" in type(module).__name__.lower() and {"softmax", "matmul"} <= set(_names(module))


def counts_items(model: nn.Module) -> bool:
    """Whether the model divides its summed loss by `num_items_in_batch`: a loss of transformers that is given it.

    Many classifiers call the loss without their keyword arguments, and so take the mean.
    """
    kind: Any = type(model)
    return _passes_keywords_to_loss(kind)


@cache
def _passes_keywords_to_loss(kind: Any) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )


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


def _names(module: nn.Module) -> tuple[str, ...]:
    code: CodeType | None = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code else ()


def _ancestors(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _layer_of(attention: str, modules: dict[str, nn.Module]) -> str | None:
    """The innermost element of a ModuleList around the attention that also holds a feed-forward block.

    Innermost, because vision models nest layers in stages; with a feed-forward block, because T5 keeps the
    parts of a layer in a ModuleList of their own.
    """
    elements = [
        path
        for path in (attention, *_ancestors(attention))
        if isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList)
    ]
    for path in elements:
        if path != attention and next(_feed_forwards(path, [attention], modules), None):
            return path
    return next((path for path in elements if path != attention), None)


def _feed_forwards(layer: str, attentions: list[str], modules: dict[str, nn.Module]) -> Iterator[str]:
    """The modules whose output is the feed-forward block's, before the residual add."""
    taken = {_block_of(attention, layer, modules) for attention in attentions}
    linears = [
        path
        for path in _topmost_linears(layer, modules)
        if not any(path == block or path.startswith(block + ".") for block in taken)
    ]
    expert = next((p for p in modules if p.startswith(layer + ".") and p.endswith(".experts")), None)
    if expert is not None:
        yield _not_inside_a_copy(expert.rpartition(".")[0])
        return
    if not linears:
        return
    down = linears[-1]
    width = features(modules[down])[1]
    ups = [path for path in linears[:-1] if features(modules[path])[0] == width]
    if not ups:
        return
    block = _common(down, ups[0])
    alone = modules[block] in (modules[layer], inner(modules[layer])) or isinstance(modules[block], nn.ModuleList)
    yield _not_inside_a_copy(down if alone else block)


def _not_inside_a_copy(path: str) -> str:
    """The path of a block; PEFT keeps copies of `modules_to_save` side by side and calls one of them.

    Raises PlanError for a path inside such a copy: whichever adapter is active, its drop must be at work.
    """
    path = path.removesuffix(".original_module")
    for part in (".modules_to_save.", ".original_module."):
        wrapper, found, rest = path.partition(part)
        if found:
            raise PlanError(
                f"{wrapper} is one of PEFT's modules_to_save and holds a part of a feed-forward block, {rest}; name "
                "the linear layer itself or the whole block in modules_to_save, or put LoRA on it"
            )
    return path


def _block_of(attention: str, layer: str, modules: dict[str, nn.Module]) -> str:
    """The attention with its own output projection: the outermost part of the layer around it."""
    block = attention
    whole = inner(modules[layer])
    for path in _ancestors(attention):
        if modules[path] in (modules[layer], whole) or isinstance(modules[path], nn.ModuleList):
            break
        block = path
    return block


def _topmost_linears(layer: str, modules: dict[str, nn.Module]) -> list[str]:
    found: list[str] = []
    for path, module in modules.items():
        inner = any(path.startswith(outer + ".") for outer in found)
        if path.startswith(layer + ".") and not inner and is_linear(module):
            found.append(path)
    return found


def _common(first: str, second: str) -> str:
    shared = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _stack(path: str, layers: list[Layer], modules: dict[str, nn.Module], is_pair: bool) -> Stack:
    attentions = [modules[attention] for layer in layers for attention in layer.attentions]
    causal = any(getattr(attention, "is_causal", False) for attention in attentions)
    return Stack(path, tuple(layers), causal, causal and not is_pair)


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
