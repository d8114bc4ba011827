"""The finite sum: a loss added up over rows of data, block by block, with its exact gradient.

    F(w) = reduction over rows i of loss(w, data[i])  +  penalty(w)

A block of rows goes through the whole forward and reverse sweep while it is in cache, so the data is read from memory
once, and no intermediate is ever longer than a block. Blocks are grouped into stripes; threads take stripes as they
come free, each stripe adds its blocks up in order in float64, and the stripes are added in order at the end. Which
thread did what leaves no trace in the result: the same data and block size give the same bits.
"""

import contextvars
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import optree
import threadpoolctl

from gpugrad import backend
from gpugrad.errors import DeviceMismatch, NonFiniteLoss, NotDifferentiable, ShapeMismatch
from gpugrad.op import Node, box, recording
from gpugrad.tape import LIVE, force_grad, new_leaf, no_grad, own, reachable, sweep
from gpugrad.tensor import Tensor
from gpugrad.transforms import value_and_grad

# A block's rows of the data, read from memory once, and its widest intermediate, which must stay in the second-level
# cache: large enough that a NumPy call is work and not overhead. Found by measurement, see docs/performance.md.
DATA_BYTES = 8 << 20
OPERAND_BYTES = 2 << 20
WORTH_A_THREAD = 512 << 10
# What all blocks in flight may keep on their tapes together, on the CPU and on a GPU.
HOST_TAPE_BYTES = 40 << 20
CUDA_TAPE_BYTES = 2 << 30
STRIPES = 16
STRIPE_BYTES = 32 << 20  # float64 gradients of all stripes together


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


class _single_threaded_blas:  # used like a function
    """Hold BLAS to one thread. The setting is the process's: the first caller makes it, the last one undoes it."""

    _lock = threading.Lock()
    _users = 0
    _limit: Any = None

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            if not cls._users:
                cls._limit = _blas().limit(limits=1)
            cls._users += 1

    def __exit__(self, *_exc: object) -> None:
        cls = type(self)
        with cls._lock:
            cls._users -= 1
            if not cls._users:
                cls._limit.restore_original_limits()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gpugrad")


class _Worker(threading.local):
    busy = False


_worker = _Worker()


def _work(run: Callable[[int], "_Stripe"], k: int) -> "_Stripe":
    """Run a stripe in a worker; an Objective within its loss does not wait for the pool that it is in."""
    _worker.busy = True
    try:
        return run(k)
    finally:
        _worker.busy = False


if hasattr(os, "register_at_fork"):  # the threads of a pool do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Stripe:
    """Sums over consecutive blocks: the loss, and the gradient with respect to every parameter, in float64."""

    __slots__ = ("bad", "gradients", "total")

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.gradients: list[Any] | None = None
        self.bad: tuple[int, int, int, float] | None = None


