"""A plan as text."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dropouts import OwnDropout
    from .plan import Plan, Site
    from .structure import Stack

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
