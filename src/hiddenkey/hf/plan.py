"""Recipe × model → plan: what will be dropped where. Pure: the model is only looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import get_args

from torch import nn

from ..errors import PlanError
from ..patterns import PATTERNS
from ..positions import POSITIONS, Side
from ..recipe import Drop, Recipe, parse, space_of
from .attention_backend import check_backend
from .model_dropouts import OwnDropout, adapter_dropouts, own_dropouts
from .peft_layers import adapters, restless
from .source_reading import closed_because, passes_tokens_first
from .structure import Layer, Site, Stack, Structure, ancestors, find_transformer, read, require_model


@dataclass(frozen=True)
class Plan:
    """What `attach` will do to a model. `print(plan)` shows it.

    own_dropouts: the model's own rates, set to 0. adapter_dropouts: the adapters' (`lora_dropout`), left as they are.
    adapters: the names of the adapters that were there. restless: what they draw besides: "PVERA draws noise".
    """

    recipe: Recipe
    model: str
    structure: Structure
    sites: tuple[Site, ...]
    own_dropouts: tuple[OwnDropout, ...]
    adapter_dropouts: tuple[OwnDropout, ...]
    adapters: tuple[str, ...]
    restless: tuple[str, ...]

    def __str__(self) -> str:
        return describe(self)


def plan(model: nn.Module, recipe: str | Recipe) -> Plan:
    """What `recipe` drops where in `model`; changes nothing.

    Raises RecipeError for a recipe that does not parse; PlanError where a drop finds no site, a slice holds no
    layer, two drops meet, the attention backend would ignore us, or some attention takes no drops; also where
    there is no transformers model. AttachError for what is no model at all.
    """
    require_model(model, "plan")
    recipe = parse(recipe)
    structure = read(model)
    name = type(find_transformer(model)[1]).__name__
    for drop in recipe.drops:
        _check_open(drop, structure, model, name)
        _check_axes(drop, structure, model, name)
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    found = [_sites(drop, structure, paths, name) for drop in recipe.drops]
    _check_overlap(found)
    sites = tuple(chain.from_iterable(found))
    for site in sites:
        if site.side == "attention":
            problem = check_backend(site.path, model.get_submodule(site.path))
            if problem:
                raise PlanError(f"'{site.drop}' can't work in {name}: {problem}")
    own, theirs = tuple(own_dropouts(model)), tuple(adapter_dropouts(model))
    return Plan(recipe, name, structure, sites, own, theirs, tuple(adapters(model)), restless(model))


def _sites(drop: Drop, structure: Structure, paths: Collection[str], model: str) -> list[Site]:
    position = POSITIONS[drop.position]
    if position.per_layer:
        found = [
            Site(drop, path, side, (stack.path, index))
            for stack in structure.stacks
            for index, layer in _layers(drop, stack)
            for path, side in position.locate(layer)
        ]
    else:
        found = [Site(drop, path, side, None) for path, side in position.locate(structure)]
    if not found:
        raise PlanError(f"'{drop}' finds no site in {model}: {_why_none(drop, structure)}")
    _check_sides(found)
    _check_paths(found, paths, model)
    return found


def _check_paths(sites: list[Site], paths: Collection[str], model: str) -> None:
    """Refuse a position whose function yields modules that there are not."""
    for site in sites:
        if site.path not in paths:
            raise PlanError(f"the position {site.drop.position!r} yields {site.path}, which {model} does not have")


def _check_sides(sites: list[Site]) -> None:
    """Refuse a position whose function yields places of another space than the position's."""
    for site in sites:
        space = space_of(site.drop)
        if site.side not in get_args(Side):
            raise PlanError(
                f"the position {site.drop.position!r} yields the side {site.side!r} of {site.path}; it is one of "
                f"{', '.join(get_args(Side))}"
            )
        if (space == "stream") == (site.side == "attention"):
            wanted = "'input' or 'output'" if space == "stream" else "'attention'"
            raise PlanError(
                f"the position {site.drop.position!r} drops in the space {space!r}, but its function yields the side "
                f"{site.side!r} of {site.path}; yield {wanted} there, or register the position with another space"
            )


def _check_open(drop: Drop, structure: Structure, model: nn.Module, name: str) -> None:
    """Refuse a drop in attention where some of the chosen layers have attention that takes none."""
    if space_of(drop) == "stream" or not POSITIONS[drop.position].per_layer:
        return
    for stack in structure.stacks:
        for _, layer in _layers(drop, stack):
            for path in layer.closed:
                module = model.get_submodule(path)
                kind, reason = type(module).__name__, closed_because(module)
                raise PlanError(
                    f"'{drop}' can't work in {name}: {path} is a {kind}, and {reason}; leave "
                    f"{drop.position!r} out of the recipe, or choose layers without it"
                )


def _check_axes(drop: Drop, structure: Structure, model: nn.Module, name: str) -> None:
    """Refuse runs of tokens where they would run across the examples of a batch."""
    if space_of(drop) != "stream" or not PATTERNS[drop.pattern].needs_segments:
        return
    around = {path for stack in structure.stacks for path in (*ancestors(stack.path), "")}
    if any(passes_tokens_first(model.get_submodule(path)) for path in around):
        raise PlanError(
            f"'{drop}' can't work in {name}: it passes (tokens, batch, features) between its layers, so that runs of "
            "tokens would run across the batch or into the padding; use the pattern element or column"
        )


