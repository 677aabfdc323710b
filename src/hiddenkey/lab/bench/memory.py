"""Peak memory of a piece of work: the bytes of tensors alive at its worst moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
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
        objects = gc.get_objects()
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
        for tensor in [found for found in objects if type(found) in kinds]:
            # What vmap left behind, as an error inside of it does, has no storage of its own.
            if tensor.layout == torch.strided and not torch._C._functorch.is_batchedtensor(tensor):
                self._follow(tensor, 0)
        return super().__enter__()

    def peak_of(self, work: Callable[[], Any]) -> int:
        """Bytes held at the worst moment of the work, above what was held before it."""
        gc.collect()
        before = self.peak = self.held
        work()
        return self.peak - before

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


def peak_memory(works: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, int]:
    """Bytes that each of the works held at its worst, above what was held before it; one after the other."""
    if device.type == "cuda":
        return {name: _allocated(work) for name, work in works.items()}
    gc.collect()
    with LiveBytes() as live:
        gc.freeze()  # what lives on is not looked through again for every work
        try:
            return {name: live.peak_of(work) for name, work in works.items()}
        finally:
            gc.unfreeze()


def _allocated(work: Callable[[], Any]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return int(torch.cuda.max_memory_allocated() - before)
