"""From a Table to a design matrix: one-hot encoding, standardisation, missing values, train/test split."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpugrad.data.table import Column, Table, is_number, listed
from gpugrad.errors import DataError

__all__ = ["Design", "Feature", "Preprocessor", "train_test_split"]

MAX_CATEGORIES = 1000
_FORMAT = 1
# rows encoded at a time: a block of a few MB stays in cache while its columns are written one after the other
_BLOCK = 4096
# beyond this the squares in the variance overflow float64
_LARGEST = 1e150


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """A design matrix and what was done to get it.

    X float32 (kept rows, columns), C-contiguous; y float32 (kept rows,) or None; kept int64, the table rows of X;
    dropped: rows left out for a missing target; unknown: column -> category never seen in fitting -> count; imputed:
    column -> values missing where none was in fitting.
    """

    X: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32] | None
    kept: npt.NDArray[np.int64]
    dropped: int
    unknown: dict[str, dict[str, int]]
    imputed: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """One sentence for everything a person should hear of: dropped rows, unknown categories."""
        notes = []
        if self.dropped:
            notes.append(f"dropped {self.dropped:,} of {self.dropped + len(self.kept):,} rows: the target is missing")
        for name, counts in self.unknown.items():
            rows = sum(counts.values())
            hold = "rows hold categories" if rows > 1 else "row holds a category"
            notes.append(
                f"column {name!r}: {rows:,} {hold} not seen in training, "
                f"encoded as zeros: {listed(map(repr, counts), 5)}"
            )
        for name, count in self.imputed.items():
            notes.append(f"column {name!r}: {count:,} missing, though none was in training; the mean stands in")
        return notes


@dataclass(frozen=True, slots=True)
class Feature:
    """How one table column becomes columns of X.

    numeric: (value - mean) / scale, 0 where missing; categorical: one 0/1 column for each of `categories`.
    indicator: a further 0/1 column, 1 where the value is missing (there were missing values in fitting).
    """

    name: str
    kind: Literal["numeric", "categorical"]
    mean: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()
    indicator: bool = False

    @property
    def column_names(self) -> list[str]:
        """Names of its columns of X, in order."""
        names = [self.name] if self.kind == "numeric" else [f"{self.name}={text}" for text in self.categories]
        return [*names, f"{self.name} is missing"] if self.indicator else names


@dataclass(frozen=True)
class Preprocessor:
    """A fitted encoding of tables: make one with `fit` on the training rows, then `transform` any table.

    features: one Feature for each input column, in the order of X; skipped: column -> why `fit` left it out.
    """

    target: str
    features: tuple[Feature, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def feature_names(self) -> list[str]:
        """Names of the columns of X: "temp", "month=1", "temp is missing"."""
        return [name for feature in self.features for name in feature.column_names]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The table columns needed, without the target."""
        return tuple(feature.name for feature in self.features)

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the numeric inputs."""
        return tuple(feature.name for feature in self.features if feature.kind == "numeric")

    @property
    def categorical(self) -> tuple[str, ...]:
        """Names of the categorical inputs."""
        return tuple(feature.name for feature in self.features if feature.kind == "categorical")

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """Categorical input -> its categories, in the order of their columns."""
        return {feature.name: feature.categories for feature in self.features if feature.kind == "categorical"}

    @property
    def means(self) -> dict[str, float]:
        """Numeric input -> mean of the values present."""
        return {feature.name: feature.mean for feature in self.features if feature.kind == "numeric"}

    @property
    def scales(self) -> dict[str, float]:
        """Numeric input -> standard deviation after imputation, 1 for a constant."""
        return {feature.name: feature.scale for feature in self.features if feature.kind == "numeric"}

    @classmethod
    def fit(
        cls,
        table: Table,
        target: str,
        *,
        features: Iterable[str] | None = None,
        drop: Iterable[str] = (),
        categorical: Iterable[str] = (),
    ) -> Preprocessor:
        """Learn categories, means and scales from the rows of `table` whose target is present.

        features: the inputs, every column but the target by default; drop: names left out; categorical: names whose
        numbers are labels. Without `features`, dates and columns with no value are left out and told in `skipped`.
        Raises DataError for names the table has not, a target without numbers, and inputs that cannot be encoded.
        """
        named, dropped, forced = (_names(x) for x in (features, drop, categorical))
        table.select(dict.fromkeys([target, *named, *dropped, *forced]))  # for its error, which names the absent ones
        if target in named or target in dropped or target in forced:
            where = "an input" if target in named else "dropped" if target in dropped else "categorical"
            raise DataError(f"the target {target!r} cannot be {where} too; leave it out of that list.")
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise DataError(f"the feature {twice!r} is named twice; name it once.")
        wanted = [name for name in (named if features is not None else table.names) if name not in {target, *dropped}]
        present, _ = _target(table, target)
        fitted: list[Feature] = []
        skipped: dict[str, str] = {}
        for name in wanted:
            column = table[name] if len(present) == table.rows else table[name].take(present)
            if reason := _unusable(column):
                if features is not None:
                    raise DataError(f"column {name!r} {reason}; leave it out of the features.")
                skipped[name] = reason
                continue
            labels = column.kind == "categorical" or name in forced
            # on the whole column, so that the message names its row
            _finite(table[name], math.inf if labels else _LARGEST)
            fitted.append(_fit_categorical(column) if labels else _fit_numeric(column))
        if not fitted:
            why = "; ".join(f"{name!r} {reason}" for name, reason in list(skipped.items())[:3])
            raise DataError(
                f"{table.source} leaves no input column for the target {target!r}{': ' + why if why else ''}; "
                "name or drop fewer columns."
            )
        return cls(target, tuple(fitted), skipped)

    def missing_columns(self, table: Table) -> list[str]:
        """Inputs that the table has not, in order; the target is not among them."""
        return [name for name in self.inputs if name not in table]

    def transform(self, table: Table, *, with_target: bool = True) -> Design:
        """Encode a table; with `with_target`, rows whose target is missing are left out and counted.

        Raises DataError naming every column that is missing or of the wrong type, and infinite values by row.
        """
        self._check(table)
        kept = np.arange(table.rows, dtype=np.int64)
        y = None
        if with_target:
            kept, y = _target(table, self.target)
        X = np.zeros((len(kept), len(self.feature_names)), np.float32)
        unknown: dict[str, dict[str, int]] = {}
        imputed: dict[str, int] = {}
        columns = []
        for feature in self.features:
            column = table[feature.name]
            if feature.kind == "numeric" and not feature.indicator and (count := int(column.missing[kept].sum())):
                imputed[feature.name] = count
            if feature.kind == "categorical":
                _finite(column)
                column = _recode(column.as_categorical(), feature, kept, unknown)
            columns.append(column)
        whole = len(kept) == table.rows
        for start in range(0, len(kept), _BLOCK):
            block = X[start : start + _BLOCK]
            rows = slice(start, start + _BLOCK) if whole else kept[start : start + _BLOCK]
            at = 0
            for feature, column in zip(self.features, columns, strict=True):
                at = _encode(feature, column, rows, block, at)
        return Design(X, y, kept, table.rows - len(kept), unknown, imputed)

    def _check(self, table: Table) -> None:
        if absent := self.missing_columns(table):
            noun = "column" if len(absent) == 1 else "columns"
            raise DataError(
                f"{table.source} has not the {noun} {listed(map(repr, absent))} that the model was fitted on.\n"
                f"Its columns: {listed(table.names, 30)}."
            )
        wrong = []
        for feature in self.features:
            column = table[feature.name]
            if column.kind == "other" or (column.kind != "numeric" and feature.kind == "numeric"):
                if column.missing.all():
                    continue
                text = column.first_text()
                came = f"{column.stored}, e.g. {text[1]!r} in row {text[0]}" if text else column.stored
                wrong.append(f"{feature.name!r} ({came}; wanted {feature.kind})")
        if wrong:
            raise DataError(
                f"{table.source} has columns of another type than the model was fitted on: {listed(wrong, 5)}."
            )

    def to_json(self) -> str:
        """Everything fitted, as one JSON text; `from_json` gives an equal Preprocessor, bit for bit."""
        columns: list[dict[str, Any]] = []
        for feature in self.features:
            entry: dict[str, Any] = {"name": feature.name, "kind": feature.kind, "indicator": feature.indicator}
            if feature.kind == "numeric":
                entry |= {"mean": feature.mean, "scale": feature.scale}
            else:
                entry |= {"categories": list(feature.categories)}
            columns.append(entry)
        whole = {"format": _FORMAT, "target": self.target, "columns": columns, "skipped": self.skipped}
        return json.dumps(whole, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Preprocessor:
        """The Preprocessor that `to_json` wrote. Raises DataError for any other text."""
        try:
            whole = json.loads(text)
            if whole["format"] != _FORMAT:
                raise DataError(
                    f"the preprocessing was stored in format {whole['format']}, this gpugrad reads {_FORMAT}; "
                    "fit the model again."
                )
            features = tuple(_feature_from_json(entry) for entry in whole["columns"])
            skipped = {str(name): str(reason) for name, reason in whole["skipped"].items()}
            return cls(_expect(whole["target"], str), features, skipped)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                "this text is no stored preprocessing of gpugrad (damaged model file?); fit the model again."
            ) from None


def train_test_split(rows: int, test_fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Train and test row numbers, int64: a seeded permutation of range(rows) cut in two, neither part empty.

    The test part is the last round(rows * test_fraction) of it, at least 1. Raises DataError for rows < 2, a fraction
    outside (0, 1) and a negative seed.
    """
    if not _is_int(rows) or rows < 2:
        raise DataError(f"train_test_split: rows came as {rows!r}; wanted an integer of at least 2.")
    if (
        isinstance(test_fraction, bool)
        or not isinstance(test_fraction, (int, float, np.floating))
        or not 0 < test_fraction < 1
    ):
        raise DataError(f"train_test_split: test_fraction came as {test_fraction!r}; wanted it between 0 and 1.")
    if not _is_int(seed) or seed < 0:
        raise DataError(f"train_test_split: seed came as {seed!r}; wanted an integer of at least 0.")
    order = np.random.default_rng(seed).permutation(rows)
    tested = min(max(round(rows * test_fraction), 1), rows - 1)
    return order[: rows - tested], order[rows - tested :]


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _names(names: Iterable[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _target(table: Table, target: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows where the target is present, and its values there."""
    column = table[target]
    if table.rows == 0:
        raise DataError(f"{table.source} has no rows; wanted at least one.")
    present = np.flatnonzero(~column.missing)
    if len(present) == 0:
        raise DataError(f"the target {target!r} has only missing values ({table.rows:,} rows); choose another column.")
    if column.kind != "numeric":
        text = column.first_text()
        came = f"{column.stored}, e.g. {text[1]!r} in row {text[0]}" if text else column.stored
        raise DataError(f"the target {target!r} is not numeric ({came}); choose or make a column of numbers.")
    _finite(column)
    with np.errstate(over="ignore"):
        y = column.values[present].astype(np.float32)
    _refuse(column, present, y)
    return present, y


def _finite(column: Column, largest: float = math.inf) -> None:
    """Raise for the first infinite value of a numeric column, or the first beyond `largest`."""
    if column.kind == "numeric":
        size = np.abs(column.values)
        if (bad := (size > largest) | np.isinf(size)).any():
            _raise_value(column, int(np.argmax(bad)))


def _refuse(column: Column, rows: slice | npt.NDArray[np.int64], encoded: npt.NDArray[np.float32]) -> None:
    """Raise for the first of `rows` whose encoded value left the range of float32."""
    if not (fine := np.isfinite(encoded)).all():
        at = int(np.argmin(fine))
        _raise_value(column, rows.start + at if isinstance(rows, slice) else int(rows[at]))


def _raise_value(column: Column, row: int) -> None:
    value = float(column.values[row])
    problem = "infinite" if math.isinf(value) else "too large for float32"
    raise DataError(
        f"column {column.name!r} holds {value!r} in row {row} (counted from 0), which is {problem}; "
        "correct it or leave it empty to mark it missing."
    )


def _unusable(column: Column) -> str:
    """Why a column cannot be an input, or nothing."""
    if column.missing.all():
        return "has no value where the target is present"
    if column.kind == "other":
        return f"is of type {column.stored}, which has no encoding (make numbers of it, such as month and hour)"
    return ""


def _fit_categorical(column: Column) -> Feature:
    numbers = column.kind == "numeric"
    coded = column.as_categorical()
    counts = np.bincount(coded.values + 1, minlength=len(coded.categories) + 1)
    distinct = int(np.count_nonzero(counts[1:]))
    if distinct > MAX_CATEGORIES:
        text = column.first_text()
        near = sum(map(is_number, coded.categories)) > len(coded.categories) / 2
        hint = f"\nIt is text because of {text[1]!r} in row {text[0]}: correct that instead." if text and near else ""
        raise DataError(
            f"column {column.name!r} is categorical with {distinct:,} distinct values, more than {MAX_CATEGORIES:,}: "
            f"most likely an identifier; drop it.{hint}"
        )
    seen = [text for text, count in zip(coded.categories, counts[1:].tolist(), strict=True) if count]
    # numbers keep their order, so that month=10 follows month=9
    names = tuple(seen if numbers else sorted(seen))
    return Feature(column.name, "categorical", categories=names, indicator=bool(counts[0]))


def _fit_numeric(column: Column) -> Feature:
    """Mean of the values present; standard deviation of the column once the mean stands in for the missing."""
    missing = column.missing
    present = column.values[~missing] if missing.any() else column.values
    low, high = float(present.min()), float(present.max())
    indicator = present.size < column.values.size
    if low == high:
        return Feature(column.name, "numeric", low, 1.0, indicator=indicator)
    mean = float(present.mean())
    deviation = present - mean
    scale = math.sqrt(float(deviation @ deviation) / column.values.size)
    # what is left of a constant after rounding is noise, not spread
    if scale <= 8 * np.finfo(np.float64).eps * abs(mean):
        scale = 1.0
    return Feature(column.name, "numeric", mean, scale, indicator=indicator)


def _recode(
    column: Column, feature: Feature, kept: npt.NDArray[np.int64], unknown: dict[str, dict[str, int]]
) -> Column:
    """The column with the fitted codes: -1 missing, -2 unknown, the latter counted into `unknown`."""
    known = {text: code for code, text in enumerate(feature.categories)}
    lookup = np.array([*(known.get(text, -2) for text in column.categories), -1], np.int32)
    strange = np.flatnonzero(lookup == -2)
    if strange.size:
        counts = np.bincount(column.values[kept] + 1, minlength=len(column.categories) + 1)[1:]
        found = {column.categories[code]: int(counts[code]) for code in strange.tolist() if counts[code]}
        if found:
            unknown[feature.name] = found
    # code -1 picks the last entry of the table
    return Column(column.name, "categorical", lookup[column.values], feature.categories, column.stored)


def _encode(
    feature: Feature, column: Column, rows: slice | npt.NDArray[np.int64], block: npt.NDArray[np.float32], at: int
) -> int:
    """Write one feature into the columns of `block` from `at`; returns the first column after it."""
    values = column.values[rows]
    if feature.kind == "numeric":
        if column.kind == "numeric":
            missing = np.isnan(values)
            with np.errstate(over="ignore"):
                out = ((values - feature.mean) / feature.scale).astype(np.float32)
            out[missing] = 0
            _refuse(column, rows, out)
            block[:, at] = out
        else:  # a column without a single value may come as any type
            missing = np.ones(len(block), np.bool_)
        at += 1
    else:
        missing = values == -1
        hot = np.flatnonzero(values >= 0)
        block[hot, at + values[hot]] = 1
        at += len(feature.categories)
    if feature.indicator:
        block[:, at] = missing
        at += 1
    return at


def _feature_from_json(entry: dict[str, Any]) -> Feature:
    name, kind, indicator = (_expect(entry[key], of) for key, of in (("name", str), ("kind", str), ("indicator", bool)))
    if kind == "categorical":
        categories = tuple(_expect(text, str) for text in _expect(entry["categories"], list))
        return Feature(name, "categorical", categories=categories, indicator=indicator)
    mean, scale = _expect(entry["mean"], float), _expect(entry["scale"], float)
    if kind != "numeric" or not math.isfinite(mean) or not 0 < scale < math.inf:
        raise ValueError(kind)
    return Feature(name, "numeric", mean, scale, indicator=indicator)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(kind)
    return value
