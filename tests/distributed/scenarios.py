"""What runs in each process: trainings of tiny models, alone or as one of two ranks."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

import hiddenkey
from hiddenkey import attention_paths, dropout, masks
from hiddenkey.hf.chunked_loss import whole
from hiddenkey.hf.structure import find_transformer
from hiddenkey.patterns import PATTERNS, Grid, register_pattern
from tests.hf.test_trainer import Rows, training_logs
from tests.hf.tiny import CLASSES, make
from tests.hf.tools import arguments, lora

RANKS = 2


class Views:
    """Seeds every forward by its number, so that all processes begin each view with one state."""

    number = 0

    def before(self, module: Any, args: Any) -> None:
        """Forward pre-hook."""
        self.number += 1
        torch.manual_seed(self.number)


if "by-length" not in PATTERNS:

    @register_pattern("by-length", needs_segments=True)
    def by_length(grid: Grid, p: float) -> Tensor:
        """A mask that depends on the example's length, the layer and the view, not on who computes it."""
        lengths = (grid.segments_over_lead() > 0).sum(-1, keepdim=True)
        places = torch.arange(grid.places, device=grid.device)
        return grid.lay((places * 3 + lengths * 5 + torch.randint(4, ())) % 4 != 0)


class InOrder(hiddenkey.DropTrainer):
    """Examples in their order: two ranks of two examples see in each step what one process of four does."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """A fingerprint of every mask that is drawn."""
    prints: list[str] = []
    modules: tuple[Any, ...] = (attention_paths, dropout)

    def draw(*arguments: Any) -> Tensor:
        keep = masks.draw(*arguments)
        prints.append(hashlib.sha256(keep.numpy().tobytes()).hexdigest())
        return keep

    for module in modules:
        module.draw = draw
    try:
        yield prints
    finally:
        for module in modules:
            module.draw = masks.draw


def build(family: str, all_trained: bool = False) -> Any:
    """The same model in every process, in float64, with LoRA on all its linear layers or trained whole."""
    if family == "llama-classifier":
        model = make("llama", head="ForSequenceClassification", num_labels=CLASSES)
    else:
        model = make(family)
    return (model if all_trained else lora(model)).double()


def trainer(
    folder: Path,
    family: str,
    recipe: str,
    ranks: int,
    *,
    model: Any = None,
    rows: int = 24,
    cls: Any = InOrder,
    **options: Any,
) -> Any:
    """A trainer whose step holds four examples of float64, whatever the number of ranks."""
    model = build(family) if model is None else model
    if "by-length" in recipe:
        find_transformer(model)[1].register_forward_pre_hook(Views().before)
    settings = {
        "optim": "sgd",
        "max_steps": 6,
        "logging_steps": 1,
        "max_grad_norm": 100.0,
        "per_device_train_batch_size": 4 // ranks,
    }
    args = arguments(folder, **{**settings, **options})
    return cls(
        model=model, args=args, train_dataset=Rows("bert" if "class" in family else family, rows), recipe=recipe
    )


def curve(folder: Path, family: str, recipe: str, ranks: int, **options: Any) -> dict[str, Any]:
    """Logged losses, trained weights, and fingerprints of the masks of a training."""
    made = trainer(folder, family, recipe, ranks, **options)
    with recorded() as masks:
        made.train()
    names = ("loss", "task_loss", "consistency_loss", "grad_norm")
    return {
        "losses": [{name: entry[name] for name in names if name in entry} for entry in training_logs(made)],
        "weights": {name: whole(p.detach()).clone() for name, p in made.model.named_parameters() if p.requires_grad},
        "masks": masks,
        "rates": made.attachment.position_rates(),
        "wrapper": type(made.model_wrapped).__name__,
    }


def same(consistency: str) -> str:
    """A recipe whose masks are the same however a batch is split."""
    return f"logits[1/2:]:by-length@0.25 + hidden[1/2:]:by-length@0.25 ~ {consistency}*0.5"


def ddp(out: Path) -> dict[str, Any]:
    """The curve with comparable masks, a short one with drawn masks, and a step by hand."""
    return {
        "same": curve(out / "same", "llama", same("kl"), RANKS),
        "drawn": curve(out / "drawn", "llama", "hiddenkey@0.3", RANKS, max_steps=2),
        "by hand": {name: by_hand(name) for name in ("kl", "kl-rdrop")},
        "refused": refused(),
        "logged alone": logged_alone(out / "alone"),
    }


class LogsAlone(TrainerCallback):
    """The first process logs losses of its own, when a step begins and while the trainer logs."""

    made: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A log between two steps."""
        if args.process_index == 0:
            self.made.log({"loss": 1.0})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A log inside another."""
        if args.process_index == 0 and "task_loss" in logs:
            self.made.log({"loss": 2.0})


def logged_alone(folder: Path) -> list[dict[str, float]]:
    """The logs of a training in which one process logs a loss without the other."""
    made = trainer(folder, "llama", "hiddenkey@0.3", RANKS, max_steps=2, ddp_timeout=30)
    callback = LogsAlone()
    callback.made = made
    made.add_callback(callback)
    made.train()
    return [{k: v for k, v in entry.items() if k.endswith("loss")} for entry in training_logs(made)]


def batches(rank: int, ranks: int, count: int = 2) -> list[dict[str, Tensor]]:
    """This rank's share of `count` micro-batches of four examples."""
    rows, size = Rows("llama", 4 * count), 4 // ranks
    chosen = [[4 * i + size * rank + j for j in range(size)] for i in range(count)]
    return [{name: torch.stack([rows[i][name] for i in part]) for name in rows[0]} for part in chosen]


