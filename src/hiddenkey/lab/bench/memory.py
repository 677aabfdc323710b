"""Peak memory of a piece of work: the bytes of tensors alive at its worst moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = (
    "Peak memory: in a run of its own, the largest sum of bytes of the tensors that the work made and still held, "
    "followed operation by operation, forward and backward, NumPy's random bytes among them. Weights and inputs lie "
    "outside. Scratch memory inside one operation is not seen."
)
CUDA = "Peak memory: in a run of its own, torch.cuda.max_memory_allocated above what was allocated before."


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that come into being until they are freed.

    Those that operations make, and those that NumPy made and an operation reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        # type() and not isinstance(), which would wake what only stands in for a module.
        for tensor in [found for found in gc.get_objects() if issubclass(type(found), Tensor)]:
            if tensor.layout == torch.strided:
                self._follow(tensor, 0)
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._add(args, kwargs)
        output = func(*args, **(kwargs or {}))
        self._add(output)
        return output

    def _add(self, *tensors: Any) -> None:
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self._follow(leaf, leaf.untyped_storage().nbytes())

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        address = int(storage._cdata)
        if address in self._known:
            return
        self._known.add(address)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that the work held at its worst, above what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    with LiveBytes() as live:
        work()
    return live.peak