def _layers(drop: Drop, stack: Stack) -> Iterator[tuple[int, Layer]]:
    depth = len(stack.layers)
    if drop.layers is not None:
        chosen = drop.layers.resolve(depth)
    else:
        chosen = range(depth // 2, depth) if stack.latter_half else range(depth)
    return ((index, stack.layers[index]) for index in chosen)


def _why_none(drop: Drop, structure: Structure) -> str:
    if not structure.stacks:
        return (
            "no layer with softmax attention or a feed-forward block of linear maps was found in it; for code of "
            "your own use hiddenkey.attention and hiddenkey.StructuredDropout"
        )
    depths = ", ".join(f"{len(stack.layers)} in {stack.path}" for stack in structure.stacks)
    if drop.layers is not None and not any(drop.layers.resolve(len(stack.layers)) for stack in structure.stacks):
        return f"the slice [{drop.layers}] holds none of its layers ({depths}); choose another, or leave it out"
    usable = []
    for position in POSITIONS:
        views = [layer for stack in structure.stacks for layer in stack.layers] if position.per_layer else [structure]
        if any(True for view in views for _ in position.locate(view)):
            usable.append(position.name)
    chosen = [layer for stack in structure.stacks for _, layer in _layers(drop, stack)]
    if drop.position in usable:
        return f"none of the {len(chosen)} chosen layers has {drop.position!r}, other layers do; choose those"
    return f"its {drop.position!r} was not found; positions found there: {', '.join(usable)}"


def _check_overlap(sites_by_drop: Iterable[Iterable[Site]]) -> None:
    taken: dict[tuple[str, str], Drop] = {}
    for sites in sites_by_drop:
        own = {(site.drop.position, site.path): site.drop for site in sites}
        for place in own:
            if place in taken:
                raise PlanError(
                    f"'{taken[place]}' and '{own[place]}' meet at {place[1]}: give them layers that do not overlap"
                )
        taken |= own


DIGITS = re.compile(r"\d+")


def describe(plan: Plan) -> str:
    """The plan as a table: one line per drop and kind of site, then the dropouts that were there before."""
    lines = [f"recipe  {plan.recipe}", f"model   {plan.model}: {_stacks(plan)}", ""]
    rows = [("drop", "sites", "where"), *(_row(group) for group in _groups(plan))]
    if not plan.sites:
        rows.append(("nothing", "0", "the recipe drops nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines += [f"  {drop:<{widths[0]}}  {sites:>{widths[1]}}  {where}" for drop, sites, where in rows]
    lines += ["", f"own dropouts set to 0: {_dropouts(plan.own_dropouts) or 'none there'}"]
    if plan.adapter_dropouts:
        lines.append(f"adapter dropout left as it is: {_dropouts(plan.adapter_dropouts)}")
    if plan.restless:
        lines.append(f"the adapter by itself, in training: {', '.join(plan.restless)}")
    return "\n".join(lines)


def _stacks(plan: Plan) -> str:
    return "; ".join(
        f"{len(stack.layers)} {'causal ' if stack.causal else ''}layers in {stack.path}{_without(stack)}"
        for stack in plan.structure.stacks
    )


def _without(stack: Stack) -> str:
    """What some of the layers lack: hybrid models have layers without softmax attention, or without feed-forward."""
    lacking = {
        "attention": sum(not layer.attentions and not layer.closed for layer in stack.layers),
        "feed-forward": sum(not layer.feed_forwards for layer in stack.layers),
    }
    parts = [f"{count} without {what}" for what, count in lacking.items() if count]
    return f" ({', '.join(parts)})" if parts else ""


def _groups(plan: Plan) -> list[list[Site]]:
    """Sites that differ in nothing but the layer."""
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in plan.sites:
        kind = DIGITS.sub("#", site.path) if site.layer else site.path
        groups.setdefault((str(site.drop), kind, site.layer[0] if site.layer else ""), []).append(site)
    return list(groups.values())


def _row(sites: list[Site]) -> tuple[str, str, str]:
    first = sites[0]
    where = f"{first.side} of {first.path}"
    if first.layer is not None:
        stack, _ = first.layer
        prefix = len(stack) + 1
        _, _, tail = first.path[prefix:].partition(".")
        indices = [site.layer[1] for site in sites if site.layer]
        where = f"{first.side} of {stack}.{_ranges(indices)}{'.' + tail if tail else ''}"
    return str(first.drop), str(len(sites)), where


def _ranges(indices: list[int]) -> str:
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _dropouts(dropouts: tuple[OwnDropout, ...]) -> str:
    counts = Counter((_kind(own), own.p) for own in dropouts)
    return ", ".join(f"{count} x {name} {p:g}" for (name, p), count in counts.items())


def _kind(own: OwnDropout) -> str:
    path = own.path if own.name == "p" else f"{own.path}.{own.name}"
    return ".".join(DIGITS.sub("#", path).split(".")[-2:])
