"""`gpugrad fit`: from a table to a trained, measured and stored model."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

import gpugrad as gg
from gpugrad.backend import Device, as_device, available_cores, cupy, to_device
from gpugrad.cli.files import UsageError, check_outputs, read_data, say, write, write_json
from gpugrad.cli.info import versions
from gpugrad.cli.model import ACTIVATIONS, Floats, Layers, Metrics, Model, forward, measure, metrics_table
from gpugrad.data import Design, Preprocessor, Table, train_test_split
from gpugrad.errors import DataError, GpugradError
from gpugrad.optim import SGD, Optimizer, Result, minimize

HIDDEN = (64, 64)
LARGEST_BATCH = 1024
# what the default number of epochs adds up to; more than 20 overfit small tables
STEPS = 3000
EPOCHS = (5, 20)
ITERATIONS = 300
TOL = 1e-4
RATES = {"adam": 0.01, "adamw": 0.01, "sgd": 0.05}
FULL_BATCH = ("lbfgs", "gd")
# share of the steps in which the learning rate rises
WARM_UP = 0.1
# one-hot columns add up to 1: without a penalty the minimum of a linear model is not a point
RIDGE = 1e-6
# rows that the test's learning curve is measured on
WATCHED = 1 << 16
PLOTS = (".png", ".pdf", ".svg")

History = dict[str, list[float]]


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad fit`."""
    started = time.perf_counter()
    _check_options(arguments)
    device = device_of(arguments.device)
    split = _load(arguments)
    plan = _plan(arguments, split.train.X.shape[0])
    loaded = time.perf_counter()
    _announce(arguments, split, plan, device)

    training = _Training(arguments, split, plan, device)
    result = training.run()
    trained = time.perf_counter()
    model = training.model(result)
    predicted: dict[str, Floats] = {}
    interrupted = result.status == "interrupted"
    try:
        if not interrupted:
            predicted = {part: model.predict(design.X, device) for part, design in split.parts.items() if design}
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        raise KeyboardInterrupt(
            _interrupted(model, arguments.out, f"{result.nit} {'epochs' if plan.batch_size else 'iterations'}")
        )
    metrics: dict[str, Metrics | None] = {"train": None, "test": None}
    for part, values in predicted.items():
        if not np.isfinite(values).all():
            raise GpugradError("training failed: the model predicts infinite values; try a smaller --lr")
        metrics[part] = measure(split.target(part), values)
    model = replace(model, metrics=metrics, complete=True)
    done = time.perf_counter()

    say(*metrics_table(metrics, split.preprocessor.target))
    if metrics["train"] and metrics["train"]["r2"] < 0:
        say("note      this is worse than predicting the mean: try a smaller --lr or another number of --epochs")
    say(f"seconds   {done - started:.1f} (data {loaded - started:.1f}, training {trained - loaded:.1f})")
    if arguments.out:
        write(arguments.out, model.save)
    if arguments.json:
        report = {
            "model": arguments.model,
            "device": str(device),
            "rows": split.rows,
            "columns": split.train.X.shape[1],
            "metrics": metrics,
            "seconds": done - started,
            "history": training.history,
            "versions": versions(),
            "data": arguments.data,
            "target": split.preprocessor.target,
            "parts": {part: len(split.target(part)) for part, design in split.parts.items() if design},
            "options": model.options,
            "timings": {"data": loaded - started, "training": trained - loaded, "evaluation": done - trained},
            "converged": result.success,
            "message": result.message,
        }
        write_json(arguments.json, report)
    if arguments.plot:
        from gpugrad.cli.plot import draw

        part = "test" if split.test else "train"
        numbers = metrics[part]
        assert numbers is not None
        title = f"{os.path.basename(arguments.data)}: {model.name}, fitted on {len(split.train.X):,} rows"
        write(
            arguments.plot,
            lambda path: draw(
                path,
                history=training.history,
                by_epoch=plan.batch_size is not None,
                true=split.target(part),
                predicted=predicted[part],
                column=split.preprocessor.target,
                part=part,
                metrics=numbers,
                title=title,
            ),
        )
    saved = [path for path in (arguments.out, arguments.plot, arguments.json) if path and path != "-"]
    if saved:
        say(f"wrote     {', '.join(saved)}")
    return 0


