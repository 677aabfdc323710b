"""`make demo`, with a tiny model and made-up texts in the place of what it downloads."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from hiddenkey.lab.run_folder import read_result

from .lab import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import demo

    texts = tmp_path / "texts"
    texts.mkdir()
    tiny.write_csv(texts / "train.csv", tiny.labelled_rows(24))
    tiny.write_csv(texts / "dev.csv", tiny.labelled_rows(12))
    monkeypatch.setattr(demo, "bring_assets", lambda *sizes: texts)
    monkeypatch.setattr(demo, "MODEL", tiny.save_bert(tmp_path / "bert"))
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    monkeypatch.setattr(demo, "EPOCHS", 2)
    return demo


def test_three_runs_are_compared(demo: ModuleType, capsys: pytest.CaptureFixture[str]):
    demo.main()
    out = demo.OUT
    runs = {recipe: read_result(out / "runs" / recipe) for recipe in demo.RECIPES}
    assert [run.recipe for run in runs.values() if run] == [
        "baseline",
        "logits:column@0.15 + hidden:element@0.15",
        "logits:column@0.15 + hidden:element@0.15 ~ kl*1.0",
    ]
    page, printed = (out / "report.md").read_text(), capsys.readouterr().out
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for recipe, run in runs.items():
        assert run is not None
        row = next(line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
        assert row in printed
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert cells[0] == f"{run.last['train_loss']:.3f}"
        assert cells[1] == f"{run.last['validation_loss']:.3f}"
        assert cells[2] == f"{run.last['validation_accuracy']:.1%}"
        lowest = min(run.epochs, key=lambda epoch: epoch["validation_loss"])
        assert cells[3] == f"{lowest['validation_loss']:.3f} (epoch {lowest['epoch']:g})"
        assert run.plan in page
    assert "24 sentences of SST-2 for training, 12 for validation, 2 epochs" in page
    rates = re.findall(r"- `hiddenkey-?@0\.15`: hidden (0\.\d+), logits (0\.\d+)", page)
    assert len(rates) == 2
    assert all(0.05 < float(rate) < 0.3 for pair in rates for rate in pair)


def test_an_interrupted_demo_goes_on(demo: ModuleType, monkeypatch: pytest.MonkeyPatch):
    train, made = demo.train, []

    def second_is_stopped(config, console):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(config.recipe)
        return train(config, console)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "train", second_is_stopped)
        demo.main()
    first = read_result(demo.OUT / "runs" / "baseline")
    demo.main()
    assert first is not None
    assert read_result(demo.OUT / "runs" / "baseline") == first
    assert (demo.OUT / "report.md").exists()
