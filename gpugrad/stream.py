"""Rows of host arrays on their way to a GPU: the next ones are copied while it computes with these.

    host      gather k+1 . . . . . . . . gather k+2 . . . .
    copies    . . . . . . copy k+1 . . . . . . . copy k+2
    compute   block k . . . . . . . block k+1 . . . . . .

Rows are gathered into one of two pinned buffers, from which the GPU copies by itself. A copy waits until the compute
that used its place on the device before is through, a block's compute until its copy is; the host waits for neither,
only for a pinned buffer that is still being copied from.
"""

import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.backend import Array, Device

HANDS = 4  # threads that gather: one alone is slower than the bus
WORTH_A_HAND = 1 << 20


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(HANDS, thread_name_prefix="gpugrad-feed")


class Feeder:
    """Brings rows of host arrays to a GPU, at most `rows` at a time.

    fresh: whoever gets a block may keep it, because each has memory of its own; else blocks take turns in two buffers,
    and one is valid until the next is asked for. One feed at a time, on whatever stream is current then.
    """

    def __init__(self, arrays: Sequence[Array], rows: int, device: Device, *, fresh: bool = False) -> None:
        self.arrays, self.rows, self.device, self.fresh = arrays, rows, device, fresh
        self._staged: list[list[Array]] = []
        self._places: list[list[Array]] = []
        self._hands = _threads()
        cuda = backend.cupy().cuda
        with backend.activate(device):
            self._copies = cuda.Stream(non_blocking=True)
            self._copied = [cuda.Event(disable_timing=True) for _ in range(2)]  # the copy into each place
            self._reached = cuda.Event(disable_timing=True)  # a place in the compute, before the latest block
            for _ in range(2):
                self._staged.append([backend.empty_pinned(*self._like(a, rows)) for a in arrays])
                if not fresh:
                    self._places.append(self._place(rows))

    @staticmethod
    def _like(array: Array, rows: int) -> tuple[tuple[int, ...], Any]:
        return (rows, *array.shape[1:]), array.dtype.newbyteorder("=")

    def _place(self, rows: int) -> list[Array]:
        cupy = backend.cupy()
        return [cupy.empty(*self._like(array, rows)) for array in self.arrays]

    def feed(self, parts: Sequence[Any]) -> Generator[list[Array], None, None]:
        """Yield the rows that each part picks, as arrays on the device. parts: slices, or arrays of row numbers."""
        ahead: list[Array] = []
        try:
            for k, part in enumerate([*parts, None]):
                block = ahead
                if k:
                    self._await_copy((k - 1) % 2)
                if part is not None:
                    # made before the caller launches compute on `block`: the copy need not wait for that one
                    ahead = self._make_room(k % 2, _length(part))
                if k:
                    yield block
                if part is not None:
                    self._send(k % 2, part, ahead)
        except BaseException:
            self._hands.shutdown()  # a gather, or a copy, may still be under way
            self._hands = _threads()
            with backend.activate(self.device):
                self._copies.synchronize()
            raise
        finally:
            with backend.activate(self.device):
                self._copies.wait_event(self._note())

    def _note(self) -> Any:
        """Mark how far the compute of the current stream has been launched."""
        self._reached.record(backend.cupy().cuda.get_current_stream())
        return self._reached

    def _await_copy(self, slot: int) -> None:
        with backend.activate(self.device):
            backend.cupy().cuda.get_current_stream().wait_event(self._copied[slot])

    def _make_room(self, slot: int, rows: int) -> list[Array]:
        """Return where on the device the next rows go, once the compute launched so far is through with the memory."""
        with backend.activate(self.device):
            room = self._place(rows) if self.fresh else [place[:rows] for place in self._places[slot]]
            self._copies.wait_event(self._note())
        return room

    def _send(self, slot: int, part: Any, room: list[Array]) -> None:
        """Gather rows, and have them copied."""
        with backend.activate(self.device):
            if not self._copied[slot].done:
                self._copied[slot].synchronize()
            rows = _length(part)
            staged = [array[:rows] for array in self._staged[slot]]
            self._gather(part, rows, staged)
            for place, array in zip(room, staged, strict=True):
                place.set(array, stream=self._copies)
            self._copied[slot].record(self._copies)

    def _gather(self, part: Any, rows: int, staged: list[Array]) -> None:
        def gather(start: int) -> None:
            stop = min(start + share, rows)
            for array, target in zip(self.arrays, staged, strict=True):
                if isinstance(part, slice):
                    numpy.copyto(target[start:stop], array[part.start + start : part.start + stop])
                elif array.dtype == target.dtype:
                    array.take(part[start:stop], axis=0, out=target[start:stop], mode="clip")  # "raise" would buffer
                else:  # the other byte order
                    numpy.copyto(target[start:stop], array[part[start:stop]])

        hands = max(1, min(HANDS, sum(array.nbytes for array in staged) // WORTH_A_HAND))
        share = -(-rows // hands)
        list((self._hands.map if hands > 1 else map)(gather, range(0, rows, share)))

    def close(self) -> None:
        """Give the memory back, the pinned one to the system."""
        if self._staged:
            with backend.activate(self.device):
                self._copies.synchronize()
            self._staged, self._places = [], []
            backend.release_pinned()
        self._hands.shutdown(wait=False)

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_copies"):
            self.close()


def _length(part: Any) -> int:
    return int(part.stop - part.start if isinstance(part, slice) else len(part))
