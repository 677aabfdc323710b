"""Every benchmark runs on a tiny shape, and the variants it compares are what their names say."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import peak_bytes
from benchmarks.step import BASELINES, CHUNKED, RECIPES, Case, with_recipe

from .lab.tiny import save_bert, save_llama

ROOT = Path(__file__).parents[1]
SHORT = ("--rounds", "2", "--seconds", "0.001", "--threads", "1", "--device", "cpu")


def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def results(name: str, out: Path, *flags: str) -> list[dict[str, Any]]:
    done = run(name, "--out", str(out), *SHORT, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["benchmark"] == name
    assert found["versions"]["torch"] == torch.__version__
    for case in found["cases"]:
        reference, *others = case["rows"]
        assert (case["reference"], reference["ratio"]) == (reference["variant"], 1)
        assert all(row["ratio"] == row["median_s"] / reference["median_s"] > 0 for row in others)
        assert all(len(row["turns_s"]) == 2 for row in case["rows"])
    return found["cases"]


@pytest.mark.parametrize(
    ("name", "flags", "cases"),
    [
        ("attention", ["--shapes", "1x2x16x8"], ["full 1x2x16x8", "causal 1x2x16x8"]),
        ("dropout", ["--shape", "2", "4", "8"], ["2x4x8"]),
        ("startup", [], ["a fresh process"]),
    ],
)
def test_a_benchmark_writes_times_in_ratios_to_its_reference(
    tmp_path: Path, name: str, flags: list[str], cases: list
):
    assert [case["case"] for case in results(name, tmp_path / "new" / "out.json", *flags)] == cases


def test_steps_of_an_encoder_and_a_decoder(tmp_path: Path):
    models = [str(save_bert(tmp_path / "bert")), str(save_llama(tmp_path / "llama"))]
    shape = ("--batch", "2", "--length", "16", "--checkpoint")
    encoder, decoder = results("step", tmp_path / "out.json", "--model", *models, *shape)
    assert [encoder["case"], decoder["case"]] == ["bert", "llama"]
    assert [row["variant"] for row in decoder["rows"]] == [*BASELINES, *RECIPES]
    assert [row["variant"] for row in encoder["rows"]] == [*(name for name in BASELINES if name != CHUNKED), *RECIPES]
    assert all(row["peak_bytes"] > 0 for case in (encoder, decoder) for row in case["rows"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["step", "--out", "out.json", "--variants", "hiddenkee@0.1"], "hiddenkee"),
        (["dropout", "--out", "out.txt"], "ends in .json"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(flags: list[str], message: str):
    done = run(*flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "ms" not in done.stdout


@pytest.mark.parametrize("save", [save_bert, save_llama])
def test_variants_differ_in_what_their_names_say(tmp_path: Path, save: Any):
    flags = Namespace(batch=3, length=12, device="cpu", dtype="float32", compile=False, checkpoint=False)
    case = Case(str(save(tmp_path / "model")), flags)

    def first_loss(name: str, seed: int = 1) -> torch.Tensor:
        work = BASELINES[name](case) if name in BASELINES else with_recipe(case, name)
        torch.manual_seed(seed)
        return work()

    plain = first_loss("plain")
    assert torch.equal(plain, first_loss("plain", seed=2))
    assert not torch.equal(plain, first_loss("own dropout"))
    assert not torch.equal(plain, first_loss("hiddenkey-@0.1"))
    rdrop = first_loss("R-Drop, whole logits")
    torch.testing.assert_close(rdrop, first_loss("hiddenkey-@0.1 ~ kl-rdrop"))
    if case.writes:
        torch.testing.assert_close(plain, first_loss(CHUNKED))


def test_peak_memory_is_that_of_the_worst_moment():
    def work() -> None:
        whole = torch.empty(2**18)  # 1 MiB
        half = whole[: 2**17] * 2
        del whole
        half + 1

    assert peak_bytes(work, "cpu") == pytest.approx(3 * 2**19, abs=64)  # and two numbers
