"""Figures of a report: the course of runs, component by component, and diagnoses of their students."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kd_common.run.report import Series, curve_style, log_scale
from vision_kd.viz.comparison import COMPONENT_STYLES, draw_gsnr
from vision_kd.viz.diagnosis import reliability

Metrics = Mapping[str, Series]


def _panels(
    count: int, *, height: float = 3.0, columns: int = 2, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure of that many panels, a few side by side."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.8 * columns, height * lines + 0.3), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
    return figure, grid[:count]


def _turn(names: Sequence[str]) -> int:
    """Return the rotation of tick labels in degrees: upright where they are too long to stand side by side."""
    return 90 if max(map(len, names)) > 2 else 0


def plot_progress(runs: Mapping[str, Metrics], metric: str, header: str) -> Figure:
    """Draw the validation metric of every run, and below it the number of unmasked classes, over the updates."""
    masked = {name: metrics["train/k"] for name, metrics in runs.items() if "train/k" in metrics}
    figure, panels = _panels(2 if masked else 1, columns=1, sharex=True)
    for number, (name, metrics) in enumerate(runs.items()):
        steps, values = metrics[f"val/{metric}"]
        panels[0].plot(steps + 1, 100 * values, label=name, **curve_style(number))
        if name in masked:
            panels[1].step(masked[name][0] + 1, masked[name][1], where="post", **curve_style(number))
    panels[0].set_ylabel(f"validation {header} (%)")
    panels[0].legend(fontsize=8)
    if masked:
        panels[1].set_ylabel("k: non-target classes\nthat are distilled")
    panels[-1].set_xlabel("updates")
    return figure


def plot_signal_to_noise(runs: Mapping[str, Metrics], momenta: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Draw the vector GSNR of every component, a panel per run, with the momentum in the legend; None without data."""
    measured = {name: m for name, m in runs.items() if any(key.startswith("gsnr/") for key in m)}
    if not measured:
        return None
    figure, panels = _panels(len(measured), sharey=True)
    for axes, (name, metrics) in zip(panels, measured.items(), strict=True):
        logged = {key: (steps + 1, values, np.zeros_like(values)) for key, (steps, values) in metrics.items()}
        curves = {component: logged[key] for component in COMPONENT_STYLES if (key := f"gsnr/{component}") in logged}
        lines = draw_gsnr(axes, curves, logged["gsnr_samples"])
        for component in curves:
            lines[component].set_label(f"{component}, momentum {momenta[name][component]:g}")
        lines["pure noise"].set_label("pure noise")
        axes.set(title=name, xlabel="updates", ylabel="GSNR of the epoch (vector form)")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def plot_component_gradients(runs: Mapping[str, Metrics]) -> Figure | None:
    """Draw the norms of the components' gradients and the cosines between them, a row per run; None without data."""
    measured = {name: m for name, m in runs.items() if any(key.startswith("grad_norm/") for key in m)}
    if not measured:
        return None
    figure = Figure(figsize=(9.6, 3.0 * len(measured) + 0.3), layout="constrained")
    rows = figure.subplots(len(measured), 2, squeeze=False, sharex=True, sharey="col")
    for (left, right), (name, metrics) in zip(rows, measured.items(), strict=True):
        for component, style in COMPONENT_STYLES.items():
            if f"grad_norm/{component}" in metrics:
                left.plot(*metrics[f"grad_norm/{component}"], label=component, **style)
        cosines = sorted(key for key in metrics if key.startswith("grad_cosine/"))
        for number, key in enumerate(cosines):
            label = key.removeprefix("grad_cosine/").replace("_", " and ")
            right.plot(*metrics[key], label=label, **curve_style(number))
        log_scale(left)
        left.set(title=name, ylabel="norm of the gradient")
        right.axhline(0, color="0.4", lw=0.8)
        right.set(ylabel="cosine between gradients", ylim=(-1.05, 1.05))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
    for axes in rows[-1]:
        axes.set_xlabel("updates")
    return figure


def plot_correlations(correlations: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Draw the correlation of the classes' logits, a panel per network, with the distance to the teacher's."""
    figure, panels = _panels(len(correlations), height=4.0)
    for axes, (name, matrix) in zip(panels, correlations.items(), strict=True):
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        title = name
        if name != "teacher" and "teacher" in correlations:
            title += f"\n{np.abs(matrix - correlations['teacher']).mean():.3f} from the teacher's on average"
        axes.set_title(title, fontsize=9)
        axes.grid(visible=False)
        if len(classes) <= 12:  # in grey print both ends of the scale look the same
            for (row, column), value in np.ndenumerate(matrix):
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6, color=colour)
        if len(classes) <= 20:
            axes.set_xticks(range(len(classes)), classes, rotation=_turn(classes), fontsize=8, parse_math=False)
            axes.set_yticks(range(len(classes)), classes, fontsize=8, parse_math=False)
        else:
            axes.set(xlabel="class", ylabel="class")
    figure.colorbar(image, ax=panels, label="correlation of logits over the validation samples", shrink=0.8)
    return figure


def plot_reliability(networks: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw the accuracy against confidence; the area of a dot is its share of the samples.

    Args:
        networks: Logits and labels of every network.
    """
    figure, (axes,) = _panels(1, height=4.2)
    axes.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1, label="perfectly calibrated")
    for number, (name, (logits, target)) in enumerate(networks.items()):
        confidence, accuracy, counts = reliability(logits, target)
        # No lines connect the dots, because bins of a few samples are noisy.
        style = {"marker": curve_style(number)["marker"], "label": name, "alpha": 0.6}
        axes.scatter(confidence, accuracy, s=300 * counts / len(target) + 8, **style)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return figure


def plot_class_changes(changes: Mapping[str, np.ndarray], classes: Sequence[str], reference: str) -> Figure:
    """Draw each class's accuracy minus that of the reference run, in points, sorted by the first run's change."""
    order = np.argsort(-next(iter(changes.values())))
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(changes)
    for i, (name, change) in enumerate(changes.items()):
        axes.bar(np.arange(len(order)) + (i - (len(changes) - 1) / 2) * width, 100 * change[order], width, label=name)
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set(ylabel=f"accuracy minus that of {reference} (points)")
    if len(order) <= 40:
        axes.set_xticks(
            range(len(order)), [classes[i] for i in order], rotation=_turn(classes), fontsize=8, parse_math=False
        )
    else:
        axes.set(xlabel="classes, sorted")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure


def plot_landscapes(surfaces: Mapping[str, np.ndarray], offsets: np.ndarray) -> Figure:
    """Draw contours of the loss around every student, with the same levels and colours for all."""
    figure, panels = _panels(len(surfaces), height=4.2, sharex=True, sharey=True)
    low = min(float(surface.min()) for surface in surfaces.values())
    high = min(float(np.percentile(surface, 90)) for surface in surfaces.values())
    levels = np.geomspace(max(low, 1e-4), max(high, 2 * max(low, 1e-4)), 13)
    for axes, (name, surface) in zip(panels, surfaces.items(), strict=True):
        filled = axes.contourf(offsets, offsets, surface.T, levels, cmap="viridis", extend="both")
        axes.plot(0, 0, "+", color="white", ms=9, mew=2)
        axes.set(title=name, xlabel="direction 1 (filter lengths)", ylabel="direction 2")
        axes.set_aspect("equal")
    figure.colorbar(filled, ax=panels, label="cross-entropy", format="%.2g", shrink=0.8)
    return figure
