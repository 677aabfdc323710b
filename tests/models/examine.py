"""The row of one model type: built, looked at, checked."""

from __future__ import annotations

import copy
from typing import Any

import torch

import hiddenkey

from .checks import CHECKS
from .exceptions import UNFIT
from .inputs import Inputs, candidates, tensors
from .kinds import class_name
from .record import BROKEN, PARTLY, REFUSED, SUPPORTED, Record
from .subject import HIDDEN, LOGITS, RATE, Subject
from .tiny import build


class NotBuiltError(Exception):
    """The model type can't be built or run here; the message says why."""


def examine(kind: str) -> Record:
    """The row of one model type."""
    record = Record(kind, class_name(kind))
    try:
        if kind in UNFIT:
            raise NotBuiltError(UNFIT[kind])
        model = build(kind)
        inputs = working_inputs(kind, model)
    except NotBuiltError as error:
        record.error = str(error)
        return record
    except Exception as error:  # noqa: BLE001  (whatever a model raises is the reason)
        record.error = _said(error)
        return record
    recipes = [text for text in (LOGITS, HIDDEN) if _plans(model, text.format(RATE), record)]
    if not recipes:
        record.status = REFUSED
        return record
    subject = Subject(kind, model, inputs, " + ".join(recipes), record)
    try:
        subject.find()
    except Exception as error:  # noqa: BLE001
        record.problems.append(f"plan: {_said(error)}")
    for check in CHECKS if not record.problems else ():
        try:
            problem = check(subject)
        except Exception as error:  # noqa: BLE001
            problem = _said(error)
        if problem:
            record.problems.append(f"{check.__name__}: {problem}")
    _judge(record)
    return record


def _judge(record: Record) -> None:
    record.status = BROKEN if record.problems else PARTLY if record.missing else SUPPORTED


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _plans(model: Any, recipe: str, record: Record) -> bool:
    try:
        hiddenkey.plan(model, recipe)
    except hiddenkey.PlanError as error:
        record.error = record.error or str(error)
        record.missing.append(recipe.split("[")[0])
        return False
    return True


def working_inputs(kind: str, model: Any) -> Inputs:
    """The first inputs with which the model runs, in evaluation and in training."""
    said = []
    for inputs in candidates(kind, model):
        try:
            with torch.no_grad():
                outputs = tensors(model.eval()(**inputs))
                model.train()(**copy.copy(inputs))
        except Exception as error:  # noqa: BLE001
            said.append(f"{', '.join(inputs)}: {_said(error)}")
            continue
        if not outputs or not all(output.isfinite().all() for output in outputs):
            raise NotBuiltError("its outputs are not finite with random weights")
        return inputs
    raise NotBuiltError(said[0] if said else f"no rule makes inputs for {model.main_input_name!r}")
