"""Figures of language distillation for reports and TensorBoard: the course of runs, and token tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kd_common.run.report import Series, curve_style

Metrics = Mapping[str, Series]
ACCEPTED, REJECTED = "#d7f0d0", "#f8d0cc"
PANELS = {"val/kl": "KL to the teacher (nats)", "val/nll": "negative log-likelihood (nats)", "val/tar": "TAR (%)"}
LINE = 96
"""Characters in a line of `plot_tokens`."""


def plot_progress(runs: Mapping[str, Metrics]) -> Figure:
    """Return the held-out KL, NLL and acceptance, and the acceptance in training, over the updates."""
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for number, (name, metrics) in enumerate(runs.items()):
        for axes, key in zip(panels, PANELS, strict=False):
            steps, values = metrics[key]
            made = np.where(steps > 0, steps + 1, 0)  # the first validation is before training
            axes.plot(made, (100 if key == "val/tar" else 1) * values, label=name, **curve_style(number))
        if "train/tar" in metrics:  # a run shorter than the log's interval has no entry
            steps, values = metrics["train/tar"]
            panels[3].plot(steps + 1, 100 * values, label=name, **curve_style(number))
    for axes, label in zip(
        panels, [f"held-out {label}" for label in PANELS.values()] + ["accepted in training (%)"], strict=True
    ):
        axes.set(xlabel="updates", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure


def plot_positions(tables: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw KL and acceptance by the position in the answer, in bins that hold equally many tokens, a curve per run."""
    return _by(tables, "position", "position in the answer (tokens)", bins=12)


def plot_entropy(tables: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Return the KL and acceptance by the teacher's entropy, in bins that hold equally many tokens, a curve per run."""
    return _by(tables, "teacher_entropy", "entropy of the teacher (nats)", bins=12)


def _by(tables: Mapping[str, Mapping[str, Tensor]], key: str, label: str, bins: int) -> Figure:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, table) in enumerate(tables.items()):
        style = curve_style(number)
        parts = np.array_split(np.argsort(table[key].numpy(), kind="stable"), bins)
        parts = [part for part in parts if len(part)]
        x, kl, top_k, spec_k = (
            [float(table[column].double().numpy()[part].mean()) for part in parts]
            for column in (key, "kl", "accepted", "speck")
        )
        left.plot(x, kl, label=name, **style)
        right.plot(x, [100 * value for value in top_k], label=f"{name}, Top-k", **style)
        right.plot(x, [100 * value for value in spec_k], ls="--", label=f"{name}, Spec-k expected", **style)
    left.set(xlabel=label, ylabel="KL to the teacher (nats)")
    right.set(xlabel=label, ylabel="accepted (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def mark_tokens(table: Mapping[str, Tensor], tokenizer: Any, number: int) -> Markup:
    """Return one example's answer as HTML: accepted tokens on green, rejected ones on red and boxed for a grey print.

    The line below a token is as many pixels thick as the teacher's entropy has nats; the pointer shows the details.
    """
    spans = []
    for row in (table["example"] == number).nonzero().squeeze(1).tolist():
        text, student, teacher = (
            tokenizer.decode([int(table[column][row])]) for column in ("token", "student_top", "teacher_top")
        )
        entropy = float(table["teacher_entropy"][row])
        details = (
            f"student: {student!r}, teacher: {teacher!r}, KL {float(table['kl'][row]):.2f}, teacher's entropy "
            f"{entropy:.2f}, Spec-k accepts with {float(table['speck'][row]):.0%}"
        )
        look = f"background:{ACCEPTED}" if table["accepted"][row] else f"background:{REJECTED};outline:1px dashed #a33"
        spans.append(
            Markup('<span style="{};border-bottom:{:.1f}px solid #555" title="{}">{}</span>').format(
                look, entropy, details, text
            )
        )
    return Markup("").join(spans)


def plot_tokens(table: Mapping[str, Tensor], tokenizer: Any, number: int) -> Figure:
    """Draw the tokens of `mark_tokens`: a bar as long as its token is an entropy of 5 nats or more."""
    boxes, column, line = [], 0, 0
    for row in (table["example"] == number).nonzero().squeeze(1).tolist():
        text = repr(tokenizer.decode([int(table["token"][row])]))[1:-1]
        if column and column + len(text) > LINE:
            column, line = 0, line + 1
        boxes.append((row, text, column, line))
        column += len(text)
    figure = Figure(figsize=(9.6, 0.3 * line + 0.6), layout="constrained")
    axes = figure.subplots()
    for row, text, column, line in boxes:
        accepted, entropy = bool(table["accepted"][row]), min(float(table["teacher_entropy"][row]), 5.0)
        edge: dict[str, Any] = {} if accepted else {"edgecolor": "#aa3333", "linestyle": ":"}
        axes.add_patch(Rectangle((column, line), len(text), 0.65, facecolor=ACCEPTED if accepted else REJECTED, **edge))
        axes.add_patch(Rectangle((column, line + 0.72), len(text) * entropy / 5, 0.12, facecolor="#555555"))
        axes.text(column, line + 0.5, text, family="monospace", fontsize=11, parse_math=False)
    axes.set(xlim=(0, LINE), ylim=(line + 1, 0))
    axes.axis("off")
    return figure
