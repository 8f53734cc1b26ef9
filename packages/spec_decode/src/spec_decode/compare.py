"""``python -m spec_decode.compare --config FILE``: drafters and their options trained alike over seeds, in one table.

A comparison file names the configurations all runs share and those each variant adds::

    base: [default]
    variants:
      FastEagle: [drafters/fast_eagle]
      stem of one layer: ["--model.drafter.options.stem=1"]
    seeds: [0, 1, 2]

The target's text and features are written once, by the first run. Every finished run is written to ``results.json`` at
once; an interrupted comparison continues where it stopped.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.compare")  # before the imports below, which take seconds

from collections.abc import Sequence
from pathlib import Path

import torch

from kd_common.run.compare import Row, by_variant, compare_command, mean_and_spread, write_table
from kd_common.run.errors import run_command
from spec_decode.decoding.autotune import measure_drafts, measure_passes
from spec_decode.drafters.files import for_inference
from spec_decode.fit import CONFIG_DIR, build, run


def run_one(variant: str, seed: int, args: Sequence[str], threads: int) -> Row:
    """Train one variant with one seed, time its draft, and return what the table needs, in plain types.

    Args:
        variant: Name in the table.
        seed: ``seed_everything`` of the run.
        args: Command line of :func:`spec_decode.fit.build`.
        threads: CPU threads of this run.
    """
    torch.set_num_threads(threads)
    quiet = ("--trainer.enable_progress_bar=false", "--measure_prompts=0")
    cli = build([*args, f"--seed_everything={seed}", *quiet])
    result = run(cli)
    target = cli.model.target
    drafter = for_inference(cli.model.drafter, cli.model.drafter_spec)
    for model in (target, drafter):
        model.pack()
    return {
        "variant": variant,
        "seed": seed,
        "history": result.history,
        "parameters": result.parameters["drafter"],
        "draft_seconds": measure_drafts(target, drafter, drafter.depth)[-1],
        "pass_seconds": measure_passes(target, (1,))[1],
        "args": list(args),
    }


def headline(row: Row) -> str:
    """Result of a finished run."""
    return f"tau {row['history'][-1]['tau']:.3f}"


def report(rows: Sequence[Row], output: Path) -> None:
    """Print the table and write it."""
    title = "held-out text, mean ± standard deviation over seeds; tau: tokens per pass of a chain, accepted + 1"
    write_table(summarise(rows), output / "results.md", title)


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One table row per variant: acceptance by level and tau at the last and best epoch, and what a draft costs."""
    lines = []
    for variant, runs in by_variant(rows).items():
        last = [run["history"][-1] for run in runs]
        levels = range(len(last[0]["acceptance"]))
        lines.append(
            {
                "variant": variant,
                "seeds": str(len(runs)),
                "parameters, M": f"{runs[0]['parameters'] / 1e6:.1f}",
                "acceptance by level, %": " ".join(
                    mean_and_spread([100 * epoch["acceptance"][level][0] for epoch in last], 1) for level in levels
                ),
                "tau, last": mean_and_spread([epoch["tau"] for epoch in last], 3),
                "tau, best": mean_and_spread([max(epoch["tau"] for epoch in run["history"]) for run in runs], 3),
                "draft, x T(1)": mean_and_spread([run["draft_seconds"] / run["pass_seconds"] for run in runs], 2),
                "training, s": f"{sum(e['seconds'] for run in runs for e in run['history']) / len(runs):.0f}",
            }
        )
    return lines


def main(args: list[str] | None = None) -> list[Row]:
    """Parse the comparison and run it."""
    return compare_command(
        run_one, headline, report, package="spec_decode", description=__doc__, config_dir=CONFIG_DIR, args=args
    )


if __name__ == "__main__":
    run_command(main)
