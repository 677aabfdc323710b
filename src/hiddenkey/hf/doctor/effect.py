"""Drops have an effect: training differs from what it is without them, from draw to draw, and by each site alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...recipe import Drop
from ..checks import some
from ..sites import AttentionSite, DropSwitch, StreamSite
from .findings import Finding
from .model_under_test import (
    SEED,
    ModelUnderTest,
    main_output,
    only_our_drops,
    outputs_of,
    tensors_in,
    without_our_drops,
)
from .outputs import difference
from .rates import ENOUGH, TOO_LITTLE, fallen, recorded

DRAWS = 8
States = list[Tensor]


def check_effect(tested: ModelUnderTest) -> Iterator[Finding]:
    """What is computed in training differs from that without our drops, from draw to draw, and by each site alone."""
    if not any(switch.is_on for switch in tested.attachment.switches):
        yield Finding("effect", "skipped", "no drop of the recipe is on, so there is nothing to see")
        return
    with only_our_drops(tested.attachment.model), torch.no_grad():
        with recorded(tested) as records:
            first = _states(tested, tested.model, SEED + 1)
        with recorded(tested) as others_drawn:
            second = _states(tested, tested.model, SEED + 2)
        with without_our_drops(tested.attachment):
            plain = _states(tested, tested.model, SEED + 1)
    drawn = [record for record in (*records.values(), *others_drawn.values()) if record.drawn]
    if drawn and not any(record.dropped for record in drawn):
        yield Finding("effect", "skipped", "nothing fell: the rates are too small for batches as small as these")
        return
    few = drawn and min(fallen(records), fallen(others_drawn)) < ENOUGH
    others = {"without drops": plain, "with another draw": second}
    if drawn and all(record.dropped == record.drawn for record in drawn):
        del others["with another draw"]
        yield Finding("effect", "skipped", "everything falls at every draw, so there is no other")
    for name, other in others.items():
        apart = [difference(*pair) for pair in zip(first, other, strict=True)]
        value, what = (apart[-1], "output") if apart[-1] else (max(apart), "layers' output")
        if value:
            reason = f"the {what} in training differs from that {name} by {value:.3g} of its norm"
            yield Finding("effect", "ok", reason, values={"difference": value})
        elif few:
            yield Finding("effect", "skipped", TOO_LITTLE)
        else:
            reason = f"the output in training is the same as {name}: no drop reaches it"
            yield Finding("effect", "wrong", reason, values={"difference": value})
    yield _check_each_site(tested)


def _check_each_site(tested: ModelUnderTest) -> Finding:
    """A kernel may be given a mask and ignore it, at one position or in one kind of layer, while other drops show."""
    model = tested.attachment.model  # not what was compiled around it, which every switch would compile again
    on = [
        (f"{drop.position} {path}", site, drop)
        for path, site in tested.attachment.sites
        for drop, switch in zip(site.drops, site.switches, strict=True)
        if switch.is_on
    ]
    with only_our_drops(model), torch.no_grad(), without_our_drops(tested.attachment):
        if not _same(_states(tested, model, SEED), _states(tested, model, SEED + 1)):
            return Finding("effect", "skipped", "the model draws by itself, which hides what one site does")
        shows = {name: _shows(tested, name, site, drop) for name, site, drop in on}
    ignored = [name for name, shown in shows.items() if shown is False]
    if ignored:
        reason = f"another draw at {some(ignored)} alone changes nothing: the mask is ignored there, or never another"
        return Finding("effect", "wrong", reason)
    if not any(shows.values()):
        return Finding("effect", "skipped", "too little falls at one site to see it there")
    return Finding("effect", "ok", f"{sum(map(bool, shows.values()))} of {len(on)} sites change it by themselves")


def _shows(tested: ModelUnderTest, name: str, site: AttentionSite | StreamSite, drop: Drop) -> bool | None:
    """Whether another draw of this site alone, through the same kernels, shows; None where too little fell to say."""
    model = tested.attachment.model
    with recorded(tested) as records, _on(site, drop):
        first = _states(tested, model, SEED)
        if any(not _same(_states(tested, model, SEED + turn), first) for turn in range(1, DRAWS)):
            return True
    record = records[name]
    only_key = isinstance(site, AttentionSite) and record.places == 1  # which is seen whatever is drawn
    return False if ENOUGH <= record.dropped < record.drawn and not only_key else None


@contextmanager
def _on(site: AttentionSite | StreamSite, drop: Drop) -> Iterator[None]:
    """One drop of one site switched on, while all are off."""
    switches = site.switches
    vars(site)["switches"] = tuple(DropSwitch(drop) if switch.drop == drop else switch for switch in switches)
    try:
        yield
    finally:
        vars(site)["switches"] = switches


def _states(tested: ModelUnderTest, model: nn.Module, seed: int) -> States:
    """The layers' outputs, and last the model's: a head may look at one token, on which nothing need fall."""
    with outputs_of(tested.attachment.model, tested.layers) as seen:
        output = main_output(tested.run(model, tested.batch, seed))
    return [*tensors_in(seen), output]


def _same(first: States, second: States) -> bool:
    return all(map(torch.equal, first, second))
