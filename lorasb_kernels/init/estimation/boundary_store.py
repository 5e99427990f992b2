"""Keeps the inputs of blocks between the recording and the replay of `layerwise`.

Tensors stay on their device up to a budget of bytes; beyond it they go to pinned host
memory, copied out and back on a separate stream while the device computes.
"""

import weakref

import torch


class ChangedInPlace(Exception):
    """A kept tensor was modified in place."""


class Kept:
    """A tensor that stays on its device."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._version = tensor.detach(), tensor._version

    def prefetch(self) -> None: ...

    def get(self) -> torch.Tensor:
        """The tensor, detached.

        Raises:
            ChangedInPlace: it has been modified.
        """
        if self._tensor._version != self._version:
            raise ChangedInPlace
        return self._tensor.detach()


class Offloaded:
    """A tensor kept in host memory, pinned for a GPU's copies.

    Args:
        tensor: the tensor.
        stream: of its device, for the copies.
    """

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | torch.cpu.Stream):
        tensor = tensor.detach()
        self._device, self._stream = tensor.device, stream
        self._module = torch.get_device_module(self._device)
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        _used_on(stream, tensor)
        self._fetched: torch.Tensor | None = None

    def prefetch(self) -> None:
        """Starts the copy back to the device."""
        if self._fetched is None:
            with self._module.stream(self._stream):
                self._fetched = self._host.to(self._device, non_blocking=True, copy=True)
            self._arrived = self._stream.record_event()

    def get(self) -> torch.Tensor:
        """The tensor on its device, for work on the current stream."""
        self.prefetch()
        tensor, self._fetched = self._fetched, None
        current = self._module.current_stream(self._device)
        current.wait_event(self._arrived)  # not for copies that were started after it
        _used_on(current, tensor)
        return tensor


class BoundaryStore:
    """Keeps tensors; one that many blocks take (masks, position embeddings) is kept once.

    Args:
        budget: bytes that may stay on the device; None for no limit. Tensors on
            the host stay where they are.
    """

    def __init__(self, budget: int | None):
        self._budget, self._used = budget, 0
        self._known: dict[int, tuple[weakref.ref, Kept | Offloaded]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream | torch.cpu.Stream] = {}

    def keep(self, tensor: torch.Tensor) -> Kept | Offloaded:
        """A handle to `tensor` as it is now."""
        reference, kept = self._known.get(id(tensor), (None, None))
        if reference is None or reference() is not tensor:
            kept = self._place(tensor)
            self._known[id(tensor)] = weakref.ref(tensor), kept
        return kept

    def forget(self) -> None:
        """Stops sharing what was kept so far, because its tensors will be freed."""
        self._known.clear()

    def _place(self, tensor: torch.Tensor) -> Kept | Offloaded:
        fits = self._budget is None or self._used + tensor.nbytes <= self._budget
        if fits or not _has_memory_of_its_own(tensor.device):
            self._used += tensor.nbytes
            return Kept(tensor)
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.get_device_module(tensor.device).Stream(
                tensor.device
            )
        return Offloaded(tensor, self._streams[tensor.device])


def _has_memory_of_its_own(device: torch.device) -> bool:
    return device.type != "cpu"


def _used_on(stream: torch.cuda.Stream | torch.cpu.Stream, tensor: torch.Tensor) -> None:
    """Prevents reuse of the memory of `tensor` before `stream` has finished."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


__all__ = ["BoundaryStore", "ChangedInPlace"]
