"""`minimize`: one call for every optimiser, full batch or mini-batches, with a history and a clean stop."""

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy

from gpugrad import backend
from gpugrad.backend import Array
from gpugrad.compile import Unasked
from gpugrad.errors import ShapeMismatch
from gpugrad.optim.first_order import (
    SGD,
    Adam,
    AdamW,
    GradientDescent,
    Iterate,
    Layout,
    Optimizer,
    PyTree,
    Schedule,
    Stop,
    backtracking,
    check_rate,
    fixed_rate,
    plain,
    to_host,
)
from gpugrad.optim.lbfgs import lbfgs

__all__ = ["Result", "minimize"]

RULES: dict[str, type[Optimizer]] = {"gd": GradientDescent, "sgd": SGD, "adam": Adam, "adamw": AdamW}
METHODS = (*RULES, "lbfgs")
MAX_ITER = 1000
EPOCHS = 10
FULL_BATCH_TOL = 1e-6


Status = Literal["running", "done", "stopped", "failed", "interrupted"]


@dataclass(repr=False)
class Result:
    """What `minimize` found, and how it went.

    params: the parameters, in the structure and kinds that were given.
    fun: the objective there; with mini-batches the mean loss over the latest epoch, taken while it ran.
    nit: iterations; with mini-batches epochs. nfev: evaluations of value and gradient; with mini-batches of one batch.
    success: a stopping test was met, or every step asked for was made with no test asked for (tol=None).
    status: "done" with success; else "stopped" (a limit or the callback), "failed" (something not finite) or
    "interrupted" (Ctrl-C); "running" in what a callback sees.
    history: lists of equal length. Full batch, an entry for the start and one for each iteration: "fun"; "grad_norm",
    the largest absolute entry of the gradient; "lr", or "step" where a line search chose it, of the step that led
    there (0 at the start). Mini-batches, an entry for each epoch: "epoch" from 1; "fun"; "lr" of its last step.
    """

    params: PyTree
    fun: float
    nit: int
    nfev: int
    success: bool
    status: Status
    message: str
    history: dict[str, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        layout = Layout(self.params)
        shown = [
            f"{name} {dtype}{shape}"
            for name, dtype, shape in zip(layout.names, layout.dtypes, layout.shapes, strict=True)
        ]
        more = f", ... ({len(shown)} in all)" if len(shown) > 6 else ""
        return (
            f"{'success' if self.success else 'stopped'}: {self.message}\n"
            f"  fun {self.fun:.10g}   nit {self.nit}   nfev {self.nfev}\n"
            f"  {', '.join(shown[:6])}{more}"
        )


Callback = Callable[[Result], object]
Evaluator = Callable[[PyTree], tuple[Any, PyTree]]


class _Problem:
    """The objective as the optimisers see it: arrays in, value and gradient arrays out, evaluations counted."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.nfev = layout, 0

    def evaluate(self, call: Evaluator, arrays: list[Array]) -> tuple[Any, list[Array]]:
        """Value, left on the device where the objective allows it, and gradients."""
        value, grads = call(self.layout.inside(arrays))
        self.nfev += 1
        value = plain(value)
        if getattr(value, "shape", ()) != ():
            raise ShapeMismatch(f"the objective returned shape {value.shape}; expected a scalar: sum or average it")
        return value, self.layout.gradients(grads)


def _layout(obj: Any, params: PyTree) -> Layout:
    """Take parameters apart. With an Objective on a GPU, those on the host are kept there during the run."""
    device, number = getattr(obj, "device", None), getattr(obj, "dtype", None)
    if isinstance(device, backend.Device) and isinstance(number, numpy.dtype):
        return Layout(params, device, number)
    return Layout(params)


def _evaluator(obj: Any) -> Evaluator:
    for name in ("evaluate", "value_and_grad"):
        if hasattr(obj, name):
            method: Evaluator = getattr(obj, name)
            return method
    if not callable(obj):
        raise TypeError(
            f"obj is a {type(obj).__name__}; expected a function params -> scalar, or an object with value_and_grad"
        )
    from gpugrad.transforms import value_and_grad

    return Unasked(value_and_grad(obj), obj)


class _Run:
    """The record of a run: history, the best place so far, the callback and the progress bar."""

    def __init__(
        self,
        problem: _Problem,
        start: list[Array],
        name: str,
        total: int,
        unit: str,
        callback: Callback | None,
        progress: bool,
    ) -> None:
        self.problem = problem
        self.callback = callback
        self.history: dict[str, list[float]] = {}
        self.nit = 0
        self.best_fun, self.best = math.inf, start
        self.fun, self.arrays = math.nan, start
        self.bar: Any = None
        if progress:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=name, unit=unit, file=sys.stderr)

    def offer(self, fun: float, arrays: list[Array]) -> None:
        """Keep the place if it is the lowest so far."""
        if -math.inf < fun < self.best_fun:
            self.best_fun, self.best = fun, arrays

    def record(self, nit: int, fun: float, arrays: list[Array], **row: float) -> None:
        self.nit, self.fun, self.arrays = nit, fun, arrays
        self.offer(fun, arrays)
        for key, value in {"fun": fun, **row}.items():
            self.history.setdefault(key, []).append(value)
        if self.bar is not None and nit:
            self.bar.set_postfix(fun=f"{fun:.6g}", refresh=False)
            self.bar.update()

    def told_to_stop(self) -> bool:
        """Show the run to the callback; True when it wants no more."""
        if self.callback is None:
            return False
        try:
            return self.callback(self.result("running", "running", copy=True)) is True
        except StopIteration:
            return True

    def result(self, status: Status, message: str, *, best: bool = False, copy: bool = False) -> Result:
        fun, arrays = (self.best_fun, self.best) if best else (self.fun, self.arrays)
        params = self.problem.layout.rebuild(arrays, copy=copy)
        fun = fun if math.isfinite(fun) else math.nan
        return Result(params, fun, self.nit, self.problem.nfev, status == "done", status, message, self.history)

    def stopped(self, success: bool, message: str) -> Result:
        return self.result("done" if success else "stopped", message, copy=True)

    def failed(self, message: str, status: Status = "failed") -> Result:
        """A run cut short: the best parameters it saw, which are finite."""
        return self.result(status, message, best=True, copy=True)


def _full_batch(
    run: _Run, states: Iterator[Iterate | Stop], step_name: str, max_iter: int, tol: float | None
) -> Result:
    for nit, state in enumerate(states):
        if isinstance(state, Stop):
            break
        arrays, fun, grad_norm, step, reach = state
        if not all(map(math.isfinite, (fun, grad_norm, reach))):
            seen = {"the objective": fun, "max|gradient|": grad_norm, "max|parameter|": reach}
            what = next(f"{key} is {value}" for key, value in seen.items() if not math.isfinite(value))
            if not nit:
                return run.failed(f"{what} at the starting parameters: start elsewhere, or check the data")
            return run.failed(f"{what} at iteration {nit}: try a smaller lr than {step:g}")
        run.record(nit, fun, arrays, grad_norm=grad_norm, **{step_name: step})
        if nit and run.told_to_stop():
            return run.stopped(False, f"stopped by the callback at iteration {nit}")
        if tol is not None and grad_norm <= tol:
            return run.stopped(True, f"converged: max|gradient| {grad_norm:.3g} <= tol {tol:g}")
        if nit == max_iter:
            message = f"made max_iter {max_iter} iterations"
            if tol is None:
                return run.stopped(True, message)
            return run.stopped(False, f"{message}, but max|gradient| {grad_norm:.3g} > tol {tol:g}")
    assert isinstance(state, Stop)
    return run.stopped(state.success, state.message)


def _mini_batch(
    run: _Run, obj: Any, optimizer: Optimizer, batch_size: int, epochs: int, seed: int, tol: float | None
) -> Result:
    problem, layout = run.problem, run.problem.layout
    xp = layout.xp
    arrays = start = run.arrays
    first = None
    optimizer.begin(layout, start)
    # sum of the losses of batches with `width` rows, then of what came before, times rows: a launch a batch
    total: Any = 0.0
    before: Any = 0.0
    width = rows = epoch = 0

    def mean_so_far() -> tuple[float, bool, float]:
        """The epoch's mean loss, whether the parameters are finite, and the very first loss: one transfer."""
        finite = xp.stack([xp.all(xp.isfinite(array)) for array in arrays]).all()
        mean, sound, at_start = to_host(xp, before + total * width, finite, first)
        return mean / rows, bool(sound), at_start

    previous = math.inf
    try:
        for epoch in range(1, epochs + 1):
            total, before, width, rows = 0.0, 0.0, 0, 0
            order = int(numpy.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            for batch in obj.batches(batch_size, order):
                value, grads = problem.evaluate(_evaluator(batch), arrays)
                arrays = optimizer.advance(arrays, grads)
                # Losses of a batch may be float32; the sum over an epoch is not.
                wide = value if isinstance(value, (int, float)) else value.astype(xp.float64, copy=False)
                first = wide if first is None else first
                if batch.rows != width:
                    total, before, width = 0.0, before + total * width, batch.rows
                total, rows = total + wide, rows + batch.rows
            if not rows:
                raise ValueError(f"obj.batches({batch_size}, seed) gave no rows in epoch {epoch}")
            mean, sound, at_start = mean_so_far()
            if epoch == 1:  # the loss of the first batch stands for that of the start
                run.offer(at_start, start)
            if not (math.isfinite(mean) and sound):
                what = f"the mean loss became {mean}" if not math.isfinite(mean) else "the parameters became non-finite"
                return run.failed(f"{what} in epoch {epoch}: try a smaller lr than {optimizer.rate:g}")
            run.record(epoch, mean, arrays, epoch=epoch, lr=optimizer.rate)
            if run.told_to_stop():
                return run.stopped(False, f"stopped by the callback after epoch {epoch}")
            if tol is not None and previous - mean < tol * abs(previous):
                return run.stopped(True, f"converged: epoch {epoch} improved the mean loss by less than tol {tol:g}")
            previous = mean
    except KeyboardInterrupt:
        if rows:  # part of an epoch: its parameters count when its mean loss so far is the lowest
            mean, sound, at_start = mean_so_far()
            if epoch == 1:
                run.offer(at_start, start)
            if math.isfinite(mean) and sound:
                run.offer(mean, arrays)
        return run.failed("interrupted", "interrupted")
    message = f"made {epochs} epochs"
    return run.stopped(tol is None, message if tol is None else f"{message}, the last still improving by tol {tol:g}")


def _count(name: str, value: Any, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}; expected an integer, at least {least}")
    return number


def _rule(method: str | Optimizer, lr: float | Schedule | None, clip_norm: float | None) -> Optimizer | None:
    """Return the optimiser that takes the steps; None where a line search does."""
    if isinstance(method, Optimizer):
        if lr is not None or clip_norm is not None:
            name = "lr" if lr is not None else "clip_norm"
            raise ValueError(f"{name} came beside method={type(method).__name__}(...): give it to the optimiser itself")
        return method
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}: expected one of {', '.join(METHODS)}, or an optimiser such as "
            "gpugrad.optim.SGD(lr=0.1, momentum=0.9)"
        )
    if lr is not None and not callable(lr):
        check_rate(lr)
    if method == "lbfgs" or (method == "gd" and lr is None):
        if lr is not None:
            raise ValueError(f"lr is {lr!r}, but method 'lbfgs' finds its step by a line search: leave lr out")
        if clip_norm is not None:
            remedy = "leave it out" if method == "lbfgs" else "give an lr too"
            raise ValueError(f"clip_norm is {clip_norm}, but method {method!r} uses a line search here: {remedy}")
        return None
    if method == "sgd" and lr is None:
        raise ValueError("method 'sgd' needs lr: a positive number, or a schedule step -> number")
    rule = RULES[method]
    return rule(clip_norm=clip_norm) if lr is None else rule(lr, clip_norm=clip_norm)  # type: ignore[call-arg]


