"""Tokenizers, and pretrained models with LoRA on them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

import hiddenkey

from ..errors import ConfigError
from .config import Dtype, TrainConfig
from .hub import require_model
from .run_folder import ADAPTER, Metrics, RunResult

if TYPE_CHECKING:
    from .tasks import Task

# The names of query and value in transformers, then of projections that hold both in one; the first found wins.
QUERY_AND_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("c_attn",),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("in_proj",),
)
HEADS = ("classifier", "score")
"""The names of classifiers' heads in transformers; one that has parts of its own is trained whole."""
# How the parts of a configuration are called that are not for text.
_SEES_OR_HEARS = re.compile(r"vision|image|audio|speech|vq")
# How the files of tokenizers are called, at their beginning.
_TOKENIZER = re.compile(r"tokenizer|tokenization|vocab|merges|spiece|sentencepiece|tekken|.*\.(model|tiktoken)$")


def load_tokenizer(config: TrainConfig, model: Any) -> Any:
    """The tokenizer of the model, with a pad token and room for `max_length`.

    Raises:
        OSError: no such tokenizer.
        ConfigError: it cannot be read, no token can pad, or the model takes fewer tokens than `max_length`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"The tokenizer of {config.model} cannot be read: {error}") from error
    _require_tokenizer(config.model, tokenizer)
    tokenizer.padding_side = "right"
    rows = embedded_tokens(model)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        raise ConfigError(
            f"The tokenizer of {config.model} has no pad, eos or unk token that the model knows; "
            "name one of them as pad_token in its tokenizer_config.json."
        )
    limits = [tokenizer.model_max_length, positions(model)]
    limit = min(value for value in limits if value is not None)
    if config.max_length > limit:
        raise ConfigError(
            f"max_length = {config.max_length}, but {config.model} takes {limit}; give {limit} or less."
        )
    return tokenizer


def positions(model: Any) -> int | None:
    """How many tokens the model has a place for: RoBERTa's like leave out those up to the padding's."""
    places: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return places if places is None or padding is None else places - padding - 1


def embedded_tokens(model: Any) -> float:
    """How many tokens the model has a vector for; some make vectors otherwise (CANINE, Perceiver)."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        return math.inf


def _require_tokenizer(model: str, tokenizer: Any) -> None:
    # transformers makes one up, of special tokens alone, to which every word is unknown.
    folder = Path(model)
    needs_files = bool(getattr(tokenizer, "vocab_files_names", {}))
    if needs_files and folder.is_dir() and not any(_TOKENIZER.match(path.name) for path in folder.iterdir()):
        raise ConfigError(
            f"{model} holds no tokenizer; put the files of the pretrained model's there (tokenizer.json)."
        )


def require_dtype(dtype: Dtype) -> None:
    """Raises ConfigError where this machine cannot train in this type."""
    if dtype == "float16" and not torch.cuda.is_available():
        raise ConfigError("dtype float16 needs a CUDA device; bfloat16 and float32 train everywhere.")


