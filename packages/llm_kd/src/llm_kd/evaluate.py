"""`python -m llm_kd.evaluate --student FOLDER --data.val FILE`: how good a student's tokens and answers are.

On the answers in the file: NLL, and with `--teacher` the KL to it, agreement and token acceptance rate. On answers
that the student writes: ROUGE-L, by default in the MiniLLM protocol.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.evaluate")  # before the imports below, which take seconds

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from kd_common.checks import at_least
from kd_common.errors import UserError
from kd_common.files import write_atomically
from kd_common.hub.language_models import load_config, load_tokenizer
from kd_common.run.compare import mean_and_spread
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_device, check_file, default_device
from kd_common.sampling import SamplingParams
from kd_common.terminal import printable
from llm_kd.data import TextDataModule
from llm_kd.evaluation.answers import Answers, answer_prompts
from llm_kd.evaluation.harness import load_harness, run_harness
from llm_kd.head import TeacherHiddenStates
from llm_kd.head.metrics import token_metrics
from llm_kd.models import Backbone, TeacherSpec, load_teacher, shared_vocabulary
from llm_kd.training.student_with_head import token_metric_means

SEEDS = [10, 20, 30, 40, 50]
"""Seeds of the MiniLLM protocol, one set of answers each."""


@torch.no_grad()
def token_means(
    student: Backbone, teacher: Backbone | None, data: TextDataModule, *, vocab_size: int, k: int = 5
) -> dict[str, float]:
    """Means over the supervised tokens of the validation data.

    Args:
        student: The model, in evaluation mode, on the device it is to run on.
        teacher: What to compare it with, likewise; None for the student's likelihood alone.
        data: The data.
        vocab_size: Number of tokens of the shared tokenizer.
        k: The teacher accepts the student's most likely token if it is among its own k most likely ones.

    Returns:
        `nll` in nats; with a teacher also `teacher_nll`, `kl` (teacher || student) in nats, `agreement` (both
        hold the same token most likely) and `tar`, the share of accepted tokens.

    Raises:
        UserError: If the likelihood is not finite.
    """
    data.setup("validate")
    device = next(student.parameters()).device
    other = teacher or student  # on its own, the student is compared with itself
    sums: dict[str, float] = {}
    for batch in tqdm(data.val_dataloader(), desc="tokens"):
        batch = batch.to(device)
        hidden = student(batch.input_ids, batch.position_ids)[batch.predict]
        others = hidden if teacher is None else teacher(batch.input_ids, batch.position_ids)[batch.predict]
        teacher_output = TeacherHiddenStates(others, other.lm_head())
        found = token_metrics(hidden, student.lm_head(), teacher_output, batch.labels[batch.predict], vocab_size, k)
        for name, value in (found | {"tokens": batch.predict.sum()}).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    means = token_metric_means(sums)
    names = ("nll",) if teacher is None else ("nll", "kl", "agreement", "tar", "teacher_nll")
    if broken := [name for name in names if not math.isfinite(means[name])]:
        raise UserError(f"{', '.join(broken)} not finite: the weights hold NaN, or overflow in this dtype; try float32")
    return {name: means[name] for name in names}


def parser() -> CommandParser:
    """Command line of this module."""
    parser = CommandParser(prog="python -m llm_kd.evaluate", description=__doc__, allow_abbrev=False)
    parser.example = "--student runs/smollm2/run_0/student_last --data.val FILE.jsonl"
    parser.add_argument("--student", type=str, required=True, help="Saved student, or any other folder or name.")
    parser.add_argument("--teacher", type=str | None, default=None, help="Teacher to compare it with.")
    parser.add_argument("--k", type=int, default=5, help="Most likely tokens of the teacher, for the acceptance rate.")
    parser.add_argument(
        "--seeds", type=list[int], default=SEEDS, help="Answers are written once per seed; [] for none."
    )
    parser.add_argument("--limit", type=int | None, default=None, help="Answer only the first prompts.")
    parser.add_argument(
        "--max_prompt",
        type=int,
        default=256,
        help="Largest number of tokens of a prompt; an answer may have data.max_length minus this.",
    )
    parser.add_class_arguments(SamplingParams, skip={"max_new_tokens"})
    unused: set[str | int] = {"train", "batch_size", "packing", "limit_train", "seed"}
    parser.add_class_arguments(TextDataModule, "data", skip=unused)
    parser.link_arguments("student", "data.tokenizer")
    parser.set_defaults({"no_repeat_ngram_size": 6, "data.responses": "dataset"})
    parser.add_argument("--harness", type=str | None, default=None, help="Tasks of lm-eval, separated by commas.")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file of settings, numbers and answers.")
    parser.add_argument("--dtype", type=str, default="float32", help="Precision of the student's weights.")
    parser.add_argument("--teacher_dtype", type=str | None, default=None, help="The teacher's, if it is another.")
    parser.add_argument("--attention", type=str, default="sdpa", help="Attention of transformers; Gemma 2 needs eager.")
    parser.add_argument("--device", type=str | None, default=None, help="Device; by default a GPU if there is one.")
    return parser


def check(settings: Namespace) -> SamplingParams:
    """Check the settings that would fail only once models are loaded, and return how answers are drawn.

    Raises:
        UserError: If the harness is asked for and not installed, or for settings that are out of range or do not fit
            each other.
    """
    if settings.harness is not None:
        load_harness()
    if settings.data.responses == "teacher" and settings.teacher is None:
        raise UserError("data.responses teacher compares with a teacher's answers: name it with --teacher")
    for name in ("limit", "max_prompt", "k"):
        if settings[name] is not None:
            at_least(f"--{name}", settings[name], 1)
    if settings.data.max_length <= settings.max_prompt:
        raise UserError(
            f"--data.max_length {settings.data.max_length} leaves no room for an answer behind a prompt of "
            f"--max_prompt {settings.max_prompt} tokens; raise the one or lower the other"
        )
    if settings.temperature == 0 and len(settings.seeds) > 1:
        raise UserError(
            "--temperature 0 draws nothing, so every seed gives the same answers: give one, as in --seeds [0]"
        )
    drawing = {f.name: settings[f.name] for f in dataclasses.fields(SamplingParams) if f.name != "max_new_tokens"}
    return SamplingParams(max_new_tokens=settings.data.max_length - settings.max_prompt, **drawing)


def load(name: str, dtype: str, settings: Namespace) -> Backbone:
    """Load a model, frozen and in evaluation mode, on the device."""
    return load_teacher(TeacherSpec(name, dtype, settings.attention)).to(settings.device)


def evaluate(settings: Namespace, sampling: SamplingParams) -> dict[str, Any]:
    """Evaluate as a parsed command line asks; see `main`."""
    names = {"teacher": settings.teacher or settings.student, "student": settings.student}
    configs = {role: load_config(name) for role, name in names.items()}
    vocab_size = shared_vocabulary(*map(load_tokenizer, names.values()), *configs.values())
    data: TextDataModule = parser().instantiate_classes(settings).data
    data.check_context_length(configs, ("val",))  # what is wrong with the data shows before models are loaded
    student = load(settings.student, settings.dtype, settings)
    teacher_dtype = settings.teacher_dtype or settings.dtype
    teacher = None if settings.teacher is None else load(settings.teacher, teacher_dtype, settings)
    if teacher is not None:
        data.write_responses(teacher.model, splits=("val",))
    result: dict[str, Any] = {"tokens": token_means(student, teacher, data, vocab_size=vocab_size, k=settings.k)}
    how: dict[str, Any] = {"limit": settings.limit, "sampling": sampling, "max_prompt": settings.max_prompt}
    answers = {
        seed: answer_prompts(student, data, seed=seed, batch_size=data.generation_batch_size, **how)
        for seed in tqdm(settings.seeds, desc="answers", unit="seed", disable=not settings.seeds)
    }
    if answers:
        result["rouge_l"] = over_seeds(answers)
    split = data.splits["val"]
    counts = {"rows": split.rows, "dropped": split.dropped, "max_tokens": split.max_tokens}
    result["data"] = counts | {"supervised_tokens": split.supervised}
    result["answers"] = [
        {"seed": seed, "prompt": prompt, "response": response, "references": references, "rouge_l": score}
        for seed, a in answers.items()
        for prompt, response, references, score in zip(a.prompts, a.responses, a.references, a.scores, strict=True)
    ]
    return result


def over_seeds(answers: Mapping[int, Answers]) -> dict[str, Any]:
    """Return ROUGE-L in per cent: mean, sample standard deviation (None for one seed), and every seed's value."""
    scores = {str(seed): found.rouge_l for seed, found in answers.items()}
    first = next(iter(answers.values()))
    return {
        "mean": statistics.fmean(scores.values()),
        "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "seeds": scores,
        "prompts": len(first.prompts),
        "left_out": first.left_out,
    }


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print a result of `main` as a table, with every setting below it."""
    tokens, settings, rouge, data = (result.get(name, {}) for name in ("tokens", "settings", "rouge_l", "data"))
    table = Table(
        title=f"{escape(printable(settings['student']))}: {data['supervised_tokens']:,} tokens of {data['rows']:,} rows"
    )
    for column in ("", "NLL", "KL", "agreement", f"TAR, top-{settings['k']}", "ROUGE-L"):
        table.add_column(column, justify="right" if column else "left")
    compared = (
        [f"{tokens['kl']:.3f}", f"{tokens['agreement']:.1%}", f"{tokens['tar']:.1%}"] if "kl" in tokens else [""] * 3
    )
    table.add_row(
        "student", f"{tokens['nll']:.3f}", *compared, mean_and_spread(list(rouge["seeds"].values())) if rouge else ""
    )
    if "teacher_nll" in tokens:
        table.add_row("teacher", f"{tokens['teacher_nll']:.3f}", "0", "100%", "", "")
    console.print(table)
    lines = {"rows left out": f"{data['dropped']:,} of more than {data['max_tokens']} tokens; not in the token metrics"}
    if rouge:
        lines["prompts answered"] = f"{rouge['prompts']:,}, {rouge['left_out']:,} longer than max_prompt not asked"
    lines["settings"] = ", ".join(f"{name} {value}" for name, value in settings.items())
    for name, value in lines.items():
        console.print(f"{name:<{max(map(len, lines))}}  {escape(printable(value))}", soft_wrap=True, highlight=False)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Evaluate and print.

    Returns:
        `settings`; `data`: counts; `tokens`: see `token_means`; `rouge_l`: see `over_seeds`;
        `answers`, all of them; `harness`: see `llm_kd.evaluation.harness.run_harness`. What was not asked
        for is left out.

    Raises:
        CacheError, EncodingError, UserError, RowsError: From the data.
        ModelNotFoundError: If there is no such model.
        UserError: If the harness is asked for and not installed, or for settings that cannot be used.
    """
    settings = parser().parse_args(args)
    settings.device = settings.device or default_device()
    check_device(settings.device)
    sampling = check(settings)
    output = None if settings.output is None else Path(settings.output)
    if output is not None:
        check_file("--output", output)
        output.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    shown = flat(settings.as_dict()) | {"max_new_tokens": sampling.max_new_tokens}
    result = {"settings": shown, **evaluate(settings, sampling)}
    save(result, output)
    print_result(result, console)
    if settings.harness is not None:  # last: what it stumbles over must not cost the rest
        tasks = [task.strip() for task in settings.harness.split(",")]
        where = {"dtype": settings.dtype, "device": settings.device, "batch_size": settings.data.val_batch_size}
        result["harness"] = run_harness(settings.student, tasks, **where)
        save(result, output)
        for task, values in result["harness"].items():
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            console.print(f"lm-eval {task}  {numbers}", markup=False, soft_wrap=True, highlight=False)
    return result


def save(result: Mapping[str, Any], output: Path | None) -> None:
    """Write a result as JSON, if a file is asked for."""
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their names on the command line."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


if __name__ == "__main__":
    run_command(main)
