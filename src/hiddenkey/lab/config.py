"""The configuration of a training run: the one place of its names, defaults and help."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro
import yaml

from ..errors import ConfigError
from ..registry import unknown

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Task = Literal["auto", "classification", "regression", "causal-lm"]
MODEL_CLASSES = {
    "auto": "",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
"""The Auto class of transformers for each task."""
Scheduler = Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt"]
Dtype = Literal["float32", "bfloat16", "float16"]
Keep = Literal["best", "last"]
TextMetric = Literal["bleu", "nist", "ter", "meteor", "rouge_l", "cider"]

OF_A_TASK = (
    *("model", "data", "data_config", "task", "validation", "validation_fraction", "test", "text_columns"),
    *("label_column", "prompt_column", "completion_column", "separator", "column_names", "train_size", "eval_size"),
    *("test_size", "max_length", "metric", "generation_metrics", "num_beams", "length_penalty", "no_repeat_ngram"),
    "max_new_tokens",
)
"""Fields that say what is learnt and how it is judged: runs that differ in them are not of one table."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a model with LoRA and a dropout recipe: `hiddenkey train [config.yaml] [--flags]`.

    The YAML file uses the same names with underscores; flags override it.
    """

    model: str
    """Hub name or local folder of the pretrained model."""
    data: str
    """Hub data set, `glue/rte`, a .csv .tsv .jsonl .json .parquet file, or a folder of train and dev files."""
    out: str
    """Folder of this run; the same command on it continues an unfinished run."""
    recipe: str = "hiddenkey@0.1"
    """What is dropped where, and the consistency loss; `baseline` drops nothing."""

    task: Task = "auto"
    """What is learnt; auto reads it off the columns."""
    data_config: str = ""
    """Configuration of a hub data set that has several."""
    validation: str = ""
    """Validation file, or the name of a part of the data; none given: its validation or dev part."""
    validation_fraction: float = 0.1
    """Share of the training rows put aside where no validation part is left; whole prompts of causal-lm."""
    test: str = ""
    """Test file, or the name of a part of the data (test, dev, a hub split); looked at once, after training."""
    text_columns: tuple[str, ...] = ()
    """One or two text columns; none given: found by their usual names."""
    label_column: str = ""
    """Column of the label or score; none given: found by its usual names."""
    prompt_column: str = ""
    """Column of the prompt of causal-lm data; lists are joined with "; "."""
    completion_column: str = ""
    """Column of the completion of causal-lm data; a list makes one example per text, an empty one none."""
    separator: str = "\n"
    """What stands between prompt and completion; a backslash with n or t is a line break or a tab."""
    column_names: tuple[str, ...] = ()
    """Column names of a .csv or .tsv file without a header line."""
    train_size: int = 0
    """Train on this many rows, chosen by data_seed; 0 = all."""
    eval_size: int = 0
    """Validate on this many rows, chosen by data_seed; 0 = all."""
    test_size: int = 0
    """Test on this many rows, of causal-lm prompts, the same for every seed; 0 = all."""
    train_eval_size: int = 500
    """Training rows on which the training loss is measured without drops after every epoch; 0 = none."""
    data_seed: int = 0
    """Chooses the split and the subsets, apart from `seed`, so that runs can share their data."""
    max_length: int = 256
    """Longest sequence in tokens; what is longer is cut."""

    lora_r: int = 8
    """Rank of LoRA."""
    lora_alpha: int = 16
    """Scale of LoRA; its branch is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """PEFT's own dropout on the input of the LoRA branch."""
    target_modules: tuple[str, ...] = ()
    """Linear layers that get LoRA, by name; none given: query and value, or what holds them together with the key."""

    learning_rate: float = 4e-4
    """Peak learning rate of AdamW."""
    epochs: int = 10
    """Passes over the training rows."""
    max_steps: int = 0
    """Stop after this many optimiser steps, in the place of epochs; 0 = after the epochs."""
    batch_size: int = 32
    """Examples per forward pass and device."""
    eval_batch_size: int = 64
    """Examples per forward pass and device in evaluation."""
    group_by_length: bool = False
    """Put training rows of like length into one batch: less padding, so less time; the order stays random."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    warmup: float = 0.06
    """Warm-up: a share of all steps below 1, a number of steps from 1 on."""
    scheduler: Scheduler = "linear"
    """Shape of the learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    label_smoothing: float = 0.0
    """Share of the probability spread over all classes or tokens in training; evaluation is without it."""
    neftune_alpha: float = 0.0
    """Noise on the embedded tokens in training (NEFTune, arXiv 2310.05914); 0 = none."""
    seed: int = 0
    """Seed of the new weights, the order of the data and the drops."""

    generation_metrics: tuple[TextMetric, ...] = ()
    """Metrics of texts generated for the test prompts: bleu, nist, ter, and with Java meteor, rouge_l, cider."""
    num_beams: int = 10
    """Beams of the search; 1 = greedy."""
    length_penalty: float = 0.9
    """A beam's log-probability is divided by its number of tokens to this power."""
    no_repeat_ngram: int = 4
    """No generated text has the same run of so many tokens twice; 0 = allowed."""
    max_new_tokens: int = 128
    """Longest generated text in tokens."""

    keep: Keep = "best"
    """Which epoch's adapter is written: the best one's by `metric` on the validation rows, or the last one's."""
    metric: str = ""
    """Validation metric of the best epoch; none given: the task's first (accuracy, pearson, nll)."""
    patience: int = 0
    """Stop after this many epochs without a better metric; 0 = never."""

    dtype: Dtype = "float32"
    """Type of the frozen weights and of autocast; what is trained stays float32; float16 needs CUDA."""
    attn_implementation: str = ""
    """Attention backend of transformers; none given: the model's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""
    save_steps: int = 0
    """Also save a checkpoint every so many steps; 0 = at the end of each epoch only."""
    log_steps: int = 10
    """Steps between two log entries."""
    overwrite: bool = False
    """Delete an earlier run in the folder and start anew."""

    def __post_init__(self) -> None:
        # A shell expands `--out ~/run`, but neither `--out=~/run` nor YAML does.
        for name in PATHS:
            object.__setattr__(self, name, expanded(getattr(self, name)))
        if isinstance(self.separator, str):  # a shell hands '\n' on as two characters
            object.__setattr__(self, "separator", self.separator.replace("\\n", "\n").replace("\\t", "\t"))

    def check(self) -> None:
        """Check every value on its own, and those that go together.

        Raises:
            ConfigError: a value of the wrong type or out of its range.
        """
        for name in FIELD_TYPES:
            convert(name, getattr(self, name))
        if bool(self.prompt_column) != bool(self.completion_column):
            raise ConfigError("prompt_column and completion_column come together: give both or neither.")
        if self.prompt_column and (self.text_columns or self.label_column):
            raise ConfigError("give text_columns and label_column, or prompt_column and completion_column, not both.")
        if self.prompt_column and self.task in ("classification", "regression"):
            raise ConfigError(f"task {self.task!r} has text_columns and label_column, not prompt_column.")
        for name in ("test_size", "generation_metrics"):
            if getattr(self, name) and not self.test:
                raise ConfigError(f"{name} = {getattr(self, name)!r} needs a test part: name it with test.")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON or YAML."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class SweepConfig:
    """Run every method, trial and seed that a sweep file asks for; the same command continues after any stop."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The sweep file, in YAML; docs/sweeps.md describes it."""
    workers: int = 1
    """Processes on this machine, each with one run at a time."""
    worker: bool = False
    """Be one worker; start any number of them, on any number of machines."""
    storage: str = ""
    """Database URL that all machines share, such as postgresql+psycopg://user@host/db; default: a file in `out`."""
    grace: int = 120
    """Seconds without a heartbeat after which a run is given to another worker; the same for all workers."""
    dry_run: bool = False
    """Check the file, its recipes, data and models, print the plan, and run nothing."""
    out: str = ""
    """Used instead of the file's `out`."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of the file's `base`, such as --set model=./tiny; may be given several times."""

    def check(self) -> None:
        """Raises ConfigError for a value out of its range, or flags that exclude one another."""
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers} is not allowed: it is a whole number of 1 or more.")
        if self.grace < 4:
            raise ConfigError(f"grace = {self.grace} is not allowed: it is 4 seconds or more.")
        if self.worker and (self.workers > 1 or self.dry_run):
            raise ConfigError("--worker is one process that works; give it without --workers and --dry-run.")


