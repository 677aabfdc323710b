"""The report from its tasks: which section holds what."""

from __future__ import annotations

from collections.abc import Sequence

from . import claims_table, conditions, costs, figures, generation, headline, rivals, runs, small_tables, table1
from .blocks import Block, Bullets, Report, Section, Text
from .how import how
from .machine import slug
from .pool import Pool, findings, pools
from .study import Task
from .task_table import task_table


def make_report(tasks: Sequence[Task], notes: Sequence[str] = ()) -> Report:
    """All sections, in the order in which a reader asks; `notes` are what the records cannot say."""
    found = pools(tasks)
    main = found[0] if found else None
    claims = findings(main)
    sections = [
        Section("Does it help?", headline.blocks(main, claims, tasks)),
        Section("Claims", claims_table.blocks(claims, main)),
        Section("Table 1", _table1(found, tasks)),
        Section("Rate, rank and training", [*_figures(found), *conditions.blocks(tasks)]),
        Section("Rivals and fair comparisons", rivals.blocks(main) if main else [Text("Not run.")]),
        Section("Tables 2 to 5", [*generation.blocks(tasks), *small_tables.blocks(tasks)]),
        Section("Cost", costs.blocks(tasks)),
        Section("How it was done", [how(tasks), *([Bullets(notes)] if notes else []), *runs.blocks(tasks)]),
    ]
    return Report("Results: dropout in LoRA fine-tuning", sections)


def _table1(found: Sequence[Pool], tasks: Sequence[Task]) -> list[Block]:
    blocks: list[Block] = []
    for place, pool in enumerate(found):
        blocks += table1.blocks(pool, _suffix(place, pool))
    pooled = {id(task) for pool in found for task in pool.tasks}
    blocks += [task_table(task) for task in tasks if not task.generation and id(task) not in pooled]
    return [*(blocks or [Text("Not run.")]), table1.misprints(), table1.paper_table()]


def _figures(found: Sequence[Pool]) -> list[Block]:
    blocks: list[Block] = []
    for place, pool in enumerate(found):
        suffix = _suffix(place, pool)
        blocks += [*figures.rates(pool, suffix), *figures.ranks(pool, suffix), *figures.training(pool.tasks)]
    return blocks or [Text("Not run.")]


def _suffix(place: int, pool: Pool) -> str:
    return f"-{slug(pool.model)}" if place else ""
