from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

import hiddenkey
from hiddenkey.errors import ConfigError, DataError, NonFiniteLossError, RunError
from hiddenkey.lab import callbacks
from hiddenkey.lab import model as models
from hiddenkey.lab import run_folder as artifacts
from hiddenkey.lab import train as run
from hiddenkey.lab.checkpoints import last_checkpoint, mark_complete
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.data import load_examples
from hiddenkey.lab.model import build_skeleton, load_config
from hiddenkey.lab.run_folder import RunResult, read_result

from . import tiny

RECIPE = "hiddenkey@0.2"


@pytest.fixture
def config(bert: Path, sentences: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(bert),
        data=str(sentences),
        out=str(tmp_path / "run"),
        recipe=RECIPE,
        max_length=16,
        batch_size=12,
        epochs=2,
        log_steps=1,
    )


def weights(result_folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(result_folder) / "adapter" / "adapter_model.safetensors")


def same(first: str, second: str) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_classification_leaves_everything_behind(config: TrainConfig):
    result = run.train(config)
    record = json.loads((Path(config.out) / "result.json").read_text())
    assert record["status"] == "finished"
    assert record["config"] == config.to_dict()
    assert record["recipe"] == str(hiddenkey.parse(RECIPE))
    assert [row["epoch"] for row in record["epochs"]] == [1, 2]
    assert {"validation_loss", "validation_accuracy", "train_loss"} <= set(record["last"])
    assert record["step_seconds"]["steps"] == 6
    assert 0 < record["step_seconds"]["p20"] <= record["step_seconds"]["median"] <= record["step_seconds"]["p80"]
    assert 0 < record["drop_rates"]["logits"] < 0.6
    assert sum("loss" in entry for entry in record["history"]) >= 6
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["device"]
    assert str(hiddenkey.load_recipe(result.adapter)) == str(hiddenkey.parse(RECIPE))
    assert "| accuracy |" in (result.adapter / "README.md").read_text()
    assert read_result(Path(config.out)) == result


