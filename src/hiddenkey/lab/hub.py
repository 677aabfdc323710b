"""Whether a model and a data set are here or on the hub, before the libraries that take seconds to import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from ..errors import ConfigError

_SECONDS = 5.0
GLUE_SET = "nyu-mll/glue"


def require_model(name: str) -> None:
    """Look at the folder of a model; a name that is no folder may be one of the hub.

    Raises:
        FileNotFoundError: no such folder, or one without a configuration.
        ConfigError: an adapter or a run in the place of a model.
    """
    folder = Path(name)
    if (folder / "config.json").exists():
        return
    for kind, file in (("a PEFT adapter", "adapter_config.json"), ("a run", "result.json")):
        if (folder / file).exists():
            raise ConfigError(
                f"{name} is the folder of {kind}, not of a model; give the model that it was trained on. To go on "
                "training an adapter, load it with PEFT in a script (README, load_recipe)."
            )
    if folder.is_dir():
        raise FileNotFoundError(f"model = {name!r}: the folder has no config.json, so it holds no model.")
    if folder.exists() or is_path(name):
        raise FileNotFoundError(f"model = {name!r}: there is no such folder.")


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder: the hub's are `name` and `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def ask_hub(kind: Literal["model", "dataset"], name: str) -> None:
    """Ask the hub once for a model or a data set. Where it cannot be reached, only its cache is read from then on.

    Raises:
        FileNotFoundError: the hub has none of this name, or cannot be reached and the cache has none either.
    """
    here = f"{'data' if kind == 'dataset' else kind} = {name!r}: there is no such file or folder here"
    try:
        cached = _is_cached(kind, name)
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else _unreachable(kind, name)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{here}, and none on the hub: {error}") from error
    if not reason:
        return
    if not cached:
        raise FileNotFoundError(f"{here}, none in the hub's cache, and the hub cannot be reached: {reason}")
    if not is_offline_mode():
        sys.stderr.write(f"The hub cannot be reached ({reason}), so its cache is used.\n")
        constants.HF_HUB_OFFLINE = True  # the libraries would try each file again and again


def _is_cached(kind: str, name: str) -> bool:
    """Whether the cache has a model's configuration, or a folder of the data set, the hub's or that of datasets."""
    if kind == "model":
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    made = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    wanted = {f"datasets--{name.replace('/', '--')}", name.replace("/", "___")}
    # datasets writes GlueSet as glue_set
    plain = {one.replace("_", "").lower() for one in wanted}
    return any(
        folder.name.replace("_", "").lower() in plain
        for cache in (Path(constants.HF_HUB_CACHE), made)
        if cache.is_dir()
        for folder in cache.iterdir()
    )


def _unreachable(kind: str, name: str) -> str:
    """Why the hub does not answer; empty where it does."""
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise
    except HfHubHTTPError:
        return ""  # it is there, and says more to those who ask for the files
    except Exception as error:  # noqa: BLE001 - each version's HTTP library has errors of its own
        return str(error) or type(error).__name__
    return ""
