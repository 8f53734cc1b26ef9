"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console

from kd_common.run.summary import files_of_run, print_lines, print_table
from llm_kd.data import TextDataModule
from llm_kd.evaluation.answers import display_text
from llm_kd.training.distillation import DistillationModule
from llm_kd.training.result import Result

BOUNDED = "a lower bound: model.teacher.cache holds the teacher's most likely tokens and the mass of all others"
"""Why the KL is marked, for people."""


def print_summary(
    result: Result, model: DistillationModule, data: TextDataModule, console: Console | None = None
) -> None:
    """Print what a run achieved: distances to teacher and text, sample answers, costs and where its files lie.

    Args:
        result: The run's result.
        model: The trained module, for the names of objective, selector and rollout.
        data: Its data, for whose responses are measured.
        console: Where to print; standard output by default.
    """
    head = model.student_with_head.head
    title = f"{type(head.objective).__name__} on {type(head.selector).__name__} tokens, {type(model.rollout).__name__}"
    whose = "teacher" if data.responses == "teacher" else "data set"
    best = result.best

    def row(name: str, values: Mapping[str, float], when: str, parameters: str = "") -> dict[str, str]:
        return {
            "": name,
            "NLL": f"{values['nll']:.3f}",
            "KL": kl(values),
            "agreement": f"{values['agreement']:.1%}",
            "TAR": f"{values['tar']:.1%}",
            "ROUGE-L": f"{result.answers[when].rouge_l:.1f}" if when in result.answers else "",
            "parameters": parameters,
        }

    rows = [row("student before", result.before, "before", f"{result.parameters['student']:,}")]
    if best is result.last:
        rows.append(row(f"last and best (epoch {best['epoch'] + 1:.0f})", best, "after"))
    else:
        rows.append(row(f"last (epoch {result.last['epoch'] + 1:.0f})", result.last, "after"))
        rows.append(row(f"best (epoch {best['epoch'] + 1:.0f})", best, ""))
    if is_whole(result.last):
        itself = {**result.last, "nll": result.last["teacher_nll"]}
        count = f"{result.parameters['teacher']:,}" if "teacher" in result.parameters else ""  # a stored one has none
        rows.insert(0, row("teacher", itself, "teacher", count) | {"KL": "0", "agreement": "100%", "TAR": ""})
    print_table(f"{title}: held-out responses of the {whose}", rows, console)
    first, last = result.history[0], result.last
    lines = {} if is_whole(last) else {"KL": BOUNDED}
    lines |= {
        "TAR": "held-out tokens at which the student's first choice is among the teacher's 5",
        "best": "by the KL on these very responses, so optimistic",
        "accepted in training": f"{first['train_tar']:.1%} in the first epoch, {last['train_tar']:.1%} in the last",
        "supervised tokens per second": f"{last['tokens_per_second']:.0f}",
        "peak memory": f"{result.peak_memory_gib:.2f} GiB",
    }
    if result.answers:
        lines["ROUGE-L"] = f"of greedy answers to {len(result.answers['before'].prompts)} held-out prompts, in per cent"
        lines["prompt"] = one_line(result.answers["before"].prompts[0])
        for when, given in result.answers.items():
            lines[f"answer, {when}"] = one_line(display_text(given.responses[0], given.written[0]))
    if result.run_dir is not None:
        lines["to try it"] = f"python -m llm_kd.generate --model {result.run_dir}/student_last --prompt ..."
    print_lines(lines | files_of_run(result.run_dir, model.export_name), console)


def is_whole(values: Mapping[str, float]) -> bool:
    """Return whether validation used the teacher's whole distribution, which alone gives its NLL."""
    return "teacher_nll" in values


def kl(values: Mapping[str, float]) -> str:
    """Return the KL to the teacher as text, marked where a truncated teacher bounds it only from below."""
    return f"{'' if is_whole(values) else '≥ '}{values['kl']:.3f}"


def one_line(text: str, width: int = 160) -> str:
    """Return text without line breaks, cut to a width."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