def test_adapter_loads_with_peft_alone_and_gives_the_same_logits(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
    trained, save = [], run.save_adapter

    def remember(model: Any, tokenizer: Any, result: RunResult) -> None:
        trained.append(model)
        save(model, tokenizer, result)

    monkeypatch.setattr(run, "save_adapter", remember)
    result = run.train(config)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(result.adapter, num_labels=2).eval()
    batch = AutoTokenizer.from_pretrained(result.adapter)(
        ["the film was fine", "dull"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trained[0].eval()(**batch).logits)
    assert any("lora_B" in name and value.any() for name, value in weights(config.out).items())


def test_causal_lm_counts_tokens_of_the_completion_alone(config: TrainConfig, llama: Path, pairs: Path):
    config = replace(config, model=str(llama), data=str(pairs), epochs=1, separator=" ")
    result = run.train(config)
    assert result.task == "causal-lm"
    assert result.last["validation_perplexity"] == pytest.approx(math.exp(result.last["validation_nll"]))
    model = AutoPeftModelForCausalLM.from_pretrained(result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    right, nll = [], []
    for row in load_examples(config).validation:
        prompt = tokenizer(row["prompt"]).input_ids
        target = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll += [-scores[i, token].item() for i, token in enumerate(target)]
        right += [scores[i].argmax().item() == token for i, token in enumerate(target)]
    assert result.last["validation_nll"] == pytest.approx(sum(nll) / len(nll), abs=1e-5)
    assert result.last["validation_token_accuracy"] == pytest.approx(sum(right) / len(right))


def test_regression(config: TrainConfig, tmp_path: Path):
    rows = [{"text": row["text"], "score": i / 7} for i, row in enumerate(tiny.labelled_rows(30))]
    data = tiny.write_csv(tmp_path / "scores.csv", rows)
    result = run.train(replace(config, data=str(data), epochs=1))
    assert -1 <= result.last["validation_pearson"] <= 1


def test_training_learns(config: TrainConfig):
    result = run.train(replace(config, epochs=25, batch_size=4, learning_rate=1e-2, recipe="hiddenkey-@0.05"))
    assert result.last["train_loss"] < 0.5 < 0.65 < result.epochs[0]["train_loss"]


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_every_option_of_the_machine_trains(config: TrainConfig, model: str, request: pytest.FixtureRequest):
    options = {"dtype": "bfloat16", "gradient_checkpointing": True, "gradient_accumulation": 2, "max_steps": 2}
    more = {"label_smoothing": 0.1, "lora_dropout": 0.1, "warmup": 1.0, "attn_implementation": "eager"}
    result = run.train(replace(config, model=str(request.getfixturevalue(model)), **options, **more))
    assert result.step_seconds["steps"] == 2
    assert 0 < result.drop_rates["logits"] < 0.6
    assert all(tensor.dtype == torch.float32 for tensor in weights(config.out).values())


@pytest.mark.parametrize(("rank", "alpha"), [(2, 5), (4, 32)])
def test_rank_and_alpha_are_those_asked_for(config: TrainConfig, rank: int, alpha: int):
    result = run.train(replace(config, lora_r=rank, lora_alpha=alpha, lora_dropout=0.25, max_steps=1))
    saved = json.loads((Path(config.out) / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (rank, alpha, 0.25)
    found = {name: tensor.shape for name, tensor in weights(config.out).items() if "lora_" in name}
    assert set(found.values()) == {(rank, 16), (16, rank)}
    # Two layers, query and value; and the classifier, which the checkpoint lacks.
    assert result.trainable_parameters == 2 * 2 * 2 * rank * 16 + 2 * 16 + 2


def test_the_trainer_has_what_was_asked_for(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Seen(callbacks.Schedule):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            decay = kwargs["optimizer"].param_groups[0]["weight_decay"]
            seen.append((args, decay, kwargs["lr_scheduler"], kwargs["model"]))
            return super().on_train_begin(args, state, control, **kwargs)

    monkeypatch.setattr(run, "Schedule", Seen)
    asked = {"weight_decay": 0.3, "scheduler": "cosine", "max_grad_norm": 0.7, "learning_rate": 2e-3, "seed": 5}
    how = {"gradient_checkpointing": True, "attn_implementation": "eager"}
    run.train(
        replace(config, warmup=2.0, max_steps=4, batch_size=3, gradient_accumulation=2, epochs=1, **asked, **how)
    )
    [(args, decay, schedule, model)] = seen
    assert model.is_gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert model.config._attn_implementation == "hiddenkey_eager"
    assert decay == args.weight_decay == 0.3
    assert (args.lr_scheduler_type, args.max_grad_norm, args.seed) == ("cosine", 0.7, 5)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (3, 2, 4)
    assert [schedule.lr_lambdas[0](step) * 2e-3 for step in (0, 1, 2, 4)] == pytest.approx([0, 1e-3, 2e-3, 0])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ("q_prj",)}, "no linear layer named q_prj"),
        ({"recipe": "hiddenkey@0.1 ~ mse"}, "'mse' compares predictions of a regression, and this task is class"),
        ({"attn_implementation": "flash_attention_2"}, "cannot be a AutoModelForSequenceClassification"),
    ],
)
def test_what_does_not_fit_is_told_before_the_weights_are_read(
    config: TrainConfig, fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "load_model", None)
    with pytest.raises(ConfigError, match=said):
        run.train(replace(config, **fields))


@pytest.mark.parametrize("read", [build_skeleton, load_config])
def test_a_kind_of_model_that_transformers_does_not_know(tmp_path: Path, read: Any):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ConfigError, match=r"cannot be read: (?s:.*)--trust-remote-code"):
        read(str(tmp_path), *(["AutoModel"] if read is build_skeleton else [False]))


def test_a_tokenizer_that_cannot_be_read(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("it wants to run code")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"tokenizer of .* cannot be read: it wants to run code"):
        run.train(config)


def test_rows_that_are_cut_are_counted(config: TrainConfig, capsys: pytest.CaptureFixture[str]):
    run.train(replace(config, max_length=6, epochs=1))
    assert "training rows fill max_length = 6" in capsys.readouterr().err


def test_checkpoints_of_an_unknown_run_are_not_touched(config: TrainConfig):
    checkpoint = Path(config.out) / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    with pytest.raises(RunError, match="--overwrite"):
        run.train(config)
    assert checkpoint.exists()


def test_patience_stops_and_best_is_kept(config: TrainConfig):
    config = replace(config, epochs=8, patience=1, keep="best", metric="loss", save_steps=2, learning_rate=0.5)
    result = run.train(config)
    assert len(result.epochs) < 8
    assert f" {len(result.epochs)} epochs," in (result.adapter / "README.md").read_text()
    assert result.best["validation_loss"] == min(row["validation_loss"] for row in result.epochs)
    assert result.last != result.best


@pytest.mark.parametrize(("metric", "higher"), [("accuracy", True), ("loss", False), ("nll", False)])
def test_the_trainer_keeps_the_epoch_that_is_best_by_the_metric(
    config: TrainConfig, metric: str, higher: bool, llama: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
):
    states = []

    class Seen(callbacks.Schedule):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            states.append((args.greater_is_better, state.best_global_step))
            return super().on_train_end(args, state, control, **kwargs)

    monkeypatch.setattr(run, "Schedule", Seen)
    if metric == "nll":
        config = replace(config, model=str(llama), data=str(pairs), separator=" ")
    result = run.train(replace(config, epochs=5, metric=metric, learning_rate=0.05))
    values = [row[f"validation_{metric}"] for row in result.epochs]
    assert len(set(values)) > 1
    assert states == [(higher, result.best["step"])]
    assert result.best[f"validation_{metric}"] == (max if higher else min)(values)


def test_finished_run_is_returned_as_is(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    first = run.train(config)
    monkeypatch.setattr(run, "load_model", None)
    assert run.train(config) == first
    assert run.train(replace(config, overwrite=False)) == first


def test_other_configuration_in_the_same_folder(config: TrainConfig):
    run.train(config)
    with pytest.raises(RunError, match=r"learning_rate: 0\.0004 there, 0\.001 now(?s:.*)--overwrite"):
        run.train(replace(config, learning_rate=1e-3))
    again = run.train(replace(config, learning_rate=1e-3, overwrite=True))
    assert again.config["learning_rate"] == 1e-3


_KILLED_RUN = """
import json, os, signal, sys
import torch
from transformers import TrainerCallback
from hiddenkey.lab import (callbacks, train as run)
from hiddenkey.lab.config import TrainConfig

torch.set_num_threads(1)
stop_at, moment, fields = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

class Killer(callbacks.Schedule):
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "step" and state.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().on_step_end(args, state, control, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        if moment == "save" and state.global_step >= stop_at:
            (run.Path(args.output_dir) / f"checkpoint-{state.global_step}" / "optimizer.pt").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_save(args, state, control, **kwargs)

run.Schedule = Killer
run.train(TrainConfig(**fields))
"""


@pytest.mark.parametrize(
    ("stop_at", "moment", "grouped"), [(5, "step", False), (6, "save", False), (5, "step", True)]
)
def test_killed_run_continues_to_the_same_bits(
    config: TrainConfig, tmp_path: Path, stop_at: int, moment: str, grouped: bool
):
    config = replace(config, epochs=3, save_steps=2, group_by_length=grouped)
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    command = [sys.executable, "-c", _KILLED_RUN, str(stop_at), moment, json.dumps(config.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_result(Path(config.out)).status == "running"
    checkpoints = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert "checkpoint-4" in checkpoints
    continued = run.train(config)
    assert last_checkpoint(Path(config.out) / "checkpoints", print).name == "checkpoint-9"
    assert same(config.out, str(tmp_path / "whole"))
    assert continued.last == whole.last
    assert continued.step_seconds["steps"] == 9


def test_continues_only_from_whole_checkpoints(tmp_path: Path):
    for step, whole in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            mark_complete(tmp_path, step)
    assert last_checkpoint(tmp_path, print).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()


def test_nan_loss_stops_with_ways_out(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    load = run.load_model

    def broken(*arguments: Any) -> Any:
        model = load(*arguments)
        next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = math.nan
        return model

    monkeypatch.setattr(run, "load_model", broken)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 1 .*learning_rate"):
        run.train(config)
    assert read_result(Path(config.out)).status == "failed"


def no_weights(*_: Any, **__: Any) -> None:
    raise AssertionError("the weights were read before the checks were done")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"recipe": "hiddenkie@0.1"}, ValueError, "hiddenkey"),
        ({"recipe": "hiddenkey@1.5"}, ValueError, r"1\.5"),
        ({"recipe": "logits[7:9]:column@0.1"}, ValueError, "layer"),
        ({"lora_r": 0}, ConfigError, "lora_r"),
        ({"metric": "bleu"}, ConfigError, "accuracy"),
        ({"max_length": 65}, ConfigError, "64"),
        ({"label_column": "nope"}, DataError, "nope"),
        ({"out": "/dev/null/run"}, RunError, "another folder"),
        ({"model": "/no/such/model"}, OSError, "model"),
    ],
)
def test_mistakes_are_found_before_the_weights_are_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[Exception], said: str
):
    monkeypatch.setattr(run, "load_model", no_weights)
    with pytest.raises(error, match=said):
        run.train(replace(config, **change))


