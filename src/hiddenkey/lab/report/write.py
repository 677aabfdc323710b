"""`hiddenkey report`: read the runs, write the pages, the tables and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..artifacts import write_text
from ..errors import RunError
from .content import make_report
from .files import csv_text, latex_text, markdown_text
from .notes import read_notes
from .page import page_text
from .study import read_study

NAME = "results"
MANIFEST = "manifest.txt"
"""The names of the files that a report wrote beside it: a later one deletes no others."""


def write_report(folders: Sequence[str], out: str) -> Path:
    """Write `results.md`, `results.html` and the folder `results` into `out`; the same runs give the same bytes.

    Raises:
        RunError: there are no runs below the folders, one or their notes cannot be read, two names are too alike, or
            a file that no report wrote would be overwritten.
        OSError: something cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    report = make_report(read_study(paths), read_notes(paths))
    _require_names_apart([table.name for table in report.tables])
    _require_names_apart([figure.name for figure in report.figures])
    texts = {f"{table.name}.csv": csv_text(table) for table in report.tables}
    texts |= {f"{table.name}.tex": latex_text(table) for table in report.tables}
    texts |= {f"{figure.name}.svg": figure.svg for figure in report.figures}
    target = Path(out).expanduser()
    folder = target / NAME
    pages = {f"{NAME}.html": page_text(report, NAME), f"{NAME}.md": markdown_text(report, f"{NAME}.html", NAME)}
    before = _written_before(folder)
    _refuse_files_of_others(target, pages, folder, texts.keys() - before)
    folder.mkdir(parents=True, exist_ok=True)
    for name in before - texts.keys():
        (folder / name).unlink()
    # First, so that what a report wrote that was killed is known for its own.
    write_text(folder / MANIFEST, "".join(f"{name}\n" for name in sorted(texts)))
    for name, text in sorted(texts.items()):
        write_text(folder / name, text)
    for name, text in pages.items():
        write_text(target / name, text)
    return target / f"{NAME}.md"


def _refuse_files_of_others(target: Path, pages: Iterable[str], folder: Path, new: Iterable[str]) -> None:
    others = [] if (folder / MANIFEST).exists() else [target / name for name in pages]
    others = [path for path in (*others, *(folder / name for name in sorted(new))) if path.exists()]
    if others:
        raise RunError(
            f"{', '.join(map(str, others[:3]))} would be overwritten, which no report of hiddenkey wrote; move it "
            "away or give another folder with --out."
        )


def _require_names_apart(names: Sequence[str]) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise RunError(
            f"several tables or figures would be written as {', '.join(double)}: give sweeps names, and models last "
            "parts of their names, that differ in more than case and marks."
        )


def _written_before(folder: Path) -> set[str]:
    manifest = folder / MANIFEST
    names = manifest.read_text(encoding="utf-8").splitlines() if manifest.is_file() else []
    return {name for name in names if name == Path(name).name and (folder / name).is_file()}
