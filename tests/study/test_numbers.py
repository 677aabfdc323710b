"""The published numbers are those of the records."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hiddenkey.lab.report import csv_table
from study.__main__ import RECORDS, RESULTS
from study.claims import findings
from study.records import Study
from study.report import all_tables, headline, write_report
from study.tables import table1

from .made_up import METHODS, make_record, study_of

EVIL = "$\\frac$ <b>\n![](http://x/y)"


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.read(RECORDS)


@pytest.fixture(scope="module")
def made(study: Study) -> dict[str, pd.DataFrame]:
    tables = {table.name: table.numbers for table in all_tables(study, findings(study))}
    return {name: pd.read_csv(io.StringIO(csv_table(numbers))) for name, numbers in tables.items()}


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """All cells are equal: numbers to the sixth place, texts whole."""
    assert list(found) == list(wanted) and len(found) == len(wanted)
    numbers = [name for name in wanted if pd.api.types.is_numeric_dtype(wanted[name])]
    assert np.allclose(found[numbers].astype(float), wanted[numbers].astype(float), rtol=0, atol=2e-6, equal_nan=True)
    texts = [name for name in wanted if name not in numbers]
    assert (found[texts].fillna("").astype(str) == wanted[texts].fillna("").astype(str)).all(axis=None)


def test_the_committed_tables_are_those_of_the_records(made: dict[str, pd.DataFrame]):
    assert {path.stem for path in RESULTS.glob("*.csv")} == made.keys()
    for name, found in made.items():
        same(found, pd.read_csv(RESULTS / f"{name}.csv"))


def test_the_answer_is_the_one_that_was_published(study: Study):
    text = headline(study, findings(study))
    assert (
        "**Whether HiddenKey helps is undecided.** `hiddenkey` minus LoRA alone, mean over MRPC, STS-B, SST-2" in text
    )
    assert "**-0.97 [-2.83, +0.90] points** (95 % interval, n = 5 seeds, p = 0.22" in text
    assert (
        "MRPC -0.05 [-1.15, +1.06], STS-B -3.11 [-11.30, +5.09], SST-2 +0.96 [-0.05, +1.98], CoLA -1.68 [-7.5" in text
    )
    assert (
        "WebNLG: `hiddenkey` over LoRA alone -0.63 [-2.49, +1.24] in BLEU and -0.184 [-0.344, -0.025] in NLL" in text
    )
    assert "Of 15 claims of the paper: 15 undecided." in text
    assert text in (RESULTS / "report.md").read_text()


def test_every_record_says_what_it_is(study: Study):
    assert (len(study.runs), len(study.incomplete)) == (690, 0)
    assert set(study.runs[study.runs["is_decoder"]]["model"]) == {"stories15m"}
    wanted = {("dropkey column", "dropkey:column"), ("neftune", "baseline"), ("r-drop", "r-drop")}
    assert {(run.method, run.preset) for run in study.runs.itertuples()} >= wanted


def test_the_page_is_whole():
    lines = (RESULTS / "report.md").read_text().splitlines()
    tables = [(one, two) for one, two in pairwise(lines) if one[:1] == two[:1] == "|"]
    assert len(tables) > 100
    assert all(one.count("|") == two.count("|") for one, two in tables)
    pictures = {path.name for path in RESULTS.glob("*.png")}
    assert pictures == {"gains.png", "rates.png", "patterns.png", "ranks.png", "training.png"}
    assert all(f"]({name})" in "\n".join(lines) for name in pictures)


def test_a_study_of_other_data_with_a_name_that_is_markup_has_its_report(tmp_path: Path):
    """Of one task that the paper does not have: its numbers stand beside none of the paper's."""
    records = [
        make_record(EVIL, method, seed, trial, 0.8) for method in METHODS for seed in (1, 2) for trial in (1, 2, 3)
    ]
    study = study_of(tmp_path, records)
    assert (study.key(EVIL), study.paper_metric(EVIL)) == (None, False)
    write_report(study, tmp_path / "results")
    page = (tmp_path / "results" / "report.md").read_text()
    assert "<b>" not in page and "![](http" not in page
    assert table1(study).numbers["paper_gain_same_tasks"].isna().all()