def by_hand(consistency: str, ranks: int = RANKS) -> dict[str, Any]:
    """Gradients of two accumulated micro-batches in a loop without a trainer, and how often ranks exchanged them."""
    model = build("llama")
    hiddenkey.attach(model, same(consistency))
    find_transformer(model)[1].register_forward_pre_hook(Views().before)
    exchanges: list[int] = []
    wrapped = model if ranks == 1 else DistributedDataParallel(model)
    if ranks > 1:
        wrapped.register_comm_hook(exchanges, averaged)
    parts = batches(distributed.get_rank() if ranks > 1 else 0, ranks)
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches(0, 1))
    for batch in parts:
        waits = ranks > 1 and batch is not parts[-1]
        with wrapped.no_sync() if waits else nullcontext():
            hiddenkey.consistency_step(wrapped, batch, num_items=items, scale=ranks).total.backward()
    return {
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "exchanges": exchanges,
    }


def averaged(exchanges, bucket):
    """What DistributedDataParallel does by itself, counted. torch reads annotations, and would not take texts."""
    exchanges.append(bucket.index())
    total = distributed.all_reduce(bucket.buffer().div_(RANKS), async_op=True).get_future()
    return total.then(lambda future: future.value()[0])


def refused() -> str:
    """What is said of gradient from both views through reentrant checkpoints."""
    model = build("llama")
    find_transformer(model)[1].gradient_checkpointing_enable({"use_reentrant": True})
    hiddenkey.attach(model, "hiddenkey@0.1 ~ kl-rdrop")
    try:
        hiddenkey.consistency_step(DistributedDataParallel(model), batches(0, RANKS)[0])
    except hiddenkey.UserError as error:
        return str(error)
    return ""


