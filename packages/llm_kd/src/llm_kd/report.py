"""`python -m llm_kd.report RUN...`: what runs did and why, as one self-contained HTML page.

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
from torch import Tensor

from kd_common.errors import UserError
from kd_common.hub.language_models import load_causal_lm, load_config, load_tokenizer
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser
from kd_common.run.report import LoggedRun, Section, report_command
from llm_kd.data import TextDataModule
from llm_kd.data.example import Example
from llm_kd.models import Backbone, shared_vocabulary
from llm_kd.viz.figures import mark_tokens, plot_entropy, plot_positions, plot_progress
from llm_kd.viz.token_table import token_table

METHOD = {"objective": "ForwardKL", "selector": "TopK", "rollout": "OffPolicy"}
"""Parts of a method, with the default of each."""


def class_name(settings: Any, default: str) -> str:
    """Last part of the class path of a block of a configuration."""
    return settings["class_path"].rpartition(".")[2] if settings else default


class Run(LoggedRun):
    """A finished run of a student."""

    command = "llm_kd.fit"
    validated = ("val/tar",)

    @property
    def label(self) -> str:
        """Return its name in figures: its method and data, and the name of its folder."""
        method = ", ".join(class_name(self.model[part], default) for part, default in METHOD.items())
        train = self.data["train"]
        data = " + ".join(Path(file).name for file in ([train] if isinstance(train, str) else train))
        return f"{method} on {data} ({self.name})"

    def summary(self) -> dict[str, str]:
        """Line of the first table."""
        metrics = self.metrics
        bound = "" if "val/teacher_nll" in metrics else "≥ "  # a stored teacher that lacks tokens
        return {
            "run": self.name,
            **{part: class_name(self.model[part], default) for part, default in METHOD.items()},
            "updates": f"{metrics['val/kl'][0][-1] + 1:.0f}",
            **{
                f"{label}, start → last": mark + " → ".join(f"{metrics[key][1][i]:.3f}" for i in (0, -1))
                for label, key, mark in (("KL", "val/kl", bound), ("NLL", "val/nll", ""))
            },
            "TAR %, start → last": " → ".join(f"{100 * metrics['val/tar'][1][i]:.1f}" for i in (0, -1)),
        }

    @property
    def student_folder(self) -> str:
        """Return the student as training left it.

        Raises:
            UserError: If there is none.
        """
        folder = self.folder / "student_last"
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: the run was stopped before its end (--limit 0: logs alone)")
        return str(folder)


def held_out(settings: Mapping[str, Any], tokenizer: str, limit: int) -> TextDataModule:
    """Return the data of a run's configuration, at most `limit` held-out rows."""
    parser = CommandParser()
    parser.add_class_arguments(TextDataModule, "data")
    kept = {name: value for name, value in settings.items() if value is not None}
    return parser.instantiate_classes(
        parser.parse_object({"data": {**kept, "tokenizer": tokenizer, "limit_val": limit}})
    ).data


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse students of different teachers, and runs with different held-out texts.

    Raises:
        UserError: Naming what differs.
    """
    if len(teachers := {run.model["teacher"]["name"] for run in runs}) > 1:
        raise UserError(f"these runs have different teachers ({', '.join(sorted(teachers))}); report on them apart")
    keys = ("val", "limit_val", "responses", "fields", "max_length", "truncate", "system")
    if differing := [key for key in keys if len({repr(run.data.get(key)) for run in runs}) > 1]:
        raise UserError(
            f"these runs have other held-out texts (data.{', data.'.join(differing)} differ); report on them apart, or "
            "with --limit 0 on their logs alone"
        )


def student_sections(runs: Sequence[Run], *, limit: int, k: int, texts: int) -> list[Section]:
    """Compare the students on the held-out text of the first run."""
    check_comparable(runs)
    folders = [run.student_folder for run in runs]
    settings, student = runs[0].model["teacher"], folders[0]
    name = settings["name"]
    tokenizer = load_tokenizer(name)
    vocab_size = shared_vocabulary(tokenizer, load_tokenizer(student), load_config(name), load_config(student))
    data = held_out(runs[0].data, name, limit)
    teacher = Backbone(load_causal_lm(name, settings["dtype"], attention=settings["attention"])).eval()
    if data.responses == "teacher":
        data.write_responses(teacher.model, splits=("val",))
    data.setup("validate")
    examples = [example for example in data.splits["val"].examples if example.num_supervised]
    tables = {}
    for run, folder in zip(runs, folders, strict=True):
        model = load_causal_lm(folder, "float32", attention=run.model["student"]["attention"])
        tables[run.label] = token_table(Backbone(model).eval(), teacher, examples, vocab_size=vocab_size, k=k)
    author = "teacher" if data.responses == "teacher" else "data set"
    number = sum(example.num_supervised for example in examples)
    about = f"{number:,} tokens of {len(examples)} held-out answers. "
    return [
        Section(
            "Acceptance and the teacher's entropy",
            about
            + f"Top-k: the student's likeliest token is among the teacher's {k} likeliest. Spec-k: at least one of "
            f"{k} draws of the student is accepted.",
            plot_entropy(tables),
        ),
        Section("Loss and acceptance by position", about, plot_positions(tables)),
        *token_sections(tables, examples[:texts], tokenizer, author, k),
    ]


def token_sections(
    tables: Mapping[str, Mapping[str, Tensor]], examples: Sequence[Example], tokenizer: Any, author: str, k: int
) -> list[Section]:
    """Answers token by token, coloured by every student's acceptance.

    Args:
        tables: Tokens of the answers by run; see `token_table`.
        examples: The answers.
        tokenizer: Their tokenizer.
        author: Who wrote them.
        k: Most likely tokens of the teacher that count as acceptance.
    """
    text = (
        f"The answer is the {author}'s, the same for every run; colours tell the students apart. Green: "
        f"Top-{k} accepts what the student would have said here; red, in a dashed box: it does not. The thicker "
        "the line below a token, the larger the teacher's entropy."
    )
    sections = []
    for number, example in enumerate(examples):
        prompt = str(tokenizer.decode(example.input_ids[: example.prompt_length], skip_special_tokens=True))
        parts = [Markup("<p><b>Prompt</b></p>") + escape(prompt.strip())]
        for name, table in tables.items():
            heading = Markup("<p><b>The {}'s answer, coloured by the student of {}</b></p>").format(author, name)
            parts.append(heading + mark_tokens(table, tokenizer, number))
        sections.append(Section(f"Tokens of text {number + 1}", text, markup=Markup("").join(parts)))
    return sections


def sections(runs: Sequence[Run], *, limit: int = 16, k: int = 5, texts: int = 3) -> list[Section]:
    """Compare students.

    Args:
        runs: Their runs.
        limit: Held-out rows the students are run on; 0 leaves the students out.
        k: Most likely tokens of the teacher that count as acceptance.
        texts: Answers shown token by token.

    Raises:
        UserError: If the runs have different teachers or held-out texts.
    """
    about = (
        "TAR: the share of tokens for which the student's likeliest one is among the teacher's five likeliest. In "
        "training it is the acceptance of the run's own selector."
    )
    found = [
        Section("Runs", table=[run.summary() for run in runs]),
        Section("Progress", about, plot_progress({run.label: run.metrics for run in runs})),
    ]
    return found + (student_sections(runs, limit=limit, k=k, texts=texts) if limit else [])


def main(args: list[str] | None = None) -> Path:
    """Write the report that a command line asks for."""
    return report_command(Run, sections, package="llm_kd", description=__doc__, args=args)


if __name__ == "__main__":
    run_command(main)
