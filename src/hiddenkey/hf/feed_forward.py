"""Where a layer's feed-forward output comes from: found by the widths of its linear maps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..errors import PlanError
from .adapters import inner

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
    return pair.down if whole or "residual" in inspect.signature(module.forward).parameters else block


def _common(first: str, second: str) -> str:
    shared = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)
