"""`gpugrad predict`: a stored model applied to every row of a table."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np

from gpugrad.cli.files import UsageError, check_outputs, read_data, say, write, write_json
from gpugrad.cli.fit import device_name, device_of
from gpugrad.cli.info import versions
from gpugrad.cli.model import Floats, Metrics, Model, measure, metrics_table
from gpugrad.data import Table
from gpugrad.data.table import require_pyarrow

SUFFIXES = (".csv", ".parquet", ".npy")


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad predict`."""
    started = time.perf_counter()
    suffix = os.path.splitext(arguments.out)[1].lower()
    if arguments.out != "-" and suffix not in SUFFIXES:
        raise UsageError(f"--out {arguments.out!r}: the name must end in {', '.join(SUFFIXES)}")
    check_outputs([arguments.model, arguments.data], {"--out": arguments.out, "--json": arguments.json})
    if suffix == ".parquet":
        require_pyarrow("writing Parquet")
    device = device_of(arguments.device)
    model = Model.load(arguments.model).on(device)
    table, _ = read_data(arguments.data)
    design = model.preprocessor.transform(table, with_target=False)
    say(
        f"model     {arguments.model}: {model.name}, predicts {model.preprocessor.target}"
        + ("" if model.complete else " (its training was interrupted)"),
        f"data      {arguments.data}: {table.rows:,} rows, {design.X.shape[1]:,} columns",
        f"device    {device_name(device)}",
    )
    for note in design.notes:
        say(f"note      {note}")
    predicted = model.predict(design.X, device)
    metrics = _metrics(table, model.preprocessor.target, predicted)
    write_predictions(arguments.out, predicted)
    if metrics:
        say(*metrics_table({"data": metrics}, model.preprocessor.target))
    seconds = time.perf_counter() - started
    if arguments.json:
        report: dict[str, Any] = {
            "model": model.kind,
            "device": str(device),
            "rows": table.rows,
            "columns": design.X.shape[1],
            "metrics": metrics,
            "unknown": design.unknown,
            "seconds": seconds,
            "versions": versions(),
        }
        write_json(arguments.json, report)
    say(f"seconds   {seconds:.1f}")
    if arguments.out != "-":
        say(f"wrote     {arguments.out}: {len(predicted):,} predictions of {model.preprocessor.target}")
    return 0


def _metrics(table: Table, target: str, predicted: Floats) -> Metrics | None:
    """How good the predictions are, on the rows that have the target."""
    if target not in table:
        return None
    column = table[target]
    if column.kind != "numeric":
        say(f"note      column {target!r} is not numeric ({column.stored}): no metrics")
        return None
    rows = np.flatnonzero(np.isfinite(column.values))
    if len(rows) == 0:
        say(f"note      column {target!r} has no values: no metrics")
        return None
    if len(rows) < table.rows:
        say(f"note      metrics on the {len(rows):,} of {table.rows:,} rows that have {target}")
    return measure(column.values[rows].astype(np.float32), predicted[rows])


def write_predictions(path: str, predicted: Floats) -> None:
    """Write predictions by the suffix of `path`: .npy an array, .csv and .parquet a column `prediction`."""
    suffix = os.path.splitext(path)[1].lower()
    if path == "-":
        sys.stdout.writelines(_csv(predicted))
        sys.stdout.flush()
    elif suffix == ".npy":
        write(path, lambda name: np.save(name, predicted))
    elif suffix == ".parquet":
        write(path, lambda name: _write_parquet(name, predicted))
    else:
        write(path, lambda name: _write_csv(name, predicted))


def _csv(predicted: Floats) -> Any:
    yield "prediction\n"
    for start in range(0, len(predicted), 1 << 16):
        # str of a float32 has the fewest digits that give the same number back
        yield "".join(f"{value!s}\n" for value in predicted[start : start + (1 << 16)])


def _write_csv(path: str, predicted: Floats) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(_csv(predicted))


def _write_parquet(path: str, predicted: Floats) -> None:
    import pyarrow
    from pyarrow import parquet

    # not pyarrow.array, which imports pandas
    values = np.ascontiguousarray(predicted)
    column = pyarrow.Array.from_buffers(pyarrow.float32(), len(values), [None, pyarrow.py_buffer(values)])
    parquet.write_table(pyarrow.table({"prediction": column}), path)