def require_quantizer(name: str, model_config: Any) -> None:
    """Raises ConfigError where what a quantised checkpoint needs is missing here: a package, or a GPU."""
    parts = (model_config, model_config.get_text_config(decoder=True))
    method = next((part.quantization_config for part in parts if getattr(part, "quantization_config", None)), None)
    if method is None:
        return
    try:
        AutoHfQuantizer.from_config(method, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # each method raises in its own way
        raise ConfigError(f"{name} is quantised, and its weights cannot be read here: {reason(error)}") from error


def model_options(config: TrainConfig, task: Task) -> dict[str, Any]:
    """What the model's configuration is given."""
    backend = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return task.model_options() | backend


def read_weights(auto: Any, config: TrainConfig, **options: Any) -> tuple[Any, set[str]]:
    """(the pretrained model, the weights of its head that are new); auto: an Auto class of transformers.

    A classifier's head is new where the model was published without one or for other classes, and so may its pooler
    be.

    Raises:
        OSError: no such model.
        ConfigError: weights that cannot be read, and others that are missing or do not fit.
    """
    options |= {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    try:
        model, loading = auto.from_pretrained(
            config.model, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise ConfigError(
            f"The weights of {config.model} cannot be read: {error}. Where git left a pointer in their place, fetch "
            "them with git lfs pull."
        ) from error
    missing = set(loading["missing_keys"])
    resized = {key: shape for key, _, shape in loading["mismatched_keys"]}
    _require_whole(model, missing, resized, config.model)
    return model, missing | set(resized)


def _require_whole(model: Any, missing: set[str], resized: dict[str, torch.Size], name: str) -> None:
    """Raises ConfigError where more than a new head is missing, or has another size than the checkpoint's."""
    base = f"{model.base_model_prefix}."
    published = type(model).__name__ in (model.config.architectures or ())
    writes = model.get_output_embeddings() is not None  # the head of a language model is never new
    own = {key for key in missing if key.startswith(base) and "pooler" not in key.split(".")}
    if lacking := sorted(missing if published or writes else own):
        raise ConfigError(
            f"The weights of {name} lack {len(lacking)} of {type(model).__name__}'s, which would be drawn at random: "
            f"{_some(lacking)}. Fetch the model again, or give one that has them all."
        )
    classes = model.config.num_labels
    if wrong := sorted(k for k, shape in resized.items() if writes or k.startswith(base) or shape[0] != classes):
        raise ConfigError(f"The weights of {name} have other sizes than its configuration says: {_some(wrong)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def load_model(config: TrainConfig, task: Task, tokenizer: Any) -> PeftModel:
    """The pretrained model with LoRA on its query and value, and whatever is new in it trained whole.

    Raises:
        OSError: no such model.
        ConfigError: no module to put LoRA on, or weights that cannot be read, are missing or do not fit.
    """
    model, new = read_weights(getattr(transformers, task.model_class), config, **model_options(config, task))
    # A classifier on a decoder finds the last token by it; the tokenizer may pad with another than was published.
    # Models of text and images read it in the configuration of the text, T5Gemma in both.
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    return add_lora(model, config, task.peft_type, new)


def add_lora(model: Any, config: TrainConfig, task_type: str | None, new: set[str]) -> PeftModel:
    """LoRA around a model, in float32; new: weights that its checkpoint lacks, which are trained whole.

    Raises:
        ConfigError: no module to put LoRA on.
    """
    lora = LoraConfig(
        task_type=task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=find_targets(model, config.target_modules),
        exclude_modules="|".join(rf"{re.escape(tower)}\..*" for tower in find_towers(model)) or None,
        modules_to_save=_new_modules(new),
    )
    peft_model = get_peft_model(model, lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def find_towers(model: nn.Module) -> list[str]:
    """Paths of the parts that see or hear, which texts alone do not enter; LoRA there would learn nothing."""
    config: Any = getattr(model, "config", None)
    kinds = {name: type(getattr(config, name)) for name in getattr(config, "sub_configs", ())}
    others = {kind for name, kind in kinds.items() if _SEES_OR_HEARS.match(name)}
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    return [name for name, part in parts if name and type(part.config) in others]


def find_targets(model: nn.Module, asked: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers that get LoRA, outside of `find_towers`.

    Raises:
        ConfigError: a name that no linear layer has, or none of the usual names.
    """
    # PEFT trains a classifier whole, and finds nothing where that alone is named.
    towers = tuple(f"{tower}." for tower in find_towers(model))
    modules = ((name, module) for name, module in model.named_modules() if not name.startswith(towers))
    linear = (name for name, module in modules if isinstance(module, (nn.Linear, Conv1D)))
    present = {name.rpartition(".")[2] for name in linear if name.partition(".")[0] not in HEADS}
    if asked:
        unknown = sorted(set(asked) - present)
        if unknown:
            raise ConfigError(
                f"target_modules: no linear layer named {', '.join(unknown)}; there are {', '.join(sorted(present))}."
            )
        return list(asked)
    found = next((names for names in QUERY_AND_VALUE if set(names) <= present), None)
    if found is None:
        raise ConfigError(
            "No query and value of a usual name for LoRA; name layers with --target-modules. "
            f"Linear layers: {', '.join(sorted(present))}."
        )
    return list(found)


def _new_modules(new: set[str]) -> list[str] | None:
    # What the checkpoint lacks is drawn at random: frozen, it would be lost with the run, so it is trained and saved.
    modules = {key.rpartition(".")[0] for key in new}
    first = {name: name.split(".")[0] for name in modules}
    heads = {first[name] if first[name] in HEADS else name for name in modules}
    return sorted(heads) or None


def build_skeleton(name: str, model_class: str, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The structure of a model without weights, in no time and no memory.

    `model_class` is an Auto class of transformers; empty, the class the model was published as, or a sequence
    classifier where that has no head.

    Raises:
        OSError: no such model.
        ConfigError: the model cannot be built with that head or attention, or wants to run code of its own.
    """
    config = load_config(name, trust_remote_code, **options)
    auto = getattr(transformers, model_class or published_class(config))
    with torch.device("meta"):
        try:
            if hasattr(auto, "from_config"):  # which asks on the terminal where it is not told
                return auto.from_config(config, trust_remote_code=trust_remote_code)
            return auto._from_config(config)
        except Exception as error:  # whatever a wrong value in the configuration runs into
            raise ConfigError(f"{name} ({config.model_type}) cannot be a {auto.__name__}: {reason(error)}") from error


def load_config(name: str, trust_remote_code: bool, **options: Any) -> Any:
    """The configuration of a model.

    Raises:
        OSError: no such model.
        ConfigError: a wrong value, a kind of model that transformers does not know, or code of its own that may not
            run.
    """
    require_model(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        kinds = config.architectures
        if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
            raise TypeError(f"architectures is a list of class names, got {kinds!r}")
        return config
    except Exception as error:  # whatever a wrong value in the file runs into
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise OSError(f"model = {name!r}: here is no folder of that name, and from the hub: {error}") from error
        own = any(word in str(error) for word in ("trust_remote_code", "model type"))
        option = " Here that option is --trust-remote-code." if own else ""
        raise ConfigError(f"The config.json of {name} cannot be read: {reason(error)}{option}") from error


def reason(error: Exception) -> str:
    """What a library's error says in one line, with its type, without which `KeyError: 'x'` reads as `'x'`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def published_class(config: Any) -> str:
    """The class a model was published as, or a sequence classifier where that has no head.

    Raises ConfigError where config.json names something of transformers that is no model.
    """
    published = str((config.architectures or [""])[0])
    found = getattr(transformers, published, None)
    if found is None or published.endswith("Model"):
        return "AutoModelForSequenceClassification"
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ConfigError(
            f"The config.json of {config.name_or_path} has architectures = {config.architectures!r}, and "
            f"transformers.{published} is no model; name the model's class there, for instance "
            "LlamaForCausalLM."
        )
    return published


_CARD = """---
base_model: {model}
library_name: peft
tags:
- lora
- hiddenkey
---

# {name}

A LoRA adapter for `{model}`, trained on `{data}` ({task}, {rows} rows) with hiddenkey {version}.

- dropout recipe: `{recipe}`
- rank {r}, alpha {alpha}, learning rate {learning_rate}, {epochs} epochs, batch size {batch}, seed {seed}
- the adapter is that of the {keep} epoch
{classes}{chat}
{tables}

The adapter needs PEFT alone; the recipe works in training only and changes nothing here.

```python
from peft import {auto_class}
from transformers import AutoTokenizer

folder = "path/of/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {auto_class}.from_pretrained(folder{options})
# As in training: the model may have been published with another token for padding, or with none.
for config in (model.config, model.config.get_text_config()):
    config.pad_token_id = tokenizer.pad_token_id
```
"""

_NO_TEMPLATE = (
    "- prompts were read as they stand in the data, without the tokenizer's chat template: ask in the same form\n"
)


def save_adapter(model: Any, tokenizer: Any, result: RunResult) -> None:
    """Write `adapter/` beside `result.json`: first under another name, then moved into place.

    Raises:
        OSError: the disk.
    """
    target = Path(result.folder) / ADAPTER
    part = target.with_name(f".{ADAPTER}.part")
    for folder in (part, target):
        if folder.exists():
            shutil.rmtree(folder)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    hiddenkey.save_recipe(part, hiddenkey.parse(result.recipe))
    plain_prompts = bool(tokenizer.chat_template) and result.task == "causal-lm"
    (part / "README.md").write_text(_card(result, _NO_TEMPLATE if plain_prompts else ""), encoding="utf-8")
    part.replace(target)


def _card(result: RunResult, chat: str) -> str:
    config = result.config
    causal = result.task == "causal-lm"
    options = {
        "classification": f", id2label={dict(enumerate(result.label_names))}",
        "regression": ", num_labels=1",
        "causal-lm": "",
    }
    trust = ", trust_remote_code=True" if config["trust_remote_code"] else ""
    return _CARD.format(
        name=Path(result.folder).name,
        model=config["model"],
        data=config["data"],
        task=result.task,
        rows=result.data_rows["train"],
        version=result.versions["hiddenkey"],
        recipe=result.recipe,
        r=config["lora_r"],
        alpha=config["lora_alpha"],
        learning_rate=config["learning_rate"],
        epochs=f"{result.last['epoch']:g}",
        batch=config["batch_size"],
        seed=config["seed"],
        keep=config["keep"],
        classes=_classes(result),
        chat=chat,
        tables="\n\n".join(_tables(result)),
        auto_class="AutoPeftModelForCausalLM" if causal else "AutoPeftModelForSequenceClassification",
        trust=trust,
        options=options[result.task] + trust,
    )


def _classes(result: RunResult) -> str:
    if not result.label_names:
        return ""
    return f"- outputs, in this order: {', '.join(f'`{name}`' for name in result.label_names)}\n"


def _tables(result: RunResult) -> Iterator[str]:
    validation = [
        {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
        for row in (result.last, result.best)
    ]
    yield _table("validation", result.metric, *validation)
    if result.test:
        yield _table("test", result.metric, result.test["last"], result.test["best"])


def _table(part: str, metric: str, last: Metrics, best: Metrics) -> str:
    head = [f"| {part} | last epoch | best epoch by {metric} |", "|---|---|---|"]
    rows = [f"| {name} | {_number(last, name)} | {_number(best, name)} |" for name in {**last, **best}]
    return "\n".join([*head, *rows])


def _number(metrics: Metrics, name: str) -> str:
    return f"{metrics[name]:.4g}" if name in metrics else ""
