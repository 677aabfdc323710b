"""What a model's own loss does, read off its code: which labels it compares, and by what it divides their sum."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from ..errors import UserError
from .code import names_in, written_in
from .outer_forward import WRAPPERS, parameters
from .structure import find_transformer

# transformers' losses that divide by the number of items.
DIVIDED = (ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification, ForQuestionAnsweringLoss)
# transformers' losses that compare logits and labels at one place; all others, such as a user's, take the next label.
IN_PLACE = frozenset(name for name, loss in LOSS_MAPPING.items() if loss is not ForCausalLMLoss)
BY_HAND = {"cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss"}
SHIFT = re.compile(r"[\w.]*labels\[(.* )?1:\]|[\w.]*logits\[(.* )?:-1(, .*)?\]")


def counts_items(model: nn.Module, labels: Tensor | None = None) -> bool:
    """Whether the model divides its summed loss by `num_items_in_batch`: a loss of transformers that is given it.

    Many classifiers call the loss without their keyword arguments, and so take the mean. Of those that pass them on,
    a regression, a classifier of several yes/no answers and CTC take it all the same. A loss that is set in the place
    of transformers' is taken to divide, and a user's module around a model where it names the argument.
    """
    if not isinstance(model, PreTrainedModel):
        return "num_items_in_batch" in parameters(model)
    kind: Any = type(model)
    if not _passes_keywords_to_loss(kind):
        return False
    loss = _stock_loss(model)
    if loss is ForSequenceClassificationLoss:
        return _is_one_of_several(model, labels)
    return loss is None or loss in DIVIDED


def _stock_loss(model: nn.Module) -> Any:
    """The loss that transformers gives the model; None where another was set in its place."""
    if hasattr(model, "_loss_function"):
        return None
    kind = getattr(model, "loss_type", None)
    return LOSS_MAPPING.get(kind if kind in LOSS_MAPPING else "ForCausalLM")


def _is_one_of_several(model: Any, labels: Tensor | None) -> bool:
    """Whether transformers takes the labels for one class each; it is written into the configuration later."""
    problem = getattr(model.config, "problem_type", None)
    if problem is None and labels is not None:
        return model.config.num_labels > 1 and not labels.is_floating_point()
    return problem in (None, "single_label_classification")


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss compares the logits of a place with the label of the next one, as causal models' do.

    Read off the code: some decoders (Bart's, XLNet) take labels that are shifted already. A loss that is set in the
    place of transformers' is taken to shift as that does. A user's module around a model shifts where its code does,
    or leaves the loss to the model. Raises UserError where a loss by hand cannot be read.
    """
    transformer: Any = model
    if not isinstance(model, PreTrainedModel):
        forward = inspect.unwrap(type(model).forward)
        if _shifts_by_hand(forward) or not BY_HAND.isdisjoint(forward.__code__.co_names):
            return _shifts_by_hand(forward)
        transformer = find_transformer(model)[1]
        return "labels" in parameters(transformer) and shifts_labels(transformer)
    if transformer.config.is_encoder_decoder:
        return False
    for forward in _forwards(type(model)):
        names = forward.__code__.co_names
        if "loss_function" in names:
            return getattr(model, "loss_type", None) not in IN_PLACE
        if not BY_HAND.isdisjoint(names):
            return _shifts_by_hand(forward)
    inner = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return any(shifts_labels(child) for child in inner if "labels" in parameters(child))


def takes_the_stock_loss(model: nn.Module) -> bool:
    """Whether its forward asks transformers for the loss, and transformers gives the one of next tokens.

    A forward from elsewhere, as of a subclass, may add to that loss or ask for another.
    """
    if not written_in(model) <= {"transformers", *WRAPPERS}:
        return False
    return _stock_loss(model) is ForCausalLMLoss and "loss_function" in names_in(model)


def _forwards(kind: type) -> Iterator[FunctionType]:
    """The forwards of a class and those it overrides, undecorated."""
    for parent in kind.__mro__:
        forward = inspect.unwrap(vars(parent).get("forward", parent))
        if isinstance(forward, FunctionType):
            yield forward


@cache
def _shifts_by_hand(forward: FunctionType) -> bool:
    try:
        tree = _tree(forward)
    except OSError as error:
        raise UserError(
            f"whether the loss in {forward.__qualname__} compares a place with the next label cannot be read, as its "
            "code stands in no file; write the class into one"
        ) from error
    parts = (node for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return any(SHIFT.fullmatch(ast.unparse(part)) for part in parts)


def _tree(forward: FunctionType) -> ast.Module:
    """Its code. Raises OSError where it stands in no file, as what was typed into an interpreter."""
    return ast.parse(textwrap.dedent(inspect.getsource(forward)))


@cache
def _passes_keywords_to_loss(kind: Any) -> bool:
    try:
        tree = _tree(inspect.unwrap(kind.forward))
    except OSError:  # so it is not given the number, and returns the mean either way
        return False
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )
