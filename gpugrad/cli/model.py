"""A fitted model: prediction in blocks of rows, and its file.

The file is safetensors: the layers as float32 arrays `layers.K.W` and `layers.K.b`, all else as text in its metadata.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

import gpugrad as gg
from gpugrad.backend import Device, out_of_memory, release_memory, to_device
from gpugrad.cli.files import finite
from gpugrad.data import Preprocessor
from gpugrad.errors import DataError

__all__ = ["ACTIVATIONS", "Metrics", "Model", "measure"]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "swish": gg.swish,
    "relu": gg.relu,
    "gelu": gg.gelu,
    "tanh": gg.tanh,
    "sigmoid": gg.sigmoid,
    "softplus": gg.softplus,
    "elu": gg.elu,
    "leaky_relu": gg.leaky_relu,
}
FORMAT = 1
# rows predicted at a time: a hidden layer of them stays in cache on a CPU, and keeps a GPU busy
BLOCK = {"cpu": 4096, "cuda": 1 << 17}

Floats = npt.NDArray[np.float32]
Metrics = dict[str, float]
Layers = list[dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """kind "linear" or "mlp" (a linear model is one layer), its layers on any device, and what goes around them.

    sizes: inputs, hidden widths, 1. A prediction is mean + scale * output. metrics: part -> name -> number.
    """

    kind: str
    activation: str | None
    layers: Layers
    preprocessor: Preprocessor
    mean: float
    scale: float
    metrics: dict[str, Metrics | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, hidden widths, 1."""
        return (*(int(layer["W"].shape[0]) for layer in self.layers), 1)

    @property
    def name(self) -> str:
        """What a person calls it: "mlp 181-64-64-1, swish"."""
        sizes = "-".join(map(str, self.sizes))
        return f"mlp {sizes}, {self.activation}" if self.kind == "mlp" else f"linear, {self.sizes[0]} columns"

    @np.errstate(over="ignore", invalid="ignore")
    def predict(self, X: Floats, device: Device) -> Floats:
        """Predictions float32 (rows,) in the target's units, a block of rows at a time. The layers are on `device`."""
        return forward(self.layers, self.activation, X, device) * np.float32(self.scale) + np.float32(self.mean)

    def on(self, device: Device) -> Model:
        """The same model with its layers on a device."""
        layers = [{key: to_device(array, device) for key, array in layer.items()} for layer in self.layers]
        return replace(self, layers=layers)

    def save(self, path: str) -> None:
        """Write the model to a safetensors file."""
        tensors = {
            f"layers.{k}.{key}": np.ascontiguousarray(array)
            for k, layer in enumerate(self.on(Device("cpu")).layers)
            for key, array in layer.items()
        }
        text = {
            "gpugrad": gg.__version__,
            "format": str(FORMAT),
            "model": self.kind,
            "activation": self.activation or "",
            "sizes": json.dumps(self.sizes),
            "preprocessing": self.preprocessor.to_json(),
            "target": json.dumps({"name": self.preprocessor.target, "mean": self.mean, "scale": self.scale}),
            "metrics": json.dumps(finite(self.metrics)),
            "options": json.dumps(self.options),
            "complete": json.dumps(self.complete),
        }
        # not save_file, whose files only their owner may read
        with open(path, "wb") as file:
            file.write(safetensors.numpy.save(tensors, metadata=text))

    @classmethod
    def load(cls, path: str) -> Model:
        """Read what `save` wrote. Raises DataError for anything else, in one line."""
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file; gpugrad fit DATA --out FILE stores a model.")
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder; give the file of a model.")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                text = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check it.") from None
        except Exception as error:  # SafetensorError, and whatever else a damaged file brings about
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{path} is no gpugrad model, or truncated ({why}); store one with gpugrad fit DATA --out FILE."
            ) from None
        if "gpugrad" not in text or "format" not in text:
            raise DataError(
                f"{path} is a safetensors file, but no gpugrad model; store one with gpugrad fit DATA --out FILE."
            )
        if text["format"] != str(FORMAT):
            raise DataError(
                f"{path} is a gpugrad model of format {text['format']} (gpugrad {text['gpugrad']}), this gpugrad reads "
                f"{FORMAT}; fit it again or use that version."
            )
        try:
            return cls._from_parts(text, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: a damaged gpugrad model ({why}); fit it again.") from None

    @classmethod
    def _from_parts(cls, text: dict[str, str], tensors: dict[str, Any]) -> Model:
        preprocessor = Preprocessor.from_json(text["preprocessing"])
        sizes, target = json.loads(text["sizes"]), json.loads(text["target"])
        kind, activation = text["model"], text["activation"] or None
        if kind not in ("linear", "mlp") or (kind == "mlp") != (activation in ACTIVATIONS):
            raise ValueError(f"model {kind!r} with activation {activation!r}")
        if sizes[0] != len(preprocessor.feature_names):
            raise ValueError(f"{sizes[0]} inputs, but the preprocessing gives {len(preprocessor.feature_names)}")
        layers = []
        for k, (above, below) in enumerate(itertools.pairwise(sizes)):
            layer = {"W": tensors.pop(f"layers.{k}.W"), "b": tensors.pop(f"layers.{k}.b")}
            for key, shape in (("W", (above, below)), ("b", (below,))):
                array = layer[key]
                if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
                    raise ValueError(f"layers.{k}.{key}: {array.dtype} {array.shape}, wanted finite float32 {shape}")
            layers.append(layer)
        mean, scale = float(target["mean"]), float(target["scale"])
        if tensors or sizes[-1] != 1 or not math.isfinite(mean) or not 0 < scale < math.inf:
            raise ValueError("parts that do not fit together")
        metrics, options = json.loads(text["metrics"]), json.loads(text["options"])
        return cls(kind, activation, layers, preprocessor, mean, scale, metrics, options, json.loads(text["complete"]))


@np.errstate(over="ignore", invalid="ignore")  # what is not finite shows in the result
def forward(layers: Layers, activation: str | None, X: Floats, device: Device) -> Floats:
    """What the layers give for each row, float32 (rows,), in blocks."""
    act = ACTIVATIONS[activation] if activation else gg.swish  # one layer has no activation
    out = np.empty(len(X), np.float32)
    size = BLOCK[device.kind]
    with gg.no_grad(), gg.device(device):
        start = 0
        while start < len(X):
            try:
                block = to_device(X[start : start + size], device)
                out[start : start + size] = gg.asarray(gg.nn.mlp(layers, block, act)).numpy()[:, 0]
            except Exception as error:
                if size == 1 or not out_of_memory(error):
                    raise
                size //= 2
                release_memory(device)
            else:
                start += size
    return out


def measure(y: Floats, predicted: Floats) -> Metrics:
    """R2 (NaN for a constant y), RMSE and MAE, computed in float64."""
    error = predicted.astype(np.float64) - y
    squares = float(error @ error)
    centred = y - y.mean(dtype=np.float64)
    total = float(centred @ centred)
    return {
        "r2": 1 - squares / total if total > 0 else math.nan,
        "rmse": math.sqrt(squares / len(y)),
        "mae": float(np.abs(error).mean()),
    }


def metrics_table(metrics: Mapping[str, Metrics | None], target: str) -> list[str]:
    """Lines for a person: a row a part, in the units of the target."""
    lines = [f"{'':<10}{'R2':>8}{'RMSE':>12}{'MAE':>12}   of {target}"]
    for part, numbers in metrics.items():
        if numbers:
            r2 = f"{numbers['r2']:.4f}" if math.isfinite(numbers["r2"]) else "n/a"
            lines.append(f"{part:<10}{r2:>8}{numbers['rmse']:>#12.5g}{numbers['mae']:>#12.5g}")
    return lines
