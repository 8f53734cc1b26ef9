"""`python -m vision_kd.evaluate --ckpt FILE`: accuracy of a saved classifier, average precision of a detector.

A student file written by `fit` knows its network and its data. For any other weight file (a training checkpoint, a
teacher of the public bundle, safetensors) name both: `--model.name resnet32x4 --data CIFAR100`. A detector's
detections are written as COCO results beside the weights; `--images FOLDER` draws them.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("vision_kd.evaluate")  # before the imports below, which take seconds

from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from kd_common.errors import UserError
from kd_common.run.errors import run_command
from kd_common.run.messages import CommandParser, check_device, check_file, check_folder, default_device
from kd_common.run.result import count_parameters
from kd_common.terminal import printable
from vision_kd.data import ImageDataModule
from vision_kd.detection.data import COCO
from vision_kd.detection.detector import Detector
from vision_kd.detection.draw import draw_detections
from vision_kd.detection.evaluation import average_precision, evaluate_detector, write_results
from vision_kd.detection.zoo import build_detector, load_detector
from vision_kd.models import (
    Classifier,
    ModelSpec,
    build_classifier,
    export,
    load_classifier,
)
from vision_kd.models.checkpoints import read_checkpoint
from vision_kd.models.classifier import DATA_SPEC
from vision_kd.models.student import check_program
from vision_kd.training.metrics import accuracy


def parser() -> CommandParser:
    """Command line of this module."""
    parser = CommandParser(prog="python -m vision_kd.evaluate", description=__doc__, allow_abbrev=False)
    parser.example = "--ckpt runs/digits/run_0/student_last.pt"
    parser.add_argument("--ckpt", type=str, required=True, help="Weight file.")
    parser.add_argument("--model", type=ModelSpec | None, default=None, help="Network, for files that do not name it.")
    parser.add_argument("--data", type=ImageDataModule | None, default=None, help="Data to evaluate on.")
    parser.add_argument("--device", type=str | None, default=None, help="Device; by default a GPU if there is one.")
    parser.add_argument("--export", type=str | None, default=None, help="Also write a torch.export program (.pt2).")
    parser.add_argument("--results", type=str | None, default=None, help="COCO results; default CKPT.detections.json.")
    parser.add_argument("--images", type=str | None, default=None, help="Folder for pictures of detections.")
    parser.add_argument("--pictures", type=int, default=20, help="Number of them, from the lowest image id on.")
    parser.add_argument("--threshold", type=float, default=0.5, help="Lowest score drawn.")
    return parser


def load(settings: Namespace) -> tuple[Classifier | Detector, ImageDataModule]:
    """Network and data of a parsed command line.

    Raises:
        UserError: If neither the file nor the command line says which data, or the classes of the two differ.
    """
    meta = read_checkpoint(settings.ckpt).meta
    if settings.data is None:
        if "data" not in meta:
            raise UserError(
                f"{settings.ckpt} does not say which data it was trained on; give --data, as in --data Digits"
            )
        settings.data = parser().parse_object({"ckpt": settings.ckpt, "data": meta["data"]}).data
    made = parser().instantiate_classes(settings)
    data, spec = made.data, made.model and replace(made.model, checkpoint=settings.ckpt)
    data_spec: dict[str, Any] = {"mean": data.mean, "std": data.std}
    if isinstance(data, COCO):
        if spec is None:
            return load_detector(settings.ckpt), data
        return build_detector(spec, class_names=data.class_names, **data_spec), data
    shared = {name: getattr(data, name) for name in DATA_SPEC}
    model = load_classifier(settings.ckpt) if spec is None else build_classifier(spec, **shared, **data_spec)
    model.check_data(settings.ckpt, **shared)
    return model, data


def detect(settings: Namespace, detector: Detector, data: COCO) -> dict[str, float]:
    """Score a detector; write its detections and, if asked for, pictures of them."""
    record = evaluate_detector(detector, data, settings.device)
    rows, image_ids = record.gather()
    write_results(Path(settings.results or f"{settings.ckpt}.detections.json"), rows)
    if settings.images is not None:
        folder = Path(settings.images)
        folder.mkdir(parents=True, exist_ok=True)
        for image_id in image_ids[: settings.pictures]:
            draw_detections(folder / f"{image_id}.png", record.split, rows, [image_id], threshold=settings.threshold)
    return average_precision(record.split, rows, image_ids)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Evaluate, print and return the metrics."""
    settings = parser().parse_args(args)
    settings.device = settings.device or default_device()
    check_device(settings.device)
    for flag in ("results", "export"):  # before what is to be written there is computed
        if settings[flag] is not None:
            check_file(f"--{flag}", settings[flag])
    if settings.images is not None:
        check_folder("--images", settings.images)
    if settings.export is not None:
        check_program(settings.export)
    model, data = load(settings)
    if settings.export is not None and not isinstance(model, Classifier):
        raise UserError("--export writes classifiers only: torch.export does not trace a detector's proposals")
    data.prepare_data()
    data.setup("validate")
    if isinstance(model, Detector):
        assert isinstance(data, COCO)
        result = detect(settings, model, data)
    else:
        result = accuracy(model, data.val_dataloader(), model.num_classes, settings.device)
    headers = {"top1": "top-1", "top5": "top-5"}
    console = Console(highlight=False)
    console.print(
        printable(f"{settings.ckpt}: ")
        + f"{count_parameters(model):,} parameters, {type(data).__name__} validation set: "
        + ", ".join(f"{headers.get(name, name)} {value:.2%}" for name, value in result.items()),
        markup=False,
        soft_wrap=True,
    )
    if settings.export is not None and isinstance(model, Classifier):
        views, _ = next(iter(data.val_dataloader()))
        export(model, settings.export, views["clean"])
        shown = printable(f"exported to {settings.export}")
        console.print(f"{shown}; load with torch.export.load(...).module()", markup=False, soft_wrap=True)
    return result


if __name__ == "__main__":
    run_command(main)
