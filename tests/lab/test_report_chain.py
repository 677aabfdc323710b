"""From a sweep file to the pages, with real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiddenkey.lab.report.write import write_report
from hiddenkey.lab.sweep.config import SweepConfig
from hiddenkey.lab.sweep.run import sweep

from . import tiny
from .sweep.tools import write_sweep


@pytest.mark.full
def test_a_sweep_becomes_a_report(bert: Path, tmp_path: Path):
    data = tiny.write_csv(tmp_path / "train.csv", tiny.labelled_rows(60))
    held = tiny.write_csv(tmp_path / "test.csv", tiny.labelled_rows(20))
    base = {"model": str(bert), "data": str(data), "test": str(held), "epochs": 2, "max_length": 16}
    methods = {
        "baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-3, 1e-2]}},
        "hiddenkey": {"recipe": "hiddenkey@{p} ~ kl*{weight}", "grid": {"p": [0.05, 0.1], "weight": [1.0]}},
    }
    path = write_sweep(tmp_path, base=base, methods=methods, axes={"seed, data_seed": [[1, 1], [2, 2]]})
    sweep(SweepConfig(str(path), workers=1))
    write_report([str(tmp_path / "out")], str(tmp_path / "docs"))
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "8 runs, 0 of them failed" in text
    assert "n = 2 seeds" in text
    assert "A step of `hiddenkey` takes" in text
    assert (tmp_path / "docs" / "results" / "rates-tiny-test.svg").exists()
