"""The training system: a drafter learns every level in one teacher-forced pass over text the target wrote."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kd_common.checks import at_least, within
from kd_common.distributed import all_reduce_sum, world_size
from kd_common.errors import UserError
from kd_common.hub.language_models import model_ends, note_unapplied
from kd_common.run.token_updates import TokenNormalizedModule
from kd_common.schedules import Schedule
from spec_decode.data.datamodule import DraftBatch, TargetText
from spec_decode.decoding.cost import expected_tokens
from spec_decode.drafters import FastEagle, TrainableDrafter, save_drafter
from spec_decode.drafters.files import frequent_tokens, read_config
from spec_decode.models import CausalLM, States
from spec_decode.models.target import TargetSpec
from spec_decode.training.losses import (
    AcceptanceTable,
    feature_loss,
    head_loss,
    level_batch,
    level_loss,
    level_weights,
    teacher_forced_acceptance,
)


class DrafterModule(TokenNormalizedModule):
    """Train a drafter of any kind against a frozen target.

    The loss of a level is the soft cross-entropy to the target's distribution, and what is weighted in beside it,
    summed over its supervised tokens. The weighted sum over the levels is divided by the number of tokens that the
    first level is supervised on. Under a reduced draft vocabulary the distribution is renormalised over it, and
    positions whose token lies outside are left out.

    Args:
        target: The model whose decoding is sped up.
        drafter: The drafter to train (`spec_decode.drafters`); None means `FastEagle()`.
        lr_schedule: Factor on the learning rate; None means a cosine from 1 to 0 over the run.
        learning_rate: AdamW's learning rate at factor 1, > 0.
        weight_decay: Weight decay of matrices, >= 0.
        betas: AdamW's decay rates.
        level_decay: Weight of level i is this to the power i (from 0), in (0, 1].
        acceptance_weight: Weight of the probability that a drawn draft token is rejected (`rejected_mass`), >= 0.
        feature_weight: Weight of the smooth-L1 distance of every level's state to the target's final state, >= 0.
        ranks: Candidates per level whose acceptance is measured, >= 1.
        chunk: Rows of the head at once; bounds the memory of the logits.
        shard_target: Spread the target's layers over all processes (FSDP2) instead of copying them to each; with online
            features. One process keeps them whole.
        seed: Seed of the drafter's initialisation; linked from `seed_everything`.

    Raises:
        ModelNotFoundError: If the target cannot be found.
        UserError: If a setting is out of range; the message names it.
    """

    metric = "tau"
    export_name = "drafter_{}"

    def __init__(
        self,
        target: TargetSpec,
        drafter: TrainableDrafter | None = None,
        lr_schedule: Schedule | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        level_decay: float = 0.8,
        acceptance_weight: float = 0.0,
        feature_weight: float = 0.0,
        ranks: int = 8,
        chunk: int = 512,
        shard_target: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(lr_schedule, learning_rate, weight_decay, betas, seed)
        self.save_hyperparameters()
        within("model.level_decay", level_decay, "(0, 1]")
        for name, value in (("acceptance_weight", acceptance_weight), ("feature_weight", feature_weight)):
            at_least(f"model.{name}", value, 0)
        for name, value in (("ranks", ranks), ("chunk", chunk)):
            at_least(f"model.{name}", value, 1)
        self.target_spec = target
        self.level_decay, self.feature_weight = level_decay, feature_weight
        self.level_loss = level_loss(acceptance_weight)
        self.ranks, self.chunk, self.shard_target = ranks, chunk, shard_target
        # In a list: the target is in no checkpoint, optimizer or DDP bucket.
        self._target = [target.load()]
        torch.manual_seed(seed)
        # A copy: the hyperparameters keep the one without weights.
        self.drafter = copy.deepcopy(drafter or FastEagle()).bind(self.target)
        self._table = AcceptanceTable.empty(1, 1)
        self._val = torch.zeros(2)

    @property
    def target(self) -> CausalLM:
        """Return the frozen target."""
        return self._target[0]

    # ------------------------------------------------------------------------------------------------ set-up

    def obtain(self, data: TargetText, trainer: pl.Trainer) -> None:
        """Attach the target to the data, in which it answers the prompts.

        Raises:
            UserError: If the data do not fit the target.
        """
        if data.attached and data.target is self.target:
            return
        tokenizer = self.target_spec.tokenizer()
        tokenizer.chat_template = data.chat_template or tokenizer.chat_template
        if trainer.is_global_zero:
            note_unapplied(self.target_spec.name)
        data.progress = trainer.progress_bar_callback is not None
        data.attach(self.target, tokenizer, model_ends(self.target_spec.name, tokenizer), trainer.world_size)

    def setup(self, stage: str) -> None:
        """Choose the reduced draft vocabulary from the training text.

        Raises:
            UserError: If the target is to be sharded on CPUs in bfloat16.
        """
        sharded_on_cpu = self.shard_target and world_size() > 1 and self.trainer.strategy.root_device.type == "cpu"
        if sharded_on_cpu and self.target.dtype == torch.bfloat16:  # said by every process, or the others would wait
            raise UserError(
                "model.shard_target on CPUs needs model.target.dtype float32: the process that writes the text lays "
                "bfloat16 weights out anew, which are then no longer shared out"
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TargetText) and self.drafter.vocabulary is not None and int(self.drafter.vocabulary[0]) < 0:
            self.drafter.use_vocabulary(frequent_tokens(data.token_counts(), self.drafter.draft_tokens))

    def on_fit_start(self) -> None:
        """Bring the target to the device, or its share."""
        if self.shard_target and world_size() > 1:
            self.target.shard(self.device)
        else:
            self.target.to(self.device)

    # ------------------------------------------------------------------------------------------------ loss

    def forward(self, tokens: Tensor, states: States) -> list[Tensor]:
        """States of every level; see `TrainableDrafter.level_states`. DDP watches the drafter through this call."""
        return self.drafter.level_states(tokens, states)

    def _states(self, batch: DraftBatch) -> States:
        if batch.states is not None:
            return batch.states
        with torch.autocast(self.device.type, enabled=False):  # the target keeps the precision it decodes in
            return self.target(batch.tokens)

    def outputs(self, batch: DraftBatch) -> tuple[States, list[Tensor]]:
        """States of the target, and of every level of the drafter."""
        states = self._states(batch)
        return states, self(batch.tokens, states)

    def level_losses(
        self, batch: DraftBatch, states: States, levels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level the summed loss, the number of supervised tokens, and the correct best candidates among them.

        Args:
            batch: Sequences to learn from.
            states: See `outputs`.
            levels: See `outputs`.
        """
        drafter = self.drafter
        final = states.final.flatten(0, 1)
        with torch.no_grad():
            head = drafter.frozen_head()
            answered = batch.answer[:, 1:].flatten().nonzero().squeeze(1)  # token t is predicted at t - 1
            at = answered + answered // (batch.tokens.shape[1] - 1)
            logits = torch.nn.functional.linear(final[at].to(head.dtype), head)
            place = torch.zeros(len(final), dtype=torch.int64, device=final.device)
            place[at] = torch.arange(len(at), device=final.device)
        losses, counts, hits = [], [], []
        for level, x in enumerate(levels[: drafter.supervised]):
            wanted = level_batch(batch.tokens, batch.answer, level)
            tokens, known = self._draft_tokens(wanted.tokens)
            row, position = wanted.rows[:, known]
            before = wanted.reached[known] - 1
            drafted = x[row, position]
            loss, right = head_loss(
                lambda part, level=level: drafter.level_logits(level, part),  # type: ignore[misc]
                drafted,
                logits[place[before]],
                tokens[known],
                self.chunk,
                tuple(drafter.parameters()),
                self.level_loss,
            )
            if self.feature_weight:
                loss = loss + self.feature_weight * feature_loss(drafted, final[before])
            losses.append(loss)
            counts.append(known.sum())
            hits.append(right)
        return losses, counts, hits

    def _draft_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Draft token of each target token, and whether it has one."""
        vocabulary = self.drafter.vocabulary
        if vocabulary is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        place = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
        return place, vocabulary[place] == tokens

    def token_sums(self, batch: DraftBatch, batch_idx: int) -> dict[str, Tensor]:
        """Weighted sum of the levels' losses of one micro-batch, and the tokens of the first level."""
        losses, counts, hits = self.level_losses(batch, *self.outputs(batch))
        summed = torch.stack(losses)
        weights = torch.tensor(level_weights(len(losses), self.level_decay), device=summed.device, dtype=summed.dtype)
        if self.is_logging_step():
            number = torch.stack(counts).clamp(min=1)
            means, accepted = (summed.detach() / number).tolist(), (torch.stack(hits) / number).tolist()
            for level, (mean, hit) in enumerate(zip(means, accepted, strict=True), start=1):
                self.log_now({f"train/loss_{level}": mean, f"train/acceptance_{level}": hit})
                self.log(f"a{level}", hit, prog_bar=True, logger=False)
        return {"loss": (weights * summed).sum(), "denominator": counts[0], "tokens": counts[0]}

    # ------------------------------------------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Start counting."""
        super().on_validation_start()
        self._table = AcceptanceTable.empty(self.drafter.depth, self.ranks, self.device)
        self._val = torch.zeros(2, dtype=self.sum_dtype, device=self.device)

    def validation_step(self, batch: DraftBatch, batch_idx: int) -> None:
        """Count losses and acceptance."""
        states, levels = self.outputs(batch)
        losses, counts, _ = self.level_losses(batch, states, levels)
        self._val += torch.stack([sum(part).to(self._val) for part in (losses, counts)])  # type: ignore[union-attr]
        vocabulary = self.drafter.vocabulary

        def candidates(level: int, states: Tensor) -> Tensor:
            ranks = min(self.ranks, self.drafter.draft_tokens)
            logits = (self.drafter.level_logits(level, x) for x in states.split(self.chunk))
            ids = torch.cat([part.topk(ranks).indices for part in logits])
            return ids if vocabulary is None else vocabulary[ids]

        teacher_forced_acceptance(self._table, batch.tokens, batch.answer, candidates, levels)

    def on_validation_epoch_end(self) -> None:
        """Log and remember the epoch's result; the drafter keeps the acceptance of its last validation."""
        for counted in (self._table.hits, self._table.reached, self._val):
            all_reduce_sum(counted)
        if not self._val[0].isfinite():
            raise self.non_finite(f"the validation loss is {float(self._val[0])} at epoch {self.current_epoch}")
        acceptance = self._table.table()
        tau = expected_tokens(acceptance, (1,) * len(acceptance))
        loss = float(self._val[0] / self._val[1].clamp(min=1))
        self.log("val/tau", tau, prog_bar=True, rank_zero_only=False, sync_dist=world_size() > 1)
        self.log("val/loss", loss, sync_dist=world_size() > 1)
        for level, row in enumerate(acceptance, start=1):
            self.log(f"val/acceptance_{level}", row[0], sync_dist=world_size() > 1)
        if self.trainer.sanity_checking:
            return
        self.drafter.acceptance = acceptance
        self.remember({"loss": loss, "tau": tau, "acceptance": acceptance})

    # ------------------------------------------------------------------------------------------------ checkpoints

    def export(self, path: Path) -> None:
        """Write the drafter, which `spec_decode.drafters.load_drafter` reads."""
        if self.trainer.is_global_zero:
            latest = self.history[-1]
            data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
            meta = {
                "target": self.target_spec.name,
                "epoch": latest["epoch"],
                "tau": latest["tau"],
                "chat_template": getattr(data, "chat_template", None),
            }
            save_drafter(self.drafter, path, meta)

    def exported_epoch(self, path: Path) -> Mapping[str, Any]:
        """Read epoch and metric from the file."""
        return read_config(path)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history, and the acceptance of the last validation into the drafter."""
        super().on_load_checkpoint(checkpoint)
        if self.history:
            self.drafter.acceptance = self.history[-1]["acceptance"]
