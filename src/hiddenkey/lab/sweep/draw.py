"""Settings by random search and TPE, drawn by Optuna with seeds that the group's name fixes."""

from __future__ import annotations

import hashlib
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from .space import Choice, Space

# A search that learns begins with some random trials; fixed, so that more trials leave the first ones as they were.
STARTUP = 5
_TRIES = 1000

optuna.logging.set_verbosity(optuna.logging.ERROR)


def draw_random(space: Space, count: int, name: str) -> list[dict[str, Any]]:
    """The first `count` different settings of the random search with this name; more begin with the same."""
    study = optuna.create_study(sampler=RandomSampler(seed=seed_of(name)))
    settings: list[dict[str, Any]] = []
    for _ in range(_TRIES * count):
        setting = _ask(study, space)
        if setting not in settings:
            settings.append(setting)
        if len(settings) == count:
            break
    return settings


def draw_tpe(space: Space, trial: int, name: str, earlier: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """The setting of the trial with this number, from what came of the `earlier` ones (lower is better)."""
    settings = [params for params, _ in earlier]
    for attempt in range(_TRIES):
        seed = seed_of(f"{name} {trial} {attempt}")
        # Where it would only repeat itself, as in a space of few values, chance goes on.
        sampler: BaseSampler = (
            TPESampler(seed=seed, n_startup_trials=STARTUP) if attempt < 10 else RandomSampler(seed=seed)
        )
        study = optuna.create_study(sampler=sampler)
        kinds = _distributions(space)
        for params, value in earlier:
            study.add_trial(optuna.trial.create_trial(params=_coded(space, params), distributions=kinds, value=value))
        setting = _ask(study, space)
        if setting not in settings:
            break
    return setting


def seed_of(name: str) -> int:
    """A seed from a name, the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _ask(study: optuna.Study, space: Space) -> dict[str, Any]:
    drawn = study.ask(_distributions(space)).params
    return {
        name: dimension.values[drawn[name]] if isinstance(dimension, Choice) else drawn[name]
        for name, dimension in space.items()
    }


def _coded(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    return {
        name: dimension.values.index(params[name]) if isinstance(dimension, Choice) else params[name]
        for name, dimension in space.items()
    }


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    kinds: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, dimension in space.items():
        if isinstance(dimension, Choice):
            kinds[name] = optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
        elif dimension.whole:
            low, high = int(dimension.low), int(dimension.high)
            kinds[name] = optuna.distributions.IntDistribution(low, high, log=dimension.log)
        else:
            kinds[name] = optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return kinds
