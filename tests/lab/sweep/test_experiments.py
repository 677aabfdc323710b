"""Every file of study/sweeps/ is checked with a tiny model of its architecture and tiny data in the hub's place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, RobertaConfig

from hiddenkey.lab.config import SweepConfig
from hiddenkey.lab.sweep import sweep
from hiddenkey.lab.sweep_file import make_plan, read_sweep

from .. import tiny

ROOT = Path(__file__).parents[3]
PAPER = sorted((ROOT / "study" / "sweeps" / "paper").glob("*.yaml"))
SMALL = [
    path
    for name in ("minilm", "pilot", "stories15m")
    for path in sorted((ROOT / f"study/sweeps/{name}").glob("*.yaml"))
]
MODELS = {"roberta": "roberta-large", "gpt2": "gpt2-medium", "llama2": "meta-llama/Llama-2-7b-hf"}
FIRST = ("roberta-rte", "roberta-stsb", "gpt2-e2e", "gpt2-webnlg", "llama2-mrpc")
VOCABULARY = len(tiny.SPECIAL) + len(tiny.WORDS)


def save_model(kind: str, folder: Path) -> Path:
    """Configuration and tokenizer, no weights: a dry run reads none."""
    small = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "roberta":
        config = RobertaConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=514,
            pad_token_id=1,
            **small,
        )
    elif kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=1024, **small)
    else:
        config = LlamaConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=4096,
            **small,
        )
    config.save_pretrained(folder)
    tiny.save_tokenizer(folder, decoder=kind != "roberta", longest=512)
    return folder


def save_data(kind: str, folder: Path, rows: int = 12) -> Path:
    """Parts with the names that the hub or the original files have, of at least so many rows."""
    folder.mkdir()
    if kind == "e2e":
        for name in ("trainset", "devset", "testset_w_refs"):
            parts = [
                {"mr": f"{r['prompt']} {i}", "ref": r["completion"]} for i, r in enumerate(tiny.paired_rows(rows))
            ]
            tiny.write_csv(folder / f"{name}.csv", parts)
    elif kind == "webnlg":
        for name in ("train", "dev", "test"):
            entries = [
                {"triples": [f"a | b | {i}"], "texts": ["the film was fine"], "seen": True} for i in range(rows)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    else:
        for name in ("train", "validation" if rows == 12 else "dev"):
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["sentence1", "sentence2", "label"])
                scores = (0.5, 2.0) if kind == "stsb" and rows > 12 else (0, 1)
                writer.writerows(
                    ["the film", f"was {tiny.WORDS[i % 12]}", scores[i % 2]] for i in range(max(30, rows))
                )
    return folder


def test_the_paper_has_eleven_setups():
    assert [path.stem for path in PAPER] == [
        *("gpt2-e2e", "gpt2-webnlg", "llama2-e2e", "llama2-mrpc", "llama2-rte"),
        *("roberta-cola", "roberta-mrpc", "roberta-qnli", "roberta-rte", "roberta-sst2", "roberta-stsb"),
    ]


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in FIRST else pytest.mark.full) for p in PAPER]
)
def test_an_experiment_can_be_run(path: Path, tmp_path: Path):
    kind, task = path.stem.split("-")
    given = read_sweep(path)
    assert path.read_text().startswith(f"# hiddenkey sweep {path.relative_to(ROOT)}\n")
    assert given.name == path.stem
    assert given.base["model"] == MODELS[kind]
    runs = [slot.run for slot in make_plan(given).slots]
    assert {run.config.test for run in runs if run} == {"test" if task in ("e2e", "webnlg") else "validation"}
    sets = (f"model={save_model(kind, tmp_path / 'model')}", f"data={save_data(task, tmp_path / 'data')}")
    config = SweepConfig(str(path), dry_run=True, set=sets, out=str(tmp_path / "out"))
    assert len(sweep(config, Console(quiet=True)).slots) == len(runs)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_small_experiment_can_be_run(path: Path, tmp_path: Path):
    given = read_sweep(path)
    assert path.read_text().startswith(f"# hiddenkey sweep {path.relative_to(ROOT)} --workers 2\n")
    assert path.stem.startswith(given.name)
    assert given.out == f"runs/{'pilot' if path.parent.name == 'pilot' else 'study'}/{path.stem}"
    slots = make_plan(given).slots
    assert len({slot.group.trials for slot in slots}) == 1, "methods have not the same number of trials"
    model = save_model("llama2" if path.parent.name == "stories15m" else "roberta", tmp_path / "model")
    sets = (f"model={model}", f"data={save_data(path.stem, tmp_path / 'data', rows=3000)}")
    config = SweepConfig(str(path), dry_run=True, set=sets, out=str(tmp_path / "out"))
    assert len(sweep(config, Console(quiet=True)).slots) == len(slots)


def test_a_setup_that_does_not_fit_its_model_is_told(tmp_path: Path):
    path = next(path for path in PAPER if path.stem == "roberta-rte")
    sets = (f"model={save_model('gpt2', tmp_path / 'model')}", f"data={save_data('rte', tmp_path / 'data')}")
    with pytest.raises(Exception, match="max_length = 9999"):
        sweep(SweepConfig(str(path), dry_run=True, set=(*sets, "max_length=9999")), Console(quiet=True))
