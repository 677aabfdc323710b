"""What the matrix knows of one model type, and how it is kept between runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

SUPPORTED, PARTLY, REFUSED, NOT_BUILT, BROKEN = "supported", "partly", "refused", "not built", "broken"


@dataclass
class Record:
    """One row. layers: of all stacks together; attentions, feed_forwards: sites with layers `[:]`.

    missing: what in the layers has no drop. outside: attention that is in no layer. unreached: sites that the inputs
    here do not reach. problems: checks that failed. error: what a user is told, or why the model isn't built.
    """

    kind: str
    model: str
    status: str = NOT_BUILT
    layers: int = 0
    attentions: int = 0
    feed_forwards: int = 0
    causal: bool = False
    checks: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    error: str = ""


def load(path: Path) -> dict[str, Record]:
    """The records of an earlier run by model type; a line that a kill cut short is left out."""
    records: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = Record(**json.loads(line))
                records[record.kind] = record
    return records


def add(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
