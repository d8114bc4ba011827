"""The finite sum: a loss added up over rows of data, block by block, with its exact gradient.

    F(w) = reduction over rows i of loss(w, data[i])  +  penalty(w)

A block of rows goes through the whole forward and reverse sweep while it is in cache, so the data is read from memory
once, and no intermediate is ever longer than a block. Blocks are grouped into stripes; threads take stripes as they
come free, each stripe adds its blocks up in order in float64, and the stripes are added in order at the end. Which
thread did what leaves no trace in the result: the same data and block size give the same bits.

On a GPU there is one stripe, on the caller's stream. Data from the host is copied there once, or, where it does not
fit, streamed through two buffers in every evaluation. Where a block runs out of memory it is done again in halves.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad import threads as _workers
from gpugrad.compile.cpu import MUCH_WORK, has_compiler
from gpugrad.compile.cpu_rows import RowProgram
from gpugrad.compile.cuda import DeviceProgram
from gpugrad.compile.cuda_rows import DeviceLoss, penalty_program
from gpugrad.compile.fingerprint import Unclear, fingerprint
from gpugrad.compile.losses import Want, directional, loss_program
from gpugrad.compile.program import Value
from gpugrad.errors import (
    CaptureError,
    CaptureWarning,
    DeviceMemoryError,
    DeviceMemoryWarning,
    DeviceMismatch,
    NonFiniteLoss,
    NotDifferentiable,
    ShapeMismatch,
)
from gpugrad.op import Node, box, recording
from gpugrad.stream import Feeder
from gpugrad.tape import LIVE, force_grad, new_leaf, no_grad, own, reachable, sweep
from gpugrad.tensor import Tensor
from gpugrad.transforms import grad, value_and_grad

# A block's rows of the data, read from memory once, and its widest intermediate, which must stay in the second-level
# cache: large enough that a NumPy call is work and not overhead. Found by measurement, see docs/performance.md.
DATA_BYTES = 8 << 20
OPERAND_BYTES = 2 << 20
WORTH_A_THREAD = 512 << 10
# What all blocks in flight may keep on their tapes together, on the CPU and on a GPU.
HOST_TAPE_BYTES = 40 << 20
CUDA_TAPE_BYTES = 2 << 30
RESIDENT_SHARE = 0.6  # of a GPU's free memory: data from the host up to this is copied there as a whole
FEED_BYTES = 64 << 20  # what goes to a GPU in one copy: enough to hide the launches, little enough to start soon
STRIPES = 16
PROGRAMS = 16  # captured losses that an Objective keeps
CAPTURE_BYTES = 1 << 20  # of data, from which on compiling the loss pays
STRIPE_BYTES = 32 << 20  # float64 gradients of all stripes together


class _Stripe:
    """Sums over consecutive blocks: the loss, and the gradient with respect to every parameter, in float64."""

    __slots__ = ("bad", "gradients", "total")

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.gradients: list[Any] = []
        self.bad: tuple[int, int, int, float] | None = None


class _Room:
    """What an Objective and its mini-batches have found out about a GPU's memory, and the buffers they share."""

    def __init__(self, device: backend.Device) -> None:
        self.device = device
        self.rows: int | None = None  # the most that a block may have
        self.news = self.told = False
        self.feeders: dict[bool, list[Feeder]] = {True: [], False: []}

    def halve(self, rows: int, why: str) -> None:
        """Take note that a block of so many rows does not fit. Raises DeviceMemoryError when it is one."""
        if rows == 1:
            free, total = backend.memory(self.device)
            raise DeviceMemoryError(
                f"Objective: one row does not fit in the memory of {self.device}: {why} {free:,} of {total:,} bytes "
                "are free; make the model smaller, free other arrays, or use device='cpu'"
            )
        for fresh in self.feeders:
            while feeder := self.feeder(fresh):
                feeder.close()
        backend.release_memory(self.device)
        self.limit(rows // 2)

    def limit(self, rows: int) -> None:
        self.rows, self.news = rows, True

    def feeder(self, fresh: bool) -> Feeder | None:
        """Take out a feeder that nobody uses, if there is one; other threads do the same."""
        try:
            return self.feeders[fresh].pop()
        except IndexError:
            return None

    def tell(self) -> None:
        """Warn, once, that blocks are smaller now."""
        if self.news and not self.told:
            self.told = True
            warnings.warn(
                f"Objective: a block does not fit in {self.device}'s memory; going on with blocks of {self.rows} rows",
                DeviceMemoryWarning,
                stacklevel=2,
            )
        self.news = False


class Objective:
    """A loss summed or averaged over the rows of arrays.

    loss(params, *block) -> Tensor of shape (rows,), one loss a row; params: any pytree of arrays, Tensors or floats.
    data: a tuple of arrays that share axis 0 (a single array stands for a tuple of one). Sample weights are one more
    array, multiplied in by the loss. Do not change the data while a call runs.
    reduction: "mean" or "sum" over rows. penalty(params) -> scalar Tensor, added once, after the reduction.
    block_size: rows a block, or "auto" to fit the caches. device: where to compute ("auto": where the data is if that
    is a GPU, else a GPU if there is one); host data is copied there once, or streamed in every evaluation if it does
    not fit. threads: workers on the CPU, by default one a core; BLAS runs single-threaded inside them.

    Over 1 MiB of data and more (on a GPU over any), with numba installed on the CPU, the loss is captured
    (`gpugrad.compile`): it runs a few times without values, and what it did is replayed, so that its side effects
    happen then alone. It is captured again when what it refers to has changed. A loss that cannot be captured runs
    operation by operation, with one CaptureWarning that says why. GPUGRAD_JIT=0 in the environment: no compiled loops.

    Attributes: `data`, `device`, `rows`, and `dtype`: the floating dtype of the data, which Python numbers among the
    parameters take. A block that does not fit on the GPU is done again in halves, with one DeviceMemoryWarning.

    Raises ShapeMismatch for arrays of unequal length, ValueError for no rows or a bad setting; when evaluated,
    DeviceMemoryError where not even one row fits.
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
        self._threads = backend.available_cores() if threads is None else threads
        self._divisor: float = self.rows if reduction == "mean" else 1
        floats = {a.dtype for a in self.data if a.dtype.kind == "f"}
        self.dtype = floats.pop() if len(floats) == 1 else numpy.dtype(numpy.float64)
        self._room = _Room(self.device)
        # evaluated on another stream, the data has to be there first
        self._ready = backend.mark(self.device) if self.device.kind == "cuda" else None
        self._programs: dict[Any, Any] = {}  # captured losses, by parameters and what the loss depends on
        # a GPU gains by fewer launches, however small the data
        self._capturing = self.device.kind == "cuda" or (_bytes(self.data) >= CAPTURE_BYTES and has_compiler())
        self._told: set[str] = set()
        self._picked: Any = None  # row numbers, of a mini-batch too large to be gathered at once

    # ------------------------------------------------------------------------------------------- evaluation

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_programs": {}}  # what was captured is captured again

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

    def hvp(self, params: Any, v: Any) -> Any:
        """Return the Hessian at params times v, both of one structure, in the structure, kinds and dtypes of params.

        Forward over reverse would need rules of its own: this is the gradient of the slope along v, two reverse sweeps.
        Raises ShapeMismatch, NotDifferentiable; a product that is not finite is returned.
        """
        given, structure = optree.tree_flatten(params)
        along, other = optree.tree_flatten(v)
        shapes = [numpy.shape(_plain(leaf)) for leaf in given]
        if other != structure or [numpy.shape(_plain(leaf)) for leaf in along] != shapes:
            got = [numpy.shape(_plain(leaf)) for leaf in along]
            raise ShapeMismatch(
                f"Objective.hvp: v has structure {other} and shapes {got}; expected that of params, {structure}, and "
                f"shapes {shapes}"
            )
        with backend.activate(self.device):
            if self._ready is not None:
                backend.follow(self._ready)
            arrays = [self._parameter(leaf) for leaf in given]
            directions = [self._parameter(leaf) for leaf in along]
            directions = [
                d if d.dtype == a.dtype else d.astype(a.dtype) for d, a in zip(directions, arrays, strict=True)
            ]
        found = self._program("product", arrays, structure)
        with backend.activate(self.device), numpy.errstate(all="ignore"):
            if isinstance(found, RowProgram):
                products = [part / self._divisor for part in self._totals(found, [*arrays, *self.data, *directions])]
            elif isinstance(found, DeviceLoss):
                products = self._captured_on_cuda(found, arrays, structure, directions)
            else:
                products = self._product_by_blocks(arrays, directions, structure)
                self._tell(found)
            if self.penalty is not None:
                p, d = (optree.tree_unflatten(structure, leaves) for leaves in (arrays, directions))
                more = optree.tree_leaves(grad(directional(self.penalty))(p, d))
                products = [acc + part for acc, part in zip(products, more, strict=True)]
            _, products = self._brought_home(0.0, products, given, check=False)
        shared: set[int] = set()
        results = [self._like(acc, leaf, shared) for acc, leaf in zip(products, given, strict=True)]
        return optree.tree_unflatten(structure, results)

    def _product_by_blocks(self, arrays: list[Any], directions: list[Any], structure: Any) -> list[Any]:
        """Return the Hessian of the sum over rows times a vector, block by block in float64."""
        p, d = (optree.tree_unflatten(structure, leaves) for leaves in (arrays, directions))
        along = grad(directional(lambda params, *block: self._losses(optree.tree_leaves(params), structure, block)))
        totals: list[Any] = []

        def add(_start: int, block: Sequence[Any]) -> None:
            nonlocal totals
            parts = optree.tree_leaves(along(p, d, *block))
            sums = totals or [part.astype(numpy.float64) * 0 for part in parts]
            totals = [acc + part for acc, part in zip(sums, parts, strict=True)]

        before = recording.trusted
        recording.trusted = before | _identities(self.data)
        try:
            self._over_blocks(self._block_rows(arrays, structure), add)
        finally:
            recording.trusted = before
        return [acc / self._divisor for acc in totals]

    def batches(self, batch_size: int, seed: int = 0) -> Iterator["Objective"]:
        """Yield one epoch of mini-batches, each an Objective over `batch_size` rows of a permutation drawn from seed.

        Every row comes once; the last batch may be smaller. With reduction "sum" a batch is scaled to stand for all
        rows, so that the penalty weighs the same.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Objective.batches: batch_size={batch_size!r}; expected a positive number of rows")
        order = numpy.random.default_rng(seed).permutation(self.rows)
        if self._picked is not None:
            order = self._picked[order]
        parts = [order[start : start + batch_size] for start in range(0, self.rows, batch_size)]
        if self._streamed:
            return self._streamed_batches(parts)
        return self._gathered_batches(order, parts)

    def _gathered_batches(self, order: Any, parts: list[Any]) -> Iterator["Objective"]:
        there = backend.to_device(order, self.device)
        start = 0
        for part in parts:
            stop = start + len(part)
            yield self._batch(self._taken(there[start:stop]), part)
            start = stop

    def _taken(self, rows: Any) -> tuple[Any, ...] | None:
        """Return rows of the data as new arrays; None where a GPU has no room for them."""
        try:
            with backend.activate(self.device):
                if self._ready is not None:
                    backend.follow(self._ready)
                return tuple(_frozen(array.take(rows, axis=0)) for array in self.data)
        except Exception as error:
            if not backend.out_of_memory(error):
                raise
        backend.release_memory(self.device)
        return None

    def _streamed_batches(self, parts: list[Any]) -> Iterator["Objective"]:
        done = 0
        # one in use, the next one on its way, and one that the caller has not let go yet
        if 3 * len(parts[0]) * self._row_bytes() <= RESIDENT_SHARE * backend.memory(self.device)[0]:
            try:
                feeder = self._feeder(len(parts[0]), fresh=True)
                try:
                    with closing(feeder.feed(parts)) as fed:
                        for block in fed:
                            yield self._batch(self._beside(block, parts[done]), parts[done])
                            done += 1
                finally:
                    self._room.feeders[True].append(feeder)
            except Exception as error:
                if not backend.out_of_memory(error):
                    raise
        for part in parts[done:]:
            yield self._batch(None, part)

    def _batch(self, data: tuple[Any, ...] | None, part: Any) -> "Objective":
        """Return an Objective over rows of the data: gathered in `data`, or for None when they are evaluated."""
        batch = Objective.__new__(Objective)
        batch.__dict__.update(self.__dict__)
        batch.rows = len(part)
        batch.data, batch._picked = (self.data, part) if data is None else (data, None)
        batch._divisor = batch.rows if self.reduction == "mean" else batch.rows / self.rows
        if data is not None and self._ready is not None:
            batch._ready = backend.mark(self.device)  # gathered on this stream, perhaps evaluated on another
        return batch

    # ------------------------------------------------------------------------------------------------ inside

    def _evaluate(self, params: Any, *, gradients: bool, check: bool) -> tuple[Any, Any]:
        given, structure = optree.tree_flatten(params)
        with backend.activate(self.device):
            if self._ready is not None:
                backend.follow(self._ready)
            arrays = [self._parameter(leaf) for leaf in given]
        found = self._program("gradient" if gradients else "value", arrays, structure)
        bad = None
        with backend.activate(self.device):
            if isinstance(found, RowProgram):
                total, grads = self._replayed(found, arrays)
            elif isinstance(found, DeviceLoss):
                total, *grads = self._captured_on_cuda(found, arrays, structure)
            else:
                sums = self._on_cuda if self.device.kind == "cuda" else self._on_cpu
                total, grads, bad = sums(self._block_rows(arrays, structure), arrays, structure, gradients)
                self._tell(found)
        # infinities that meet here are reported by row, or are the caller's to judge
        with backend.activate(self.device), numpy.errstate(all="ignore"):
            if self.penalty is not None:
                total, grads = self._with_penalty(self.penalty, total, grads, arrays, structure)
            total, grads = self._brought_home(total, grads, given, check)
        if check and not math.isfinite(total):
            self._report(bad or self._search(self._block_rows(arrays, structure), arrays, structure), total)
        if not gradients:
            return total, None
        shared: set[int] = set()
        results = [self._like(acc, leaf, shared) for acc, leaf in zip(grads, given, strict=True)]
        return total, optree.tree_unflatten(structure, results)

    def _program(self, want: Want, arrays: list[Any], structure: Any) -> RowProgram | DeviceLoss | str | None:
        """Return the captured loss, why there is none, or None where capture is not for this Objective."""
        if not self._capturing or not {"raise", "call"}.isdisjoint(numpy.geterr().values()):
            return None  # who wants to hear of overflows hears of them from NumPy
        try:
            meaning = fingerprint(self.loss)
            shapes = tuple((a.shape, a.dtype) for a in arrays)
            found: RowProgram | DeviceLoss | str | None = self._programs.get((want, structure, shapes, meaning))
        except Unclear as error:
            return f"it refers to {error}, which may change unnoticed"
        except Exception:  # an object that does not want to be looked at
            return None
        if found is not None:
            return found
        made = DeviceLoss if self.device.kind == "cuda" else _on_rows
        params, data = ([Value(a.shape, a.dtype) for a in some] for some in (arrays, self.data))
        for _ in range(2):
            try:
                found = made(self.loss, want, params, structure, data, self.device)
            except Exception as error:  # whatever the loss does: it may well run eagerly
                if backend.out_of_memory(error):
                    return None  # for constants of the loss; next time there may be room
                found = (str(error).splitlines() or [type(error).__name__])[0]
            try:
                before, meaning = meaning, fingerprint(self.loss)
            except Exception:  # what it keeps has become more than can be looked at
                break
            if meaning == before:
                self._keep((want, structure, shapes, meaning), found)
                return found
            # once: what it keeps for itself is filled now
        self._capturing = False  # running it is not all that it is for
        return "calling it changes what it refers to"

    def _with_penalty(
        self, penalty: Callable[[Any], Any], total: Any, grads: list[Any], arrays: list[Any], structure: Any
    ) -> tuple[Any, list[Any]]:
        """Return value and gradients (if there are any) with those of the penalty."""
        program = None
        if grads and backend.is_cuda_array(total):
            program = self._penalty_program(penalty, grads, arrays, structure)
        if program is not None:
            total, *grads = program([*arrays, total, *grads])
            return total, grads
        extra, extra_grads = value_and_grad(penalty)(optree.tree_unflatten(structure, arrays))
        total = total + (extra.astype(numpy.float64) if hasattr(extra, "astype") else extra)
        return total, [acc + more for acc, more in zip(grads, optree.tree_leaves(extra_grads), strict=False)]

    def _penalty_program(
        self, penalty: Callable[[Any], Any], grads: list[Any], arrays: list[Any], structure: Any
    ) -> DeviceProgram | None:
        """Return what adds the penalty on a GPU in few launches, None where it cannot be captured."""
        if not self._capturing:
            return None
        try:
            shapes = tuple((a.shape, a.dtype) for a in (*arrays, *grads))
            key = ("penalty", structure, shapes, fingerprint(penalty))
            found = self._programs.get(key)
        except Exception:  # an object that does not want to be looked at
            return None
        if found is None:
            params, gradients = ([Value(a.shape, a.dtype) for a in some] for some in (arrays, grads))
            try:
                found = penalty_program(penalty, params, structure, gradients, self.device)
            except Exception as error:  # it may well run op by op
                if backend.out_of_memory(error):
                    return None
                found = f"its penalty: {(str(error).splitlines() or [type(error).__name__])[0]}"
            self._keep(key, found)
        self._tell(found if isinstance(found, str) else None)
        return found if isinstance(found, DeviceProgram) else None

    def _keep(self, key: Any, program: Any) -> None:
        while len(self._programs) >= PROGRAMS:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[key] = program

    def _tell(self, why: RowProgram | DeviceLoss | str | None) -> None:
        """Warn, once, that a loss runs operation by operation."""
        if isinstance(why, str) and not self._told:
            self._told.add(why)
            warnings.warn(
                f"Objective: the loss runs operation by operation, right but slower, as it cannot be captured: {why}",
                CaptureWarning,
                stacklevel=4,
            )

    def _replayed(self, program: RowProgram, arrays: list[Any]) -> tuple[Any, list[Any]]:
        """Return value and gradients (all that the program gives) from a captured loss."""
        with numpy.errstate(all="ignore"):
            total, *grads = (part / self._divisor for part in self._totals(program, [*arrays, *self.data]))
        return total, grads

    def _totals(self, program: RowProgram, arrays: list[Any]) -> list[Any]:
        """Return what a captured loss adds up over all rows, in float64."""
        size = self._block_size if isinstance(self._block_size, int) else None
        out = program.run(arrays, self.rows, self._threads, size)
        return [numpy.asarray(part, dtype=numpy.float64) for part in out]

    def _on_cpu(self, size: int, arrays: list[Any], structure: Any, gradients: bool) -> tuple[Any, list[Any], Any]:
        """Return the value, the gradients (none unless asked for) and the first row whose loss is not finite."""
        starts = range(0, self.rows, size)
        grad_bytes = 8 * sum(math.prod(a.shape) for a in arrays)
        count = min(len(starts), STRIPES, max(4, STRIPE_BYTES // max(grad_bytes, 1)))
        bounds = [len(starts) * k // count for k in range(count + 1)]
        stop: list[bool] = []

        def run(k: int) -> _Stripe:
            return self._stripe(range(bounds[k], bounds[k + 1]), size, arrays, structure, gradients, stop)

        stripes = _workers.in_order(run, count, self._threads, stop)
        bad = [s.bad for s in stripes if s.bad is not None]
        with numpy.errstate(all="ignore"):
            total = sum((s.total for s in stripes[1:]), stripes[0].total) / self._divisor
            grads = stripes[0].gradients
            for stripe in stripes[1:]:
                for acc, more in zip(grads, stripe.gradients, strict=True):
                    acc += more
            for acc in grads:
                acc /= self._divisor
        return total, grads, min(bad) if bad else None

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
            with force_grad() if gradients else no_grad():
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
        stop = min(start + size, self.rows)
        losses = self._losses(tensors, structure, [_block(array[start:stop]) for array in self.data])
        values = losses._data if type(losses) is Tensor else losses
        with numpy.errstate(over="ignore", invalid="ignore"):
            part = values.sum(dtype=numpy.float64)
        if into.bad is None and not math.isfinite(part):
            into.bad = _first_bad(values, block, start)
        into.total = into.total + part
        if not gradients:
            return
        if not into.gradients:
            into.gradients = [numpy.zeros(a.shape, dtype=numpy.float64) for a in arrays]
        if type(losses) is not Tensor or losses._node is None:
            return
        seed = numpy.ones(values.shape, dtype=values.dtype)
        nodes = [t._node for t in tensors]
        with numpy.errstate(all="ignore"):
            for node, g in sweep([(losses._node, seed)], nodes).items():
                acc = into.gradients[nodes.index(node)]
                acc += g

    def _losses(self, tensors: list[Any], structure: Any, block: Sequence[Any]) -> Any:
        """Run the loss over one block and check what it returns."""
        rows = len(block[0])
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

    # ---------------------------------------------------------------------------------------------- on a GPU

    def _on_cuda(self, size: int, arrays: list[Any], structure: Any, gradients: bool) -> tuple[Any, list[Any], None]:
        """As `_on_cpu`, on the caller's stream: nothing is read back, nothing waited for."""
        xp = backend.namespace_of_device(self.device)
        total: Any = None
        grads: list[Any] = []
        scaled = False

        def add(_start: int, block: Sequence[Any]) -> None:
            nonlocal total, grads, scaled
            tensors = [box(a, new_leaf(a, "Objective") if gradients else None) for a in arrays]
            losses = self._losses(tensors, structure, block)
            values = losses._data if type(losses) is Tensor else losses
            # All rows in one block, as in a mini-batch: launches count, and there is nothing to add up.
            scaled = len(values) == self.rows
            nodes = [t._node for t in tensors]
            found: dict[Any, Any] = {}
            if gradients and type(losses) is Tensor and losses._node is not None:
                wide = numpy.result_type(values.dtype, numpy.float32)
                seed = xp.full(values.shape, 1 / self._divisor if scaled else 1.0, dtype=wide)
                found = sweep([(losses._node, seed)], nodes)
            if scaled:
                mean = self._divisor == self.rows
                total = values.mean(dtype=numpy.float64) if mean else values.sum(dtype=numpy.float64) / self._divisor
                if gradients:
                    grads = [
                        found[node] if node in found else xp.zeros(a.shape, dtype=a.dtype)
                        for node, a in zip(nodes, arrays, strict=True)
                    ]
                return
            part = values.sum(dtype=numpy.float64)
            sums = grads or [xp.zeros(a.shape, dtype=numpy.float64) for a in arrays if gradients]
            # Nothing below can run out of memory: a block counts whole or not at all.
            total = part if total is None else total + part
            grads = sums
            for acc, node in zip(grads, nodes, strict=False):
                if node in found:
                    acc += found[node]

        with force_grad() if gradients else no_grad():
            self._over_blocks(size, add)
        if not scaled:
            total = total / self._divisor
            for acc in grads:
                acc /= self._divisor
        return total, grads, None

    def _captured_on_cuda(
        self, found: DeviceLoss, arrays: list[Any], structure: Any, more: Sequence[Any] = ()
    ) -> list[Any]:
        """Return what a captured loss adds up over all rows, divided; on the caller's stream, nothing waited for."""
        totals: list[Any] = []

        def add(_start: int, block: Sequence[Any]) -> None:
            nonlocal totals
            rows = len(block[0])
            given = [*arrays, *(part._data for part in block), *more]
            parts = found.run(given, rows, 1 / self._divisor, whole=rows == self.rows)
            if not totals:
                totals = parts if rows == self.rows else [part.astype(numpy.float64, copy=False) for part in parts]
                return
            # Nothing below can run out of memory: a block counts whole or not at all.
            for acc, part in zip(totals, parts, strict=True):
                acc += part

        self._over_blocks(self._captured_rows(found, arrays, structure), add)
        return totals

    def _captured_rows(self, found: DeviceLoss, arrays: list[Any], structure: Any) -> int:
        """Return the rows a block of a captured loss: all of them, where one kernel keeps nothing of a row."""
        if not found.one_pass or isinstance(self._block_size, int):
            return self._block_rows(arrays, structure)
        if self._streamed:
            fitting = min(FEED_BYTES, backend.memory(self.device)[0] // 8) // self._row_bytes()
            return max(1, min(int(fitting), self.rows))
        return self.rows

    def _over_blocks(self, size: int, work: Callable[[int, Sequence[Any]], None]) -> None:
        """Call work(first row, block) for blocks of `size` rows, in order; of fewer where a GPU has no more room."""
        if not self._streamed:
            self._in_blocks(0, self.rows, size, self._between, work)
            return
        feeder = self._feeder(min(size, self._room.rows or size))
        size = min(size, feeder.rows)
        step = feeder.rows // size * size
        parts = [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]
        if self._picked is not None:
            parts = [self._picked[part] for part in parts]
        try:
            with closing(feeder.feed(parts)) as fed:
                for k, rows in enumerate(fed):
                    chunk = self._beside(rows, parts[k])
                    self._in_blocks(k * step, len(chunk[0]), size, functools.partial(_rows, chunk), work)
        finally:
            self._room.feeders[False].append(feeder)

    def _in_blocks(
        self,
        first: int,
        rows: int,
        size: int,
        between: Callable[[int, int], Sequence[Any]],
        work: Callable[[int, Sequence[Any]], None],
    ) -> None:
        """Call `work` for rows 0 to `rows` of what `between` gives, of which the first is number `first`."""
        done = 0
        while done < rows:
            count = min(size, self._room.rows or size, rows - done)
            try:
                work(first + done, [_block(part) for part in between(done, done + count)])
            except Exception as error:
                if not backend.out_of_memory(error):
                    raise
                why = str(error)
            else:
                done += count
                self._room.tell()
                continue
            if not self._let_go():  # else once more: what other programs kept may have been in the way
                self._room.halve(count, why)  # here, where the exception no longer holds the tape

    def _let_go(self) -> int:
        """Give back the buffers that captured programs keep and no call is using; return how many sets there were."""
        programs = [p for p in self._programs.values() if isinstance(p, (DeviceLoss, DeviceProgram))]
        released = sum(program.release() for program in programs)
        if released:
            backend.release_memory(self.device)
        return released

    def _between(self, start: int, stop: int) -> Sequence[Any]:
        if self._picked is None:
            return _rows(self.data, start, stop)
        rows = backend.to_device(self._picked[start:stop], self.device)
        return [array.take(rows, axis=0) for array in self.data]

    @property
    def _streamed(self) -> bool:
        return self.device.kind == "cuda" and any(isinstance(a, numpy.ndarray) for a in self.data)

    def _row_bytes(self) -> int:
        return sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self.data if isinstance(a, numpy.ndarray))

    def _feeder(self, size: int, fresh: bool = False) -> Feeder:
        """Take out a feeder for blocks, or for mini-batches that keep their memory, of `size` rows."""
        while kept := self._room.feeder(fresh):
            if kept.rows >= size:
                return kept
            kept.close()
        host = [a for a in self.data if isinstance(a, numpy.ndarray)]
        if fresh:
            return Feeder(host, size, self.device, fresh=True)
        fitting = max(backend.memory(self.device)[0] // (8 * self._row_bytes()), 1)  # two of them are a quarter
        if fitting < size and self._block_size != "auto":
            self._room.limit(fitting)
        while True:
            size = min(size, fitting)
            rows = min(max(min(fitting, FEED_BYTES // self._row_bytes()) // size, 1) * size, self.rows)
            try:
                return Feeder(host, rows, self.device)
            except Exception as error:
                if not backend.out_of_memory(error):
                    raise
                why = str(error)
            self._room.halve(rows, why)
            fitting = rows // 2

    def _beside(self, fed: Sequence[Any], part: Any) -> tuple[Any, ...]:
        """Put arrays that were fed to the GPU beside the same rows of those that are there."""
        rest = iter(fed)
        with backend.activate(self.device):
            if not isinstance(part, slice):
                part = backend.to_device(part, self.device)
            return tuple(
                next(rest) if isinstance(a, numpy.ndarray) else a[part] if isinstance(part, slice) else a.take(part, 0)
                for a in self.data
            )

    def _brought_home(self, total: Any, grads: list[Any], given: list[Any], check: bool) -> tuple[Any, list[Any]]:
        """Read from a GPU the value, if it is to be checked, and the gradients of what lives on the host, at once."""
        if self.device.kind == "cpu":
            return total, grads
        home = [k for k in range(len(grads)) if not backend.is_cuda_array(_plain(given[k]))]
        if check or home:
            xp = backend.namespace_of_device(self.device)
            value, *read = backend.fetch(xp, total, *(grads[k] for k in home))
            total = float(value) if check else total
            for k, g in zip(home, read, strict=True):
                grads[k] = g
        return total, grads

    # ----------------------------------------------------------------------------------------- parameters, blocks

    def _parameter(self, leaf: Any) -> Any:
        """Return a parameter as an array on the data's device that nobody changes during the call."""
        if type(leaf) is float:
            leaf = self.dtype.type(leaf)  # a Python number does not widen float32 data
        if type(leaf) is Tensor and recording.on and _is_traced(leaf._node):
            raise NotDifferentiable(
                "Objective: a parameter is being differentiated by grad, vjp or a Tape, which cannot see inside; use "
                "value_and_grad of the Objective itself"
            )
        array = _plain(leaf)
        if isinstance(array, backend.Abstract):
            raise CaptureError(
                "Objective: called within a captured function; it captures its own loss: call it outside"
            )
        if not backend.is_array(array):
            raise TypeError(f"Objective: a parameter is a {type(leaf).__name__}; expected an array, Tensor or float")
        if array.dtype.kind != "f":
            raise NotDifferentiable(f"Objective: a parameter has dtype {array.dtype}; expected floating point")
        if array.dtype == numpy.float16:
            array = array.astype(numpy.float32)  # a block's sum would overflow before it reaches float64
        here = backend.device_of(array)
        if here == self.device:
            return _frozen(array.copy()) if isinstance(array, numpy.ndarray) else array
        if here.kind == "cpu":
            return backend.to_device(array, self.device)
        raise DeviceMismatch(
            f"Objective: the data is on {self.device}, a parameter on {here}; move one: Objective(..., device={here!r})"
        )

    def _like(self, acc: Any, leaf: Any, shared: set[int]) -> Any:
        """Return an accumulated gradient as the kind and dtype of its parameter."""
        if type(leaf) is float:
            return float(acc)
        g = own(numpy.asarray(acc, _plain(leaf).dtype) if isinstance(acc, numpy.generic) else acc, shared)
        g = g if g.dtype == _plain(leaf).dtype else g.astype(_plain(leaf).dtype)
        return box(g, None) if type(leaf) is Tensor else g

    def _block_rows(self, arrays: list[Any], structure: Any) -> int:
        """Return the rows a block: given, or found by looking at what the tape of a few rows holds."""
        if isinstance(self._block_size, int):
            return self._block_size
        key = (self._streamed, structure, *((a.shape, a.dtype) for a in arrays))
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
        rows = min(64, self.rows)
        while True:
            try:
                with backend.activate(self.device), force_grad(), numpy.errstate(all="ignore"):
                    block = [_block(backend.to_device(a[:rows], self.device)) for a in self.data]
                    sizes = self._tape(arrays, structure, block)
                break
            except Exception as error:
                if rows == 1 or not backend.out_of_memory(error):
                    raise
            rows //= 2
        data = max(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self.data)
        wide = max([*sizes, 1])
        # a result, what its rule keeps besides, and a cotangent
        taped = 3 * sum(sizes) + data
        if self.device.kind == "cuda":
            fitting = min(CUDA_TAPE_BYTES, backend.memory(self.device)[0] // 2) // taped
            if self._streamed:
                fitting = min(fitting, min(FEED_BYTES, backend.memory(self.device)[0] // 8) // self._row_bytes())
            return max(1, int(fitting)), 0
        fitting = int(min(DATA_BYTES / data, OPERAND_BYTES / wide, HOST_TAPE_BYTES / self._threads / taped))
        return max(1, min(fitting, 1 << 17)), int(WORTH_A_THREAD / max(data, wide))

    def _tape(self, arrays: list[Any], structure: Any, block: Sequence[Any]) -> list[float]:
        """Return the bytes a row of every intermediate on the tape of a block."""
        rows = len(block[0])
        losses = self._losses([box(a, new_leaf(a, "Objective")) for a in arrays], structure, block)
        node = losses._node if type(losses) is Tensor else None
        return [
            math.prod(n.shape) * n.dtype.itemsize / rows
            for n in (reachable([node]) if node is not None else ())
            if n.op is not None and math.prod(n.shape) >= rows
        ]

    def _search(self, size: int, arrays: list[Any], structure: Any) -> tuple[int, int, int, float] | None:
        """Find the first row whose loss is not finite; on a GPU it was not looked for on the way."""
        found: list[tuple[int, int, int, float]] = []

        def look(start: int, block: Sequence[Any]) -> None:
            if found:
                return
            losses = self._losses([box(a, None) for a in arrays], structure, block)
            values = losses._data if type(losses) is Tensor else losses
            bad = _first_bad(backend.to_device(values, backend.CPU), start // size, start)
            found.extend([bad] if bad is not None else [])

        with backend.activate(self.device), no_grad(), numpy.errstate(all="ignore"):
            self._over_blocks(size, look)
        return found[0] if found else None

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


def _on_rows(*loss: Any) -> RowProgram:
    made = RowProgram(loss_program(*loss))
    if made.kernel is None and made.work > MUCH_WORK:
        raise CaptureError("compiling it would take longer than it is likely to save")
    return made


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
    arrays = [_plain(a) for a in given]
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
    plain = [numpy.asarray(a) if isinstance(a, numpy.ndarray) else a for a in arrays]
    return _resident(plain, where), where


def _resident(arrays: list[Any], where: backend.Device) -> tuple[Any, ...]:
    """Return arrays on a device; those from the host as they are if a GPU has no room for all of them."""
    moving = sum(a.nbytes for a in arrays if isinstance(a, numpy.ndarray))
    if where.kind == "cuda" and moving > RESIDENT_SHARE * backend.memory(where)[0]:
        return tuple(arrays)
    try:
        return tuple(backend.to_device(a, where) for a in arrays)
    except Exception as error:
        if not backend.out_of_memory(error):
            raise
    backend.release_memory(where)
    return tuple(arrays)


def _bytes(data: tuple[Any, ...]) -> int:
    return sum(a.nbytes for a in data)


def _identities(data: tuple[Any, ...]) -> frozenset[int]:
    return frozenset(i for a in data for i in (id(a), id(a if a.base is None else a.base)))


def _frozen(array: Any) -> Any:
    if isinstance(array, numpy.ndarray):
        array.flags.writeable = False
    return array


def _rows(arrays: Sequence[Any], start: int, stop: int) -> list[Any]:
    return [array[start:stop] for array in arrays]


def _block(part: Any) -> Any:
    """Return rows of the data for the loss: a read-only view on the CPU, a constant Tensor of it on a GPU."""
    return _frozen(part) if isinstance(part, numpy.ndarray) else box(part, None)


def _plain(leaf: Any) -> Any:
    return leaf._data if type(leaf) is Tensor else leaf
