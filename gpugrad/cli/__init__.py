"""The command `gpugrad`: fit and predict from files, what this installation is, and whether its numbers are right.

What a person reads goes to stderr, what a program reads to stdout or a file. Exit status: 0 done, 1 failed, 2 bad
usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

import gpugrad
from gpugrad.cli.files import UsageError
from gpugrad.cli.model import ACTIVATIONS
from gpugrad.errors import GpugradError

__all__ = ["main"]

OPTIMIZERS = ("adam", "adamw", "sgd", "gd", "lbfgs")

_FIT_EXAMPLES = """\
examples:
  gpugrad fit flights                                    the example data set, an MLP with Swish
  gpugrad fit flights --model linear --json -            metrics as JSON on stdout
  gpugrad fit flights --drop dep_delay --plot fit.png    from what is known before departure
  gpugrad fit houses.csv --target price --hidden 128,64 --epochs 30 --out model.safetensors
  gpugrad fit sales.parquet --target sold --categorical store,weekday --test-fraction 0.1

DATA is a Parquet, CSV, .npz or .npy file, or the name of an example data set (flights). Text columns are one-hot
encoded, numbers standardised; missing values get a column of their own. Rows without a target are left out. Ctrl-C
ends the training; with --out the best parameters so far are kept."""

_PREDICT_EXAMPLES = """\
examples:
  gpugrad predict model.safetensors new.csv --out predictions.csv
  gpugrad predict model.safetensors new.parquet --out predictions.npy
  gpugrad predict model.safetensors new.csv --out - | head

One prediction a row of DATA, in its order: a column `prediction`, or a float32 array for .npy. DATA needs the columns
the model was fitted on, others are ignored; if it has the target too, R2, RMSE and MAE are shown."""


_BENCH_EXAMPLES = """\
examples:
  gpugrad bench --quick                                  everything at small sizes
  gpugrad bench linreg glm --peers torch,jax.jit --html bench.html
  gpugrad bench --json new.json --compare old.json       exit status 1 if something has become slower

suites:  ops swish linreg glm mlp step overhead memory scaling
peers:   numpy cupy autograd torch torch.compile jax.jit sklearn; one that is not installed is named as missing"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1, such as 0.2")
    return value


def _widths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer widths, such as 64,64")
    return tuple(map(int, parts))


