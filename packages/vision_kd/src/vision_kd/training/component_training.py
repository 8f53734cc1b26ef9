"""The training system: manual optimisation of a student from named gradient components, whatever the task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_common.checks import at_least, positive, within
from kd_common.distributed import average_batchnorm_buffers, batchnorm_buffers, world_size
from kd_common.errors import UserError
from kd_common.grads import accumulate, all_reduce_mean, clip_components, component_cosines, component_norms
from kd_common.gsnr import GradientSNR
from kd_common.optim import ComponentOptimizer
from kd_common.run.trainer_settings import check_precision_and_length
from kd_common.schedules import CosineDecay, Schedule, TopKSchedule
from vision_kd.data import ImageDataModule
from vision_kd.methods import Method
from vision_kd.methods.kd import KD
from vision_kd.models import ModelSpec, NormalizedNetwork, save_student
from vision_kd.models.checkpoints import DESCRIPTION, read_checkpoint
from vision_kd.models.student import describe
from vision_kd.policies import DeepKD, GradientPolicy
from vision_kd.training.guards import FiniteGuard
from vision_kd.training.specs import DynamicTopK, TeacherSpec
from vision_kd.training.step import ComponentGradients
from vision_kd.training.task import Task


class ComponentTraining(Task):
    """Distil a student: a method yields loss components, a policy turns their gradients into updates.

    This is what manual optimisation loses; a subclass adds what differs between tasks, see `Task`.

    Args:
        student: Network to train.
        data_spec: What it has to know of the data, as in `Task.data_spec`.
        teacher: Network to distil from and how to obtain it; None for methods without a teacher.
        method: Loss (`vision_kd.methods`); None means `KD()`.
        policy: Gradient policy (`vision_kd.policies`); None means `DeepKD()`.
        topk: Dynamic top-k mask on the non-target term; None distils all classes throughout.
        lr_schedule: Factor on the learning rate; None means a cosine from 1 to 0 over the run.
        learning_rate: Learning rate at factor 1, > 0.
        momentum: Base momentum mu, in [0, 1).
        weight_decay: Weight decay, >= 0.
        accumulate: Micro-batches per update, >= 1; their gradients are averaged over samples, also when the last one
            is smaller.
        clip_norm: Largest norm of the summed gradient of all components; None does not clip.
        ema_decay: Decay of an exponential moving average of the student, in [0, 1), which is then the model that is
            validated and exported; None keeps none.
        gsnr_every: Measure gradient signal-to-noise, norms and cosines of the separate components every so many
            updates; such an update runs one backward pass per component. 0 never measures.
        seed: Seed of every random draw during training.

    Raises:
        UserError: If a setting is out of range; the message names it.
    """

    clipping = "model.clip_norm"

    def __init__(
        self,
        student: ModelSpec,
        data_spec: Mapping[str, Any],
        *,
        teacher: TeacherSpec | None = None,
        method: Method | None = None,
        policy: GradientPolicy | None = None,
        topk: DynamicTopK | None = None,
        lr_schedule: Schedule | None = None,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        accumulate: int = 1,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        gsnr_every: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="data_spec")
        self._data_spec = dict(data_spec)
        self.automatic_optimization = False
        self.method = method or KD()
        self.policy = policy or DeepKD()
        self.topk = topk
        self.lr_schedule = lr_schedule or CosineDecay()
        self.student_spec = student
        self.teacher_spec = teacher
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.gsnr_every = gsnr_every
        self.seed = seed
        self.student = self.build(student, **data_spec)
        self.num_classes = self.student.num_classes
        self.auxiliary = nn.ModuleList()  # trained with the student, of no use afterwards
        self._check_settings()
        self.ema = None
        if ema_decay is not None:
            within("model.ema_decay", ema_decay, "[0, 1)")
            self.ema = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
        self.gsnr = GradientSNR()
        self._pending: ComponentGradients = {}
        self._pending_samples = 0
        self._statistics: dict[str, Tensor] = {}
        self._statistics_before: list[Tensor] = []

    def _check_settings(self) -> None:
        if self.needs_teacher and self.teacher_spec is None:
            raise UserError(
                f"model.method {type(self.method).__name__} needs model.teacher; it is not set"
                if self.method.needs_teacher
                else f"the components {', '.join(self.components)} need model.teacher; it is not set"
            )
        if self.topk is not None and "nontarget" not in self.method.components:
            raise UserError(
                f"model.topk masks the non-target term, which model.method {type(self.method).__name__} does not have; "
                "set model.topk to null or choose another method"
            )
        if self.topk is not None:
            self._topk_schedule(total_steps=1)  # raises on a k outside [1, C - 1]
        for name in ("learning_rate", "clip_norm"):
            if (value := getattr(self, name)) is not None:
                positive(f"model.{name}", value)
        at_least("model.weight_decay", self.weight_decay, 0)
        at_least("model.accumulate", self.accumulate, 1)
        at_least("model.gsnr_every", self.gsnr_every, 0)
        self.build_optimizer()  # a policy that does not fit the method fails here, not after the teacher was trained

    # ------------------------------------------------------------------------------------------------ set-up

    @property
    def inference_model(self) -> NormalizedNetwork:
        """Return the student that is validated and exported: its moving average when there is one."""
        model: Any = self.student if self.ema is None else self.ema.module
        return model

    def forward(self, images: Any) -> Any:
        """Run the network that is validated on a batch of images."""
        return self.inference_model(images)

    def build_optimizer(self) -> ComponentOptimizer:
        """Return a new optimizer of the policy."""
        return self.policy.optimizer(
            nn.ModuleList([self.student, *self.auxiliary]),
            self.components,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    @property
    def momenta(self) -> dict[str, float]:
        """Momentum (beta1 of Adam) that the policy gives every component."""
        optimizer = self.build_optimizer()
        return dict(optimizer.param_groups[0][optimizer.coefficient])

    @property
    def accumulated(self) -> int:
        """Return the batches of an update on one rank."""
        return self.accumulate

    def _topk_schedule(self, total_steps: int) -> TopKSchedule:
        assert self.topk is not None
        return TopKSchedule(
            self.num_classes,
            total_steps,
            k_start=self.topk.k_start,
            k_opt=self.topk.k_opt,
            phase_ends=self.topk.phase_ends,
        )

    def k_at(self, step: int) -> int | None:
        """Classes that survive the mask at an update, counted from 0; None without a mask."""
        return None if self.topk is None else self._topk_schedule(self.total_steps)(step)

    def setup(self, stage: str) -> None:
        """Check what the schedules and the precision need, and obtain the teacher."""
        if stage == "fit":
            check_precision_and_length(self.trainer.precision, self.trainer.max_epochs, self.trainer.max_steps)
            data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
            if isinstance(data, ImageDataModule):
                self.obtain(data, self.trainer)

    def on_fit_start(self) -> None:
        """Bring the teacher to the device."""
        if self.needs_teacher and self.teacher is None:
            raise UserError("no teacher is attached; call attach_teacher(...) or train with an ImageDataModule")
        if self.teacher is not None:
            # A lower precision than fp32 is the student's choice; float64 images need a float64 teacher.
            self.teacher.to(self.device, torch.promote_types(next(self.student.parameters()).dtype, torch.float32))

    # ------------------------------------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Start what is kept between batches."""
        self._guard = FiniteGuard(self.device)
        # An exception in the middle of a step may be saved, too, so the statistics before the step are kept.
        self._statistics = batchnorm_buffers(self.student)
        self._statistics_before = [buffer.clone() for buffer in self._statistics.values()]
        self.gsnr.reset()
        self._pending, self._pending_samples = {}, 0  # an interrupted fit may have left some
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Measure every epoch anew; no update reaches into the next."""
        self.gsnr.reset()
        self._pending, self._pending_samples = {}, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the draws of the batch, and keep the BatchNorm statistics, which the forward pass changes."""
        super().on_train_batch_start(batch, batch_idx)
        if self._statistics:
            torch._foreach_copy_(self._statistics_before, list(self._statistics.values()))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Differentiate one micro-batch `(images, target)`; update the student once enough of them are accumulated."""
        samples = len(batch[1])
        optimizer: Any = self.optimizers()
        measure = self.gsnr_every > 0 and self.global_step % self.gsnr_every == 0
        k = self.k_at(self.global_step)
        step = self.component_step(
            batch,
            [p for group in optimizer.param_groups for p in group["params"]],
            buckets=None if measure else optimizer.buckets,
            epoch=self.global_step / self.steps_per_epoch,
            k=k,
        )
        self._stop_if_not_finite(step.components, batch_idx)
        gradients = step.gradients
        self._touched = True
        if self.accumulate > 1:
            accumulate(self._pending, gradients, scale=samples)
            self._pending_samples += samples
            if (batch_idx + 1) % self.accumulate and not self.trainer.is_last_batch:
                return
            gradients = {}
            accumulate(gradients, self._pending, scale=1.0 / self._pending_samples)
            self._pending, self._pending_samples = {}, 0
        gradients = all_reduce_mean(gradients)
        if measure or self.is_logging_step():
            values = {f"train/{name}": float(value) for name, value in step.components.items()}
            values["train/lr"] = optimizer.param_groups[0]["lr"]
            if k is not None:
                values["train/k"] = k
            self.log_now(values | (self._measure(gradients) if measure else {}))
            self.log("loss", sum(step.components.values()), prog_bar=True, logger=False, batch_size=samples)
        self._update(optimizer, gradients)

    def _update(self, optimizer: Any, gradients: ComponentGradients) -> None:
        """Step optimizer, learning-rate schedule and moving average once."""
        if self.clip_norm is not None:
            clip_components(gradients, self.clip_norm)
        optimizer.step(components=gradients)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def _measure(self, gradients: ComponentGradients) -> dict[str, float]:
        """Feed the gradient statistics; return the norms of the components and the cosines between them."""
        reached = {name: [g for g in grads if g is not None] for name, grads in gradients.items()}
        self.gsnr.update({name: grads for name, grads in reached.items() if grads})
        values = {f"grad_norm/{name}": float(norm) for name, norm in component_norms(gradients).items()}
        return values | {
            f"grad_cosine/{a}_{b}": float(cosine) for (a, b), cosine in component_cosines(gradients).items()
        }

    def _stop_if_not_finite(self, losses: Mapping[str, Tensor], batch_idx: int) -> None:
        """Stop at a non-finite loss: at once on a CPU, at the next logging step where a look would stall the device.

        Raises:
            NonFiniteLossError: Naming the batch and the last checkpoint.
        """
        self._guard.observe(losses, batch_idx)
        if self.device.type != "cpu" and not self.is_logging_step() and not self.trainer.is_last_batch:
            return
        if (bad := self._guard.first_bad_batch()) is not None:
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
            raise self.non_finite(
                f"the loss became NaN or infinite at epoch {self.current_epoch}, batch {bad} (components of batch "
                f"{batch_idx}: {values}); nothing was saved since. Look at that batch"
            )

    def gsnr_of_epoch(self) -> dict[str, float]:
        """Vector GSNR of every component over the updates measured this epoch, and their number.

        Empty with fewer than two of them. Pure noise reads about 1 / gsnr_samples.
        """
        counts = {name: self.gsnr.count(name) for name in self.gsnr.names}
        measured = {f"gsnr/{name}": self.gsnr.vector(name) for name, count in counts.items() if count > 1}
        return measured | {"gsnr_samples": float(max(counts.values()))} if measured else {}

    # ------------------------------------------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Give all ranks the same BatchNorm statistics; manual optimisation under DDP does not."""
        super().on_validation_start()
        average_batchnorm_buffers(self.student)
        if self.ema is not None:
            average_batchnorm_buffers(self.ema)

    def on_validation_epoch_end(self) -> None:
        """Log and remember the result; the final table reads the last and the best from here."""
        values = self.validation_metrics()
        for name, value in values.items():
            self.log(f"val/{name}", value, prog_bar=name == self.metric, sync_dist=True)
        if not self.trainer.sanity_checking:
            gsnr = self.gsnr_of_epoch()
            self.log_dict({"train/seconds": self._seconds, **gsnr}, sync_dist=True)
            self.remember(values | gsnr)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def export(self, path: Path) -> None:
        """Write the student alone, for plain PyTorch; see `vision_kd.models.save_student`."""
        if self.trainer.is_global_zero:
            latest = self.history[-1]
            extra = {**self.data_settings(), "epoch": latest["epoch"], self.metric: latest[self.metric]}
            save_student(path, self.inference_model, self.student_spec, extra)

    def exported_epoch(self, path: Path) -> Mapping[str, Any]:
        """Read epoch and metric from the file."""
        return read_checkpoint(path).meta

    def saved_data_spec(self) -> dict[str, Any]:
        """Return the data spec that the constructor was given."""
        return self._data_spec

    def rank_state(self) -> dict[str, Any]:
        """Add an unfinished update, the statistics of gradients in this epoch, and the rank's BatchNorm statistics."""
        state = super().rank_state() | {"gsnr": self.gsnr.state_dict()}
        if self._pending:
            state["pending"] = self._pending_samples, {name: list(grads) for name, grads in self._pending.items()}
        if world_size() > 1:
            state["statistics"] = dict(self._statistics)
        return state

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        super().load_rank_state(state)
        self.gsnr.load_state_dict(state["gsnr"])
        samples, pending = state.get("pending", (0, {}))
        self._pending_samples = samples
        self._pending = {
            name: [g if g is None else g.to(self.device) for g in grads] for name, grads in pending.items()
        }
        for name, buffer in state.get("statistics", {}).items():
            self._statistics[name].copy_(buffer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the student as it was before the step if the step is not finished.

        The checkpoint describes the student and its data, so that they are compared wherever it is read.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[DESCRIPTION] = describe(self.inference_model, self.student_spec) | self.data_settings()
        if self._in_batch():
            before = zip(self._statistics, self._statistics_before, strict=True)
            checkpoint["state_dict"] |= {f"student.{name}": buffer for name, buffer in before}
