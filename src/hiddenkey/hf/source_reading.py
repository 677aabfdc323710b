"""What a module's forward does, read off its code: which names it uses, its own helpers included."""

from __future__ import annotations

import ast
import dis
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UserError

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
INTERFACE = re.compile(r"ALL_(?!MASK)\w*ATTENTION_FUNCTIONS")
# Blocks that mix tokens by something else than softmax attention: no feed-forward blocks, whatever maps they hold.
MIXER = re.compile(
    r"(Attention|Attn|Mamba|Mixer|Delta|Recurrent|SSM|ShortConv|LSTM|Fourier)(?!.*(MLP|Mlp|FeedForward))"
)

# Attention whose weights are no plain softmax over the keys, and why no drop can be put there.
BLOCKWISE = "it computes its keys in parts, with a softmax for each"
WINDOW = "its keys are offsets in a window, not tokens"
ONE_CALL = "torch's multi_head_attention_forward computes it in one call"
CLOSED = {
    "BigBirdBlockSparseAttention": BLOCKWISE,
    "BigBirdPegasusBlockSparseAttention": BLOCKWISE,
    "PegasusXGlobalLocalAttention": BLOCKWISE,
    "ProphetNetNgramSelfAttention": BLOCKWISE,
    "LongformerSelfAttention": WINDOW,
    "LEDEncoderSelfAttention": WINDOW,
    "NystromformerSelfAttention": "it approximates the softmax by three others over landmarks",
    "LiltSelfAttention": "it computes a softmax over the text and one over the layout",
    "AutoformerAttention": "its weights are over delays, not keys",
    "SwiftFormerEfficientAdditiveAttention": "it weighs queries by one learned vector and has no keys",
    "GroupViTAssignAttention": "each token is given to one group by a hard maximum",
    "MultiheadAttention": ONE_CALL,
}
# The same by what its forward calls.
CLOSED_CALLS = {
    "multi_head_attention_forward": ONE_CALL,
    "XSoftmax": "its softmax is a function of its own with its own gradient",
}
SOFTMAX_NAMES = ("softmax", "Softmax", "scaled_dot_product_attention")
# Parts of models that pass (T, B, D) between their layers, where all others pass (B, T, D).
TOKENS_FIRST = frozenset({"XLNetModel", "FSMTEncoder", "FSMTDecoder"})
# Packages that, around a model or its forward, hand on its arguments and leave its loss alone, or are known to change
# it (see `adapters.adds_to_loss`).
WRAPPERS = frozenset({"torch", "peft", "accelerate", "deepspeed"})


def parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward, and where it is an override that hands on its `**kwargs`, those of the
    forward above it.
    """
    found = dict(inspect.signature(module.forward).parameters)
    for forward, above in pairwise(_forwards(type(module))):
        rest = bool(forward.__code__.co_flags & inspect.CO_VARKEYWORDS)
        if not rest or "super" not in forward.__code__.co_names:
            break
        inherited = list(inspect.signature(above).parameters.items())[1:]
        found |= {name: parameter for name, parameter in inherited if name not in found}
    return found


def uses_interface(module: nn.Module) -> bool:
    """Whether its forward looks its function up in transformers' AttentionInterface."""
    return any(INTERFACE.fullmatch(name) for name in names_in(module))


def asks_for_sdpa(module: nn.Module) -> bool:
    """Whether its forward compares the attention implementation with "sdpa" by itself.

    No attribute tells, and the name that answers every comparison compiles from torch 2.13 on alone.
    """
    return any(
        "_attn_implementation" in code.co_names and "sdpa" in _texts(code.co_consts) for code in _code_of(module)
    )


def uses_own_softmax(module: nn.Module) -> bool:
    """Whether it is an attention class whose forward calls softmax, or torch's attention, itself."""
    if not ATTENTION.search(type(module).__name__) or closed_because(module):
        return False
    return not names_in(module).isdisjoint(SOFTMAX_NAMES)


def closed_because(module: nn.Module) -> str | None:
    """Why no drop can be put into this attention module, or None where one can, or where it is none."""
    for parent in type(module).__mro__:
        if parent.__name__ in CLOSED:
            return CLOSED[parent.__name__]
    if not ATTENTION.search(type(module).__name__):
        return None
    return next((reason for name, reason in CLOSED_CALLS.items() if name in names_in(module)), None)


def passes_tokens_first(module: nn.Module) -> bool:
    """Whether tokens are the first axis of what the module passes between its layers, and examples the second."""
    return not TOKENS_FIRST.isdisjoint(parent.__name__ for parent in type(module).__mro__)


def names_in(module: nn.Module) -> frozenset[str]:
    """The names that the module's forward uses, and those of the functions beside it that it calls."""
    return _names_of(_code_of(module))


def config_names_in(module: nn.Module) -> frozenset[str]:
    """The names that the same functions read from `self.config`.

    Falcon's layers have a `hidden_dropout` of their own too, which nobody reads: neither the names in the code alone
    nor the attributes tell which of both is at work.
    """
    return _config_names_of(_code_of(module))


