"""`hiddenkey report` on results whose truth is known."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hiddenkey.cli import main
from hiddenkey.errors import RunError
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.report import write_report

from .test_stored import result_in

EVIL = "$\\frac$ <script>x</script>\n![](http://x/y) =1"


def write_run(folder: Path, method: str, seed: int, trial: int = 1, **changes: Any) -> Path:
    """One finished run as `hiddenkey sweep` leaves it; `changes` of its fields, `axes` and `trials` of its sweep."""
    value = changes.pop("value", 0.8)
    recipe = changes.pop("recipe", f"{method}@0.{trial}" if method != "baseline" else "baseline")
    config = TrainConfig(
        model="models/bert", data="films.csv", out="o", recipe=recipe, seed=seed, data_seed=seed
    ).to_dict()
    sweep = {"name": "films", "method": method, "params": {"lr": trial / 100}, "trial": trial}
    sweep |= {"axes": {"seed": seed} | changes.pop("axes", {}), "trials": changes.pop("trials", 1)}
    scores = {"best": {"validation_accuracy": value}, "test": {"best": {"accuracy": value}}}
    path = folder / f"{len(list(folder.glob('*')))}" / "result.json"
    path.parent.mkdir(parents=True)
    record = asdict(result_in(path.parent, status="finished", recipe=recipe, config=config, sweep=sweep, **scores))
    path.write_text(json.dumps(record | changes))
    return path


def page_of(folder: Path) -> str:
    return write_report(str(folder))[0].read_text()


GAINS = (0.012, 0.020, 0.016, 0.015, 0.017)


def test_the_verdict_is_the_paired_difference_on_the_test_part(tmp_path: Path):
    for seed, gain in enumerate(GAINS, start=1):
        level = 0.7 + 0.02 * seed  # which pairing takes out
        write_run(tmp_path, "baseline", seed, value=level)
        write_run(tmp_path, "hiddenkey", seed, value=level + gain)
    page = page_of(tmp_path)
    # Mean 1.6, sd 0.2915, t = 2.776: half of the interval is 0.362.
    said = (
        "Better than plain LoRA: **hiddenkey**: test accuracy 77.6, plain LoRA 76.0, difference +1.6 [+1.2, +2.0], "
    )
    assert f"{said}5 seeds.\n" in page
    assert page.index("| hiddenkey ") < page.index("| baseline ")
    assert "not run" not in page and "missing" not in page and "paper" not in page
    assert (tmp_path / "report" / "forest.png").stat().st_size > 5000
    assert len(pd.read_csv(tmp_path / "report" / "runs.csv")) == 10


def test_nothing_beats_plain_lora_by_chance_alone(tmp_path: Path):
    for seed, gain in enumerate((0.012, -0.010, 0.011, -0.013, 0.002), start=1):
        write_run(tmp_path, "baseline", seed)
        write_run(tmp_path, "hiddenkey", seed, value=0.8 + gain)
    assert "**Nothing beat plain LoRA** beyond chance; the best was **hiddenkey**: test accuracy 80.0" in page_of(
        tmp_path
    )


def test_many_methods_are_corrected_for(tmp_path: Path):
    """p = 0.018 of one method is enough alone, and not beside four more."""
    for seed, gain in enumerate((0.004, 0.020, 0.012, 0.006, 0.013), start=1):
        write_run(tmp_path, "baseline", seed)
        write_run(tmp_path, "drop", seed, value=0.8 + gain)
    assert "Better than plain LoRA: **drop**" in page_of(tmp_path)
    for seed in range(1, 6):
        for number in range(4):
            write_run(tmp_path, f"m{number}", seed, value=0.8 + (-1) ** seed * 0.01)
    assert "**Nothing beat plain LoRA** beyond chance; the best was **drop**" in page_of(tmp_path)


def test_validation_chooses_the_trial_and_the_test_part_judges_it(tmp_path: Path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "baseline", seed, value=0.7)
        write_run(tmp_path, "drop", seed, 1, value=0.9, test={"best": {"accuracy": 0.60 + seed / 100}}, trials=2)
        write_run(tmp_path, "drop", seed, 2, value=0.8, test={"best": {"accuracy": 0.95}}, trials=2)
    page = page_of(tmp_path)
    assert "test accuracy 62.0, plain LoRA 70.0, difference -8.0" in page
    assert "drop@0.1, lr 0.01 ×3" in page


def test_without_a_test_part_in_every_run_validation_judges_and_a_lower_loss_is_better(tmp_path: Path):
    lower = {"metric": "loss", "lower_is_better": True}
    for seed in (1, 2, 3):
        write_run(tmp_path, "baseline", seed, best={"validation_loss": 1.0}, test={"best": {"loss": 9.0}}, **lower)
        write_run(tmp_path, "drop", seed, best={"validation_loss": 0.9 - seed / 1000}, test={}, **lower)
    assert "**drop**: validation loss 0.898, plain LoRA 1.000, difference +0.102" in page_of(tmp_path)


def test_seeds_are_the_unit_and_axes_are_paired(tmp_path: Path):
    """A rank at which both are better is no difference; two ranks of three seeds are three pairs."""
    for seed in (1, 2, 3):
        for rank, level in ((8, 0.6), (64, 0.8)):
            write_run(tmp_path, "baseline", seed, value=level, axes={"lora_r": rank})
            write_run(tmp_path, "drop", seed, value=level + 0.01 * seed, axes={"lora_r": rank})
    assert "difference +2.0 [-0.5, +4.5], 3 seeds" in page_of(tmp_path)


def test_failed_unfinished_and_missing_runs_are_named(tmp_path: Path):
    write_run(tmp_path, "baseline", 1)
    write_run(tmp_path, "baseline", 2)
    write_run(tmp_path, "drop", 1, trials=2)
    write_run(tmp_path, "drop", 1, 2, trials=2, status="failed", failure="loss is nan at step 3", best={}, test={})
    write_run(tmp_path, "other", 1, status="running", best={}, test={})
    page = page_of(tmp_path)
    assert re.search(r"- failed: drop, seed 1, .*loss is nan at step 3", page)
    assert "- running: other, seed 1, " in page
    assert "- missing: 2 of 2 of drop, seed 2, films" in page
    assert "- missing: 1 of 1 of other, seed 2, films" in page
    assert "**No verdict with one seed**; use five or more." in page


def test_runs_of_train_are_named_by_their_recipes_and_without_a_baseline_nothing_is_compared(tmp_path: Path):
    write_run(tmp_path, "drop", 1, recipe="dropkey@0.1", sweep={})
    page = page_of(tmp_path)
    assert "## films.csv with bert" in page
    assert "No finished run of plain LoRA to compare with: add a method with the recipe baseline." in page
    write_run(tmp_path, "weight decay", 1, recipe="baseline", sweep={})
    assert "**dropkey@0.1**: test accuracy 80.0, plain LoRA 80.0, difference +0.0 (no interval), 1 seed" in page_of(
        tmp_path
    )


def test_of_several_plain_methods_the_one_called_baseline_counts(tmp_path: Path):
    for method in ("weight decay", "lora dropout"):
        write_run(tmp_path, method, 1, recipe="baseline")
    assert "Several methods are plain LoRA with other settings: weight decay, lora dropout" in page_of(tmp_path)
    write_run(tmp_path, "baseline", 1, value=0.7)
    assert "test accuracy 80.0, plain LoRA 70.0" in page_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"best": []}, "best: "),
        ({"config": {"model": "m", "data": "d", "out": "o", "seed": "one"}}, "config: seed"),
        ({"sweep": {"name": "x"}}, "sweep: no method, params, axes, trials"),
        ({"best": {"validation_accuracy": float("nan")}}, "best.validation_accuracy"),
    ],
)
def test_a_damaged_record_is_named_with_its_field(tmp_path: Path, change: dict[str, Any], said: str):
    path = write_run(tmp_path, "baseline", 1, **change)
    with pytest.raises(RunError, match=re.escape(f"{path} is damaged: {said}")):
        write_report(str(tmp_path))


def test_a_file_that_no_report_wrote_is_not_overwritten(tmp_path: Path):
    write_run(tmp_path, "baseline", 1)
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.md").write_text("my own notes")
    with pytest.raises(RunError, match="would be overwritten"):
        write_report(str(tmp_path), str(out))
    assert (out / "report.md").read_text() == "my own notes"
    page_of(tmp_path)
    assert page_of(tmp_path)  # its own is written again


def test_the_html_page_needs_no_network_and_runs_nothing(tmp_path: Path):
    for seed in (1, 2):
        write_run(tmp_path, "baseline", seed)
        write_run(tmp_path, EVIL, seed, recipe="drop@0.1", value=0.8 + seed / 100)
    page_of(tmp_path)
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in html
    assert set(re.findall(r'(?:src|href)="(.{10})', html)) == {"data:image"}
    assert "$\\frac$ &lt;script&gt;x&lt;/script&gt; ![](http://x/y) =1" in html


def test_the_command_says_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "runs", "baseline", 1)
    main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("No other method shares a finished seed with plain LoRA")
    assert f"{said[1]}\n" == f"{tmp_path / 'out' / 'report.md'}\n"
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "out")])
    assert "no result.json below" in capsys.readouterr().err