class Objective:
    """A loss summed or averaged over the rows of arrays.

    loss(params, *block) -> Tensor of shape (rows,), one loss a row; params: any pytree of arrays, Tensors or floats.
    data: a tuple of arrays that share axis 0 (a single array stands for a tuple of one). Sample weights are one more
    array, multiplied in by the loss. Do not change the data while a call runs.
    reduction: "mean" or "sum" over rows. penalty(params) -> scalar Tensor, added once, after the reduction.
    block_size: rows a block, or "auto" to fit the caches. device: where the data is to be ("auto": where it is if that
    is a GPU, else a GPU if there is one); host data is copied there once. threads: workers on the CPU, by default one a
    core; BLAS runs single-threaded inside them.

    Raises ShapeMismatch for arrays of unequal length, ValueError for no rows or a bad setting.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        data: Any,
        *,
        reduction: str = "mean",
        penalty: Callable[[Any], Any] | None = None,
        block_size: int | str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Objective: reduction={reduction!r}; expected 'mean' or 'sum'")
        if block_size != "auto" and (not isinstance(block_size, int) or block_size < 1):
            raise ValueError(f"Objective: block_size={block_size!r}; expected 'auto' or a positive number of rows")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"Objective: threads={threads!r}; expected a positive number")
        self.loss = loss
        self.penalty = penalty
        self.reduction = reduction
        self.data, self.device = _placed(data, device)
        self.rows = len(self.data[0])
        self._block_size = block_size
        self._auto: dict[Any, tuple[int, int]] = {}
        self._threads = available_cores() if threads is None else threads
        self._divisor: float = self.rows if reduction == "mean" else 1
        floats = {a.dtype for a in self.data if a.dtype.kind == "f"}
        self._float = floats.pop() if len(floats) == 1 else numpy.dtype(numpy.float64)

    # ------------------------------------------------------------------------------------------- evaluation

    def value(self, params: Any) -> float:
        """Return the objective at params. Raises NonFiniteLoss, ShapeMismatch."""
        total, _ = self._evaluate(params, gradients=False, check=True)
        return float(total)

    def value_and_grad(self, params: Any) -> tuple[float, Any]:
        """Return the objective and its gradient, in the structure, kinds and dtypes of params.

        Raises NonFiniteLoss, ShapeMismatch, NotDifferentiable.
        """
        total, gradients = self._evaluate(params, gradients=True, check=True)
        return float(total), gradients

    def evaluate(self, params: Any) -> tuple[Any, Any]:
        """Return what `value_and_grad` returns, but do not wait for a GPU: the value is a 0-d array on the device.

        A value that is not finite is returned and not raised, for optimisers that step back from it.
        """
        return self._evaluate(params, gradients=True, check=False)

    def batches(self, batch_size: int, seed: int = 0) -> Iterator["Objective"]:
        """Yield one epoch of mini-batches, each an Objective over `batch_size` rows of a permutation drawn from seed.

        Every row comes once; the last batch may be smaller. With reduction "sum" a batch is scaled to stand for all
        rows, so that the penalty weighs the same.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Objective.batches: batch_size={batch_size!r}; expected a positive number of rows")
        order = numpy.random.default_rng(seed).permutation(self.rows)
        if self.device.kind == "cuda":
            order = backend.to_device(order, self.device)
        for start in range(0, self.rows, batch_size):
            rows = order[start : start + batch_size]
            batch = Objective.__new__(Objective)
            batch.__dict__.update(self.__dict__)
            with backend.activate(self.device):
                batch.data = tuple(_frozen(array.take(rows, axis=0)) for array in self.data)
            batch.rows = len(rows)
            batch._divisor = batch.rows if self.reduction == "mean" else batch.rows / self.rows
            yield batch

    # ------------------------------------------------------------------------------------------------ inside

    def _evaluate(self, params: Any, *, gradients: bool, check: bool) -> tuple[Any, Any]:
        given, structure = optree.tree_flatten(params)
        arrays = [self._parameter(leaf) for leaf in given]
        size = self._block_rows(arrays, structure)
        starts = range(0, self.rows, size)
        grad_bytes = 8 * sum(math.prod(a.shape) for a in arrays)
        count = min(len(starts), STRIPES, max(4, STRIPE_BYTES // max(grad_bytes, 1)))
        if self.device.kind == "cuda":
            count = 1  # one stream: nothing to share
        bounds = [len(starts) * k // count for k in range(count + 1)]
        stop: list[bool] = []

        def run(k: int) -> _Stripe:
            return self._stripe(range(bounds[k], bounds[k + 1]), size, arrays, structure, gradients, stop)

        stripes = self._in_order(run, count, stop)
        bad = [s.bad for s in stripes if s.bad is not None]
        # infinities that meet here are reported by row, or are the caller's to judge
        with backend.activate(self.device), numpy.errstate(all="ignore"):
            total = sum((s.total for s in stripes[1:]), stripes[0].total) / self._divisor
            grads: list[Any] | None = None
            if gradients:
                grads = stripes[0].gradients or []
                for stripe in stripes[1:]:
                    for acc, more in zip(grads, stripe.gradients or (), strict=True):
                        acc += more
                for acc in grads:
                    acc /= self._divisor
            if self.penalty is not None:
                extra, extra_grads = value_and_grad(self.penalty)(optree.tree_unflatten(structure, arrays))
                total = total + (extra.astype(numpy.float64) if hasattr(extra, "astype") else extra)
                for acc, more in zip(grads or (), optree.tree_leaves(extra_grads), strict=False):
                    acc += more
        if check and not math.isfinite(float(total)):
            self._report(min(bad) if bad else self._search(size, arrays, structure), float(total))
        if grads is None:
            return total, None
        results = [self._like(acc, leaf) for acc, leaf in zip(grads, given, strict=True)]
        return total, optree.tree_unflatten(structure, results)

    def _in_order(self, run: Callable[[int], _Stripe], count: int, stop: list[bool]) -> list[_Stripe]:
        """Run the stripes and return them in order; on the CPU by the thread pool, with BLAS held to one thread."""
        if self.device.kind == "cuda" or count == 1 or _worker.busy:
            return [run(k) for k in range(count)]
        with _single_threaded_blas():
            if self._threads == 1:
                return [run(k) for k in range(count)]
            pool = _pool(self._threads)
            # a copied context hands numpy.errstate on to the workers
            futures = [pool.submit(contextvars.copy_context().run, _work, run, k) for k in range(count)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stop.append(True)  # an error or Ctrl-C: the others end after their block
                for future in futures:
                    future.cancel()
                for future in futures:
                    if not future.cancelled():
                        future.exception()
                raise

    def _stripe(
        self,
        blocks: range,
        size: int,
        arrays: list[Any],
        structure: Any,
        gradients: bool,
        stop: list[bool],
    ) -> _Stripe:
        result = _Stripe()
        before = recording.trusted
        recording.trusted = before | _identities(self.data)
        try:
            with backend.activate(self.device), force_grad() if gradients else no_grad():
                for block in blocks:
                    if stop:
                        break
                    self._add_block(result, block, block * size, size, arrays, structure, gradients)
        finally:
            recording.trusted = before
        return result

    def _add_block(
        self, into: _Stripe, block: int, start: int, size: int, arrays: list[Any], structure: Any, gradients: bool
    ) -> None:
        tensors = [box(a, new_leaf(a, "Objective") if gradients else None) for a in arrays]
        losses = self._losses(tensors, structure, start, size)
        values = losses._data if type(losses) is Tensor else losses
        with numpy.errstate(over="ignore", invalid="ignore"):
            part = values.sum(dtype=numpy.float64)
        if self.device.kind == "cpu" and into.bad is None and not math.isfinite(part):
            into.bad = _first_bad(values, block, start)
        into.total = into.total + part
        if not gradients:
            return
        if into.gradients is None:
            xp = backend.namespace_of_device(self.device)
            into.gradients = [xp.zeros(a.shape, dtype=numpy.float64) for a in arrays]
        if type(losses) is not Tensor or losses._node is None:
            return
        xp = backend.namespace(values)
        seed = xp.ones(values.shape, dtype=values.dtype)
        nodes = [t._node for t in tensors]
        with numpy.errstate(all="ignore"):
            for node, g in sweep([(losses._node, seed)], nodes).items():
                acc = into.gradients[nodes.index(node)]
                acc += g

    def _losses(self, tensors: list[Any], structure: Any, start: int, size: int) -> Any:
        """Run the loss over one block and check what it returns."""
        rows = min(size, self.rows - start)
        block = [_view(array, start, start + rows) for array in self.data]
        losses = self.loss(optree.tree_unflatten(structure, tensors), *block)
        shape = getattr(losses, "shape", None)
        if shape != (rows,):
            got = f"shape {shape}" if shape is not None else f"a {type(losses).__name__}"
            raise ShapeMismatch(
                f"Objective: the loss returned {got} for a block of {rows} rows, expected shape ({rows},): one loss a "
                "row; leave the sum or mean over rows to the Objective's reduction"
                + ("; drop the last axis, e.g. with [:, 0]" if shape == (rows, 1) else "")
            )
        if losses.dtype.kind != "f":
            raise NotDifferentiable(f"Objective: the loss returned dtype {losses.dtype}, expected floating point")
        return losses

    def _parameter(self, leaf: Any) -> Any:
        """Return a parameter as an array on the data's device that nobody changes during the call."""
        if type(leaf) is float:
            leaf = self._float.type(leaf)  # a Python number does not widen float32 data
        if type(leaf) is Tensor and recording.on and _is_traced(leaf._node):
            raise NotDifferentiable(
                "Objective: a parameter is being differentiated by grad, vjp or a Tape, which cannot see inside; use "
                "value_and_grad of the Objective itself"
            )
        array = leaf._data if type(leaf) is Tensor else leaf
        if not backend.is_array(array):
            raise TypeError(f"Objective: a parameter is a {type(leaf).__name__}; expected an array, Tensor or float")
        if array.dtype.kind != "f":
            raise NotDifferentiable(f"Objective: a parameter has dtype {array.dtype}; expected floating point")
        if array.dtype == numpy.float16:
            array = array.astype(numpy.float32)  # a block's sum would overflow before it reaches float64
        here = backend.device_of(array)
        if here == self.device or isinstance(array, numpy.generic):
            return _frozen(array.copy()) if isinstance(array, numpy.ndarray) else array
        if here.kind == "cpu":
            return backend.to_device(array, self.device)
        raise DeviceMismatch(
            f"Objective: the data is on {self.device}, a parameter on {here}; move one: Objective(..., device={here!r})"
        )

    def _like(self, acc: Any, leaf: Any) -> Any:
        """Return an accumulated gradient as the kind, dtype and device of its parameter."""
        if type(leaf) is float:
            return float(acc)
        array = leaf._data if type(leaf) is Tensor else leaf
        g = backend.to_device(acc.astype(array.dtype, copy=False), backend.device_of(array))
        return box(g, None) if type(leaf) is Tensor else own(g, set())

    def _block_rows(self, arrays: list[Any], structure: Any) -> int:
        """Return the rows a block: given, or found by looking at what the tape of a few rows holds."""
        if isinstance(self._block_size, int):
            return self._block_size
        key = (structure, *((a.shape, a.dtype) for a in arrays))
        found = self._auto.get(key)
        if found is None:
            found = self._auto[key] = self._fitting_rows(arrays, structure)
        rows, fewest = found
        blocks = -(-self.rows // rows)
        if self.device.kind == "cpu" and self.rows > fewest:
            blocks = -(-blocks // self._threads) * self._threads  # every thread gets as many, all about as long
        return -(-self.rows // blocks)

    def _fitting_rows(self, arrays: list[Any], structure: Any) -> tuple[int, int]:
        """Return the rows a block should have, and how many rows are too few to share among threads."""
        probe = min(64, self.rows)
        data = max(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self.data)
        with backend.activate(self.device), force_grad(), numpy.errstate(all="ignore"):
            tensors = [box(a, new_leaf(a, "Objective")) for a in arrays]
            losses = self._losses(tensors, structure, 0, probe)
            node = losses._node if type(losses) is Tensor else None
            sizes = [
                math.prod(n.shape) * n.dtype.itemsize / probe
                for n in (reachable([node]) if node is not None else ())
                if n.op is not None and math.prod(n.shape) >= probe
            ]
        wide = max([*sizes, 1])
        # a result, what its rule keeps besides, and a cotangent
        taped = 3 * sum(sizes) + data
        if self.device.kind == "cuda":
            return int(max(1, CUDA_TAPE_BYTES // taped)), 0
        rows = int(min(DATA_BYTES / data, OPERAND_BYTES / wide, HOST_TAPE_BYTES / self._threads / taped))
        return max(1, min(rows, 1 << 17)), int(WORTH_A_THREAD / max(data, wide))

    def _search(self, size: int, arrays: list[Any], structure: Any) -> tuple[int, int, int, float] | None:
        """Find the first row whose loss is not finite; on a GPU it was not looked for on the way."""
        with backend.activate(self.device), no_grad(), numpy.errstate(all="ignore"):
            for block, start in enumerate(range(0, self.rows, size)):
                losses = self._losses([box(a, None) for a in arrays], structure, start, size)
                values = losses._data if type(losses) is Tensor else losses
                found = _first_bad(backend.to_device(values, backend.CPU), block, start)
                if found is not None:
                    return found
        return None

    def _report(self, bad: tuple[int, int, int, float] | None, total: float) -> None:
        if bad is None:
            raise NonFiniteLoss(
                f"Objective: the value is {total}, though every row's loss is finite: look at their sum and the penalty"
            )
        block, row, within, value = bad
        raise NonFiniteLoss(
            f"Objective: the loss is {value} at row {row} of the data (block {block}, row {within} in it), not "
            "finite; look at that row and the parameters"
        )


def _is_traced(node: Node | None) -> bool:
    """Tell whether a tensor is computed from tracked ones, or watched by a transform or a Tape."""
    return node is not None and (node.op is not None or node.saved is LIVE or "tapes" in node.params)


def _first_bad(values: Any, block: int, start: int) -> tuple[int, int, int, float] | None:
    """Return (block, row, row in the block, loss) of the first loss that is not finite, None if all are."""
    finite = numpy.isfinite(values)
    if finite.all():
        return None
    within = int(numpy.argmin(finite))
    return block, start + within, within, float(values[within])


def _placed(data: Any, device: str) -> tuple[tuple[Any, ...], backend.Device]:
    """Check the arrays and put them where they are to be."""
    given: Sequence[Any] = data if isinstance(data, (tuple, list)) else (data,)
    arrays = [a._data if type(a) is Tensor else a for a in given]
    for position, array in enumerate(arrays):
        if not backend.is_array(array):
            raise TypeError(f"Objective: data[{position}] is a {type(array).__name__}; expected an array or Tensor")
        if isinstance(array, numpy.ndarray):
            backend.host_array(array, f"Objective: data[{position}]")
        if array.ndim == 0:
            raise ShapeMismatch(f"Objective: data[{position}] is 0-d; expected an axis of rows")
    if not arrays:
        raise ValueError("Objective: no data; expected at least one array")
    lengths = [len(a) for a in arrays]
    if len(set(lengths)) > 1:
        raise ShapeMismatch(f"Objective: arrays of unequal length {lengths}; all must share their first axis")
    if not lengths[0]:
        raise ValueError("Objective: the data has no rows")
    found = next((backend.device_of(a) for a in arrays if backend.is_cuda_array(a)), None)
    where = found if device == "auto" and found is not None else backend.as_device(device)
    for array in arrays:
        here = backend.device_of(array)
        if here.kind == "cuda" and here != where:
            raise DeviceMismatch(f"Objective: data on {here}, device={where!r} asked for; pass device={here!r}")
    return tuple(
        backend.to_device(numpy.asarray(a) if isinstance(a, numpy.ndarray) else a, where) for a in arrays
    ), where


def _identities(data: tuple[Any, ...]) -> frozenset[int]:
    return frozenset(i for a in data for i in (id(a), id(a if a.base is None else a.base)))


def _frozen(array: Any) -> Any:
    if isinstance(array, numpy.ndarray):
        array.flags.writeable = False
    return array


def _view(array: Any, start: int, stop: int) -> Any:
    """Return rows of the data for the loss: a read-only view on the CPU, a constant Tensor of it on a GPU."""
    part = array[start:stop]
    return _frozen(part) if isinstance(part, numpy.ndarray) else box(part, None)