def device_of(spec: str) -> Device:
    """The device of --device. Raises UsageError for a name that means none, DeviceUnavailable where it is missing."""
    try:
        return as_device(spec)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None


def device_name(device: Device) -> str:
    """A device for a person: "cpu, 2 cores"."""
    if device.kind == "cpu":
        cores = available_cores()
        return f"cpu, {cores} core{'s' * (cores > 1)}"
    return f"{device}, {cupy().cuda.runtime.getDeviceProperties(device.number)['name'].decode(errors='replace')}"


# before the data is read ---------------------------------------------------------------------------------------------


def _check_options(arguments: argparse.Namespace) -> None:
    """Find what does not go together, and outputs that cannot be written."""
    if arguments.model == "linear":
        for option in ("hidden", "activation"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option} belongs to --model mlp; leave it out for a linear model")
    optimizer = _optimizer(arguments)
    if optimizer in FULL_BATCH and arguments.batch_size is not None:
        raise UsageError(f"--batch-size does not go with --optimizer {optimizer}, which takes all rows; use adam")
    if optimizer == "lbfgs" and arguments.lr is not None:
        raise UsageError("--lr does not go with --optimizer lbfgs, which finds its steps by itself; use adam")
    if arguments.out == "-":
        raise UsageError("--out: a model cannot go to stdout; name a file, such as model.safetensors")
    if arguments.plot is not None:
        suffix = os.path.splitext(arguments.plot)[1].lower()
        if suffix not in PLOTS:
            raise UsageError(f"--plot {arguments.plot!r}: the name must end in {', '.join(PLOTS)}")
        if importlib.util.find_spec("matplotlib") is None:
            raise DataError('--plot needs matplotlib, which is not installed; run: pip install "gpugrad[plot]"')
    check_outputs([arguments.data], {f"--{name}": getattr(arguments, name) for name in ("out", "plot", "json")})


def _optimizer(arguments: argparse.Namespace) -> str:
    chosen: str = arguments.optimizer or ("lbfgs" if arguments.model == "linear" else "adam")
    return chosen


# data ----------------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The encoded data. rows: with a target; dropped: without; test: None for --test-fraction 0."""

    preprocessor: Preprocessor
    train: Design
    test: Design | None
    rows: int
    dropped: int

    @property
    def parts(self) -> dict[str, Design | None]:
        """Training and test part by name."""
        return {"train": self.train, "test": self.test}

    def target(self, part: str) -> Floats:
        """The true values of a part."""
        design = self.parts[part]
        assert design is not None
        assert design.y is not None
        return design.y


def _load(arguments: argparse.Namespace) -> Split:
    """Read, choose columns, split and encode."""
    table, about = read_data(arguments.data)
    target, features, categorical = _columns(table, about, arguments)
    table = table.select([target, *features])
    given = {"features": features, "categorical": categorical} if arguments.features else {"categorical": categorical}
    try:
        present = np.flatnonzero(~table[target].missing)
        if len(present) < 2:
            Preprocessor.fit(table, target, **given)  # its error where there is none
            raise DataError(f"{table.source} has one row with a value of {target!r}; wanted at least two.")
        train = present
        test = present[:0]
        if arguments.test_fraction:
            train, test = (
                present[part] for part in train_test_split(len(present), arguments.test_fraction, arguments.seed)
            )
        rows = table.take(train)
        preprocessor = Preprocessor.fit(rows, target, **given)
        encoded = preprocessor.transform(rows)
        tested = preprocessor.transform(table.take(test)) if len(test) else None
    except DataError:
        Preprocessor.fit(table, target, **given)  # most likely the same, but with the row numbers of the file
        raise
    return Split(preprocessor, encoded, tested, len(present), table.rows - len(present))


