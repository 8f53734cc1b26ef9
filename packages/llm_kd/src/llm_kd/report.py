"""``python -m llm_kd.report RUN...``: what runs did and why, as one self-contained HTML page.

From the logs: KL, NLL and acceptance over the updates. From the saved students, on held-out text: accepted and rejected
tokens in place, acceptance by the teacher's entropy, loss by position. Several runs are laid over each other.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.report")  # before the imports below, which take seconds

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from rich.console import Console

from kd_common.errors import UserError
from kd_common.hub.language_models import load_causal_lm, load_config, load_tokenizer
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_folder
from kd_common.run.report import Section, check_validated, read_config, read_metrics, run_names, write_report
from kd_common.terminal import printable
from llm_kd.data import TextDataModule
from llm_kd.models import Backbone, shared_vocabulary
from llm_kd.viz.figures import Metrics, mark_tokens, plot_entropy, plot_positions, plot_progress
from llm_kd.viz.token_table import token_table

METHOD = {"objective": "ForwardKL", "selector": "TopK", "rollout": "OffPolicy"}
"""Parts of a method, with the default of each."""


def class_name(settings: Any, default: str) -> str:
    """Last part of the class path of a block of a configuration."""
    return settings["class_path"].rpartition(".")[2] if settings else default


def label(name: str, config: Mapping[str, Any]) -> str:
    """What a run is called in figures: its method and data, and the name of its folder."""
    model, train = config["model"]["init_args"], config["data"]["init_args"]["train"]
    method = ", ".join(class_name(model[part], default) for part, default in METHOD.items())
    data = " + ".join(Path(file).name for file in ([train] if isinstance(train, str) else train))
    return f"{method} on {data} ({name})"


def summary(name: str, config: Mapping[str, Any], metrics: Metrics) -> dict[str, str]:
    """Line of the first table."""
    model = config["model"]["init_args"]
    bound = "" if "val/teacher_nll" in metrics else "≥ "  # a stored teacher that lacks tokens
    return {
        "run": name,
        **{part: class_name(model[part], default) for part, default in METHOD.items()},
        "updates": f"{metrics['val/kl'][0][-1] + 1:.0f}",
        **{
            f"{label}, start → last": mark + " → ".join(f"{metrics[key][1][i]:.3f}" for i in (0, -1))
            for label, key, mark in (("KL", "val/kl", bound), ("NLL", "val/nll", ""))
        },
        "TAR %, start → last": " → ".join(f"{100 * metrics['val/tar'][1][i]:.1f}" for i in (0, -1)),
    }


def held_out(settings: Mapping[str, Any], tokenizer: str, limit: int) -> TextDataModule:
    """The data of a run's configuration, at most ``limit`` held-out rows."""
    parser = CommandParser()
    parser.add_class_arguments(TextDataModule, "data")
    kept = {name: value for name, value in settings.items() if value is not None}
    return parser.instantiate_classes(
        parser.parse_object({"data": {**kept, "tokenizer": tokenizer, "limit_val": limit}})
    ).data


