"""`hiddenkey bench --page`: the tables and figures of a page, from the results of a bench.

What stands between the two marks is written anew; what a person wrote outside them stays.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..artifacts import write_text
from ..errors import RunError
from ..provenance import short, shown_versions
from .config import BenchConfig
from .record import Case, Record, read_records
from .report import HEADINGS, bar_chart, number, table_rows
from .targets import MIB, TARGETS, Records, extra_memory

BEGIN = "<!-- written by `hiddenkey bench --page`: begin -->"
END = "<!-- written by `hiddenkey bench --page`: end -->"
NEW_PAGE = f"# What it costs\n\n{BEGIN}\n{END}\n"
_SHOWN_ELSEWHERE = ("suite", "model", "providers", "out", "page")


def write_page(config: BenchConfig) -> Path:
    """Write the page and its figures from the results in `config.out`.

    Raises:
        RunError: no results, one that cannot be read, or a page without the two marks.
    """
    page, records = Path(config.page), read_records(Path(config.out))
    text = page.read_text(encoding="utf-8") if page.exists() else NEW_PAGE
    figures = page.with_suffix("")
    whole = replace_block(text, block(records, figures.name, config.out), page)
    figures.mkdir(parents=True, exist_ok=True)
    for record in records.values():
        bar_chart(record, figures / f"{record.name}.png")
    write_text(page, whole)
    return page


def replace_block(text: str, content: str, page: Path) -> str:
    """The page with new content between its marks.

    Raises:
        RunError: not exactly one block.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RunError(f"{page} does not hold the two lines between which to write, once each:\n{BEGIN}\n{END}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def block(records: Records, figures: str, out: str) -> str:
    """Everything between the marks, as Markdown."""
    parts = [targets_section(records), source_section(records, out)]
    parts += [record_section(record, figures) for record in records.values()]
    return "\n\n".join([*parts, gpu_section(records)]) + "\n"


def targets_section(records: Records) -> str:
    """Every target beside what was measured."""
    rows = []
    for target in TARGETS:
        value = target.measure(records)
        shown = "-" if value is None else f"{number(value)}{target.unit}"
        rows.append([target.what, f"≤ {target.limit:.2f}{target.unit}", shown, target.verdict(records)])
    table = markdown(("what", "target", "measured", ""), rows)
    extra = extra_memory(records, 8192)
    note = "" if extra is None else f" Extra memory of causal column attention at 8192: {extra / MIB:.1f} MiB."
    return f"## Targets\n\nRatios of medians to plain in one run, unless it says otherwise.{note}\n\n{table}"


def source_section(records: Records, out: str) -> str:
    """Machine, versions, commit and date of every result."""
    rows = []
    for record in records.values():
        machine = record.machine
        where = (
            f"{machine.get('gpu', machine['processor'])}, {machine['threads']} threads of {machine['cores']} cores"
        )
        load = " ".join(f"{value:.1f}" for value in machine["load_before"])
        packages = shown_versions(record.versions)
        rows.append([f"`{record.name}`", record.date, short(record.commit), flags(record), where, load, packages])
    table = markdown(("result", "date", "commit", "flags", "machine", "load before", "versions"), rows)
    hows = list(dict.fromkeys(record.how for record in records.values()))
    longest = [how for how in hows if not any(how != other and how in other for other in hows)]
    paragraphs = "\n\n".join(longest)
    command = (
        f"`hiddenkey bench --page` writes tables and figures from the JSON files in `{out}`, which hold every time."
    )
    return f"## How it was measured\n\n{command}\n\n{paragraphs}\n\n{table}"


def flags(record: Record) -> str:
    """The flags of its command but for suite, model, providers and folder."""
    plain = {name: value for name, value in asdict(BenchConfig()).items() if name not in _SHOWN_ELSEWHERE}
    given = {name: record.config.get(name, value) for name, value in plain.items()}
    found = [f"--{name.replace('_', '-')} {given[name]}" for name, value in plain.items() if given[name] != value]
    return f"`{' '.join(found)}`" if found else "-"


def record_section(record: Record, figures: str) -> str:
    """The figure of one result and the tables of its cases."""
    tables = "\n\n".join(case_table(case) for case in record.cases)
    return f"## {record.title}\n\n![{record.title}]({figures}/{record.name}.png)\n\n{legend(record)}\n\n{tables}"


def legend(record: Record) -> str:
    """What each provider does, once."""
    told = dict.fromkeys((row.name, row.what) for case in record.cases for row in case.rows)
    return "\n".join(f"- {name}: {what}" for name, what in told)


def case_table(case: Case) -> str:
    """One case: what was run, and a row for each provider."""
    about = ", ".join(f"{name} {_shown(value)}" for name, value in case.about.items())
    return f"**{case.name}** ({about}), ratios to `{case.reference}`:\n\n{markdown(HEADINGS, table_rows(case))}"


def gpu_section(records: Records) -> str:
    """Which results are from a GPU, or that there are none."""
    found = [record for record in records.values() if record.machine["device"] == "cuda"]
    names = ", ".join(f"`{record.name}` ({record.machine['gpu']})" for record in found)
    return f"## On a GPU\n\n{names or 'Not measured.'}"


def markdown(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(headings), ["---"] * len(headings), *rows]]
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
