"""The sweep file: what it expands to, and every mistake told before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiddenkey.errors import ConfigError, RecipeError, UserError
from hiddenkey.lab.sweep_file import Values, make_plan, read_sweep

from .tools import plan_of, runs_of, sweep_values, write_sweep

LR = {"low": "1e-5", "high": 1e-3, "log": True}
P = {"low": 0.01, "high": 0.3}


def with_grids(learning_rate: Any, p: Any) -> dict[str, Any]:
    return {
        "baseline": {"recipe": "baseline", "grid": {"learning_rate": learning_rate}},
        "hiddenkey": {"recipe": "hiddenkey@{p} ~ kl*{weight}", "grid": {"p": p, "weight": [1.0]}},
    }


def test_every_method_has_every_trial_on_every_combination_of_axes(tmp_path: Path):
    axes = {"seed, data_seed": [[1, 11], [2, 12], [3, 13]], "lora_r": [4, 8]}
    plan = plan_of(tmp_path, methods=with_grids([1e-4, 2e-4], [0.1, 0.2]), axes=axes)
    runs = runs_of(plan)
    assert len(plan.slots) == len(runs) == 2 * 2 * 3 * 2
    assert len({run.id for run in runs}) == len(runs)
    assert Counter(run.sweep["method"] for run in runs) == {"baseline": 12, "hiddenkey": 12}
    assert {(run.config.seed, run.config.data_seed) for run in runs} == {(1, 11), (2, 12), (3, 13)}
    first = next(run for run in runs if run.sweep["method"] == "hiddenkey")
    assert first.config.recipe == "hiddenkey@0.1 ~ kl*1.0"
    assert first.sweep == {
        "name": "tiny",
        "method": "hiddenkey",
        "params": {"p": 0.1, "weight": 1.0},
        "axes": {"seed": 1, "data_seed": 11, "lora_r": 4},
        "trial": 1,
        "trials": 2,
    }
    assert first.config.out == f"{tmp_path}/out/{first.id}"
    assert first.id.startswith("hiddenkey-p0.1-weight1-seed1-data_seed11-lora_r4-")


def test_a_method_may_set_what_the_base_sets(tmp_path: Path):
    methods = {
        "baseline": {"recipe": "baseline", "grid": {"epochs": [2, 3]}},
        "short": {"recipe": "baseline", "set": {"epochs": 4, "weight_decay": 0}, "grid": {"lora_r": [1, 2]}},
    }
    runs = runs_of(plan_of(tmp_path, methods=methods, axes=None))
    assert [run.config.epochs for run in runs] == [2, 3, 4, 4]
    assert [run.config.weight_decay for run in runs] == [0.1, 0.1, 0.0, 0.0]


def test_an_id_is_made_of_the_run_and_of_nothing_else(tmp_path: Path):
    ids = [run.id for run in runs_of(plan_of(tmp_path))]
    methods = sweep_values(tmp_path)["methods"]
    methods["dropkey column"]["recipe"] = "logits:column@{p}"  # the same in other words
    same = plan_of(tmp_path, out=str(tmp_path / "elsewhere"), name="other", methods=methods)
    assert [run.id for run in runs_of(same)] == ids
    base = sweep_values(tmp_path)["base"]
    assert [run.id for run in runs_of(plan_of(tmp_path, base=base | {"weight_decay": 0.1}))] == ids, "the default"
    assert not set(ids) & {run.id for run in runs_of(plan_of(tmp_path, base=base | {"epochs": 2}))}


def test_fields_of_the_base_can_be_set_from_outside(tmp_path: Path):
    sweep = read_sweep(write_sweep(tmp_path), ["model=./tiny", "learning_rate=1e-3", "text_columns=[a, b]"], "there")
    assert sweep.base["model"] == "./tiny"
    assert (sweep.base["learning_rate"], sweep.base["text_columns"], sweep.out) == (1e-3, ("a", "b"), "there")
    for wrong, said in (("modle=x", "model"), ("model", "field=value"), ("seed=1", "twice in base and axes")):
        with pytest.raises(ConfigError, match=said):
            read_sweep(write_sweep(tmp_path), [wrong])


def test_random_search_draws_the_same_every_time_and_more_trials_begin_with_them(tmp_path: Path):
    methods = with_grids(LR, P)
    plan, same, more = (plan_of(tmp_path, methods=methods, search="random", trials=trials) for trials in (3, 3, 5))
    assert runs_of(plan) == runs_of(same)
    ids = {run.id for run in runs_of(plan)}
    assert ids == {slot.run.id for slot in more.slots if slot.run and slot.trial <= 3}
    rates = {run.sweep["params"]["p"] for run in runs_of(plan) if run.sweep["method"] == "hiddenkey"}
    assert len(rates) == 6, "other draws for every seed"
    assert all(0.01 <= rate <= 0.3 for rate in rates)
    assert all(1e-5 <= run.config.learning_rate <= 1e-3 for run in runs_of(plan) if run.sweep["method"] == "baseline")


def test_random_search_in_a_small_space_takes_every_setting_once(tmp_path: Path):
    methods = {"baseline": {"recipe": "baseline", "grid": {"lora_r": {"low": 1, "high": 6}}}}
    runs = runs_of(plan_of(tmp_path, methods=methods, axes=None, search="random", trials=6))
    assert sorted(run.config.lora_r for run in runs) == [1, 2, 3, 4, 5, 6]


def settings_of(tmp_path: Path, grid: Values, trials: int, value: Callable[..., float]) -> list[Values]:
    """What TPE tries where `value` is what comes of a setting."""
    methods = {"a": {"recipe": "hiddenkey@{p}", "grid": {"p": P} | grid}}
    plan = plan_of(tmp_path, methods=methods, axes=None, search="tpe", trials=trials)
    settings = plan.slots[0].group.settings()
    found = [next(settings)]
    while len(found) < trials:
        found.append(settings.send(value(**found[-1])))
    return found


def test_tpe_moves_to_where_it_was_good_and_repeats_nothing(tmp_path: Path):
    grid = {"target_modules": [["query"], ["value"], ["query", "value"]]}

    def value(p: float, target_modules: tuple[str, ...]) -> float:
        return abs(p - 0.1) + 0.3 * (target_modules != ("value",))

    found = settings_of(tmp_path, grid, 50, value)
    assert found == settings_of(tmp_path, grid, 50, value)
    assert sum(abs(setting["p"] - 0.1) for setting in found[30:]) / 20 < 0.055
    small = settings_of(tmp_path, {"p": [0.1, 0.2], "lora_r": [1, 2]}, 4, lambda **_: 1.0)
    assert sorted(map(str, small)) == [str({"p": p, "lora_r": r}) for p in (0.1, 0.2) for r in (1, 2)]


def test_a_home_folder_is_part_of_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids = set()
    for home in ("/home/a", "/home/b"):
        monkeypatch.setenv("HOME", home)
        plan = plan_of(tmp_path, base={"model": "m", "data": "~/d.csv"})
        assert runs_of(plan)[0].config.data == f"{home}/d.csv"
        ids.add(runs_of(plan)[0].id)
    assert len(ids) == 2


METHOD = {"recipe": "dropkey@{p}", "grid": {"p": [0.1, 0.2]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nmae": "x"}, "unknown name 'nmae'. Did you mean 'name'"),
        ({"name": None}, "name is missing"),
        ({"name": 3}, "name = 3"),
        ({"base": {"model": "m", "data": "d", "epoch": 1}}, "Did you mean 'epochs'"),
        ({"base": {"model": "m", "data": "d", "epochs": "two"}}, "epochs = 'two'"),
        ({"base": {"model": "m", "data": "d", "out": "x"}}, "base: unknown name 'out'"),
        ({"base": {"model": "m"}}, "data is missing"),
        ({"base": {"model": "m", "data": "d", "seed": 1}}, "twice in base and axes"),
        ({"base": {"model": "m", "data": "d", "epochs": 0}}, "epochs = 0"),
        ({"base": []}, "base = "),
        ({"methods": {}}, "methods = {}"),
        ({"methods": {"a": {"recipe": "baseline", "gird": {}}}}, "Did you mean 'grid'"),
        ({"methods": {"a": {"grid": {}}}}, "recipe is missing"),
        ({"methods": {"a": METHOD | {"recipe": "dropkey@{q}"}}}, "has {q}, but grid has no q"),
        (
            {"methods": {"a": METHOD | {"recipe": "dropkey@0.1"}}},
            "p is neither a field that can be varied nor a name",
        ),
        ({"methods": {"a": METHOD | {"recipe": "dropkey@{p:.1f}"}}}, "Unknown format code"),
        ({"methods": {"a": METHOD | {"recipe": "dropkey@{p"}}}, "write {p}"),
        ({"methods": {"a": METHOD | {"recipe": "dropkie@{p}"}}}, "dropkie"),
        ({"methods": {"a": METHOD | {"grid": {"p": [0.1, 1.0]}}}}, "p = 1.0"),
        ({"methods": {"a": METHOD | {"grid": {"p": [0.1, "1e-1"]}}}}, "stands in it twice"),
        ({"methods": {"a": METHOD | {"grid": {"p": 0.1}}}}, "a list of one or more values"),
        ({"methods": {"a": METHOD | {"grid": {"p": []}}}}, "a list of one or more values"),
        ({"methods": {"a": METHOD | {"grid": {"p": [True]}}}}, "a number or a text where"),
        ({"methods": {"a": METHOD | {"grid": {"p": P}}}}, "a range needs search"),
        ({"methods": {"a": METHOD, "b": {"recipe": "baseline"}}}, "a 2, b 1"),
        ({"methods": {"a": METHOD | {"set": {"seed": 3}}}}, "seed is the same for all"),
        (
            {"methods": {"a": {"recipe": "baseline", "set": {"lora_r": 4}, "grid": {"lora_r": [4]}}}},
            "set and in grid",
        ),
        ({"methods": {"a": {"recipe": "baseline", "grid": {"recipe": ["a"]}}}}, "neither a field that can be varied"),
        ({"methods": {"a": {"recipe": "baseline"}, "A": {"recipe": "baseline"}}}, "one name to a reader"),
        (
            {"methods": {"a": {"recipe": "{r}", "grid": {"r": ["hiddenkey@0.1", "hiddenkey@0.1 ~ kl*1.0"]}}}},
            "are equal",
        ),
        ({"methods": {"Lora Dropout": METHOD, "lora_dropout": METHOD}}, "one name to a reader"),
        ({"methods": {"a": {"recipe": "baseline", "set": {"max_length": 32}}}}, "max_length is the same for all"),
        ({"methods": {"a": {"recipe": "baseline", "set": {"metric": "f1"}}}}, "metric is the same for all"),
        (
            {"methods": {"a": {"recipe": "baseline", "grid": {"train_size": [4, 5]}}}},
            "train_size is the same for all",
        ),
        (
            {"methods": {"a": {"recipe": "baseline", "grid": {"data_seed": [4, 5]}}}},
            "data_seed is the same for all; give it in base or in axes.",
        ),
        ({"axes": {"metric": ["accuracy", "f1"]}}, "axes: metric cannot be one"),
        ({"axes": {"task": ["auto", "regression"]}}, "axes: task cannot be one"),
        ({"axes": {"sed": [1]}}, "Did you mean 'seed'"),
        ({"axes": {"seed": 1}}, "axes.seed = 1 is not allowed"),
        ({"axes": {"seed": [1, 1]}}, "stands in it twice"),
        ({"axes": {"seed": [-1]}}, "seed = -1"),
        ({"axes": {"seed, data_seed": [1, 2]}}, "lists of 2 values"),
        ({"axes": {"seed": [1], "seed, data_seed": [[1, 2]]}}, "seed stands twice"),
        ({"axes": {"seed, seed": [[2, 8]]}}, "seed stands twice"),
        ({"base": {"model": "m", "data": "d", "recipe": "x"}}, "base: unknown name 'recipe'. Known"),
        ({"search": "anneal"}, "search = 'anneal'"),
        ({"search": "random", "trials": 10**9}, "trials = 1000000000 is not allowed"),
        ({"axes": {name: list(range(1, 1001)) for name in ("seed", "lora_r", "data_seed")}}, "asks for 4e+09 runs"),
        ({"name": "x" * 10**6}, "…"),
        ({"methods": {"x" * 10**6: METHOD}}, "…"),
        ({"x" * 10**6: 1}, "unknown name 'xxx"),
        (
            {"methods": {"a": {"recipe": "dropkey@{lora_dropout}", "grid": {"lora_dropout": [0.1]}}}},
            "neither a field",
        ),
        ({"methods": {"a": METHOD | {"set": {"num_beams": 4}}}}, "num_beams is the same for all"),
        ({"trials": 4}, "trials = 4: random"),
        ({"search": "random"}, "trials = None: random"),
        ({"search": "random", "trials": 3}, "2 different settings, but trials = 3"),
        (
            {"search": "tpe", "trials": 2, "methods": {"a": METHOD | {"grid": {"p": {"low": 0.3, "high": 0.1}}}}},
            "low",
        ),
        ({"search": "tpe", "trials": 2, "methods": {"a": METHOD | {"grid": {"p": {"low": 0.1}}}}}, "'high'"),
        ({"search": "tpe", "trials": 2, "methods": {"a": METHOD | {"grid": {"p": P | {"high": 1.0}}}}}, "p = 1.0"),
        ({"search": "random", "trials": 1, "methods": {"a": METHOD | {"grid": {"p": P | {"high": 1.5}}}}}, "p = 1.5"),
        (
            {"search": "tpe", "trials": 2, "methods": {"a": METHOD | {"grid": {"p": P | {"step": 1}}}}},
            "'step'",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        plan_of(tmp_path, **changes)
    assert isinstance(error.value, (ConfigError, RecipeError))
    assert said in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text", ["", "[]", "name: [", "name: a\nname: b\n", "!!python/object/apply:os.system [ls]", "\x00"]
)
def test_what_is_no_mapping_with_every_key_once_is_told(tmp_path: Path, text: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.yaml"):
        make_plan(read_sweep(path))


def test_the_same_method_twice_is_told(tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    entry = "  a: {recipe: baseline}\n"
    path.write_text(f"name: x\nout: y\nbase: {{model: m, data: d}}\nmethods:\n{entry}{entry}")
    with pytest.raises(ConfigError, match="'a' stands twice"):
        read_sweep(path)


def test_the_file_of_the_documentation(tmp_path: Path):
    page = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text()
    path = tmp_path / "sweep.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    plan = make_plan(read_sweep(path))
    assert len(plan.slots) == 4 * 3 * 3 * 2
    assert {run.config.weight_decay for run in runs_of(plan) if run.sweep["method"] == "lora dropout"} == {0.0}
