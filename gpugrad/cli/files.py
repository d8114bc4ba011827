"""Where the command reads from and writes to: the data it was given, outputs checked before the work, JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from gpugrad import datasets
from gpugrad.data import Table, read_table
from gpugrad.errors import DataError, GpugradError


class UsageError(GpugradError):
    """The command line asks for something that cannot be: exit status 2."""


def read_data(source: str) -> tuple[Table, dict[str, Any]]:
    """The table of a file or an example data set, and what is known about the latter. Raises DataError."""
    if source in datasets.NAMES:
        return datasets.load(source)
    if not os.path.splitext(source)[1] and not os.path.exists(source):
        raise DataError(f"{source}: no such file, nor an example data set ({', '.join(datasets.NAMES)}).")
    return read_table(source), {}


def check_outputs(inputs: list[str], outputs: Mapping[str, str | None]) -> None:
    """Find out before the work whether the outputs (option -> path) can be written.

    Raises UsageError for a path given twice or that is an input, DataError for one that cannot be written.
    """
    taken = {os.path.realpath(path): "an input" for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        real = path if path == "-" else os.path.realpath(path)
        if not path or real in taken:
            raise UsageError(f"{option} {path!r}: {'is ' + taken[real] + ' too' if path else 'no name'}; give another")
        taken[real] = option
        if path != "-" and (problem := _unwritable(real)):
            raise DataError(f"{option} {path}: {problem}.")


def _unwritable(path: str) -> str:
    """Why a file cannot be written there, or nothing."""
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        return "is a folder; give a file name in it"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}; make it first"
    if os.path.exists(path) and not os.access(path, os.W_OK):
        return "cannot be written; check its permissions"
    if not _is_special(path):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return f"cannot be written ({error.strerror}); choose another folder"
    return ""


def _is_special(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def write(path: str, save: Callable[[str], object]) -> None:
    """Let `save` write to a name beside `path`, then rename: there is the whole file or what was there before."""
    path = os.path.realpath(path)
    if _is_special(path):  # /dev/null, a pipe
        save(path)
        return
    stem, suffix = os.path.splitext(path)
    temporary = f"{stem}.{os.getpid()}.tmp{suffix}"
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write JSON to a file, or to stdout for "-"; what is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return

    def save(name: str) -> None:
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)

    write(path, save)


def finite(value: Any) -> Any:
    """The same for JSON: None for every float that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(*lines: str) -> None:
    """Print lines for a person, on stderr."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)