def _columns(table: Table, about: dict[str, Any], arguments: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    """Target, inputs and categorical inputs. Raises UsageError for names that do not fit."""
    target = arguments.target or about.get("target")
    if target is None:
        raise UsageError(f"--target is needed: name the column to predict, one of {', '.join(table.names[:30])}")
    named = [
        *([target] if arguments.target else ()),
        *(arguments.features or ()),
        *arguments.drop,
        *arguments.categorical,
    ]
    try:
        table.select(dict.fromkeys(named or table.names))
    except DataError as error:
        raise UsageError(str(error)) from None
    for option in ("features", "drop", "categorical"):
        names = getattr(arguments, option) or []
        if target in names:
            raise UsageError(f"--{option}: {target!r} is the target; leave it out of the list")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--{option}: {twice[0]!r} is named twice; name it once")
    known = [name for name in about.get("features", table.names) if name != target]
    inputs = [name for name in arguments.features or known if name not in arguments.drop]
    if not inputs:
        raise UsageError("no input is left; name or drop other columns")
    if strange := [name for name in arguments.categorical if name not in inputs]:
        raise UsageError(f"--categorical: {strange[0]!r} is not among the inputs {', '.join(inputs[:30])}")
    categorical = [name for name in about.get("categorical", ()) if name in inputs]
    return target, inputs, list(dict.fromkeys([*categorical, *arguments.categorical]))


# training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to train. Without a batch_size, epochs are iterations. rate: the largest learning rate, if there is one."""

    optimizer: str
    hidden: tuple[int, ...]
    activation: str | None
    epochs: int
    batch_size: int | None
    rate: float | None

    def steps(self, rows: int) -> int:
        """Steps of all epochs."""
        return self.epochs * math.ceil(rows / (self.batch_size or rows))


def _plan(arguments: argparse.Namespace, rows: int) -> Plan:
    """The options, and for those not given what suits the number of rows."""
    linear = arguments.model == "linear"
    optimizer = _optimizer(arguments)
    hidden = () if linear else arguments.hidden or HIDDEN
    activation = None if linear else arguments.activation or "swish"
    if optimizer in FULL_BATCH:
        return Plan(optimizer, hidden, activation, arguments.epochs or ITERATIONS, None, arguments.lr)
    batch = arguments.batch_size or max(32, min(LARGEST_BATCH, 1 << (rows // 64).bit_length()))
    least, most = EPOCHS
    epochs = arguments.epochs or min(max(math.ceil(STEPS / math.ceil(rows / batch)), least), most)
    # wide layers need smaller steps
    rate = arguments.lr or RATES[optimizer] * min(1.0, 64 / max(hidden, default=64))
    return Plan(optimizer, hidden, activation, epochs, batch, rate)


def _schedule(peak: float, steps: int) -> Callable[[int], float]:
    """The learning rate at each step: a straight line up to `peak`, then one down to 0."""
    rising = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        return peak * (step + 1) / rising if step < rising else peak * (steps - step) / (steps - rising)

    return rate


def _announce(arguments: argparse.Namespace, split: Split, plan: Plan, device: Device) -> None:
    fitted, rows = split.preprocessor, split.rows
    left = f" ({split.dropped:,} without are left out)" if split.dropped else ""
    tested = len(split.test.X) if split.test else 0
    how = (
        f"{plan.optimizer}, {plan.epochs} epochs"
        if plan.batch_size
        else f"{plan.optimizer}, at most {plan.epochs} iterations"
    )
    if plan.batch_size:
        how += f", {plan.batch_size:,} rows a step, learning rate {plan.rate:g} falling to 0"
    columns = split.train.X.shape[1]
    sizes = (columns, *plan.hidden, 1)
    count = sum((above + 1) * below for above, below in itertools.pairwise(sizes))
    name = "-".join(map(str, sizes)) + (f", {plan.activation}" if plan.activation else "")
    say(
        f"data      {arguments.data}: {rows:,} rows with {fitted.target}{left}",
        f"columns   {columns:,} from {len(fitted.inputs)} inputs, {len(fitted.categorical)} of them categorical",
        f"split     {len(split.train.X):,} rows to train, {tested:,} to test, seed {arguments.seed}",
        f"model     {arguments.model} {name}: {count:,} parameters",
        f"training  {how}",
        f"device    {device_name(device)}",
    )
    for column, reason in fitted.skipped.items():
        say(f"note      column {column!r} {reason}: left out")
    for note in split.test.notes if split.test else ():
        say(f"note      test part, {note}")


class _Batches:
    """An objective that tells how many rows of its mini-batches are done."""

    def __init__(self, objective: gg.Objective, done: Callable[[int], None]) -> None:
        self.objective, self.done = objective, done

    def batches(self, batch_size: int, seed: int) -> Iterator[gg.Objective]:
        """As Objective.batches."""
        for batch in self.objective.batches(batch_size, seed):
            yield batch
            self.done(batch.rows)


class _Training:
    """One run of `minimize`, with its history and its progress on stderr."""

    def __init__(self, arguments: argparse.Namespace, split: Split, plan: Plan, device: Device) -> None:
        self.arguments, self.split, self.plan, self.device = arguments, split, plan, device
        y = split.target("train")
        self.mean = float(y.mean(dtype=np.float64))
        self.scale = float(y.std(dtype=np.float64)) or 1.0
        self.standard = ((y - np.float32(self.mean)) / np.float32(self.scale)).astype(np.float32)
        self.history: History = {}
        self.watched = split.test and (split.test.X[:WATCHED], split.target("test")[:WATCHED])
        if not plan.hidden:  # a linear model is found faster on columns of mean 0 and deviation 1
            centre, spread = _moments(split.train.X)
            self.centre, self.shrink = (
                to_device(array.astype(np.float32)[:, None], device) for array in (centre, 1 / spread)
            )

    def run(self) -> Result:
        """Train. Raises GpugradError when it comes to nothing."""
        plan, rows, seed = self.plan, len(self.standard), self.arguments.seed
        objective = gg.Objective(
            self._loss, (self.split.train.X, self.standard), penalty=None if plan.hidden else _ridge, device=self.device
        )
        sizes = [self.split.train.X.shape[1], *plan.hidden, 1]
        start = gg.nn.init_mlp(sizes, seed=seed, device=self.device)
        if not plan.hidden:
            start[0]["W"] *= 0
        self.began = self.told = time.perf_counter()
        batches = plan.batch_size is not None
        self.bar = tqdm(
            total=rows * plan.epochs if batches else None,
            unit="row" if batches else "it",
            unit_scale=batches,
            desc=plan.optimizer,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not _terminal(),
        )
        try:
            if plan.batch_size:
                assert plan.rate is not None
                schedule = _schedule(plan.rate, plan.steps(rows))
                method: str | Optimizer = plan.optimizer
                if method == "sgd":
                    method = SGD(schedule, momentum=0.9, nesterov=True, clip_norm=1.0)
                result = minimize(
                    _Batches(objective, self.bar.update),
                    start,
                    method,
                    lr=None if isinstance(method, Optimizer) else schedule,
                    batch_size=plan.batch_size,
                    epochs=plan.epochs,
                    seed=seed,
                    callback=self._watch,
                )
            else:
                result = minimize(
                    objective, start, plan.optimizer, lr=plan.rate, max_iter=plan.epochs, tol=TOL, callback=self._watch
                )
        finally:
            self.bar.close()
        return self._judged(result)

    def _judged(self, result: Result) -> Result:
        if result.success or result.status == "interrupted":
            return result
        if self.plan.batch_size or result.status == "failed":
            raise GpugradError(f"training failed: {result.message.replace('smaller lr', 'smaller --lr')}")
        say(f"note      not converged: {result.message}; --epochs allows more iterations")
        return result

    def _loss(self, params: Layers, X: Any, y: Any) -> Any:
        layers = params if self.plan.hidden else self._unscaled(params)
        activation = ACTIVATIONS[self.plan.activation] if self.plan.activation else gg.swish
        return gg.squared_error(gg.nn.mlp(layers, X, activation)[:, 0], y)

    def _unscaled(self, params: Layers) -> Layers:
        """The linear model on the columns as they are, from that on columns of mean 0 and deviation 1."""
        weights = params[0]["W"] * self.shrink
        return [{"W": weights, "b": params[0]["b"] - gg.sum(weights * self.centre, axis=0)}]

    def _layers(self, params: Layers) -> Layers:
        if self.plan.hidden:
            return params
        return [{key: gg.asarray(array).data for key, array in layer.items()} for layer in self._unscaled(params)]

    def _watch(self, result: Result) -> None:
        """Note one epoch in the history, and show it."""
        row: dict[str, float] = {
            "epoch": result.nit,
            "loss": result.fun,
            "train_rmse": self.scale * math.sqrt(result.fun),
        }
        if self.watched:
            X, y = self.watched
            out = forward(self._layers(result.params), self.plan.activation, X, self.device)
            row["test_rmse"] = measure(y, out * np.float32(self.scale) + np.float32(self.mean))["rmse"]
        key = "lr" if "lr" in result.history else "step"
        row[key] = result.history[key][-1]
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        self._show(result.nit, row)

    def _show(self, epoch: int, row: dict[str, float]) -> None:
        parts = [f"{part} RMSE {row[f'{part}_rmse']:#.5g}" for part in ("train", "test") if f"{part}_rmse" in row]
        if not self.bar.disable:
            if self.plan.batch_size:
                self.bar.set_description(f"epoch {epoch}/{self.plan.epochs}", refresh=False)
            else:
                self.bar.update()
            self.bar.set_postfix_str(", ".join(parts))
            return
        now = time.perf_counter()
        if now - self.told >= 1 or epoch == self.plan.epochs or (self.plan.batch_size and self.plan.epochs <= 30):
            self.told = now
            what = f"epoch {epoch:>3}/{self.plan.epochs}" if self.plan.batch_size else f"iteration {epoch:>3}"
            say(f"{what}   {'   '.join(parts)}   {now - self.began:.1f} s")

    def model(self, result: Result) -> Model:
        """The trained model, still without metrics."""
        plan, arguments = self.plan, self.arguments
        options = {
            "optimizer": plan.optimizer,
            "epochs": plan.epochs,
            "batch_size": plan.batch_size,
            "lr": plan.rate,
            "seed": arguments.seed,
            "test_fraction": arguments.test_fraction,
            "hidden": list(plan.hidden),
            "activation": plan.activation,
        }
        layers = self._layers(result.params)
        return Model(
            arguments.model, plan.activation, layers, self.split.preprocessor, self.mean, self.scale, {}, options, False
        )


def _moments(X: Floats) -> tuple[Any, Any]:
    """Mean and standard deviation of each column in float64, 1 for a constant one; a block of rows at a time."""
    total, squares = np.zeros((2, X.shape[1]))
    for start in range(0, len(X), 4096):
        block = X[start : start + 4096].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.einsum("ij,ij->j", block, block)
    mean = total / len(X)
    spread = np.sqrt(np.maximum(squares / len(X) - mean * mean, 0))
    # the columns are standardised or 0 and 1: less is rounding
    spread[spread < 1e-6] = 1
    return mean, spread


def _terminal() -> bool:
    """Whether stderr is a terminal that a bar fits on."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _ridge(params: Layers) -> Any:
    return RIDGE * gg.sum(gg.square(params[0]["W"]))


def _interrupted(model: Model, out: str | None, done: str) -> str:
    """Keep what there is, and say so."""
    if out is None:
        return "interrupted; nothing was kept (--out FILE keeps the best parameters so far)"
    write(out, model.save)
    return f"interrupted after {done}; the best parameters so far are in {out}"
