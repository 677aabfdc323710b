from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hiddenkey import cli
from hiddenkey.cli import LAB_EXTRA, main
from hiddenkey.lab.config import SweepConfig, TrainConfig
from tests.core.test_registry import PLUGIN, install

from . import tiny
from .signals import heed_interrupts
from .test_stored import result_in, written

PROGRAM = [sys.executable, "-c", "from hiddenkey.cli import main; main()"]


def hiddenkey(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_help_and_version_load_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from hiddenkey.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code in (0, None)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["plan", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "hiddenkey" in done.stdout


WITHOUT_LIBRARIES = (
    "import sys\n"
    "from hiddenkey.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "except SystemExit as stop:\n"
    "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    "    raise\n"
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train --model BERT --data gone.csv --out OUT", "No such data file: .*gone.csv"),
        ("train --model BERT --data CSV --validation gone.csv --out OUT", "No such data file: .*gone.csv"),
        ("train --model BERT --data ./gone --out OUT", "'./gone': there is no such file or folder"),
        ("train --model BERT --data a/b/gone --out OUT", "'a/b/gone': there is no such file or folder"),
        ("train --model BERT --data BERT --out OUT", "has no training part"),
        ("train --model BERT --data BERT/config.txt --out OUT", "there is no such file or folder"),
        ("train --model ./gone --data CSV --out OUT", "'./gone': there is no such folder"),
        ("train --model a/b/gone --data CSV --out OUT", "'a/b/gone': there is no such folder"),
        ("train --model CSV --data CSV --out OUT", "rows.csv': there is no such folder"),
        ("train --model EMPTY --data CSV --out OUT", "has no config.json"),
        ("train --model ADAPTER --data CSV --out OUT", "is the folder of a PEFT adapter"),
        ("plan ./gone hiddenkey@0.1", "'./gone': there is no such folder"),
        ("doctor ./gone hiddenkey@0.1", "'./gone': there is no such folder"),
        ("doctor BERT hiddenkey@0.1 --train-args gone.yaml", "gone.yaml is not there"),
        ("sweep gone.yaml", "gone.yaml is not there"),
        ("report gone", "gone is no folder"),
        ("plan no-such-model hiddenkey@0.1", "none in the hub's cache.*HF_HUB_OFFLINE is set"),
        ("train --model owner/gone --data CSV --out OUT", "none in the hub's cache.*HF_HUB_OFFLINE is set"),
        ("plan no.such..model hiddenkey@0.1", "none on the hub: "),
    ],
)
def test_what_is_not_there_is_told_before_the_slow_imports(arguments: str, said: str, bert: Path, tmp_path: Path):
    tiny.write_csv(tmp_path / "rows.csv", tiny.labelled_rows(40))
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = {"BERT": bert, "CSV": "rows.csv", "EMPTY": "empty", "ADAPTER": "adapter", "OUT": "out"}
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


class _Hub(BaseHTTPRequestHandler):
    """Has no model and no data set."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        _Hub.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(hub: str, *arguments: str, code: str = WITHOUT_LIBRARIES) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_hub_is_asked_once_for_a_model_that_it_lacks(hub: str):
    done = ask(hub, "plan", "owner/gone", "hiddenkey@0.1")
    assert done.returncode == 2, done.stderr
    assert "'owner/gone': there is no such file or folder here, and none on the hub" in done.stderr
    assert [path for path in _Hub.asked if "gone" in path] == ["/api/models/owner/gone"]


def test_a_data_set_that_the_hub_lacks(hub: str, bert: Path, tmp_path: Path):
    flags = ["--model", str(bert), "--data", "glue/rte", "--out", str(tmp_path)]
    done = ask(hub, "train", *flags)
    assert done.returncode == 2, done.stderr
    assert [path for path in _Hub.asked if "glue" in path] == ["/api/datasets/nyu-mll/glue"]


def test_a_hub_that_cannot_be_reached():
    done = ask("http://127.0.0.1:9", "plan", "owner/gone", "hiddenkey@0.1")
    assert done.returncode == 2, done.stderr
    assert "none in the hub's cache, and the hub cannot be reached: " in done.stderr


@pytest.mark.parametrize("cached", ("", "datasets/owner___rows", "hub/datasets--owner--rows"))
def test_a_data_set_of_a_hub_that_cannot_be_reached(cached: str, bert: Path, tmp_path: Path, monkeypatch):
    """Told before the slow imports; where the cache has a folder of it, the libraries look into that."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / cached).mkdir(parents=True, exist_ok=True)
    flags = ["train", "--model", str(bert), "--data", "owner/rows", "--out", str(tmp_path / "out")]
    code = WITHOUT_LIBRARIES if not cached else "import sys\nfrom hiddenkey.cli import main\nmain(sys.argv[1:])\n"
    done = ask("http://127.0.0.1:9", *flags, code=code)
    assert done.returncode == 2, done.stderr
    assert ("none in the hub's cache, and the hub cannot be reached" in done.stderr) is not bool(cached)


def test_what_is_cached_is_used_where_the_hub_cannot_be_reached(bert: Path, tmp_path: Path):
    """And no library asks again."""
    snapshot = tmp_path / "hub" / "models--owner--bert" / "snapshots" / ("0" * 40)
    shutil.copytree(bert, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = (
        "import os, sys\n"
        f"os.environ['HF_HUB_CACHE'] = {str(tmp_path / 'hub')!r}\n"
        "from hiddenkey.cli import main\n"
        "main(sys.argv[1:])\n"
        "from huggingface_hub import is_offline_mode\n"
        "assert is_offline_mode()\n"
    )
    done = ask("http://127.0.0.1:9", "plan", "owner/bert", "hiddenkey@0.1", code=code)
    assert done.returncode == 0, done.stderr
    assert "so its cache is used" in done.stderr
    assert "logits" in done.stdout


def test_plan_prints_sites_without_weights(
    bert: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for model in (bert, llama):
        (tmp_path / model.name).mkdir()
        (tmp_path / model.name / "config.json").write_bytes((model / "config.json").read_bytes())
        main(["plan", str(tmp_path / model.name), "hiddenkey-@0.1"])
        said = capsys.readouterr().out
        assert "logits" in said
        assert "hidden" in said


def test_without_the_extra_the_command_says_what_to_install(bert: Path, sentences: Path, tmp_path: Path):
    code = "import sys; sys.modules['datasets'] = None\nfrom hiddenkey.cli import main; main()"
    arguments = ["train", "--model", str(bert), "--data", str(sentences), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hiddenkey[lab]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ("plan", "doctor"))
def test_the_proof_needs_no_extra(command: str, bert: Path):
    """Who trains by a script installs the package alone."""
    code = f"import sys; sys.modules.update(dict.fromkeys({LAB_EXTRA}))\nfrom hiddenkey.cli import main; main()"
    arguments = [command, str(bert), "hiddenkey@0.3", *(["--rounds", "1"] if command == "doctor" else [])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hidden:element@0.3" in done.stdout


def test_a_plugins_names_work_on_the_command_line(bert: Path, tmp_path: Path):
    install(tmp_path, PLUGIN)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [*PROGRAM, "plan", str(bert), "hidden:feature@0.5 ~ abs"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "hidden:feature@0.5 ~ abs*1.0" in done.stdout
    assert "layer" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "/no/such/model", "hiddenkey@0.1"], "/no/such/model"),
        (["plan", "BERT", "hiddenkie@0.1"], "hiddenkey"),
        (["plan", "BERT", "hidden:column@1.0"], "1.0"),
        (["train", "--model", "BERT", "--data", "gone.csv", "--out", "OUT"], "gone.csv"),
        (["train", "--model", "BERT", "--data", "gone.csv", "--out", "OUT", "--epochs", "0"], "epochs"),
        (["plan", "x" * 10**5, "hiddenkey@0.1"], "characters left out"),
        (["train", "gone.yaml"], "gone.yaml"),
        (["train", "--model", "BERT", "--data", "gone.csv"], "--out"),
        (["train", "--modle", "BERT"], "--modle"),
        (["train", "--lr", "1e-4"], "--lr is not an option of train; it is called --learning-rate here"),
        (["train", "--num_train_epochs=3"], "it is called --epochs here"),
        (["train", "--seed", "1", "run.yaml"], "run.yaml: the file comes first"),
        (["train", "--overwrite", "run.yaml"], "run.yaml: the file comes first"),
        (["trane"], "trane"),
        ([], "train"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    bert: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    names = {"BERT": str(bert), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        main([names.get(argument, argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error) < 10_000
    assert said in error
    assert "Traceback" not in error


def test_a_pipe_that_is_closed_early_is_no_error(bert: Path):
    command = [*PROGRAM, "plan", str(bert), "hiddenkey@0.1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_another_pipe_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(command: object) -> None:
        raise BrokenPipeError

    monkeypatch.setitem(cli.RUNNERS, "plan", broken)
    with pytest.raises(SystemExit) as stop:
        main(["plan", "model", "hiddenkey@0.1"])
    assert stop.value.code == 2
    assert "a pipe to another process broke" in capsys.readouterr().err


def test_train_from_yaml_with_flags_on_top(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {bert}\ndata: {sentences}\nepochs: 3\nmax_length: 16\nrecipe: baseline\nlearning_rate: 1e-3\n"
    )
    command = ["train", str(path), "--out", str(out), "--epochs", "1"]
    done = hiddenkey(*command)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "result.json").read_text())
    assert (record["config"]["epochs"], record["config"]["learning_rate"]) == (1, 1e-3)
    assert str(out / "adapter") in done.stdout
    assert "epoch 1" in done.stderr
    main(command)
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seed", "1"])
    assert stop.value.code == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def test_a_broken_file_is_told_of_once(bert: Path, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\nc,0,1,1\n")
    flags = {"--model": bert, "--data": tmp_path / "rows.csv", "--out": tmp_path / "out"}
    done = hiddenkey("train", *(str(part) for flag in flags.items() for part in flag))
    assert done.returncode == 2
    assert done.stderr.count("2 column names (text, label), but 4 fields in line 4") == 1


def test_ctrl_c_promises_nothing_where_nothing_was_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(command: cli.ReportCommand) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUNNERS, "report", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["report", "anywhere"])
    assert capsys.readouterr().err == "\nStopped.\n"


@pytest.mark.parametrize(
    ("flags", "said"), [([], " The same command continues from the last checkpoints."), (["--dry-run"], "")]
)
def test_ctrl_c_in_a_sweep(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(command: SweepConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUNNERS, "sweep", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["sweep", "any.yaml", *flags])
    assert capsys.readouterr().err == f"\nStopped.{said}\n"


@pytest.mark.parametrize(
    ("flags", "begun", "advice"),
    [
        ([], {}, "The same command continues from the last checkpoint."),
        ([], {"seed": 9}, "Nothing was begun yet."),
        ([], None, "Nothing was begun yet."),
        (["--overwrite"], {}, "The same command without --overwrite continues from the last checkpoint."),
        (["--overwrite"], {"seed": 9}, "Nothing was deleted yet."),
        (["--overwrite"], None, "Nothing was deleted yet."),
    ],
    ids=[
        "plain",
        "plain, another run is there",
        "plain, nothing is there",
        "begun anew",
        "another run is there",
        "nothing is there",
    ],
)
def test_ctrl_c_does_not_advise_to_delete(
    flags: list[str],
    begun: dict[str, Any] | None,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = TrainConfig("m", "d", str(tmp_path))
    if begun is not None:
        written(tmp_path, config=replace(config, **begun).to_dict())

    def stop(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUNNERS, "train", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["train", "--model", "m", "--data", "d", "--out", str(tmp_path), *flags])
    assert capsys.readouterr().err == f"\nStopped. {advice}\n"


def test_ctrl_c_says_how_to_continue(bert: Path, sentences: Path, tmp_path: Path):
    out = tmp_path / "out"
    flags = ["--model", str(bert), "--data", str(sentences), "--out", str(out), "--max-length", "16"]
    command = [*PROGRAM, "train", *flags, "--epochs", "5000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 180  # the machine may be busy
    while not list(out.glob("checkpoints/*/complete")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "same command continues" in error
    assert "Traceback" not in error


def test_a_number_that_is_not_finite_is_printed_again(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """A finished run is shown once more from its `result.json`, which has null there."""
    values = {"validation_nll": 800.0, "validation_perplexity": None}
    result = result_in(tmp_path, last=values, best=values, metric="nll")
    monkeypatch.setattr("hiddenkey.lab.train.train", lambda config: result)
    monkeypatch.setattr(cli, "_require_found", lambda config: None)
    main(["train", "--model", "m", "--data", "d", "--out", str(tmp_path)])
    assert "validation_nll 800  validation_perplexity -" in capsys.readouterr().out