def plain(value: Any) -> Any:
    """As JSON keeps it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


PATHS = ("model", "data", "out", "validation", "test")


def expanded(path: Any) -> Any:
    """A path with the home folder in the place of a leading ~."""
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~/") else path


FIELD_TYPES: dict[str, Any] = {field.name: get_type_hints(TrainConfig)[field.name] for field in fields(TrainConfig)}
DEFAULTS: dict[str, Any] = {
    field.name: plain(field.default) for field in fields(TrainConfig) if field.default is not MISSING
}
"""As `to_dict` gives them."""


def complete(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that was written down, by a version that lacked a field too: it had that field's default."""
    return DEFAULTS | dict(earlier)


def convert(name: str, value: Any) -> Any:
    """`value` as the field `name` wants it: a list becomes a tuple, and 1 a float.

    Raises:
        ConfigError: the value has another type, or is out of its range.
    """
    from pydantic import ValidationError

    if isinstance(value, str) and "\0" in value:  # no path can hold it
        raise ConfigError(f"{name} = {reprlib.repr(value)} is not allowed: a NUL character stands in it.")
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name} = {reprlib.repr(value)} is not allowed: {fault(error)[1]}.") from None


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, Field, TypeAdapter

    hint: Any = FIELD_TYPES[name]
    limited = Annotated[hint, Field(**_LIMITS.get(name, {}))]
    return TypeAdapter(limited, config=ConfigDict(strict=True, allow_inf_nan=False))


