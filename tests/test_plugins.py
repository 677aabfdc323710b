"""The plugins for Axolotl and ms-swift, through their own commands on a tiny model; skipped where they are missing.

Both pin versions that `constraints.txt` hasn't got, so each is tested in a virtual environment of its own:
`docs/trainers.md` says how.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import hiddenkey

from .lab.tiny import save_llama

PLUGINS = Path(__file__).parents[1] / "examples" / "plugins"
RECIPE = "hiddenkey@0.3"
STEPS = 3
AXOLOTL = {
    "model_type": "AutoModelForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "datasets": [{"path": "texts.jsonl", "ds_type": "json", "type": "alpaca"}],
    "dataset_prepared_path": "prepared",
    "output_dir": "out",
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "sequence_len": 64,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
}
SWIFT = {
    "model_type": "llama",
    "template": "chatml",
    "tuner_type": "lora",
    "torch_dtype": "float32",
    "dataset": "texts.jsonl",
    "attn_impl": "sdpa",
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "lora_dropout": 0,
    "output_dir": "out",
    "add_version": "false",
    "max_length": 64,
    "report_to": "none",
}


@pytest.fixture
def run(tmp_path):
    """Runs a command in a folder with a tiny model and texts; returns (the logs of its steps, what it printed)."""
    save_llama(tmp_path / "model")
    with (tmp_path / "texts.jsonl").open("w") as file:
        for i in range(16):
            counted = " ".join(map(str, range(i + 1)))
            messages = [{"role": "user", "content": f"Count to {i}"}, {"role": "assistant", "content": counted}]
            row = {"instruction": f"Count to {i}", "output": counted, "messages": messages}
            file.write(json.dumps(row) + "\n")

    def run(*command, **environment):
        settings = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": str(PLUGINS)} | environment
        options = {"cwd": tmp_path, "env": os.environ | settings, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-m", *command], check=False, timeout=900, **options)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        state = max(tmp_path.glob("out/**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]

    return run


def check(with_plugin, plain):
    assert len(with_plugin) == len(plain) == STEPS
    for entry in with_plugin:
        assert entry["consistency_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["consistency_loss"], rel=1e-3)
        assert all(0.15 < entry[f"drop_rate/{position}"] < 0.45 for position in ("logits", "hidden"))
    assert not any("task_loss" in entry for entry in plain)


@pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotl(run, tmp_path):
    def train(**more):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"base_model": "model", **AXOLOTL, **more}))
        return run("axolotl.cli.train", "config.yaml")

    plugin = {"plugins": ["hiddenkey_axolotl.HiddenKeyPlugin"], "seed": 5}
    plain = train(seed=5)
    check(train(**plugin, hiddenkey_recipe=RECIPE), plain)
    assert hiddenkey.load_recipe(tmp_path / "out") == hiddenkey.parse(RECIPE)
    # LoRA starts at zero, and draws its weights before Axolotl seeds: the first loss alone can be compared.
    (first, *_) = train(**plugin, hiddenkey_recipe="baseline")
    assert first["task_loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)


@pytest.mark.skipif(find_spec("swift") is None, reason="ms-swift is not installed")
def test_swift(run, tmp_path):
    arguments = [text for name, value in SWIFT.items() for text in (f"--{name}", str(value))]

    def train(*more, **environment):
        return run("swift.cli.main", "sft", "--model", str(tmp_path / "model"), *arguments, *more, **environment)

    plugin = ("--external_plugins", str(PLUGINS / "hiddenkey_swift.py"))
    plain = train("--seed", "5")
    check(train("--seed", "5", *plugin, HIDDENKEY_RECIPE=RECIPE), plain)
    assert hiddenkey.load_recipe(tmp_path / "out" / f"checkpoint-{STEPS}") == hiddenkey.parse(RECIPE)
    same = train("--seed", "5", *plugin, HIDDENKEY_RECIPE="hiddenkey@0")
    assert [entry["loss"] for entry in same] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)
