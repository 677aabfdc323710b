"""What the loader does with weights that a checkpoint lacks."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.errors import ConfigError
from hiddenkey.lab.run import train


def _without(model: Path, part: str, folder: Path) -> Path:
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, weights, metadata={"format": "pt"})
    return folder


def test_a_layer_that_the_weights_lack_is_an_error_that_names_it(bert: Path, sentences: Path, tmp_path: Path):
    model = _without(bert, "encoder.layer.0.", tmp_path / "model")
    out = str(tmp_path / "out")
    config = TrainConfig(
        model=str(model), data=str(sentences), out=out, learning_rate=1e-3, max_length=32, max_steps=1
    )
    with pytest.raises(ConfigError, match=r"lack \d+ .*bert\.encoder\.layer\.0\."):
        train(config)
