"""The clock, the results, the page and the mistakes of the bench."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hiddenkey
from hiddenkey.cli import main
from hiddenkey.lab.bench import page as performance
from hiddenkey.lab.bench import run as bench
from hiddenkey.lab.bench.attention import RIVALS
from hiddenkey.lab.bench.config import BenchConfig
from hiddenkey.lab.bench.measure import interleave, order
from hiddenkey.lab.bench.memory import peak_memory
from hiddenkey.lab.bench.providers import PROVIDERS
from hiddenkey.lab.bench.record import Case, Record, Row, read_record, read_records, write_record
from hiddenkey.lab.bench.targets import TARGETS, Target, growth, over_sum, ratio
from hiddenkey.lab.errors import RunError
from hiddenkey.patterns import generator, random_bytes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


# The clock


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11, 12])
def test_every_provider_follows_every_other_one_equally_often(count: int):
    rows = [order(count, turn) for turn in range(2 * count)]
    assert all(sorted(row) == list(range(count)) for row in rows)
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    assert set(pairs) == {(a, b) for a in range(count) for b in range(count) if a != b}
    assert len(set(pairs.values())) <= 1


def test_providers_take_turns_in_one_run():
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abcd"}
    times = interleave(works, rounds=3)
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert len(rounds) == 4
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert rounds[1] != rounds[2] != rounds[3]
    assert {len(values) for values in times.values()} == {3}


def test_a_limit_of_seconds_leaves_three_rounds():
    assert len(interleave({"a": lambda: None}, rounds=50, seconds=1e-9)["a"]) == 3


def test_peak_memory_counts_what_is_held():
    weight = torch.ones(256, 1024, requires_grad=True)
    kept: list[Any] = []

    def work() -> None:
        one = torch.ones(256, 1024)  # 1 MiB
        two = one + 1  # 2 MiB
        del one
        three = two * 2  # 2 MiB still
        del two, three
        torch.ones(1024).view(32, 32).t()

    works = {
        "two": work,
        "keeps": lambda: kept.append(torch.ones(256, 1024)),
        "two again": work,
        "backward": lambda: (weight * weight).sum().backward(),
        "view": lambda: weight.view(-1),
    }
    found = peak_memory(works, CPU)
    assert found.pop("backward") >= 2 * 2**20
    assert found == {"two": 2 * 2**20, "keeps": 2**20, "two again": 2 * 2**20, "view": 0}


def test_what_vmap_left_behind_is_no_memory():
    left: list[Any] = []
    torch.vmap(lambda x: left.append(x) or x)(torch.ones(2, 3))
    assert peak_memory({"work": lambda: torch.ones(256, 1024)}, CPU) == {"work": 2**20}


def test_peak_memory_counts_what_numpy_makes():
    given = torch.from_numpy(np.ones(2**20, dtype=np.int8))
    buffer = given[1:]
    del given  # the storage lives on in its view

    def work() -> None:
        one = random_bytes(generator(), 2**20) + buffer[:1]  # 2 MiB, of which NumPy's is freed
        two = random_bytes(generator(), 2**20)  # 2 MiB
        one + two  # 3 MiB

    found = peak_memory({"work": work, "outside": lambda: buffer + 1}, CPU)
    assert found == {"work": 3 * 2**20, "outside": 2**20 - 1}


# Results


def row(name: str, *seconds: float, peak: int | None = None) -> Row:
    return Row(name, "ours: x" if name.startswith("hidden") else "x", list(seconds), peak)


def record(name: str, *cases: Case, **other: object) -> Record:
    machine = {"device": "cpu", "processor": "P", "cores": 2, "threads": 2, "load_before": [0.0, 0.1, 0.2]}
    versions = dict.fromkeys(("python", "torch", "transformers", "peft"), "1.0")
    where = {"machine": machine, "versions": versions, "commit": "abc", "date": "2026-01-01 00:00 UTC", "config": {}}
    return Record(name, "step", name, "how", **where, cases=list(cases), **other)


def test_ratios():
    case = Case("c", {}, "plain", [row("plain", 1, 2, 4, peak=10), row("hidden", 2, 2, 12, peak=11)])
    assert case.ratio("hidden") == 1.0
    assert case.paired("hidden") == 2.0
    assert case.memory_ratio("hidden") == 1.1
    assert case.ratio("gone") is None
    assert row("a", 1, 2, 3, 4, 5, 6).quantile(0.2) == pytest.approx(2)
    assert row("a", 1, 2, 3, 4, 5, 6).quantile(0.8) == pytest.approx(5)


def test_targets_are_met_or_not_or_not_measured():
    case = Case("c", {}, "plain", [row("plain", 1.0), row("forward alone", 0.5), row("hiddenkey@0.1", 1.6)])
    records = {"step-x": record("step-x", case)}
    assert Target("t", 1.6, ratio("step-x", "hiddenkey@0.1")).verdict(records) == "met"
    assert Target("t", 1.5, ratio("step-x", "hiddenkey@0.1")).verdict(records) == "**not met**"
    assert Target("t", 1.5, ratio("step-y", "hiddenkey@0.1")).verdict(records) == "not measured"
    assert over_sum("step-x", "hiddenkey@0.1", "plain", "forward alone")(records) == pytest.approx(1.6 / 1.5)
    assert {target.verdict({}) for target in TARGETS} == {"not measured"}


def test_a_target_is_of_its_shape_type_and_device_alone():
    case = Case("minilm", {}, "plain", [row("plain", 1.0), row("hiddenkey-@0.1", 1.01)])
    made, target = record("step-minilm", case), TARGETS[0]
    assert target.verdict({made.name: made}) == "met"
    for name, value in {"quick": True, "dtype": "bfloat16", "batch_size": 2, "length": 16, "padding": 0.0}.items():
        assert target.verdict({made.name: replace(made, config={name: value})}) == "not measured"
    assert target.verdict({made.name: replace(made, machine=made.machine | {"device": "cuda"})}) == "not measured"


def test_the_committed_page_is_that_of_the_committed_results():
    records = read_records(ROOT / "results" / "bench")
    page = (ROOT / "docs" / "performance.md").read_text()
    assert performance.replace_block(page, performance.block(records, "performance", "results/bench"), Path()) == page
    assert [target.what for target in TARGETS if target.measure(records) is None] == []


def test_growth_of_extra_memory():
    cases = [
        Case(
            f"causal 1 x 16 x {size} x 64", {}, "plain", [row("plain", 1.0, peak=100), row("column", 1.0, peak=peak)]
        )
        for size, peak in ((4096, 110), (8192, 120))
    ]
    assert growth({"attention": record("attention", *cases)}) == 2


def test_a_run_writes_whole_results_that_read_back(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    providers = ("own dropout, sdpa", "hiddenkey@0.1")
    config = BenchConfig(
        suite="step", model=(str(llama),), providers=providers, out=str(tmp_path), quick=True, rounds=2
    )
    (path,) = bench.bench(config)
    assert "plain" in capsys.readouterr().out
    written = json.loads(path.read_text())
    (case,) = written["cases"]
    assert [entry["name"] for entry in case["rows"]] == ["plain", *providers]
    for entry in case["rows"]:
        assert len(entry["seconds"]) == 2
        assert entry["peak_bytes"] > 0
        assert {"p20", "p50", "p80", "ratio", "paired", "memory_ratio"} <= set(entry["summary"])
    assert {"processor", "threads", "load_before", "device"} <= set(written["machine"])
    assert {"python", "torch", "transformers", "peft"} <= set(written["versions"])
    assert written["config"] == config.to_dict()
    assert written["date"]
    assert written["how"]
    found = read_record(path)
    assert write_record(found, tmp_path / "..").read_bytes() == path.read_bytes()
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not list(tmp_path.glob(".*"))


def test_a_record_under_another_name_is_refused(tmp_path: Path):
    path = write_record(record("r", Case("c", {}, "plain", [row("plain", 1.0)])), tmp_path)
    content = json.loads(path.read_text()) | {"name": "../elsewhere"}
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="name"):
        read_record(path)


def test_an_interrupted_write_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = Case("c", {}, "plain", [row("plain", 1.0)])
    path = write_record(record("r", case), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_record(record("r", replace(case, name="other")), tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("suite", ["draw", "loss", "startup"])
def test_the_small_suites_run(suite: str, tmp_path: Path):
    (path,) = bench.bench(BenchConfig(suite=suite, out=str(tmp_path), quick=True, rounds=1))
    found = read_record(path)
    assert all(case.ratio(case.reference) == 1 for case in found.cases)
    if suite == "startup":
        assert found.facts["loaded"]["hiddenkey --help"] == []


def test_modes_run_each_against_its_own_plain(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    (path,) = bench.bench(BenchConfig(suite="modes", model=(str(llama),), out=str(tmp_path), quick=True, rounds=1))
    cases = read_record(path).cases
    assert [case.name for case in cases] == ["checkpointed", "compiled", "compiled and checkpointed"]
    assert all([row.name for row in case.rows] == ["plain", "hiddenkey-[:]@0.1"] for case in cases)
    assert len(compiled) == 4


def test_attention_runs(tmp_path: Path):
    (path,) = bench.bench(BenchConfig(suite="attention", out=str(tmp_path), quick=True, rounds=1))
    assert all({entry.name for entry in case.rows} == set(RIVALS) for case in read_record(path).cases)


# The page


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    steps = [row("plain", 1.0, 1.1, peak=100), row("hiddenkey-@0.1", 1.02, 1.2, peak=101)]
    write_record(record("step-minilm", Case("minilm", {"shape": [2, 3]}, "plain", steps)), folder)
    return folder


def test_the_page_is_the_same_every_time(results: Path, tmp_path: Path):
    config = BenchConfig(out=str(results), page=str(tmp_path / "performance.md"))
    page = performance.write_page(config)
    figure = tmp_path / "performance" / "step-minilm.png"
    first = page.read_text(), figure.read_bytes()
    assert "| `hiddenkey-@0.1` step, MiniLM 32 x 128 padded | ≤ 1.03 |" in first[0]
    assert "Not measured." in first[0]
    assert all(f"- {entry.name}: {entry.what}\n" in first[0] for entry in [row("plain"), row("hiddenkey-@0.1")])
    performance.write_page(config)
    assert (page.read_text(), figure.read_bytes()) == first


def test_few_rounds_have_no_quantiles_and_flags_are_told(tmp_path: Path):
    many = record("step-x", Case("x", {}, "plain", [row("plain", *range(1, 6))]))
    few = replace(
        record("step-y", Case("y", {}, "plain", [row("plain", 1, 2, 3)])), config={"rounds": 3, "threads": 2}
    )
    for made in (many, few):
        write_record(made, tmp_path)
    text = performance.write_page(BenchConfig(out=str(tmp_path), page=str(tmp_path / "page.md"))).read_text()
    assert "| plain | 5 | 1,800 ms | 3,000 ms | 4,200 ms |" in text
    assert "| plain | 3 | - | 2,000 ms | - |" in text
    assert "| `step-y` | 2026-01-01 00:00 UTC | abc | `--rounds 3 --threads 2` |" in text


def test_quick_results_take_no_others_place(results: Path):
    before = {path: path.read_bytes() for path in results.iterdir()}
    with pytest.raises(hiddenkey.UserError, match=r"quick results .* such as step-minilm\.json; give another --out"):
        bench.bench(BenchConfig(suite="startup", quick=True, out=str(results)))
    assert {path: path.read_bytes() for path in results.iterdir()} == before


def test_what_a_person_wrote_stays(results: Path, tmp_path: Path):
    page = tmp_path / "performance.md"
    page.write_text(f"# Mine\n\nbefore\n\n{performance.BEGIN}\nSTALE\n{performance.END}\n\nafter\n")
    performance.write_page(BenchConfig(out=str(results), page=str(page)))
    text = page.read_text()
    assert text.startswith("# Mine\n\nbefore\n")
    assert text.endswith("\nafter\n")
    assert "STALE" not in text


@pytest.mark.parametrize("text", ["# Mine\n", f"{performance.END}{performance.BEGIN}", performance.BEGIN * 2])
def test_a_page_without_marks_is_an_error(results: Path, tmp_path: Path, text: str):
    page = tmp_path / "performance.md"
    page.write_text(text)
    with pytest.raises(hiddenkey.UserError, match="between which to write"):
        performance.write_page(BenchConfig(out=str(results), page=str(page)))
    assert page.read_text() == text


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"suite": "steps"}, "suite = 'steps'"),
        ({"suite": "step"}, "--model"),
        ({"suite": "draw", "rounds": -1}, "rounds = -1"),
        ({"suite": "draw", "padding": 1.0}, "padding = 1.0"),
        ({"suite": "step", "model": ("LLAMA",), "providers": ("plian",)}, "Did you mean 'plain'"),
        ({"suite": "step", "model": ("LLAMA",), "providers": ("hiddenkey@2",)}, "nor is it a recipe"),
        ({"suite": "step", "model": ("BERT",), "providers": ("plain, loss in chunks",)}, "is for causal-lm"),
        ({"suite": "step", "model": ("/no/such/model",)}, "/no/such/model"),
        ({"suite": "draw", "device": "tpu"}, "device = 'tpu'"),
        ({"suite": "step", "model": ("a/one", "b/one")}, "two have one name"),
        ({"page": "page"}, "page = 'page' is not allowed: it ends in .md"),
        ({"suite": "step", "model": ("VIT",)}, "cannot be loaded"),
    ],
)
def test_mistakes_are_told(options: dict[str, object], said: str, bert: Path, llama: Path, tmp_path: Path):
    names = {"LLAMA": str(llama), "BERT": str(bert), "VIT": str(tmp_path / "vit")}
    transformers.ViTConfig().save_pretrained(names["VIT"])
    if "model" in options:
        options = options | {"model": tuple(names.get(name, name) for name in options["model"])}
    with pytest.raises(hiddenkey.UserError, match=said.replace("(", r"\(")):
        bench.bench(BenchConfig(out=str(tmp_path / "out"), quick=True, **options))


def test_a_fault_of_a_step_is_not_ascribed_to_the_models_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> list[object]:
        raise ValueError("shapes that do not fit")

    monkeypatch.setattr(bench, "step_cases", broken)
    with pytest.raises(ValueError, match="shapes that do not fit") as caught:
        bench.bench(BenchConfig(suite="step", model=(str(llama),), quick=True, out=str(tmp_path / "out")))
    assert not isinstance(caught.value, hiddenkey.UserError)


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bench, "draw_cases", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="cannot be written"):
        bench.bench(BenchConfig(suite="draw", quick=True, out=str(tmp_path)))


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bench.bench(BenchConfig(suite="loss", quick=True, rounds=1, out="~/found"))
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    performance.write_page(BenchConfig(out="~/found", page="~/page.md"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "found") == ["page", "page.md"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "--suite"),
        (["--suite", "step"], 2, "--model"),
        (["--suite", "speed"], 2, "speed"),
        (["--page", "page.md", "--out", "/no/such/folder"], 2, "no bench results"),
    ],
)
def test_the_command_line(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert (stop.value.code or 0) == code
    assert said in "".join(capsys.readouterr())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error(tmp_path: Path):
    with pytest.raises(hiddenkey.UserError, match="no GPU"):
        bench.bench(BenchConfig(suite="draw", device="cuda", out=str(tmp_path)))


def test_results_that_are_missing_or_foreign_are_errors(tmp_path: Path):
    config = BenchConfig(out=str(tmp_path), page=str(tmp_path / "page.md"))
    with pytest.raises(hiddenkey.UserError, match="no bench results"):
        performance.write_page(config)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(hiddenkey.UserError, match=r"other\.json"):
        performance.write_page(config)


def test_all_leaves_out_steps_without_a_model():
    assert "step" not in BenchConfig().suites()
    assert "step" in BenchConfig(model=("x",)).suites()
    assert set(PROVIDERS) >= {"plain", "forward alone"}
