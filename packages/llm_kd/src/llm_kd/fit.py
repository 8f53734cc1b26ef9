"""`python -m llm_kd.fit`: distil a language model and report what came of it.

`build` parses and makes everything, `run` trains, `main` does both and prints the table. Notebooks
and tests call `build([...])` with the same arguments as the command line.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.fit")  # before the imports below, which take seconds

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

import llm_kd.objectives
import llm_kd.selection
import llm_kd.training.callbacks
import llm_kd.training.rollout
import llm_kd.training.strategies  # noqa: F401  (makes class names and the strategy known to the command line)
from kd_common.errors import UserError
from kd_common.hub.language_models import load_config
from kd_common.run.cli import FitCLI, fixed_seed
from kd_common.run.errors import run_command
from kd_common.run.memory import peak_memory_gib
from kd_common.run.rehearsal import alone
from kd_common.run.result import count_parameters
from kd_common.run.run_lock import holding_folder
from kd_common.run.trainer_settings import check_batches
from llm_kd.data import SPLITS, TextDataModule
from llm_kd.evaluation.answers import Answers, answer_prompts
from llm_kd.models import Backbone
from llm_kd.models.context_length import check_context_length
from llm_kd.training.distillation import DistillationModule
from llm_kd.training.rehearsal import rehearse
from llm_kd.training.result import Result
from llm_kd.training.summary import print_summary

CONFIG_DIR = Path(str(files("llm_kd") / "configs"))


class LanguageCLI(FitCLI):
    """The command line of `llm_kd.fit`: tokenizer and seed are passed on."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what model and data must agree on."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--answers",
            type=int,
            default=16,
            help="Validation prompts that the student answers before and after training, for ROUGE-L; 0 for none.",
        )
        parser.link_arguments("model.init_args.teacher.name", "data.init_args.tokenizer")
        for target in ("data.init_args.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=fixed_seed)

    def before_instantiate_classes(self) -> None:
        """Refuse what would only fail, or silently do something else, once models are loaded.

        Raises:
            UserError: For a precision that the weights do not bear, or a number of answers below 0.
        """
        trainer = self.config["trainer"]
        dtype = self.config["model"]["init_args"]["student"]["dtype"]
        if trainer["precision"] == "bf16-true" and dtype != "bfloat16":
            raise UserError(
                f"trainer.precision bf16-true would train in bfloat16 what model.student.dtype asks for in {dtype}; "
                "small updates vanish there. Use bf16-mixed, or set model.student.dtype to bfloat16"
            )
        if self.config["answers"] < 0:
            raise UserError(f"--answers must be at least 0, got {self.config['answers']}")


def build(args: Sequence[str] | None = None, cli_class: type[LanguageCLI] = LanguageCLI) -> LanguageCLI:
    """Parse the configuration and instantiate model, data and trainer; runs nothing.

    Args:
        args: Command line as a list, or None for `sys.argv`.
        cli_class: Of what is built; `llm_kd.cache_teacher` parses the same and builds less.
    """
    return cli_class(DistillationModule, TextDataModule, config_dir=CONFIG_DIR, args=args)


@holding_folder
def run(cli: LanguageCLI) -> Result:
    """Obtain the teacher and its responses, distil, and collect the result."""
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    model.check_data(data)
    check_lengths(model, data, cli.config["answers"])
    batches = data.check_batch(trainer.world_size)
    validated = -(-len(data.rows("val")) // (data.val_batch_size * trainer.world_size))
    check_batches(trainer, batches, validated)
    if trainer.is_global_zero and alone():
        rehearse(model, data, trainer, cli.run_dir)
    model.obtain(data, trainer)
    data.check_batch(trainer.world_size)  # packed rows are known only now
    student = model.student_with_head.student
    parameters = {"student": count_parameters(student)}
    if (teacher := model.running_teacher) is not None:
        parameters["teacher"] = count_parameters(teacher)
    answers: dict[str, Answers] = {}

    def ask(when: str, speaker: Backbone) -> None:
        # A sharded model answers only in its own forward pass; evaluate the saved student instead.
        if cli.config["answers"] and trainer.is_global_zero and trainer.world_size == 1:
            speaker.to(trainer.strategy.root_device)
            answers[when] = answer_prompts(speaker, data, limit=cli.config["answers"])

    before = validate(cli)
    ask("before", student)
    trainer.fit(model, datamodule=data, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    ask("after", student)
    if teacher is not None and (data.responses == "dataset" or any(row.answered for row in data.rows("val"))):
        ask("teacher", teacher)
    return Result(
        history=model.history,
        metric=model.metric,
        mode=model.mode,
        parameters=parameters,
        run_dir=cli.run_dir,
        before=before,
        answers=answers,
        peak_memory_gib=peak_memory_gib(),
    )


def check_lengths(model: DistillationModule, data: TextDataModule, answers: int) -> None:
    """Refuse what would outgrow the positions of student or teacher, before the teacher is loaded.

    Args:
        model: The training module.
        data: The data.
        answers: Number of validation prompts that the student is to answer.

    Raises:
        UserError, RowsError, EncodingError: From the data.
        UserError: If a conversation is too long, or a prompt leaves too few positions for a response.
    """
    spec = model.teacher_spec
    configs = {"student": model.student_with_head.student.causal_lm.config}
    if spec.cache is None or data.responses == "teacher":
        configs["teacher"] = load_config(spec.name)
    data.check_context_length(configs, SPLITS)
    if model.rollout.generates:
        written = model.rollout.sampling.max_new_tokens
        what = f"training prompts with responses of model.rollout.sampling.max_new_tokens {written}"
        check_context_length(configs, data.longest_prompt("train") + written, what, "lower that, or data.max_length")
    if answers:
        written = data.sampling.max_new_tokens
        what = f"all validation prompts with answers of data.sampling.max_new_tokens {written}, sequences"
        hint = "lower that, or set answers to 0"
        check_context_length(configs, min(data.prompt_lengths("val")) + written, what, hint)


def validate(cli: LanguageCLI) -> dict[str, float]:
    """Validation means of the student as it is."""
    found = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    return {name.removeprefix("val/"): value for name, value in found.items()}


def main(args: Sequence[str] | None = None) -> Result:
    """Build, run and print the table."""
    cli = build(args)
    result = run(cli)
    if cli.trainer.is_global_zero:
        print_summary(result, cli.model, cli.datamodule)
    return result


if __name__ == "__main__":
    run_command(main)