def _columns(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of column names, such as temp,month")
    return names


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(
        prog="gpugrad",
        description="Fit regressions by gradient descent, on NumPy or on a GPU.",
        epilog='"gpugrad COMMAND --help" tells the options of a command. Exit status: 0 done, 1 failed, 2 bad usage.',
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"gpugrad {gpugrad.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_fit(commands)
    _add_predict(commands)
    info = commands.add_parser(
        "info",
        help="versions, devices, BLAS",
        description="Show the versions, devices and BLAS that gpugrad runs on. Useful in a bug report.",
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    _add_selftest(commands)
    _add_bench(commands)
    return top


def _add_fit(commands: argparse._SubParsersAction[_Parser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="train a model on a table",
        description="Train a regression of one column of a table on the others, and show how well it does.",
        epilog=_FIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fit.add_argument("data", metavar="DATA", help="Parquet, CSV, .npz or .npy file, or the example data set flights")
    data = fit.add_argument_group("columns and rows")
    data.add_argument("--target", metavar="COL", help="column to predict (needed for a file; flights: arr_delay)")
    data.add_argument("--features", type=_columns, metavar="A,B,...", help="inputs (default: all but the target)")
    data.add_argument("--drop", type=_columns, default=[], metavar="A,B,...", help="columns to leave out")
    data.add_argument(
        "--categorical", type=_columns, default=[], metavar="A,B,...", help="columns of numbers that are labels"
    )
    data.add_argument(
        "--test-fraction",
        type=_fraction,
        default=0.2,
        metavar="F",
        help="share of the rows kept for the test, 0 for no test (default 0.2)",
    )
    data.add_argument(
        "--seed", type=_integer(0), default=0, metavar="N", help="of the split, the start and the batches (default 0)"
    )
    model = fit.add_argument_group("model")
    model.add_argument("--model", choices=("mlp", "linear"), default="mlp", help="default mlp")
    model.add_argument("--hidden", type=_widths, metavar="N,N", help="mlp: widths of the hidden layers (default 64,64)")
    model.add_argument(
        "--activation",
        choices=tuple(ACTIVATIONS),
        metavar="NAME",
        help=f"mlp: {', '.join(ACTIVATIONS)} (default swish)",
    )
    training = fit.add_argument_group("training")
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="default adam on mini-batches for mlp, lbfgs on all rows for linear"
    )
    training.add_argument(
        "--epochs",
        type=_integer(1),
        metavar="N",
        help="passes over the training rows (default: by the number of rows, 12 for flights); lbfgs: most iterations",
    )
    training.add_argument(
        "--batch-size", type=_integer(1), metavar="N", help="rows a step (default: by the number of rows, at most 1024)"
    )
    training.add_argument(
        "--lr",
        type=_rate,
        metavar="RATE",
        help="largest learning rate; it rises to this, then falls to 0 (default 0.01, sgd 0.05, less for wide layers)",
    )
    training.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)")
    output = fit.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="store the model, e.g. model.safetensors")
    output.add_argument("--plot", metavar="FILE", help="draw learning curve and predicted against true, e.g. fit.png")
    output.add_argument("--json", metavar="FILE", help="write metrics and history as JSON; - is stdout")


def _add_predict(commands: argparse._SubParsersAction[_Parser]) -> None:
    predict = commands.add_parser(
        "predict",
        help="apply a stored model to a table",
        description="Apply a stored model, with its preprocessing, to every row of a table.",
        epilog=_PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    predict.add_argument("model", metavar="MODEL", help='file that "gpugrad fit --out" stored')
    predict.add_argument("data", metavar="DATA", help="Parquet, CSV, .npz or .npy file, or an example data set")
    predict.add_argument(
        "--out", required=True, metavar="FILE", help="predictions as .csv, .parquet or .npy; - is CSV on stdout"
    )
    predict.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)")
    predict.add_argument("--json", metavar="FILE", help="write metrics and counts as JSON; - is stdout")


def _add_selftest(commands: argparse._SubParsersAction[_Parser]) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="check the numbers on this machine",
        description="Check every op and its gradient, sums, optimisers and fits on a device against float64 on the "
        "CPU; on a GPU its kernels, streaming and memory too. Exit status 1 if something is off. On a GPU the first "
        "run compiles kernels for a minute or two; CuPy keeps them.",
        allow_abbrev=False,
    )
    selftest.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)")
    selftest.add_argument("--quick", action="store_true", help="fewer cases: a health check of a second or two")
    selftest.add_argument("--json", metavar="FILE", help="write the results as JSON; - is stdout")


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measure gpugrad against this machine's own limits and against every peer that is installed. "
        "Values are checked against float64 before anything is timed.",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    bench.add_argument("suites", nargs="*", metavar="SUITE", help="what to measure (default: all suites)")
    bench.add_argument("--peers", type=_columns, metavar="A,B,...", help="whom to compare with (default all), or none")
    bench.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)")
    bench.add_argument("--threads", type=_integer(1), metavar="N", help="cores for everything (default: all)")
    bench.add_argument("--no-numba", action="store_true", help="as if numba were not installed")
    bench.add_argument("--quick", action="store_true", help="small sizes, in less than a minute")
    bench.add_argument("--seconds", type=_rate, metavar="S", help="for the samples of one row (default 5, quick 0.15)")
    bench.add_argument("--json", metavar="FILE", help="write everything measured as JSON; - is stdout")
    bench.add_argument("--html", metavar="FILE", help="write one self-contained page with tables and plots")
    bench.add_argument("--compare", metavar="OLD.json", help="tell what is faster or slower than in a report of --json")


def _complain(message: str, command: str = "") -> None:
    print(f"gpugrad{command and ' ' + command}: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default sys.argv; returns the exit status."""
    command = ""
    try:
        arguments = parser().parse_args(argv)
        command = arguments.command
        with warnings.catch_warnings():
            # in the command's own voice, on one line
            warnings.showwarning = lambda message, *_, **__: _complain(str(message), command)
            return int(import_module(f"gpugrad.cli.{command}").run(arguments))
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UsageError as error:
        _complain(str(error), command)
        return 2
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted; nothing was written", command)
        return 130
    except GpugradError as error:
        _complain(str(error), command)
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as error:
        _complain(f"not enough memory ({error}); use fewer rows or columns", command)
    except OSError as error:
        _complain(f"{error.filename or 'input/output'}: {error.strerror or error}", command)
    except Exception as error:
        if os.environ.get("GPUGRAD_TRACEBACK"):
            raise
        text = (str(error).splitlines() or [""])[0]
        _complain(
            f"unexpected {type(error).__name__}: {text}\n"
            "This is a defect of gpugrad: please report it, with what GPUGRAD_TRACEBACK=1 shows.",
            command,
        )
    return 1
