"""``python -m spec_decode.report RUN...``: what drafters learned and what they bring, as one self-contained HTML page.

From the logs: loss and acceptance per level over the updates. From the saved drafters, on a few prompts: acceptance
per level, where the time goes, and draft trees with their accepted paths. Several runs for one target are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from kd_common.errors import run_command
from kd_common.report import Section, Series, read_config, read_metrics, run_names, write_report
from spec_decode.data.prompts import packaged_prompts, read_prompts
from spec_decode.decoder import PHASES, SpeculativeDecoder
from spec_decode.measure import Measurement, measure
from spec_decode.session import Session
from spec_decode.tree import DraftTree, depths
from spec_decode.verify import Verified

ACCEPTED, DRAFTED = "tab:green", "0.6"
DECODING = [phase for phase in PHASES if phase != "prefill"]


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
    """Acceptance per level on validation text, and the loss of the first level in training, over the updates."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, metrics) in enumerate(runs.items()):
        levels = sorted(key for key in metrics if key.startswith("val/acceptance_"))
        for level, key in enumerate(levels, start=1):
            steps, values = metrics[key]
            shade = 1 - 0.75 * (level - 1) / max(len(levels) - 1, 1)
            label = f"{name}, level {level}" if level in (1, len(levels)) else None
            left.plot(steps + 1, 100 * values, ".-", color=f"C{number}", alpha=shade, label=label)
        if "train/loss_1" in metrics:
            steps, values = metrics["train/loss_1"]
            right.plot(steps + 1, values, lw=1, color=f"C{number}", label=name)
    left.set(xlabel="updates", ylabel="accepted, given all levels above (%)")
    right.set(xlabel="updates", ylabel="cross-entropy of the first level (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


def plot_acceptance(measured: Mapping[str, Measurement]) -> Figure:
    """Acceptance of every level while decoding."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, found in measured.items():
        if found.acceptance:
            axes.plot(range(1, len(found.acceptance) + 1), [100 * a for a in found.acceptance], "o-", label=name)
    axes.set(xlabel="level", ylabel="accepted, given all levels above (%)", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_time(measured: Mapping[str, Measurement]) -> Figure:
    """Milliseconds per emitted token by phase."""
    figure = Figure(figsize=(7.2, 0.5 * len(measured) + 1.5), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(measured))
    for phase in [*DECODING, "overhead"]:
        widths = np.array([milliseconds(found)[phase] for found in measured.values()])
        axes.barh(list(measured), widths, left=left, label=phase)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token, prefill left out")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def milliseconds(found: Measurement) -> dict[str, float]:
    """Time per emitted token of every phase, and of what lies between them."""
    phases = {phase: found.phases[phase] for phase in DECODING}
    phases["overhead"] = found.seconds - sum(phases.values())
    return {phase: 1000 * seconds / max(found.tokens, 1) for phase, seconds in phases.items()}


def plot_trees(passes: Sequence[tuple[DraftTree, Verified]], tokenizer: Any) -> Figure:
    """Draft trees of consecutive passes: tokens, edges, and the accepted path in green; the bonus token below."""
    figure = Figure(figsize=(9.6, 2.3 * len(passes) + 0.4), layout="constrained")
    for axes, (tree, verified) in zip(figure.subplots(len(passes), 1, squeeze=False)[:, 0], passes, strict=True):
        tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        depth, accepted = depths(tree.parents)[0].tolist(), set(verified.path[0].tolist())
        seen: dict[int, int] = {}
        place: dict[int, tuple[float, float]] = {}
        for node, token in enumerate(tokens):
            if token < 0:
                continue
            place[node] = (depth[node], -seen.get(depth[node], 0))
            seen[depth[node]] = seen.get(depth[node], 0) + 1
            colour = ACCEPTED if node in accepted else DRAFTED
            if node:
                (x0, y0), (x1, y1) = place[parents[node]], place[node]
                axes.plot([x0, x1], [y0, y1], color=colour, lw=1.5, zorder=1)
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour, "linewidth": 1.2}
            axes.text(
                *place[node], repr(tokenizer.decode([token]))[1:-1], ha="center", va="center", fontsize=7, bbox=box
            )
        bonus = repr(tokenizer.decode([int(verified.bonus[0])]))[1:-1]
        axes.set_title(f"{int(verified.accepted[0])} accepted, then the target's own “{bonus}”", fontsize=8, loc="left")
        axes.set(xlim=(-0.5, max(depth) + 0.5), ylim=(-max(seen.values()) + 0.4, 0.6))
        axes.axis("off")
    return figure


def decode(
    runs: Mapping[str, Path], prompts: Sequence[str], *, tree: str, max_new_tokens: int
) -> tuple[dict[str, Measurement], dict[str, tuple[Passes, Any]]]:
    """Decode prompts greedily with every run's drafter and plainly; also keep the first passes of the first prompt.

    Args:
        runs: Folders by name, all for one target.
        prompts: Texts.
        tree: See `spec_decode.session.parse_tree`.
        max_new_tokens: Tokens per prompt.
    """
    measured: dict[str, Measurement] = {}
    pictures: dict[str, tuple[Passes, Any]] = {}
    for name, run in runs.items():
        session = Session.open(str(run / "drafter_best"), None, dtype="auto", device="cpu", tree=tree)
        encoded = [session.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
        decoders = {name: session.decoder}
        if not measured:
            decoders = {"plain decoding": SpeculativeDecoder(session.target), **decoders}
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_tokens": session.stops}
        measured |= measure(decoders, encoded, **settings)
        passes = Passes(4)
        session.decoder.generate(encoded[:1], **settings, on_pass=passes)
        pictures[name] = (passes, session.tokenizer)
    return measured, pictures


def report(
    runs: Sequence[Path],
    output: Path,
    *,
    prompts: Path | None = None,
    count: int = 4,
    tree: str = "chain",
    max_new_tokens: int = 96,
) -> Path:
    """Write the report of some runs; returns the page.

    Args:
        runs: Folders that `fit` printed.
        output: Folder of the page.
        prompts: JSONL file of prompts; the last packaged ones, on which `fit` does not train by default, if None.
        count: Prompts that are decoded; 0 leaves decoding out.
        tree: See `spec_decode.session.parse_tree`.
        max_new_tokens: Tokens per prompt.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If the runs have different targets.
    """
    names = {name: run for run, name in run_names(runs).items()}
    models = {name: read_config(run)["model"]["init_args"] for name, run in names.items()}
    metrics = {name: read_metrics(run) for name, run in names.items()}
    if len(targets := {model["target"]["name"] for model in models.values()}) > 1:
        raise ValueError(f"these runs are for different targets ({', '.join(sorted(targets))}); report on them apart")
    table = [
        {
            "run": name,
            "drafter": model["drafter"]["name"],
            "options": ", ".join(f"{key} {value}" for key, value in (model["drafter"]["options"] or {}).items()),
            "updates": f"{metrics[name]['val/tau'][0][-1] + 1:.0f}",
            "tau, validation": f"{metrics[name]['val/tau'][1][-1]:.2f}",
        }
        for name, model in models.items()
    ]
    sections = [
        Section("Runs", f"Target: {targets.pop()}. tau: tokens per target pass, accepted + 1.", table=table),
        Section("Training", "Dark: the first level; light: the last.", plot_training(metrics)),
    ]
    if count:
        texts = (packaged_prompts()[::-1] if prompts is None else read_prompts(prompts))[:count]
        measured, pictures = decode(names, texts, tree=tree, max_new_tokens=max_new_tokens)
        plain = measured["plain decoding"]
        speeds = [
            {
                "decoder": name,
                "tokens/s": f"{found.tokens_per_second:.1f}",
                "over plain decoding": f"{found.tokens_per_second / plain.tokens_per_second:.2f}x",
                "tau": f"{found.tau:.2f}",
            }
            for name, found in measured.items()
        ]
        about = f"{len(texts)} prompts, greedy, up to {max_new_tokens} tokens each, tree {tree}."
        sections += [
            Section("Acceptance while decoding", about, plot_acceptance(measured)),
            Section("Where the time goes", about, plot_time(measured), speeds),
        ]
        for name, (passes, tokenizer) in pictures.items():
            if passes.kept:
                text = "The first passes of the first prompt: what was drafted, and in green what the target accepted."
                sections.append(Section(f"Draft trees of {name}", text, plot_trees(passes.kept, tokenizer)))
    return write_report(output, "Drafting with " + ", ".join(names), sections)


def main(args: list[str] | None = None) -> Path:
    """Parse the command line, write the report and say where it is."""
    parser = ArgumentParser(prog="python -m spec_decode.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument("--output", type=Path, default=Path("runs/report"), help="Folder of the page.")
    parser.add_argument("--prompts", type=Path | None, default=None, help="JSONL file; packaged prompts by default.")
    parser.add_argument("--count", type=int, default=4, help="Prompts that are decoded; 0 for none.")
    parser.add_argument("--tree", type=str, default="chain", help="Tree to draft, as in spec_decode.generate.")
    parser.add_argument("--max_new_tokens", type=int, default=96, help="Tokens per prompt.")
    settings = parser.parse_args(args)
    page = report(
        settings.runs,
        settings.output,
        prompts=settings.prompts,
        count=settings.count,
        tree=settings.tree,
        max_new_tokens=settings.max_new_tokens,
    )
    Console().print(f"written to {page}", soft_wrap=True, highlight=False)
    return page


if __name__ == "__main__":
    run_command(main)