def minimize(
    obj: Any,
    params: PyTree,
    method: str | Optimizer = "lbfgs",
    *,
    lr: float | Schedule | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    max_iter: int | None = None,
    tol: float | Literal["auto"] | None = "auto",
    clip_norm: float | None = None,
    callback: Callback | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Minimise an objective over a pytree of parameters.

    obj: a function params -> scalar (captured as by `gpugrad.compile` if it closes over much data), an `Objective`, or
    any object with ``value_and_grad(params)``; mini-batches need its ``batches(batch_size, seed)``.
    params: where to start; a floating array, Tensor or Python number, or a pytree of them. Never written to.
    method: "gd", "sgd", "adam", "adamw", "lbfgs", or an optimiser, such as ``gpugrad.optim.SGD(lr=0.1, momentum=0.9)``,
    whose state then goes on from where it is.
    lr: learning rate, or a schedule called with the number of steps taken (0 first). "sgd" needs one; "adam" and
    "adamw" take 1e-3; "gd" without one finds each step by a backtracking line search; "lbfgs" takes none.
    batch_size: rows a step, in an order drawn anew each epoch from `seed`; None for all rows at once.
    epochs: passes over the data with a batch_size (10). max_iter: iterations without (1000).
    tol: full batch, stop when the largest absolute entry of the gradient is at most tol (1e-6); mini-batches, when an
    epoch's mean loss is not below the last one's by this fraction (by default never). None: never.
    clip_norm: upper bound on the Euclidean norm of the gradient, for methods with an lr.
    callback: called with the Result so far after every iteration or epoch; returning True or raising StopIteration
    stops the run.
    progress: show a progress bar on stderr.

    A non-finite objective, gradient or parameter, and KeyboardInterrupt, end the run with success False and the best
    parameters so far (by mean loss over an epoch with mini-batches).

    Raises ValueError for options that do not go together.
    """
    rule = _rule(method, lr, clip_norm)
    name = method if isinstance(method, str) else type(method).__name__.lower()
    if tol == "auto":
        tol = FULL_BATCH_TOL if batch_size is None else None
    if tol is not None and not (isinstance(tol, (int, float)) and tol >= 0):
        raise ValueError(f"tol is {tol!r}; expected a number, not negative, None or 'auto'")
    if batch_size is None:
        if epochs is not None:
            raise ValueError(f"epochs is {epochs} without batch_size: give batch_size, or max_iter for full batches")
        total = _count("max_iter", MAX_ITER if max_iter is None else max_iter)
    else:
        if rule is None or isinstance(rule, GradientDescent):
            raise ValueError(
                f"batch_size is {batch_size}, but method {name!r} needs the whole sum: use 'sgd', 'adam' or 'adamw'"
            )
        if max_iter is not None:
            raise ValueError(f"max_iter is {max_iter} beside batch_size: mini-batch runs are counted in epochs")
        if not hasattr(obj, "batches"):
            raise ValueError(
                f"batch_size is {batch_size}, but obj ({type(obj).__name__}) has no batches(batch_size, seed): "
                "wrap loss and data in gpugrad.Objective"
            )
        batch_size = _count("batch_size", batch_size)
        total = _count("epochs", EPOCHS if epochs is None else epochs)
    seed = _count("seed", seed, 0)
    layout = _layout(obj, params)
    problem = _Problem(layout)
    unit = "it" if batch_size is None else "epoch"
    # A trial step may overflow: that is detected and reported here, so NumPy need not warn of it as well.
    with backend.activate(layout.device), numpy.errstate(over="ignore", invalid="ignore"):
        start = layout.arrays(params)
        finite = backend.fetch(layout.xp, *(layout.xp.all(layout.xp.isfinite(array)) for array in start))
        for where, sound in zip(layout.names, finite, strict=True):
            if not sound:
                raise ValueError(f"{where} holds NaN or infinity: start from finite parameters")
        run = _Run(problem, start, name, total, unit, callback, progress)
        try:
            if batch_size is not None:
                assert rule is not None
                return _mini_batch(run, obj, rule, batch_size, total, seed, tol)
            evaluate = functools.partial(problem.evaluate, _evaluator(obj))
            if rule is not None:
                states, step_name = fixed_rate(rule, layout, start, evaluate), "lr"
            else:
                states, step_name = (lbfgs if method == "lbfgs" else backtracking)(layout, start, evaluate), "step"
            return _full_batch(run, states, step_name, total, tol)
        except KeyboardInterrupt:
            return run.failed("interrupted", "interrupted")
        finally:
            if run.bar is not None:
                run.bar.close()
