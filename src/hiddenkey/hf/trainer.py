"""Trainers with drops and consistency: a mixin for any transformers trainer, and `DropTrainer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..errors import AttachError, SavedRecipeError
from ..recipe import Recipe, parse
from .attach import attach
from .attachment import Attachment, find_attachment
from .compared_outputs import compared_in, copied
from .distributed import RankSeed
from .outer_forward import arguments
from .rate_monitor import log_what_is_wrong
from .saving import load_recipe, save_recipe
from .training_step import StepLoss, consistency_step, falls, step_around_loss


class ConsistencyMixin:
    """Put before a transformers or TRL trainer class: `class MyTrainer(ConsistencyMixin, SFTTrainer)`.

    recipe: attached to the trainer's model; None where the model has one attached, or gets one before `train()`.
    In training, the loss becomes task + weight * consistency, for DPO with the policy's two views compared at the
    tokens of both completions; the log gets `task_loss`, `consistency_loss` and `drop_rate/<position>`, and a warning
    where drops are not what the recipe says. Checkpoints carry the recipe: to resume from one of another recipe is
    a SavedRecipeError, from one without a FileNotFoundError. In several processes, each that sees other data draws
    masks of its own.
    """

    model: nn.Module
    args: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int
    label_smoother: Any
    get_tp_size: Any
    _signature_columns: list[str]
    _together = False
    _divides_own_loss: bool | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Raises TypeError where a trainer stands before the mixin, whose methods would then never be called."""
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(ConsistencyMixin)]
        if Trainer in before:
            others = ", ".join(base.__name__ for base in cls.__bases__ if base is not ConsistencyMixin)
            raise TypeError(
                f"{cls.__name__} has a trainer before ConsistencyMixin, so the mixin would do nothing; write "
                f"class {cls.__name__}(ConsistencyMixin, {others})"
            )

    def __init__(self, *args: Any, recipe: str | Recipe | None = None, **kwargs: Any) -> None:
        self._recipe = None if recipe is None else parse(recipe)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if not trainer.label_names and self.args.label_names is None and "labels" in arguments(self.model):
            trainer.label_names = ["labels"]
        trainer.add_callback(RankSeed(self.get_tp_size))
        if self._recipe is not None and getattr(self, "model_init", None) is None:
            attach(self.model, self._recipe)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, with the recipe attached."""
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc]
        if self._recipe is not None:
            attach(model, self._recipe)
        return model

    @property
    def attachment(self) -> Attachment:
        """The handle of the attached recipe; raises AttachError where there is none."""
        attachment = find_attachment(self.model)
        if attachment is None:
            raise AttachError(
                "no recipe is attached to the trainer's model; give the trainer recipe='hiddenkey@0.1', or call "
                "hiddenkey.attach(model, recipe) first"
            )
        return attachment

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss`; in training task + weight * consistency (arXiv 2403.00812, section 3.2).

        Raises:
            AttachError: no recipe is attached.
            UserError: the consistency is not defined for this model's outputs and labels.
        """
        if not model.training:
            return self._trainers_loss(model, inputs, num_items_in_batch, return_outputs)
        divided = self._is_scaled(num_items_in_batch) and self._divides(model, inputs, num_items_in_batch)
        num_items = num_items_in_batch if divided else None
        options: dict[str, Any] = {"num_items": num_items, "scale": self._consistency_scale(num_items)}
        if self._gives_no_logits() and self.attachment.recipe.consistency is not None:
            step = step_around_loss(
                self.attachment,
                model,
                inputs,
                compared_in(inputs, type(self).__name__),
                lambda: self._trainers_loss(model, dict(inputs), num_items_in_batch),
                **options,
            )
        elif self._gives_no_logits():
            loss = self._trainers_loss(model, inputs, num_items_in_batch)
            step = StepLoss(loss, loss, None, None)
        else:
            task_loss = None if self._is_models_own_loss() else partial(self._trainers_loss, return_outputs=True)
            step = consistency_step(model, inputs, task_loss=task_loss, **options)
        self._note(step)
        return (step.total, step.outputs) if return_outputs else step.total

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns too that the model takes through `**kwargs`, into which Trainer does not look."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if not self._gives_no_logits():
            self._signature_columns = sorted({*self._signature_columns, *arguments(self.model)})

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Where all processes log their training loss together. At any other time one of them may log alone, and must
        not wait for the others.
        """
        trainer: Any = self
        self._together = trainer.control.should_log
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._together = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what happened since the last log to the trainer's own log of the training loss."""
        if "loss" in logs and self._together:
            self._together = False
            logs.update(self._parts(logs["loss"]))
            logs.update({f"drop_rate/{name}": rate for name, rate in self.attachment.position_rates().items()})
            log_what_is_wrong(self, self.attachment)
        super().log(logs, start_time)  # type: ignore[misc]

    def _is_models_own_loss(self) -> bool:
        """Whether the trainer's loss is what the model computes from its labels, no more."""
        trainer: Any = super()
        return (
            getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss
            and self.label_smoother is None
            and self.compute_loss_func is None
        )

    def _gives_no_logits(self) -> bool:
        """Whether this is one of TRL's trainers, which compute their losses without logits."""
        return any(parent.__module__.partition(".")[0] == "trl" for parent in type(self).__mro__)

    def _trainers_loss(
        self, model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None, return_outputs: bool = False
    ) -> Any:
        # By name, as transformers calls it: a trainer's own may have `**kwargs` alone for them, or another order.
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items}
        return super().compute_loss(model, batch, **options)  # type: ignore[misc]

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether the loss is divided by num_items rather than by the number of accumulated batches."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return scaled and num_items is not None

    def _divides(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> bool:
        """Whether the trainer divides its loss by num_items, as transformers takes it to, or by the number of
        accumulated batches; a user's may be a mean over each batch, and the consistency is then too. Tried in the
        first step where it matters, with twice these numbers.
        """
        module: str = getattr(super().compute_loss, "__module__", "")  # type: ignore[misc]
        users = self.compute_loss_func is not None or module.partition(".")[0] not in ("transformers", "trl")
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        whole = getattr(self, "current_gradient_accumulation_steps", 1) == self.args.world_size == 1
        if not users or declared is not None or whole:
            return True

        def loss(times: int) -> Tensor:
            with self._steps(times):
                found: Tensor = self._trainers_loss(model, copied(inputs), times * num_items)
            return found

        if self._divides_own_loss is None:
            self._divides_own_loss = falls(self.attachment, model, loss)
        return self._divides_own_loss is not False

    @contextmanager
    def _steps(self, times: int) -> Iterator[None]:
        """As if a step accumulated that many times as many batches."""
        planned, current = self.args.gradient_accumulation_steps, self.current_gradient_accumulation_steps
        self.args.gradient_accumulation_steps = times * planned
        self.current_gradient_accumulation_steps = times * current
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps, self.current_gradient_accumulation_steps = planned, current

    def _consistency_scale(self, num_items: Tensor | int | None) -> float:
        """The factor by which transformers scales a loss over tokens of all devices, for our term too."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return 1.0
        # Only with a quantised model: transformers puts others into DataParallel, where drops are an error.
        if self.args.n_gpu > 1:
            return float(self.args.n_gpu)
        return float(self.accelerator.num_processes // self.get_tp_size())

    def _note(self, step: StepLoss) -> None:
        notes = {"total": step.total, "task_loss": step.task, "consistency_loss": step.consistency}
        window = vars(self).setdefault("_window", {})
        for name, value in notes.items():
            if value is not None:
                total, count = window.get(name, (0, 0))
                window[name] = total + value.detach(), count + 1

    def _parts(self, loss: float) -> dict[str, float]:
        """The parts of the logged loss since the last log, over all processes, in its scale: transformers sums some
        losses over the forward passes of a step and averages others.
        """
        window: dict[str, tuple[Tensor, int]] = vars(self).pop("_window", {})
        means = {name: float(self.accelerator.gather(v / count).mean()) for name, (v, count) in window.items()}
        total = means.pop("total", 0.0)
        return {name: value * loss / total if total else value for name, value in means.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder, attachment = Path(output_dir or self.args.output_dir), find_attachment(self.model)
        recipe = self._recipe if attachment is None else attachment.recipe  # it may be detached by now
        if recipe is not None and self.args.should_save and folder.is_dir():
            save_recipe(folder, recipe)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Compare recipes too: of all that resuming loads, this alone is asked for under every engine."""
        if checkpoint is not None:
            self._compare_recipes(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _compare_recipes(self, checkpoint: str) -> None:
        saved, ours = load_recipe(checkpoint), self.attachment.recipe
        if saved != ours:
            raise SavedRecipeError(
                f"the checkpoint {checkpoint} was trained with the recipe '{saved}', this run uses '{ours}': resume "
                "with the former, or start a new run in another output folder"
            )


class DropTrainer(ConsistencyMixin, Trainer):
    """transformers' `Trainer` that attaches a recipe to its model.

    recipe: such as "hiddenkey@0.1"; None where the model has one attached already. Everything else is Trainer's.
    Raises AttachError where neither is so.
    """

    def __init__(self, *args: Any, recipe: str | Recipe | None = None, **kwargs: Any) -> None:
        super().__init__(*args, recipe=recipe, **kwargs)
        _ = self.attachment
