"""No test here may reach a hub, and no test may fill the user's cache."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from . import tiny


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache) / "datasets")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    return tiny.write_csv(tmp_path / "sentences.csv", tiny.labelled_rows(40))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return tiny.write_csv(tmp_path / "pairs.csv", tiny.paired_rows(24))