def test_full_disk_is_found_first(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(run, "load_model", no_weights)
    with pytest.raises(RunError, match="1 MiB free"):
        run.train(config)


def test_prompt_that_fills_everything_is_an_error(config: TrainConfig, llama: Path, pairs: Path):
    config = replace(config, model=str(llama), data=str(pairs), max_length=3, separator=" ")
    with pytest.raises(DataError, match="max_length = 3"):
        run.train(config)


def test_scores_cannot_be_smoothed(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": row["text"], "score": i / 7} for i, row in enumerate(tiny.labelled_rows(30))]
    data = tiny.write_csv(tmp_path / "scores.csv", rows)
    monkeypatch.setattr(run, "load_model", no_weights)
    with pytest.raises(ConfigError, match=r"label_smoothing = 0\.1 .*regression"):
        run.train(replace(config, data=str(data), label_smoothing=0.1))


def test_evaluation_is_without_label_smoothing(
    config: TrainConfig, llama: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
):
    smoothed: list[Any] = []
    smooth = LabelSmoother.__call__

    def counted(smoother: Any, *args: Any, **kwargs: Any) -> Any:
        smoothed.append(smoother)
        return smooth(smoother, *args, **kwargs)

    monkeypatch.setattr(LabelSmoother, "__call__", counted)
    change = {"model": str(llama), "data": str(pairs), "separator": " ", "label_smoothing": 0.3, "recipe": "baseline"}
    result = run.train(replace(config, **change, learning_rate=0.05))
    assert len(smoothed) == result.step_seconds["steps"], "once in every step of both epochs, and nowhere else"
    for part in ("validation", "train"):
        assert result.last[f"{part}_loss"] == pytest.approx(result.last[f"{part}_nll"], rel=1e-4)


def test_unknown_target_lists_the_layers(config: TrainConfig):
    with pytest.raises(ConfigError, match=r"q_proj.*query"):
        run.train(replace(config, target_modules=("q_proj",)))
