"""The training system: a student distilled from a live or stored teacher, with exact token normalisation."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from kd_common.distributed import all_reduce_sum
from kd_common.errors import UserError
from kd_common.hub.language_models import load_config, load_tokenizer, model_ends
from kd_common.run.token_updates import TokenNormalizedModule
from kd_common.run.training import step_seed
from kd_common.schedules import Schedule
from llm_kd.data import TextDataModule
from llm_kd.data.batch import TokenBatch, collate
from llm_kd.data.encode import Encoder, padding_token
from llm_kd.data.example import Example, padding_example, prompt_response_example
from llm_kd.head import KDHead
from llm_kd.models import Backbone, StudentSpec, TeacherSpec, build_student, check_packing, shared_vocabulary
from llm_kd.models.generation import response_ends
from llm_kd.models.save import save_student
from llm_kd.objectives import Objective
from llm_kd.objectives.fkl import ForwardKL
from llm_kd.selection import Selector
from llm_kd.selection.speck import SpecK
from llm_kd.selection.topk import TopK
from llm_kd.teacher import CachedTeacher, OnlineTeacher, Teacher, vocabulary_fingerprint
from llm_kd.training.rollout import OffPolicy, Rollout
from llm_kd.training.strategies import shard_student, shard_teacher, unsharded
from llm_kd.training.student_with_head import StudentWithHead, validation_means
from llm_kd.training.teacher import needed_teacher, prepare_teacher


class DistillationModule(TokenNormalizedModule):
    """Distil a language model: a selector weights the tokens, an objective compares the two models on them.

    Args:
        teacher: The model to distil from.
        student: The model to train.
        objective: Divergence per token (`llm_kd.objectives`); None means `ForwardKL()`.
        selector: Weights of the tokens (`llm_kd.selection`); None means `TopK()`.
        rollout: Who writes the responses (`llm_kd.training.rollout`); None means `OffPolicy()`, the data.
        lr_schedule: Factor on the learning rate; None means a cosine from 1 to 0 over the run.
        normalize: `valid` divides by the number of supervised tokens, `selected` by the sum of the weights.
        loss_temperature: Temperature of both models in the divergence, > 0.
        verify_temperature: Temperature of both models in the selection, > 0.
        temperature_scale: `squared` multiplies a divergence by the square of its temperature.
        learning_rate: AdamW's learning rate at factor 1, > 0.
        weight_decay: Weight decay of matrices, >= 0; vectors (norms, biases) have none.
        betas: AdamW's decay rates.
        gradient_checkpointing: Recompute the student's layers in the backward pass instead of keeping activations.
        compile: Compile the student's backbone with `torch.compile`.
        chunk_size: Rows per chunk of the head; None fits it to the device.
        seed: Seed of every random draw during training; linked from `seed_everything`.

    Raises:
        ModelNotFoundError: If a model cannot be found.
        UserError: If a setting is out of range, or teacher and student do not share a tokenizer.
    """

    strategies = (ModelParallelStrategy,)
    metric = "kl"
    mode = "min"
    export_name = "student_{}"
    large = True
    sums = (*TokenNormalizedModule.sums, "accepted", "weights")

    def __init__(
        self,
        teacher: TeacherSpec,
        student: StudentSpec,
        objective: Objective | None = None,
        selector: Selector | None = None,
        rollout: Rollout | None = None,
        lr_schedule: Schedule | None = None,
        normalize: Literal["valid", "selected"] = "valid",
        loss_temperature: float = 1.0,
        verify_temperature: float = 1.0,
        temperature_scale: Literal["squared", "none"] = "squared",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        chunk_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(lr_schedule, learning_rate, weight_decay, betas, seed)
        self.save_hyperparameters()
        self.teacher_spec = teacher
        self.student_spec = student
        self.rollout = rollout or OffPolicy()
        if teacher.cache is not None and self.rollout.generates:
            raise UserError(
                "model.teacher.cache holds the teacher's distributions for the data's responses only, and "
                f"model.rollout {type(self.rollout).__name__} writes new ones; set model.teacher.cache to null"
            )
        self._open_tokenizer()
        if isinstance(selector, SpecK) and selector.seed is None:
            selector.seed = seed
        head = KDHead(
            objective or ForwardKL(),
            selector or TopK(),
            normalize=normalize,
            loss_temperature=loss_temperature,
            verify_temperature=verify_temperature,
            temperature_scale=temperature_scale,
            vocab_size=self.vocab_size,
            chunk_size=chunk_size,
        )
        backbone = build_student(student, teacher.name)
        if gradient_checkpointing:
            backbone.causal_lm.activation_checkpointing_enable()
        if compile:
            backbone.compile(dynamic=True)
        self.student_with_head = StudentWithHead(backbone, head, self.vocab_size).train()
        backbone.causal_lm.generation_config.eos_token_id = self.eos_ids  # the saved student stops where taught
        # Not a submodule: the teacher stays out of the checkpoint, the optimizer and DDP.
        self._teacher: list[Teacher] = []
        self._loaded: list[Backbone | None] = []
        self._packs = False  # the student was seen to keep packed conversations apart
        self.sharded = False
        self._val: dict[str, Any] = {}

    def _open_tokenizer(self) -> None:
        """Read the shared tokenizer. It is the teacher's: the data are written in its chat template."""
        teacher, student = self.teacher_spec.name, self.student_spec.name or self.teacher_spec.name
        self.tokenizer = load_tokenizer(teacher)
        self._teachers_ends = model_ends(teacher, self.tokenizer)
        self._pad_id = padding_token(self.tokenizer, Encoder(self.tokenizer).eos_ids)
        self.vocab_size = shared_vocabulary(
            self.tokenizer, load_tokenizer(student), load_config(teacher), load_config(student)
        )

    # ------------------------------------------------------------------------------------------------ set-up

    def attach_teacher(self, teacher: Teacher) -> None:
        """Distil from this teacher.

        Raises:
            CacheError: If it is stored and belongs to another tokenizer.
            UserError: If it is stored and does not determine the loss.
        """
        if isinstance(teacher, CachedTeacher):
            cache = teacher.cache
            cache.check(tokenizer=vocabulary_fingerprint(self.tokenizer.get_vocab()), vocab_size=self.vocab_size)
            self.student_with_head.head.check_truncated(cache.header.size, cache.header.vocab_size)
        self._teacher = [teacher]

    def check_data(self, data: TextDataModule) -> None:
        """Tell the data whether the student writes the responses itself, and check that the two fit.

        Raises:
            UserError: If the student writes responses to packed rows, or cannot read such rows.
        """
        data.prompts_only = not self.rollout.reads_answers
        if data.packing and self.rollout.generates:
            raise UserError(
                f"data.packing puts many conversations into a row, but under model.rollout "
                f"{type(self.rollout).__name__} the student answers each in a row of its own; set data.packing to false"
            )
        if data.packing and not self._packs:
            check_packing(self.student_with_head.student, "student")
            self._packs = True

    def load_teacher(self, data: TextDataModule) -> Backbone | None:
        """Load the teacher, once, and return it; None if it need not run."""
        if not self._loaded:
            self._loaded = [needed_teacher(self.teacher_spec, data)]
        return self._loaded[0]

    def obtain(self, data: TextDataModule, trainer: pl.Trainer) -> None:
        """Attach the teacher of the settings unless one is attached, and let it write the responses that the data lack.

        Raises:
            UserError: If model and data do not fit.
            CacheError: If the stored teacher is damaged or another one, or lacks examples.
        """
        self.check_data(data)
        device = trainer.strategy.root_device
        if not self._teacher:
            self.attach_teacher(prepare_teacher(self.teacher_spec, data, device, self.load_teacher(data)))
            self._loaded = []
        elif self.running_teacher is not None and data.awaits_answers:
            self.running_teacher.to(device)
            data.write_responses(self.running_teacher.model)

    @property
    def teacher(self) -> Teacher:
        """Return the attached teacher.

        Raises:
            UserError: If there is none.
        """
        if not self._teacher:
            raise UserError("no teacher is attached; call attach_teacher(...) or train with a TextDataModule")
        return self._teacher[0]

    @property
    def running_teacher(self) -> Backbone | None:
        """Return the teacher if it runs beside the student, or None."""
        return cast(Backbone, self.teacher.backbone) if isinstance(self.teacher, OnlineTeacher) else None

    def configure_model(self) -> None:
        """Shard student and teacher under FSDP2; other strategies leave them whole."""
        if self._device_mesh is None or self.sharded:
            return
        mesh = self._device_mesh["data_parallel"]
        shard_student(self.student_with_head, mesh)
        if self.running_teacher is not None:
            shard_teacher(self.running_teacher, mesh)
        self.sharded = True

    def on_fit_start(self) -> None:
        """Bring the teacher to the device."""
        self.teacher.to(self.device)

    # ------------------------------------------------------------------------------------------------ training

    def token_sums(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """Sums of one micro-batch: loss, accepted tokens and weights."""
        # Every draw is a function of seed, epoch, batch and rank, so a resumed run repeats what it would have drawn.
        torch.manual_seed(self._seed("model", batch_idx, self.global_rank))
        if self.rollout.generates:
            batch = self._respond(batch, batch_idx)
        output = self.student_with_head(batch, self.teacher.output(batch))
        return {
            "loss": output.loss_sum,
            "denominator": output.denominator,
            "tokens": torch.tensor(output.num_tokens),
            "accepted": output.accepted_sum,
            "weights": output.weights.sum(),
        }

    def _seed(self, *parts: Any) -> int:
        return step_seed(self.seed, self.current_epoch, *parts)

    def _respond(self, batch: TokenBatch, batch_idx: int) -> TokenBatch:
        """Return the batch with the responses that the rollout chooses."""
        progress = self.global_step / self.total_steps
        draw = random.Random(self._seed("rollout", batch_idx)).random()
        # Rank 0 decides: writing under FSDP2 takes all ranks, and their memories may differ by a response.
        source = self.trainer.strategy.broadcast(self.rollout.choose(draw, progress))
        if source == "dataset":
            return batch
        if source == "replay":
            rng = random.Random(self._seed("replay", batch_idx, self.global_rank))
            examples = self.rollout.replay(len(batch.prompts), rng)
        else:
            examples = self._write(batch.prompts, self._seed("sampling", batch_idx, self.global_rank))
            self._touched = True
            self.rollout.keep(examples)
        pad = self._pad_id
        rows = [[example] for example in examples] or [[padding_example(pad)]]
        return collate(rows, pad).to(self.device)

    def _write(self, prompts: list[list[int]], seed: int) -> list[Example]:
        """Return the student's responses to prompts."""
        responses = self.student_with_head.generate(
            prompts or [[self._pad_id]],  # sharded, every rank must take part
            self.rollout.sampling,
            eos_ids=self.eos_ids,
            pad_id=self._pad_id,
            seed=seed,
            synced=self.sharded,
        )
        return [
            prompt_response_example(prompt, response, "") for prompt, response in zip(prompts, responses, strict=False)
        ]

    @property
    def eos_ids(self) -> list[int]:
        """Return the tokens that end a response: of chat template, tokenizer and the settings of both models."""
        return response_ends(self.student_with_head.student.causal_lm, self._teachers_ends)

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the loss, and `tar`, the share of the tokens that the teacher accepts."""
        return super().means(sums) | {"tar": sums["accepted"] / (sums["tokens"] or 1.0)}

    def on_update(self, sums: Mapping[str, float]) -> None:
        """Let objective and selector follow the loss."""
        loss = sums["loss"] / sums["denominator"]
        selected = sums["loss"] / (sums["weights"] or 1.0)
        self.student_with_head.head.on_step(loss, self.global_step + 1, self.total_steps, selected)

    # ------------------------------------------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Start the sums; the teacher must be on the device also when nothing was trained."""
        self.teacher.to(self.device)
        self._val = {}
        super().on_validation_start()

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Add the sums of one batch."""
        for name, value in self.student_with_head.measure(batch, self.teacher.output(batch)).items():
            self._val[name] = self._val.get(name, 0.0) + value.to(self.sum_dtype)

    def on_validation_epoch_end(self) -> None:
        """Log and remember the means over the tokens of all ranks.

        Raises:
            NonFiniteLossError: If the student's likelihood is not finite.
        """
        names = sorted(self._val)
        sums = all_reduce_sum(torch.stack([self._val[name] for name in names]))
        values = validation_means(dict(zip(names, sums.tolist(), strict=True)))
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=False)
        if not math.isfinite(values["nll"]):
            raise self.non_finite(f"the validation NLL is {values['nll']} at epoch {self.current_epoch}")
        if self.trainer.sanity_checking:
            return
        self.rollout.on_validation(values["kl"])  # the untrained student's too: what follows is compared with it
        self.remember(values)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def rank_state(self) -> dict[str, Any]:
        """Add the state of the rollout."""
        return super().rank_state() | {"rollout": self.rollout.state_dict()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        super().load_rank_state(state)
        self.rollout.load_state_dict(state["rollout"])

    def export(self, path: Path) -> None:
        """Write student and tokenizer as transformers loads them."""
        student = self.student_with_head.student
        if self.sharded:  # neither saving nor merging adapters works on shards
            student = unsharded(student, lambda: build_student(self.student_spec, self.teacher_spec.name))
        if self.trainer.is_global_zero:
            save_student(student, self.tokenizer, path)

    def is_whole(self) -> bool:
        """Return False inside an update under FSDP2, too, which hides the gradients of an unfinished update."""
        return super().is_whole() and not (self.sharded and self._in_window())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of objective and selector, too."""
        super().on_save_checkpoint(checkpoint)
        # Also in the state dict, of which Lightning restores only tensors under FSDP2.
        checkpoint["head"] = {name: part.get_extra_state() for name, part in self._stateful_parts()}

    def _stateful_parts(self) -> list[tuple[str, torch.nn.Module]]:
        """Objective and selector, as far as they have a state that follows training."""
        parts = [(name, getattr(self.student_with_head.head, name)) for name in ("objective", "selector")]
        return [(name, p) for name, p in parts if type(p).get_extra_state is not torch.nn.Module.get_extra_state]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of objective and selector, too."""
        super().on_load_checkpoint(checkpoint)
        for name, part in self._stateful_parts():
            part.set_extra_state(checkpoint["head"][name])
