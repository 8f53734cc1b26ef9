"""`python -m vision_kd.fit`: distil a classifier or a detector and report what came of it.

`build` parses and makes everything, `run` trains, `main` does both and prints the table. Notebooks
and tests call `build([...])` with the same arguments as the command line.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("vision_kd.fit")  # before the imports below, which take seconds

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

import vision_kd.training.callbacks  # noqa: F401  (makes its class names known to the command line)
from kd_common.errors import UserError
from kd_common.run.cli import FitCLI, fixed_seed
from kd_common.run.errors import run_command
from kd_common.run.imports import refuse_imports
from kd_common.run.rehearsal import alone
from kd_common.run.result import count_parameters
from kd_common.run.run_lock import holding_folder
from vision_kd.data import ImageDataModule
from vision_kd.training.component_training import ComponentTraining
from vision_kd.training.rehearsal import limited_validation, rehearse
from vision_kd.training.result import Result
from vision_kd.training.summary import print_summary

CONFIG_DIR = Path(str(files("vision_kd") / "configs"))


class VisionCLI(FitCLI):
    """The command line of `vision_kd.fit`: the data's shape and the seed are passed on to the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what model and data must agree on."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--baseline",
            type=list[str] | None,
            default=None,
            help="Also train the student alone, for the table at the end: arguments of that run, [] for none.",
        )
        # A model that does not take one of these is given the others.
        for name in ("num_classes", "class_names", "in_channels", "image_size", "mean", "std"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for target in ("data.init_args.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=fixed_seed)

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning would replace silently, or refuse with advice that does not fit manual optimisation.

        Raises:
            UserError: For accumulation or clipping by the trainer.
        """
        trainer = self.config["trainer"]
        if trainer["accumulate_grad_batches"] not in (None, 1):
            raise UserError("trainer.accumulate_grad_batches does not see component gradients; set model.accumulate")
        if trainer["gradient_clip_val"] is not None:
            raise UserError("trainer.gradient_clip_val does not see component gradients; set model.clip_norm")
        if self.config["baseline"] is not None and trainer["fast_dev_run"]:
            raise UserError("baseline repeats the run from its folder, and trainer.fast_dev_run writes none")
        refuse_imports("baseline", self.config["baseline"] or ())


def build(args: Sequence[str] | None = None) -> VisionCLI:
    """Parse the configuration and instantiate model, data and trainer; runs nothing.

    Args:
        args: Command line as a list, or None for `sys.argv`.
    """
    return VisionCLI(ComponentTraining, ImageDataModule, config_dir=CONFIG_DIR, args=args)


@holding_folder
def run(cli: VisionCLI) -> Result:
    """Obtain the teacher, distil, and collect the result."""
    model, data = cli.model, cli.datamodule
    if cli.config["baseline"] is not None and cli.trainer.world_size > 1:
        raise UserError("baseline trains a second time in one process; with several set it to null and run it apart")
    if cli.trainer.is_global_zero:  # one process fetches what may have to be fetched
        data.check_batch(cli.trainer.world_size)
        if alone():
            rehearse(model, data, cli.trainer, cli.run_dir)
    model.obtain(data, cli.trainer)
    parameters = {"student": count_parameters(model.student)}
    teacher: dict[str, Any] = {}
    if model.teacher is not None:
        parameters["teacher"] = count_parameters(model.teacher)
        teacher = {"origin": model.teacher_origin}
        if cli.trainer.is_global_zero:
            teacher |= measure_teacher(cli)
    cli.trainer.fit(model, datamodule=data, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    if cli.run_dir is not None and cli.trainer.is_global_zero:
        model.save_visualizations(cli.run_dir)
    return Result(
        metric=model.metric,
        mode=model.mode,
        teacher=teacher,
        history=model.history,
        k=model.k_at(model.global_step - 1),
        parameters=parameters,
        run_dir=cli.run_dir,
        alone=run(build(baseline_args(cli))) if cli.config["baseline"] is not None else None,
    )


def baseline_args(cli: VisionCLI) -> list[str]:
    """Command line of the run that trains the student of a finished run on the labels alone."""
    assert cli.run_dir is not None
    without = [f"--model.{name}=null" for name in cli.model.distillation_settings]
    return [
        f"--config={cli.run_dir / 'config.yaml'}",
        "--config=methods/vanilla",
        *without,
        *cli.config["baseline"],
        f"--run_dir={cli.run_dir / 'student_alone'}",
        "--ckpt_path=null",
        "--baseline=null",
    ]


def measure_teacher(cli: VisionCLI) -> dict[str, float]:
    """Measure the attached teacher on the validation data, and print its metrics before training starts."""
    cli.datamodule.prepare_data()
    cli.datamodule.setup("validate")
    data = limited_validation(cli.datamodule, cli.trainer)
    result = cli.model.measure(cli.model.teacher, data, cli.trainer.strategy.root_device)
    shown = ", ".join(f"{header} {result[name]:.2%}" for name, header in cli.model.metrics.items() if name in result)
    rank_zero_info(f"Teacher {cli.model.teacher_spec.name}: {shown}")
    return result


def main(args: Sequence[str] | None = None) -> Result:
    """Build, run and print the table."""
    cli = build(args)
    result = run(cli)
    if cli.trainer.is_global_zero:
        print_summary(result, cli.model)
    return result


if __name__ == "__main__":
    run_command(main)