def fault(error: ValidationError) -> tuple[str, str]:
    """Where the first fault of a checked value lies (empty for the value itself), and what would be right."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"].replace("Input should", "it should")


_COUNTS = ("lora_r", "lora_alpha", "epochs", "batch_size", "eval_batch_size", "gradient_accumulation")
_SIZES = ("train_size", "eval_size", "test_size", "train_eval_size", "max_steps", "patience", "save_steps")

_LIMITS: dict[str, dict[str, Any]] = {
    name: limits
    for names, limits in (
        (("model", "data", "out", "recipe"), {"min_length": 1}),
        ((*_COUNTS, "log_steps", "num_beams", "max_new_tokens"), {"ge": 1, "lt": 2**63}),
        ((*_SIZES, "no_repeat_ngram"), {"ge": 0, "lt": 2**63}),
        (("max_length",), {"ge": 2, "lt": 2**63}),
        (("weight_decay", "warmup", "neftune_alpha"), {"ge": 0}),
        (("learning_rate", "max_grad_norm"), {"gt": 0}),
        (("lora_dropout", "label_smoothing"), {"ge": 0, "lt": 1}),
        (("validation_fraction",), {"gt": 0, "lt": 1}),
        (
            ("seed", "data_seed"),
            {"ge": 0, "lt": 2**32},
        ),  # numpy's generator, which the Trainer seeds too, has 32 bits
        (("target_modules", "column_names", "generation_metrics"), {"strict": False}),  # a list of YAML too
        (("text_columns",), {"strict": False, "max_length": 2}),
    )
    for name in names
}
"""Arguments of pydantic's Field."""


OTHER_NAMES = {
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "output": "out",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "validation_file": "validation",
    "test_file": "test",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "scheduler",
    "logging_steps": "log_steps",
    "rank": "lora_r",
    "alpha": "lora_alpha",
}
"""What transformers and others call our fields."""


class _Loader(yaml.SafeLoader):
    """Takes no key twice, and 1e-4 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            keys.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


_MOST_VALUES = 1_000_000


def parse_yaml(text: str) -> Any:
    """What a YAML text says; raises YAMLError or ValueError, also where its aliases stand for too many values."""
    loader = _Loader(text)
    try:
        found = loader.get_single_data()
    finally:
        loader.dispose()
    if _count(found, {}) > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return found


def _count(value: Any, counted: dict[int, int]) -> int:
    """How many values a value holds, each alias in full."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = 1  # while it is counted: a value may hold itself
        parts = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count(part, counted) for part in parts)
    return counted[id(value)]


def require_yaml(path: str | Path) -> None:
    """Raises FileNotFoundError where there is no such file."""
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {kind}; a YAML file is wanted here, and all else stands behind its flag.")


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in it.
        OSError: the file cannot be read.
    """
    require_yaml(path)
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields a YAML file sets, in the types of `TrainConfig`.

    Raises:
        ConfigError: not a mapping of known names to values that are allowed.
        OSError: the file cannot be read.
    """
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds {type(given).__name__}, not lines of the form `name: value`.")
    for name in given:
        if name in OTHER_NAMES:
            raise ConfigError(f"{path}: unknown name {name!r}; it is called {OTHER_NAMES[name]} here.")
        if name not in FIELD_TYPES:
            raise ConfigError(f"{path}: {unknown('name', str(name), FIELD_TYPES)}")
    try:
        return {name: convert(name, value) for name, value in given.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
