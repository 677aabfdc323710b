"""docs/models.md from the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from .record import BROKEN, NOT_BUILT, PARTLY, REFUSED, SUPPORTED, Record

HEAD = """# Models

Every model type of the installed transformers that an auto class knows, built with a tiny random configuration, with
`logits[:]:column + hidden[:]:element` attached. Written by `make models` (`python -m tests.models`); do not edit.

{versions}

| model types | | what it means |
|---|---|---|
{totals}

What is checked of every model that is built:

- evaluation is that of the plain model, bit for bit; p = 0 is the plain model in training
- drops that keep everything change nothing; with p > 0 every site draws and the output changes
- gradients are finite, and the same with activation checkpointing (where the plain model's are)
- in causal models a later token reaches no earlier output while drops are at work
- detach gives everything back
- eager attention drops too; flash and flex attention are refused with the way out

Attention is found once by the library, from the model's code, and once by watching which modules compute a softmax
over keys in a forward; the two must agree.

*layers* counts every element of the model's stacks (text, vision and audio parts together), *attention* and
*feed-forward* the sites in them. Hybrid models have layers without softmax attention, so fewer attention sites than
layers; encoder-decoders have cross-attention, so more. `print(hiddenkey.plan(model, recipe))` says the same of yours.
"""

MEANING = {
    SUPPORTED: "drops in the attention and the feed-forward block of every layer that has them",
    PARTLY: "one of the two, or not in every layer; a recipe that asks for the rest is refused",
    REFUSED: "no drop is possible, `plan` and `attach` say why",
    BROKEN: "a check failed",
    NOT_BUILT: "no tiny model or no input could be made here, so nothing is known",
}


def render(records: list[Record]) -> str:
    """The page."""
    totals = "\n".join(
        f"| {sum(record.status == status for record in records)} | {status} | {meaning} |"
        for status, meaning in MEANING.items()
        if status != BROKEN or any(record.status == BROKEN for record in records)
    )
    head = HEAD.format(versions=versions(), totals=totals)
    return head + "".join(_section(status, records) for status in MEANING)


def versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}."


def row(record: Record) -> str:
    """A model type's line in the table of its status."""
    return f"| {' | '.join(_cell(column(record)) for column in COLUMNS[record.status].values())} |"


def write(path: Path, records: list[Record]) -> None:
    path.write_text(render(records))


def _section(status: str, records: list[Record]) -> str:
    rows = [record for record in records if record.status == status]
    if not rows:
        return ""
    columns = COLUMNS[status]
    lines = [f"## {status[0].upper()}{status[1:]}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += map(row, rows)
    return "\n" + "\n".join(lines) + "\n"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _notes(record: Record) -> str:
    notes = [f"no {part}" if part in ("logits", "hidden") else f"no drop: {part}" for part in record.missing]
    notes += [f"attention outside the layers, without drops: {path}" for path in record.outside]
    if record.unreached:
        notes.append(f"found but not run here: {', '.join(_towers(record.unreached))}")
    return "; ".join([*notes, *record.problems])


def _towers(sites: list[str]) -> list[str]:
    """The parts of a model that hold the sites: what comes before the layer's index."""
    return list(dict.fromkeys(site.split(" ", 1)[1].partition(".#")[0] for site in sites))


Column = Callable[[Record], object]
KIND: dict[str, Column] = {"model type": lambda r: f"`{r.kind}`", "class": lambda r: r.model}
COUNTS: dict[str, Column] = {
    "layers": lambda r: r.layers,
    "attention": lambda r: r.attentions,
    "feed-forward": lambda r: r.feed_forwards,
}
COLUMNS: dict[str, dict[str, Column]] = {
    SUPPORTED: {**KIND, **COUNTS, "also checked": lambda r: ", ".join(r.checks), "note": _notes},
    PARTLY: {**KIND, **COUNTS, "note": _notes, "error": lambda r: r.error},
    REFUSED: {**KIND, "error": lambda r: r.error},
    BROKEN: {**KIND, **COUNTS, "note": _notes},
    NOT_BUILT: {**KIND, "why": lambda r: r.error},
}
