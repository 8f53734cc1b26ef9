"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_common.run.checkpoints import files_of_run
from kd_common.terminal import printable
from llm_kd.data import TextDataModule
from llm_kd.evaluation.answers import visible
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
    console = console or Console()
    head = model.distiller.head
    title = f"{type(head.objective).__name__} on {type(head.selector).__name__} tokens, {type(model.rollout).__name__}"
    whose = "teacher" if data.responses == "teacher" else "data set"
    table = Table(title=f"{title}: held-out responses of the {whose}")
    for column in ("", "NLL", "KL", "agreement", "TAR", "ROUGE-L", "parameters"):
        table.add_column(column, justify="left" if not column else "right")
    best = result.best
    rows = {"student before": (result.before, "before")}
    if best is result.last:
        rows[f"last and best (epoch {best['epoch'] + 1:.0f})"] = (best, "after")
    else:
        rows[f"last (epoch {result.last['epoch'] + 1:.0f})"] = (result.last, "after")
        rows[f"best (epoch {best['epoch'] + 1:.0f})"] = (best, "")
    if is_whole(result.last):
        table.add_row(
            "teacher",
            f"{result.last['teacher_nll']:.3f}",
            "0",
            "100%",
            "",
            rouge(result, "teacher"),
            f"{result.parameters['teacher']:,}" if "teacher" in result.parameters else "",  # a stored one is not loaded
        )
    for name, (values, when) in rows.items():
        parameters = f"{result.parameters['student']:,}" if when == "before" else ""
        table.add_row(
            name,
            f"{values['nll']:.3f}",
            kl(values),
            f"{values['agreement']:.1%}",
            f"{values['tar']:.1%}",
            rouge(result, when),
            parameters,
        )
    console.print(table)
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
            lines[f"answer, {when}"] = one_line(visible(given.responses[0], given.written[0]))
    if result.run_dir is not None:
        # A resumed run has no best student of its own where the best epoch came before it.
        found = ",".join(which for which in ("last", "best") if (result.run_dir / f"student_{which}").is_dir())
        lines["student"] = f"{result.run_dir}/student_{{{found}}}, for AutoModelForCausalLM.from_pretrained"
        lines["to try it"] = f"python -m llm_kd.generate --model {result.run_dir}/student_last --prompt ..."
        lines |= files_of_run(result.run_dir, " --trainer.max_epochs ...")
    for name, value in lines.items():
        console.print(f"{name:<{max(map(len, lines))}}  {escape(printable(value))}", soft_wrap=True, highlight=False)


def is_whole(values: Mapping[str, float]) -> bool:
    """Whether validation means were measured against the teacher's whole distribution: only that gives its NLL."""
    return "teacher_nll" in values


def kl(values: Mapping[str, float]) -> str:
    """The KL to the teacher among validation means, marked where a truncated teacher bounds it only from below."""
    return f"{'' if is_whole(values) else '≥ '}{values['kl']:.3f}"


def rouge(result: Result, when: str) -> str:
    """ROUGE-L of some answers in per cent; empty if there are none."""
    return f"{result.answers[when].rouge_l:.1f}" if when in result.answers else ""


def one_line(text: str, width: int = 160) -> str:
    """Text without line breaks, cut to a width."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