# Where a model's own loss is a mean, transformers multiplies it by the number of processes unless told not to.
MEAN = {"average_tokens_across_devices": False}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert kl": ("bert", "kl", MEAN),
    "bert kl-clean": ("bert", "kl-clean", MEAN),
    "bert kl-rdrop": ("bert", "kl-rdrop", MEAN),
    "bert label smoothing": ("bert", "kl", {"label_smoothing_factor": 0.1}),
    "bert whole": ("bert", "kl", {"whole": True, **MEAN}),
    "bert whole kl-rdrop": ("bert", "kl-rdrop", {"whole": True, **MEAN}),
    "bert accumulation": ("bert", "kl", {"accumulation": 2, **MEAN}),
    "llama js": ("llama", "js", {}),
    "llama kl-rdrop": ("llama", "kl-rdrop", {}),
    "llama label smoothing": ("llama", "kl-rdrop", {"label_smoothing_factor": 0.1}),
    "llama whole": ("llama", "kl", {"whole": True}),
    "llama whole kl-rdrop": ("llama", "kl-rdrop", {"whole": True}),
    "llama whole, unused searched": ("llama", "kl", {"whole": True, "ddp_find_unused_parameters": True}),
    "llama accumulation": ("llama", "kl", {"accumulation": 2}),
    "llama accumulation kl-rdrop": ("llama", "kl-rdrop", {"accumulation": 2}),
    "llama checkpointing": ("llama", "kl", {"gradient_checkpointing": True}),
    "llama checkpointing kl-rdrop": ("llama", "kl-rdrop", {"gradient_checkpointing": True}),
    "llama, unused not searched": ("llama", "kl", {"ddp_find_unused_parameters": False}),
    "llama kl-rdrop, unused not searched": ("llama", "kl-rdrop", {"ddp_find_unused_parameters": False}),
    "llama classifier": ("llama-classifier", "kl", MEAN),
    "llama classifier accumulation": ("llama-classifier", "kl", {"accumulation": 2, **MEAN}),
    "gpt2 kl": ("gpt2", "kl", {}),
}


def variant(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    """The curve of one of them."""
    family, consistency, options = VARIANTS[name]
    options = dict(options)
    accumulation = options.pop("accumulation", 1)
    model = build(family, options.pop("whole", False))
    return curve(
        folder,
        family,
        same(consistency),
        ranks,
        model=model,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // ranks // accumulation,
        **options,
    )


def ddp_variants(out: Path) -> dict[str, Any]:
    """All of them in one start."""
    return {name: variant(out / name, name, RANKS) for name in VARIANTS}


def plain(out: Path) -> list[list[float]]:
    """Losses of a language model at rate 0, and those of transformers' Trainer."""
    args = {"ranks": RANKS, "max_grad_norm": 0.0}
    ours, other = (trainer(out / recipe, "llama", recipe, **args) for recipe in ("hiddenkey@0", "baseline"))
    other.compute_loss = MethodType(Trainer.compute_loss, other)
    for each in (ours, other):
        each.train()
    return [[entry["loss"] for entry in training_logs(each)] for each in (ours, other)]


SEEDS = range(24)


def final_losses(folder: Path, ranks: int) -> Tensor:
    """The loss without drops after a short training, seed by seed."""
    losses = []
    for seed in SEEDS:
        made = trainer(folder / str(seed), "llama", "hiddenkey@0.3", ranks, seed=seed, learning_rate=0.05)
        made.train()
        batch = batches(0, 1, 1)[0]
        with torch.no_grad():
            losses.append(float(made.model.eval()(**batch).loss))
    return torch.tensor(losses)


def seeds(out: Path) -> list[float]:
    """The same in two processes."""
    found: list[float] = final_losses(out, RANKS).tolist()
    return found


KILLED_AT = 5


class Killer(TrainerCallback):
    """Kills one of the ranks in the middle of training; torchrun ends the other."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The signal that nothing can catch."""
        if state.global_step == KILLED_AT and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(out: Path, mode: str, recipe: str = "hiddenkey@0.3", **options: Any) -> dict[str, Any]:
    """A training with shuffled examples and drawn masks: whole, killed, or resumed after that."""
    made = trainer(
        out / ("whole" if mode == "whole" else "cut"),
        "llama",
        recipe,
        RANKS,
        cls=hiddenkey.DropTrainer,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=2,
        max_steps=9,
        **options,
    )
    if mode == "killed":
        made.add_callback(Killer())
    with recorded() as masks:
        made.train(resume_from_checkpoint=mode == "resumed")
    weights = {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}
    return {"weights": weights, "masks": masks, "losses": [entry["loss"] for entry in training_logs(made)]}
