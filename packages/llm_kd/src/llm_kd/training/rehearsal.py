"""One dry step of a run, before its teacher writes answers."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from kd_common.hub.language_models import quiet
from kd_common.run.rehearsal import check_monitors, rehearsing
from llm_kd.data import TextDataModule
from llm_kd.data.batch import collate
from llm_kd.data.example import prompt_response_example
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule
from llm_kd.training.student_with_head import validation_means


def rehearse(model: DistillationModule, data: TextDataModule, trainer: pl.Trainer, run_dir: Path | None) -> None:
    """Pass one short conversation through student, teacher and loss, forth and back, and write what surrounds weights.

    What fails here would fail later, after the teacher has answered or at the first export. The run itself is left as
    it was, bit for bit. Models that are shared out over processes are not run, for one process may not hold them.

    Args:
        model: The training module.
        data: The data.
        trainer: The trainer of the run.
        run_dir: Folder of the run; None for one that writes nothing.

    Raises:
        ValueError: From the settings, such as a validation interval that never comes.
    """
    backbone = model.load_teacher(data)
    if backbone is None:  # stored outputs cover no other conversation
        return
    student_with_head, device = model.student_with_head, trainer.strategy.root_device
    with rehearsing(run_dir) as folder, contextlib.ExitStack() as stack:
        with quiet():
            # Everything but the weights, of which an interrupted export may be many gigabytes.
            student_with_head.student.merged().save_pretrained(folder, state_dict={"none": torch.zeros(1)})
        model.tokenizer.save_pretrained(folder)
        if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1:
            return
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(trainer.precision_plugin.forward_context())
        student_with_head.to(device), backbone.to(device)
        prompt = data.first_prompt("train")
        batch: Any = collate([[prompt_response_example(prompt, [*model.eos_ids[:1]] * 2, "")]], data.pad_id).to(device)
        teacher_output = OnlineTeacher(backbone).output(batch)
        student_with_head(batch, teacher_output).loss_sum.backward()
        student_with_head.zero_grad(set_to_none=True)
        sums = {name: float(value) for name, value in student_with_head.measure(batch, teacher_output).items()}
        if model.rollout.generates:
            sampling = replace(model.rollout.sampling, max_new_tokens=1)
            student_with_head.generate([prompt], sampling, eos_ids=model.eos_ids, pad_id=data.pad_id, seed=0)
        logged = [f"val/{name}" for name in validation_means(sums)]
        check_monitors(trainer, [*logged, "loss", "tar"])
