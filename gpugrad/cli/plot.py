"""The picture of a fit: its learning curve, and predicted against true values. Needs matplotlib."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from gpugrad.cli.model import Floats, Metrics

# share of the rows that may lie outside the frame, where a few far ones would shrink all others to a spot
OUTSIDE = 1e-3
# up to here every row is a dot of its own
FEW = 2000
TRAIN, TEST = "#1f5fa8", "#c2410c"


def draw(
    path: str,
    *,
    history: dict[str, list[float]],
    by_epoch: bool,
    true: Floats,
    predicted: Floats,
    column: str,
    part: str,
    metrics: Metrics,
    title: str,
) -> None:
    """Draw both panels into a file; the suffix of `path` gives the format."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # a column may be called "$cost": no mathematics in names
    with (
        warnings.catch_warnings(),
        rc_context({"text.parse_math": False, "font.size": 11, "axes.titlesize": 12, "axes.axisbelow": True}),
    ):
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        figure.suptitle(title, fontsize=13)
        _learning_curve(left, history, column, by_epoch)
        _predicted_true(right, true, predicted, column, part, metrics)
        figure.savefig(path, dpi=150)


def _learning_curve(axes: Any, history: dict[str, list[float]], column: str, by_epoch: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, train, test = (history.get(name, []) for name in ("epoch", "train_rmse", "test_rmse"))
    marker = "o" if len(epochs) <= 20 else ""
    label = "train, mean over the epoch" if by_epoch else "train"
    axes.plot(epochs, train, color=TRAIN, marker=marker, markersize=4.5, label=label)
    if test:
        axes.plot(epochs, test, color=TEST, marker=marker and "s", markersize=4.5, linestyle="--", label="test")
    # the first epoch begins at random parameters: its mean says little and would flatten all that follows
    shown = np.array(train[1:] + test if by_epoch and len(epochs) > 3 else train + test)
    low, high = float(shown.min()), float(shown.max())
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(title="Learning curve", xlabel="epoch" if by_epoch else "iteration", ylabel=f"RMSE of {column}")
    axes.set_ylim(low - pad, high + 3 * pad)  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", framealpha=1)


def _frame(true: Floats, predicted: Floats) -> tuple[float, float]:
    """Limits for both axes: all rows, or all but a few far ones."""
    both = np.concatenate([true, predicted])
    low, high = float(both.min()), float(both.max())
    inner = np.quantile(both, [OUTSIDE / 4, 1 - OUTSIDE / 4])
    near, far = (float(x) for x in inner + np.array([-0.1, 0.1]) * (inner[1] - inner[0]))
    if high - low > 1.3 * (far - near) > 0:
        low, high = max(low, near), min(high, far)
    pad = 0.02 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _predicted_true(axes: Any, true: Floats, predicted: Floats, column: str, part: str, metrics: Metrics) -> None:
    low, high = _frame(true, predicted)
    inside = (true >= low) & (true <= high) & (predicted >= low) & (predicted <= high)
    if len(true) <= FEW:
        axes.scatter(true[inside], predicted[inside], s=16, color=TRAIN, alpha=0.5, linewidths=0)
    else:
        _density(axes, true[inside], predicted[inside], (low, high, low, high), len(true))
    r2 = f"{metrics['r2']:.4f}" if np.isfinite(metrics["r2"]) else "n/a"
    axes.axline((low, low), slope=1, color="black", linewidth=1.1, linestyle="--", label="predicted = true")
    axes.set(
        title=f"{part.capitalize()}: R² {r2}, RMSE {metrics['rmse']:#.4g}, MAE {metrics['mae']:#.4g}",
        xlabel=f"true {column}",
        ylabel=f"predicted {column}",
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
    )
    axes.locator_params(nbins=6)
    if outside := len(true) - int(inside.sum()):
        text = f"{outside:,} of {len(true):,} rows lie outside"
        axes.text(0.98, 0.02, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=9, color="#444444")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _density(axes: Any, true: Floats, predicted: Floats, extent: tuple[float, float, float, float], rows: int) -> None:
    """Rows counted in hexagons, on a logarithmic scale."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    # the palest colours would be lost on paper
    colors = ListedColormap(colormaps["viridis_r"](np.linspace(0.06, 1, 256)))
    size = int(np.clip(np.sqrt(rows) / 3, 20, 75))
    cells = axes.hexbin(true, predicted, gridsize=size, extent=extent, mincnt=1, cmap=colors, linewidths=0)
    cells.set_norm(LogNorm(1, max(10, float(cells.get_array().max()))))
    axes.figure.colorbar(cells, ax=axes, label=f"rows in a cell, of {rows:,}", shrink=0.9, format="{x:,.0f}")
