"""`gpugrad fit`: from a table to a trained, measured and stored model."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import gpugrad as gg
from gpugrad.backend import Device, as_device, cupy, to_device
from gpugrad.cli.files import UsageError, check_outputs, read_data, say, write, write_json
from gpugrad.cli.info import versions
from gpugrad.cli.model import ACTIVATIONS, Floats, Metrics, Model, forward, measure
from gpugrad.data import Design, Preprocessor, Table, train_test_split
from gpugrad.errors import DataError
from gpugrad.objective import available_cores
from gpugrad.optim import SGD, Optimizer, Result, minimize

HIDDEN = (64, 64)
LBFGS_ITERATIONS = 300
LBFGS_TOL = 1e-5
# one-hot columns add up to 1: without a penalty the minimum of a linear model is not a point
RIDGE = 1e-6
# share of the steps in which the learning rate rises
WARM_UP = 0.1
# rows that the learning curve of the test is measured on
WATCHED = 65536


@dataclass
class Split:
    """The encoded data: design matrices of training and test part (None without one), and what was left out."""

    preprocessor: Preprocessor
    train: Design
    test: Design | None
    rows: int
    dropped: int

    @property
    def parts(self) -> dict[str, Design | None]:
        return {"train": self.train, "test": self.test}


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad fit`."""
    started = time.perf_counter()
    _check_options(arguments)
    device = _device(arguments.device)
    table, about = read_data(arguments.data)
    split = _split(table, about, arguments)
    del table
    ...
    return 0
