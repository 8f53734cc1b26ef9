"""``python -m vision_kd.fit``: distil a classifier and report what came of it.

:func:`build` parses and makes everything, :func:`run` trains, :func:`main` does both and prints the table. Notebooks
and tests call ``build([...])`` with the same arguments as the command line.
"""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from kd_common.cli import FitCLI
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import vision_kd.methods
import vision_kd.policies  # noqa: F401  (makes the class names known to the command line)
from vision_kd.callbacks import StudentExport
from vision_kd.data import ImageDataModule
from vision_kd.evaluate import accuracy
from vision_kd.models import count_parameters
from vision_kd.module import DistillationModule
from vision_kd.summary import print_summary
from vision_kd.teacher import obtain_teacher

CONFIG_DIR = Path(str(files("vision_kd") / "configs"))


class VisionCLI(FitCLI):
    """The command line of ``vision_kd.fit``: the data's shape and the seed are passed on to the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what model and data must agree on."""
        super().add_arguments_to_parser(parser)
        for name in ("num_classes", "in_channels", "mean", "std"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for target in ("data.init_args.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=fixed_seed)


def fixed_seed(seed: bool | int) -> int:
    """The seed as a number.

    Raises:
        ValueError: For ``true``, which would draw a new seed on resuming.
    """
    if seed is True:
        raise ValueError("seed_everything must be a number (or false for 0): a run is resumed from its seed")
    return int(seed)


@dataclass
class Result:
    """What a run achieved.

    Attributes:
        teacher: Accuracy of the teacher before training, and how it was obtained; empty without a teacher.
        last: Validation metrics of the last epoch.
        best: Those of the epoch with the highest top-1; selected on the validation data, so optimistic.
        gsnr: Vector GSNR of each component in the last epoch.
        k: Surviving classes at the last update; None without a mask.
        seconds_per_epoch: Mean training time of an epoch.
        parameters: Parameter counts of student and teacher.
        run_dir: Folder of checkpoints, logs and the resolved configuration; None if nothing was written.
    """

    teacher: dict[str, Any]
    last: dict[str, float]
    best: dict[str, float]
    gsnr: dict[str, float]
    k: int | None
    seconds_per_epoch: float
    parameters: dict[str, int]
    run_dir: Path | None = field(default=None)


def build(args: ArgsType = None) -> VisionCLI:
    """Parse the configuration and instantiate model, data and trainer; runs nothing.

    Args:
        args: Command line as a list, configuration as a dict, or None for ``sys.argv``.
    """
    return VisionCLI(
        DistillationModule,
        ImageDataModule,
        config_dir=CONFIG_DIR,
        args=args,
        checkpoint={"monitor": "val/top1", "mode": "max"},
    )


def run(cli: VisionCLI) -> Result:
    """Obtain the teacher, distil, and collect the result."""
    model, data = cli.model, cli.datamodule
    data_config = json.loads(json.dumps(cli.config["data"].as_dict(), default=str))
    parameters = {"student": count_parameters(model.student)}
    teacher: dict[str, Any] = {}
    data.views = model.method.views
    if model.method.needs_teacher:
        classifier, origin = obtain_teacher(model.teacher_spec, data, data_config)
        model.attach_teacher(classifier)
        parameters["teacher"] = count_parameters(classifier)
        teacher = measure_teacher(cli) | {"origin": origin}
    if cli.run_dir is not None:
        cli.trainer.callbacks.append(StudentExport(cli.run_dir, {"data": data_config}))
    cli.trainer.fit(model, datamodule=data, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    return Result(
        teacher=teacher,
        last=model.history[-1],
        best=max(model.history, key=lambda epoch: epoch["top1"]),
        gsnr=model.gsnr_of_epoch(),
        k=model.k,
        seconds_per_epoch=fmean(epoch["seconds"] for epoch in model.history),
        parameters=parameters,
        run_dir=cli.run_dir,
    )


@rank_zero_only
def measure_teacher(cli: VisionCLI) -> dict[str, Any]:
    """Accuracy of the attached teacher on the validation data, printed before training starts."""
    cli.datamodule.prepare_data()
    cli.datamodule.setup("validate")
    result = accuracy(
        cli.model.teacher,
        cli.datamodule.val_dataloader(),
        cli.model.num_classes,
        cli.trainer.strategy.root_device,
    )
    rank_zero_info(f"Teacher {cli.model.teacher_spec.name}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}")
    return dict(result)


def main(args: ArgsType = None) -> Result:
    """Build, run and print the table."""
    cli = build(args)
    result = run(cli)
    if cli.trainer.is_global_zero:
        print_summary(result, cli.model)
    return result


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
