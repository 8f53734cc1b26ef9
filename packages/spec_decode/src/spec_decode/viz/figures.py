"""Figures of drafting for reports and TensorBoard: the course of runs, decoding measurements, draft trees."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd_common.run.report import Series, curve_style
from spec_decode.decoding.measure import Measurement
from spec_decode.decoding.statistics import PHASES
from spec_decode.decoding.tree import DraftTree, depths
from spec_decode.decoding.verify import Verified

ACCEPTED, DRAFTED = "tab:green", "0.6"
DECODING = [phase for phase in PHASES if phase != "prefill"]
# One per phase and one for the rest; neighbours differ in lightness, for a grey print.
SHADES = mpl.colormaps["cividis"]([0.0, 0.5, 1.0, 0.25, 0.75])


@dataclass
class Passes:
    """The first target passes of a generation of one row, for pictures.

    Args:
        most: Passes to keep.
    """

    most: int
    kept: list[tuple[DraftTree, Verified]] = field(default_factory=list)

    def __call__(self, tree: DraftTree, verified: Verified) -> None:
        """Keep a pass that verified a draft."""
        if len(self.kept) < self.most and tree.tokens.shape[1] > 1:
            self.kept.append((tree, verified))


def plot_training(runs: Mapping[str, Mapping[str, Series]]) -> Figure:
    """Draw the acceptance per level on validation text and the first level's training loss over the updates."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, metrics) in enumerate(runs.items()):
        levels = sorted(key for key in metrics if key.startswith("val/acceptance_"))
        for level, key in enumerate(levels, start=1):
            steps, values = metrics[key]
            shade = 1 - 0.75 * (level - 1) / max(len(levels) - 1, 1)
            label = f"{name}, level {level}" if level in (1, len(levels)) else None
            left.plot(steps + 1, 100 * values, alpha=shade, label=label, **curve_style(number))
        if "train/loss_1" in metrics:
            steps, values = metrics["train/loss_1"]
            right.plot(steps + 1, values, label=name, **curve_style(number))
    left.set(xlabel="updates", ylabel="accepted, given all levels above (%)")
    right.set(xlabel="updates", ylabel="cross-entropy of the first level (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def plot_acceptance(measured: Mapping[str, Measurement]) -> Figure:
    """Return the acceptance of every level while decoding."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    drafted = {name: found.acceptance for name, found in measured.items() if found.acceptance}
    for number, (name, acceptance) in enumerate(drafted.items()):
        shares = [100 * share for share in acceptance]
        axes.plot(range(1, len(shares) + 1), shares, label=name, clip_on=False, **curve_style(number))
    axes.set(xlabel="level", ylabel="accepted, given all levels above (%)", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_time(measured: Mapping[str, Measurement]) -> Figure:
    """Return the milliseconds per emitted token by phase."""
    figure = Figure(figsize=(7.2, 0.5 * len(measured) + 1.5), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(measured))
    phases = [*DECODING, "overhead"]
    for phase, colour in zip(phases, SHADES, strict=True):
        widths = np.array([milliseconds(found)[phase] for found in measured.values()])
        axes.barh(list(measured), widths, left=left, label=phase, color=colour, edgecolor="0.3", linewidth=0.5)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token, prefill left out")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def milliseconds(found: Measurement) -> dict[str, float]:
    """Return the time per emitted token of every phase, and of the rest."""
    phases = {phase: found.phases[phase] for phase in DECODING}
    phases["overhead"] = found.seconds - sum(phases.values())
    return {phase: 1000 * seconds / max(found.tokens, 1) for phase, seconds in phases.items()}


def node_places(tree: DraftTree) -> dict[int, tuple[int, int]]:
    """Return the column (levels below the root) and row (from 0, downwards) of every node of a batch's first tree."""
    depth, used = depths(tree.parents)[0].tolist(), Counter[int]()
    places = {}
    for node, present in enumerate(tree.present[0].tolist()):
        if present:
            places[node] = (depth[node], used[depth[node]])
            used[depth[node]] += 1
    return places


def plot_trees(passes: Sequence[tuple[DraftTree, Verified]], tokenizer: Any) -> Figure:
    """Draw the trees of consecutive passes: tokens, edges, the accepted path in thick green, the bonus token above."""

    def word(token: int) -> str:
        return repr(tokenizer.decode([token]))[1:-1]

    drawn = [node_places(tree) for tree, _ in passes]
    heights = [2 + max(row for _, row in places.values()) for places in drawn]
    figure = Figure(figsize=(9.6, 0.4 * sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(passes), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, places, (tree, verified) in zip(panels, drawn, passes, strict=True):
        accepted = set(verified.path[0].tolist())
        for node, (x, y) in places.items():
            colour, width = (ACCEPTED, 2.5) if node in accepted else (DRAFTED, 1.0)
            if node:
                x0, y0 = places[int(tree.parents[0, node])]
                axes.plot([x0, x], [y0, y], color=colour, lw=width, zorder=1)
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour, "linewidth": width}
            text = word(int(tree.tokens[0, node]))
            axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, parse_math=False)
        title = f"{int(verified.accepted[0])} accepted, then the target's own “{word(int(verified.bonus[0]))}”"
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        rows, levels = max(y for _, y in places.values()), max(x for x, _ in places.values())
        axes.set(xlim=(-0.3, levels + 0.3), ylim=(rows + 0.6, -0.6))
        axes.axis("off")
    return figure
