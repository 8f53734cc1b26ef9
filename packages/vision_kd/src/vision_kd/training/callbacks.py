"""Callbacks of a vision run."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from kd_common.run.tensorboard_figures import TensorBoardFigures
from vision_kd.training.classification import DistillationModule
from vision_kd.viz.diagnosis import class_correlation, collect_logits
from vision_kd.viz.runs import plot_correlations, plot_reliability


class StudentFigures(TensorBoardFigures):
    """Calibration and correlation of the logits of a classifier beside its teacher's, in TensorBoard.

    Args:
        samples: Validation images they are computed on.
    """

    def __init__(self, samples: int = 512) -> None:
        self.samples = samples

    def figures(self, module: DistillationModule) -> Mapping[str, Figure]:
        """Run student and teacher on the images; a detector has no such logits and gives no figures."""
        if not isinstance(module, DistillationModule):
            return {}
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        networks = {"student": module.inference_model}
        if module.teacher is not None:
            networks = {"teacher": module.teacher, **networks}
        logits = {
            name: collect_logits(network, data.val_dataloader(), module.device, limit=self.samples)
            for name, network in networks.items()
        }
        correlations = {name: class_correlation(z).numpy() for name, (z, _) in logits.items()}
        return {
            "calibration": plot_reliability(logits),
            "correlation": plot_correlations(correlations, data.class_names),
        }
