"""What a module's forward does, read off its code: which names it uses, its own helpers included."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import nn

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


def uses_interface(module: nn.Module) -> bool:
    """Whether its forward looks its function up in transformers' AttentionInterface."""
    return any(INTERFACE.fullmatch(name) for name in names_in(module))


def asks_for_sdpa(module: nn.Module) -> bool:
    """Whether its forward compares the attention implementation with "sdpa" by itself."""
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
    """The names that the same functions read from `self.config`."""
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
    found: set[str] = set()
    for code in codes:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for owner, read in pairwise(steps):
            if owner.opname == read.opname == "LOAD_ATTR" and owner.argval == "config":
                found.add(read.argval)
    return frozenset(found)


def _code_of(module: nn.Module) -> tuple[CodeType, ...]:
    kind: Any = type(module)
    return _code_from(kind, inspect.unwrap(kind.forward))


@cache
def _code_from(kind: Any, forward: Any) -> tuple[CodeType, ...]:
    """The code of a class's forward, of the functions beside it that it calls, and of those inside them.

    forward: what it is now; Axolotl puts one of its own into the class.
    """
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