def student_sections(
    runs: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]], *, limit: int, k: int, texts: int
) -> list[Section]:
    """What the students make of the held-out text of the first run.

    Raises:
        UserError: If a run has left no student.
        UserError: If the runs have different teachers or held-out texts.
    """
    first = next(iter(configs.values()))
    model, settings = first["model"]["init_args"], first["data"]["init_args"]
    teachers = {config["model"]["init_args"]["teacher"]["name"] for config in configs.values()}
    if len(teachers) > 1:
        raise UserError(f"these runs have different teachers ({', '.join(sorted(teachers))}); report on them apart")
    differing = [
        key
        for key in ("val", "limit_val", "responses", "fields", "max_length", "truncate", "system")
        if len({repr(config["data"]["init_args"].get(key)) for config in configs.values()}) > 1
    ]
    if differing:
        raise UserError(
            f"these runs have other held-out texts (data.{', data.'.join(differing)} differ); report on them apart, or "
            "with --limit 0 on their logs alone"
        )
    folders = {name: run / "student_last" for name, run in runs.items()}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: the run was stopped before its end (--limit 0: logs alone)")
    teacher_name = model["teacher"]["name"]
    tokenizer = load_tokenizer(teacher_name)
    student_folder = str(next(iter(folders.values())))
    vocab_size = shared_vocabulary(
        tokenizer, load_tokenizer(student_folder), load_config(teacher_name), load_config(student_folder)
    )
    data = held_out(settings, teacher_name, limit)
    teacher = Backbone(
        load_causal_lm(teacher_name, model["teacher"]["dtype"], attention=model["teacher"]["attention"])
    ).eval()
    if data.responses == "teacher":
        data.write_responses(teacher.model, splits=("val",))
    data.setup("validate")
    examples = [example for example in data.splits["val"].examples if example.num_supervised]
    tables = {}
    for name, folder in folders.items():
        attention = configs[name]["model"]["init_args"]["student"]["attention"]
        student = Backbone(load_causal_lm(str(folder), "float32", attention=attention)).eval()
        tables[name] = token_table(student, teacher, examples, vocab_size=vocab_size, k=k)
    tokens = sum(example.num_supervised for example in examples)
    author = "teacher" if data.responses == "teacher" else "data set"
    about = f"{tokens:,} tokens of {len(examples)} held-out answers. "
    sections = [
        Section(
            "Acceptance and the teacher's entropy",
            about
            + f"Top-k: the student's likeliest token is among the teacher's {k} likeliest. Spec-k: at least one of "
            f"{k} draws of the student is accepted.",
            plot_entropy(tables),
        ),
        Section("Loss and acceptance by position", about, plot_positions(tables)),
    ]
    for number, example in enumerate(examples[:texts]):
        prompt = str(tokenizer.decode(example.input_ids[: example.prompt_length], skip_special_tokens=True))
        parts = [Markup("<p><b>Prompt</b></p>") + escape(prompt.strip())]
        for name, table in tables.items():
            heading = Markup("<p><b>The {}'s answer, coloured by the student of {}</b></p>").format(author, name)
            parts.append(heading + mark_tokens(table, tokenizer, number))
        text = (
            f"The answer is the {author}'s, the same for every run; colours tell the students apart. Green: "
            f"Top-{k} accepts what the student would have said here; red, in a dashed box: it does not. The thicker "
            "the line below a token, the larger the teacher's entropy."
        )
        sections.append(Section(f"Tokens of text {number + 1}", text, markup=Markup("").join(parts)))
    return sections


def report(runs: Sequence[Path], output: Path, *, limit: int = 16, k: int = 5, texts: int = 3) -> Path:
    """Write the report of some runs; returns the page.

    Args:
        runs: Folders that `fit` printed.
        output: Folder of the page.
        limit: Held-out rows the students are run on; 0 leaves the students out.
        k: Most likely tokens of the teacher that count as acceptance.
        texts: Answers shown token by token.

    Raises:
        UserError: If a folder holds no finished run.
        UserError: If the runs have different teachers or held-out texts, or one is of another command.
    """
    names = {name: run for run, name in run_names(runs).items()}
    configs = {name: read_config(run) for name, run in names.items()}
    metrics = {name: read_metrics(run) for name, run in names.items()}
    for name, run in names.items():
        check_validated(run, metrics[name], "llm_kd.fit", "val/tar")
    labels = {name: label(name, configs[name]) for name in names}
    sections = [
        Section("Runs", table=[summary(name, configs[name], metrics[name]) for name in names]),
        Section(
            "Progress",
            "TAR: the share of tokens for which the student's likeliest one is among the teacher's five likeliest. In "
            "training it is the acceptance of the run's own selector.",
            plot_progress({labels[name]: values for name, values in metrics.items()}),
        ),
    ]
    if limit:
        folders = {labels[name]: run for name, run in names.items()}
        called = {labels[name]: config for name, config in configs.items()}
        sections += student_sections(folders, called, limit=limit, k=k, texts=texts)
    return write_report(output, "Distillation of " + ", ".join(names), sections)


def main(args: list[str] | None = None) -> Path:
    """Parse the command line, write the report and say where it is."""
    parser = CommandParser(prog="python -m llm_kd.report", description=__doc__, allow_abbrev=False)
    parser.example = "runs/smollm2/run_0"
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument("--output", type=Path, default=Path("runs/report/llm_kd"), help="Folder of the page.")
    parser.add_argument("--limit", type=int, default=16, help="Held-out rows the students are run on; 0 for none.")
    parser.add_argument("--k", type=int, default=5, help="Most likely tokens of the teacher that count as accepted.")
    parser.add_argument("--texts", type=int, default=3, help="Answers shown token by token.")
    settings = parser.parse_args(args)
    check_folder("--output", settings.output)
    page = report(settings.runs, settings.output, limit=settings.limit, k=settings.k, texts=settings.texts)
    Console().print(printable(f"written to {page}"), markup=False, soft_wrap=True, highlight=False)
    return page


if __name__ == "__main__":
    run_command(main)
