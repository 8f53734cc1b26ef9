"""Updates by the token: losses are summed over all tokens of an update and divided once by their number."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd_common.checks import at_least, positive
from kd_common.distributed import all_reduce_sum, world_size
from kd_common.optim import decay_groups
from kd_common.run.training import TrainingModule
from kd_common.schedules import CosineDecay, Schedule


class TokenNormalizedModule(TrainingModule):
    """Train with AdamW on the mean loss per token of an update, whatever its micro-batches and ranks.

    The loss of an update is the sum over all its tokens, micro-batches and ranks, divided by their number (or by the
    sum of their weights), so that neither accumulation nor the number of ranks changes it.

    Args:
        lr_schedule: Factor on the learning rate; None means a cosine from 1 to 0 over the run.
        learning_rate: AdamW's learning rate at factor 1, > 0.
        weight_decay: Weight decay of matrices, >= 0; vectors (norms, biases) have none.
        betas: AdamW's decay rates.
        seed: Seed of every random draw during training.

    Attributes:
        sums: Names of what `token_sums` returns.

    Raises:
        UserError: If a setting is out of range.
    """

    sums: ClassVar[tuple[str, ...]] = ("loss", "denominator", "tokens")

    def __init__(
        self,
        lr_schedule: Schedule | None,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        seed: int,
    ) -> None:
        super().__init__()
        positive("model.learning_rate", learning_rate)
        at_least("model.weight_decay", weight_decay, 0)
        self.lr_schedule = lr_schedule or CosineDecay()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.seed = seed
        self._window = torch.zeros(len(self.sums))
        self._since_validation = dict.fromkeys(self.sums, 0.0)

    def token_sums(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """Return the sums over a micro-batch's tokens, by name.

        Those are at least the `loss`, its `denominator` and the number of supervised `tokens`.
        """
        raise NotImplementedError

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return what is shown of an update, or of all since the last validation, from its sums."""
        return {"loss": sums["loss"] / (sums["denominator"] or 1.0)}

    def on_update(self, sums: Mapping[str, float]) -> None:
        """Follow the sums of an update that is about to be made."""

    def build_optimizer(self) -> torch.optim.AdamW:
        """Return AdamW over all trained parameters."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(decay_groups(trained, self.weight_decay), lr=self.learning_rate, betas=self.betas)

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type in which sums over many tokens are exact enough."""
        return torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64

    def on_train_start(self) -> None:
        """Start the sums of the first update."""
        self._window = torch.zeros(len(self.sums), dtype=self.sum_dtype, device=self.device)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum of the losses of one micro-batch; it is normalised before the optimizer steps."""
        sums = self.token_sums(batch, batch_idx)
        self._window += torch.stack([sums[name].detach().to(self._window) for name in self.sums])
        return sums["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise the gradient by the tokens of the whole update, and log its means.

        Lightning calls this before it clips. By then it has divided by the number of micro-batches, and the ranks'
        gradients have been averaged.

        Raises:
            NonFiniteLossError: If the loss is not finite; the update is not made.
        """
        self._touched = True
        sums = dict(zip(self.sums, all_reduce_sum(self._window).tolist(), strict=True))
        self._window.zero_()
        for name, value in sums.items():
            self._since_validation[name] += value
        if not math.isfinite(sums["loss"]):
            raise self.non_finite(f"the loss of update {self.global_step + 1} is {sums['loss']}, and it was not made")
        if sums["denominator"] == 0:  # no supervised token, or none with a weight: the gradient is zero as it is
            return
        factor = self.accumulated * world_size() / sums["denominator"]
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.on_update(sums)
        means = self.means(sums)
        self.log_dict(means, prog_bar=True, logger=False)
        if self.is_logging_step():
            values = {**means, "tokens": sums["tokens"], "lr": optimizer.param_groups[0]["lr"]}
            self.log_now({f"train/{name}": value for name, value in values.items()})

    def training_since(self) -> Mapping[str, Any]:
        """Return and log the means of the training since the last validation, and its speed."""
        trained, self._since_validation = self._since_validation, dict.fromkeys(self.sums, 0.0)
        means, speed = self.means(trained), trained["tokens"] / self._seconds
        self.log_now({f"epoch/{name}": value for name, value in {**means, "tokens_per_second": speed}.items()})
        return {**{f"train_{name}": mean for name, mean in means.items()}, "tokens_per_second": speed}

    def rank_state(self) -> dict[str, Any]:
        """Add the sums of the unfinished update, and of the updates since the last validation."""
        state = super().rank_state() | {"since_validation": self._since_validation}
        return state | ({"window": self._window.clone()} if self._in_window() else {})

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        super().load_rank_state(state)
        self._since_validation = dict(state["since_validation"])
        self._window += state.get("window", torch.zeros(())).to(self._window)