def written_in(module: nn.Module) -> set[str]:
    """The packages that its forward, set by hand or not, and what is wrapped around it come from."""
    packages: set[str] = set()
    function: Any = module.forward
    while function is not None:
        # What `functools.wraps` says of itself is what it is around; its globals are its own.
        bare = getattr(function, "func", getattr(function, "__func__", function))
        name = bare.__globals__["__name__"] if isinstance(bare, FunctionType) else type(bare).__module__
        packages.add(name.partition(".")[0])
        function = getattr(function, "__wrapped__", None)
    return packages


@cache
def _names_of(codes: tuple[CodeType, ...]) -> frozenset[str]:
    return frozenset(name for code in codes for name in code.co_names)


@cache
def _config_names_of(codes: tuple[CodeType, ...]) -> frozenset[str]:
    # `self.config.layerdrop` is: LOAD_FAST self, LOAD_ATTR config, LOAD_ATTR layerdrop.
    steps = [step for code in codes for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    reads = (pair for pair in pairwise(steps) if pair[0].opname == pair[1].opname == "LOAD_ATTR")
    return frozenset(read.argval for owner, read in reads if owner.argval == "config")


def _code_of(module: nn.Module) -> tuple[CodeType, ...]:
    kind: Any = type(module)
    return _code_from(kind, inspect.unwrap(kind.forward))


@cache
def _code_from(kind: Any, forward: Any) -> tuple[CodeType, ...]:
    """The code of a class's forward, of the functions beside it that it calls, and of those inside them.

    forward: what it is now; Axolotl puts one of its own into the class.

    Nothing else tells where an attention takes its softmax from before a first batch: transformers itself searches
    the source text for it, and a plan must not run the model.
    """
    # GPTNeoSelfAttention.forward names `_attn`, a method of the class, whose code is read too and names `softmax`: so
    # it has its own. LlamaAttention.forward names ALL_ATTENTION_FUNCTIONS: so it asks the interface. The functions of
    # torch that they call belong to other files and are not followed.
    files = {forward.__module__, *(parent.__module__ for parent in kind.__mro__)}
    found: dict[CodeType, None] = {}
    waiting: list[object] = [forward]
    while waiting:
        function = waiting.pop()
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType) or function.__code__ in found:
            continue
        if function.__module__ not in files and not function.__module__.startswith("transformers.models."):
            continue
        for code in _with_inner(function.__code__):
            found[code] = None
            names = code.co_names
            waiting += [inspect.getattr_static(kind, name, None) for name in names if not hasattr(nn.Module, name)]
            waiting += [function.__globals__.get(name) for name in names]
    return tuple(found)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _texts(constants: Iterable[object]) -> Iterator[str]:
    """The texts among constants and in the tuples and sets among them."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _texts(constant)


# transformers' losses that compare logits and labels at one place; all others, such as a user's, take the next label.
IN_PLACE = frozenset(name for name, loss in LOSS_MAPPING.items() if loss is not ForCausalLMLoss)
BY_HAND = {"cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss"}
SHIFT = re.compile(r"[\w.]*labels\[(.* )?1:\]|[\w.]*logits\[(.* )?:-1(, .*)?\]")


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss compares the logits of a place with the label of the next one, as causal models' do.

    Read off the code: some decoders (Bart's, XLNet) take labels that are shifted already. The gradient of a first
    batch's loss would tell, but not at the logits that are put out where accelerate casts them afterwards. A loss
    that is set in the place of transformers' is taken to shift as that does. A user's module around a model shifts
    where its code does, or leaves the loss to the model. Raises UserError where a loss by hand cannot be read.
    """
    transformer: Any = model
    if not isinstance(model, PreTrainedModel):
        forward = inspect.unwrap(type(model).forward)
        if _shifts_by_hand(forward) or not BY_HAND.isdisjoint(forward.__code__.co_names):
            return _shifts_by_hand(forward)
        transformer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
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


def takes_the_stock_loss(model: PreTrainedModel) -> bool:
    """Whether its forward asks transformers for the loss, and transformers gives the one of next tokens.

    A forward from elsewhere, as of a subclass, may add to that loss or ask for another. A first batch does not show
    it: a penalty on an adapter's weights starts at 0.
    """
    kind = getattr(model, "loss_type", None)
    set_by_hand = hasattr(model, "_loss_function")
    return (
        written_in(model) <= {"transformers", *WRAPPERS}
        and not set_by_hand
        and LOSS_MAPPING.get(kind if kind in LOSS_MAPPING else "ForCausalLM") is ForCausalLMLoss
        and "loss_function" in names_in(model)
    )


def _forwards(kind: type) -> Iterator[FunctionType]:
    """The forwards of a class and those it overrides, undecorated."""
    for parent in kind.__mro__:
        forward = inspect.unwrap(vars(parent).get("forward", parent))
        if isinstance(forward, FunctionType):
            yield forward


@cache
def _shifts_by_hand(forward: FunctionType) -> bool:
    """Whether it cuts labels or logits by one place, as in `labels[..., 1:]` or `lm_logits[:, :-1, :]`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except OSError as error:  # as of what was typed into an interpreter
        raise UserError(
            f"whether the loss in {forward.__qualname__} compares a place with the next label cannot be read, as its "
            "code stands in no file; write the class into one"
        ) from error
    parts = (node for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return any(SHIFT.fullmatch(ast.unparse(part)) for part in parts)
