"""Keep the student as a folder that plain transformers loads, and show where the teacher accepts its tokens."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from kd_common.files import finish_replacing, replace_folder, staging_paths
from kd_common.hub.language_models import quiet
from kd_common.run.result import best_epoch
from kd_common.run.tensorboard_figures import TensorBoardFigures
from llm_kd.models import Body, build_student
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule
from llm_kd.viz.figures import plot_entropy, plot_positions, plot_tokens
from llm_kd.viz.token_table import token_table

STUDENTS = BEST, LAST = "student_best", "student_last"


class StudentExport(pl.Callback):
    """Write ``student_best`` when a validation has the lowest KL so far, and ``student_last`` at the end.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put students in place that a kill of this run caught between two names."""
        if trainer.is_global_zero:
            for name in STUDENTS:
                finish_replacing(self.folder / name)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export a student that is the best so far."""
        assert isinstance(pl_module, DistillationModule)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not pl_module.history:
            return
        if pl_module.history[-1] is best_epoch(pl_module.history, pl_module.metric, pl_module.mode):
            export_student(pl_module, self.folder / BEST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the student as training left it."""
        assert isinstance(pl_module, DistillationModule)
        export_student(pl_module, self.folder / LAST)


def export_student(module: DistillationModule, folder: Path) -> None:
    """Save student and tokenizer with ``save_pretrained``; the folder is replaced only when all is written.

    Every rank must call this: a sharded student is put together on rank 0, which writes.
    """
    body = module.distiller.student
    if module.sharded:
        whole = get_model_state_dict(body, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not module.trainer.is_global_zero:
        return
    if module.sharded:  # neither saving nor merging adapters works on shards
        stops = body.causal_lm.generation_config
        body = build_student(module.student_spec, module.teacher_spec.name)
        body.causal_lm.generation_config = stops
        body.load_state_dict(whole)
    finish_replacing(folder)
    partial, _ = staging_paths(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            body.merged().save_pretrained(partial)
        module.tokenizer.save_pretrained(partial)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({error}); what was there before is unchanged") from error
    replace_folder(folder)


class TokenFigures(TensorBoardFigures):
    """Accepted and rejected tokens, KL and acceptance by position and by the teacher's entropy, in TensorBoard.

    On the first held-out answers; nothing is drawn where the teacher is a cache, or the models are sharded.

    Args:
        examples: Answers that the models are run on; the first is shown token by token.
        k: Most likely tokens of the teacher that count as accepted.
    """

    def __init__(self, examples: int = 4, k: int = 5) -> None:
        self.examples = examples
        self.k = k

    def figures(self, module: DistillationModule) -> Mapping[str, Figure]:
        """Run student and teacher on the answers."""
        teacher = module.teacher
        if module.sharded or not isinstance(teacher, OnlineTeacher):
            return {}
        data = module.trainer.datamodule.splits["val"]  # type: ignore[attr-defined]
        examples = [example for example in data.examples if example.num_supervised][: self.examples]
        student = module.distiller.student
        table = token_table(student, cast(Body, teacher.body), examples, vocab_size=module.vocab_size, k=self.k)
        return {
            "tokens": plot_tokens(table, module.tokenizer, 0),
            "position": plot_positions({"student": table}),
            "entropy": plot_entropy({"student": table}),
        }
