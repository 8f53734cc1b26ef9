"""Figures of several runs: accuracy over epochs and gradient signal-to-noise ratios."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kd_common.run.report import curve_style, log_scale

Histories = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
"""Metrics of every validation of every seed, by variant."""

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Abscissa, mean and standard deviation."""

# A component looks the same in every panel and figure.
COMPONENT_STYLES = {
    name: curve_style(number) for number, name in enumerate(("task", "target", "nontarget", "relation", "feature"))
}


def curve(histories: Sequence[Sequence[Mapping[str, float]]], key: str) -> Curve:
    """Return epochs, mean and standard deviation over seeds of a quantity; NaN where an epoch did not measure it."""
    length = min(len(history) for history in histories)
    values = np.array([[epoch.get(key, np.nan) for epoch in history[:length]] for history in histories])
    return np.arange(1, length + 1), values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]


def draw_gsnr(axes: Axes, curves: Mapping[str, Curve], samples: Curve) -> dict[str, Line2D]:
    """Draw the vector GSNR of the components on a logarithmic axis and return the lines by name.

    Args:
        axes: Where to draw.
        curves: Abscissa, mean and spread by component; those that were not measured may be missing or all NaN.
        samples: Number of samples behind each value; the dashed line is the value of pure noise.
    """
    lines = {}
    for name, style in COMPONENT_STYLES.items():
        if name in curves and np.isfinite(curves[name][1]).any():
            x, mean, spread = curves[name]
            (lines[name],) = axes.plot(x, mean, **style)
            axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, lw=0)
    x, number, _ = samples
    if np.isfinite(number).any():
        (lines["pure noise"],) = axes.plot(x, 1 / number, color="0.4", ls="--", lw=1)
    log_scale(axes)
    return lines


def plot_accuracy(variants: Histories, judged: str, header: str, path: Path) -> None:
    """Plot accuracy (or AP) over epochs with a band of one standard deviation, and every seed's last epoch."""
    colours = mpl.colormaps["tab20" if len(variants) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, points = figure.subplots(1, 2, width_ratios=[3, 2])
    for index, ((variant, histories), colour) in enumerate(zip(variants.items(), colours, strict=False)):
        epochs, mean, spread = curve(histories, judged)
        curves.plot(epochs, 100 * mean, label=variant, **curve_style(index) | {"color": colour})
        curves.fill_between(epochs, 100 * (mean - spread), 100 * (mean + spread), color=colour, alpha=0.15, lw=0)
        last = [100 * history[-1][judged] for history in histories]
        points.plot(last, [index] * len(last), "o", color=colour, alpha=0.6, ms=4)
        points.plot(np.mean(last), index, "|", color=colour, ms=16, mew=2)
    # The axis starts later, because the first epochs would squeeze the differences; its label says so.
    half = 100 * np.concatenate([curve(h, judged)[1][len(h[0]) // 2 :] for h in variants.values()])
    curves.set(xlabel="epoch", ylabel=f"validation {header} (%), cut below", ylim=(half.min() - 1.5, half.max() + 0.7))
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    points.set(xlabel=f"last {header} (%): dot a seed, bar the mean", yticks=range(len(variants)))
    points.set_yticklabels(list(variants))
    points.invert_yaxis()
    curves.legend(fontsize=7, loc="lower right")
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_gsnr(variants: Histories, path: Path) -> None:
    """Return the vector GSNR of each component over epochs, one panel per variant that measured it."""
    measured = {
        variant: histories
        for variant, histories in variants.items()
        if any(key.startswith("gsnr/") for key in histories[0][-1])
    }
    columns = min(4, len(measured))
    lines = -(-len(measured) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Line2D] = {}
    for axes in grid.flat[len(measured) :]:
        axes.set_visible(False)
    for axes, (variant, histories) in zip(grid.flat, measured.items(), strict=False):
        curves = {name: curve(histories, f"gsnr/{name}") for name in COMPONENT_STYLES}
        handles |= draw_gsnr(axes, curves, curve(histories, "gsnr_samples"))
        axes.set_title(variant, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(alpha=0.3, which="both", lw=0.4)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("GSNR (vector form)", fontsize=9)
    figure.savefig(path, dpi=130)
