"""What a report is made of, before it is Markdown or HTML. Texts may hold inline Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .machine import slug


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    lead: bool = False
    """Whether it is the answer that the page opens with."""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows as they are read, and the same numbers for machines."""

    name: str
    """Of the files: `<name>.csv`, `<name>.tex`."""
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Sequence[dict[str, Any]]
    """One dictionary for each line of the CSV file, in long form."""
    note: str = ""
    long: bool = False
    """Folded on the page; in Markdown a link to its files."""


@dataclass(frozen=True)
class Figure:
    """One picture."""

    name: str
    """Of its file `<name>.svg`."""
    title: str
    alt: str
    """What it shows, in words, for those who do not see it."""
    svg: str


@dataclass(frozen=True)
class Figures:
    """Pictures beside one another."""

    figures: Sequence[Figure]
    note: str = ""
    title: str = ""
    long: bool = False
    """Folded on the page, left out in Markdown."""


Block = Text | Bullets | Table | Figures


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def anchor(self) -> str:
        """The heading as the name of a place on the page."""
        return slug(self.title)


@dataclass(frozen=True)
class Report:
    """The whole."""

    title: str
    sections: Sequence[Section]

    @property
    def blocks(self) -> list[Block]:
        """All blocks in order."""
        return [block for section in self.sections for block in section.blocks]

    @property
    def tables(self) -> list[Table]:
        """All tables in order."""
        return [block for block in self.blocks if isinstance(block, Table)]

    @property
    def figures(self) -> list[Figure]:
        """All figures in order."""
        return [figure for block in self.blocks if isinstance(block, Figures) for figure in block.figures]
