"""Peak memory of a piece of work: the bytes of tensors alive at its worst moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = (
    "Peak memory: in a run of its own, the largest sum of bytes of the tensors that the work made and still held, "
    "followed operation by operation, forward and backward. Weights and inputs lie outside. Scratch memory inside "
    "one operation is not seen."
)
CUDA = "Peak memory: in a run of its own, torch.cuda.max_memory_allocated above what was allocated before."


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and _address(leaf) not in known:
                self._add(leaf)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self._known or not storage.nbytes():
            return
        self._known.add(address)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, address, storage.nbytes()).atexit = False

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


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
