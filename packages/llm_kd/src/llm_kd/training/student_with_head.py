"""The student's forward pass, head and loss included: what DDP and FSDP wrap."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kd_common.sampling import SamplingParams
from llm_kd.data.batch import TokenBatch
from llm_kd.head import HeadOutput, KDHead
from llm_kd.head.metrics import token_metrics
from llm_kd.head.teacher_output import TeacherOutput
from llm_kd.models import Backbone
from llm_kd.models.generation import generate


class StudentWithHead(nn.Module):
    """Student backbone and distillation head in one module, so that sharded head weights are whole while the head runs.

    Args:
        student: The student.
        head: Loss, selection and LM heads.
        vocab_size: Number of tokens of the shared tokenizer.
    """

    def __init__(self, student: Backbone, head: KDHead, vocab_size: int) -> None:
        super().__init__()
        self.student = student
        self.head = head
        self.vocab_size = vocab_size

    def forward(self, batch: TokenBatch, teacher: TeacherOutput) -> HeadOutput:
        """Loss of the batch's supervised tokens.

        Args:
            batch: Tokens.
            teacher: The teacher's rows of the same supervised tokens.
        """
        hidden = self.student(batch.input_ids, batch.position_ids)
        return self.head(hidden[batch.predict], self.student.lm_head(), teacher)

    @torch.no_grad()
    def measure(self, batch: TokenBatch, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Sums over the supervised tokens: loss, its denominator, their number, and the token metrics (top-5)."""
        hidden = self.student(batch.input_ids, batch.position_ids)[batch.predict]
        head = self.student.lm_head()
        output = self.head(hidden, head, teacher)
        return {
            **token_metrics(hidden, head, teacher, batch.labels[batch.predict], self.vocab_size, k=5),
            "loss": output.loss_sum,
            "denominator": output.denominator,
            "tokens": output.loss_sum.new_tensor(output.num_tokens),
        }

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        eos_ids: Collection[int],
        pad_id: int,
        seed: int,
        synced: bool = False,
    ) -> list[list[int]]:
        """Responses of the student to all prompts in one batch; see `llm_kd.models.generation.generate`."""
        return generate(
            self.student.model,
            prompts,
            sampling,
            eos_ids=eos_ids,
            pad_id=pad_id,
            seed=seed,
            batch_size=max(1, len(prompts)),
            vocab_size=self.vocab_size,
            synced=synced,
        )


def token_metric_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means per token of the sums of `llm_kd.head.metrics.token_metrics`, `tar` for the accepted share.

    Args:
        sums: The sums, and the number of `tokens`.
    """
    tokens = sums["tokens"] or 1.0
    means = {name: sums[name] / tokens for name in ("nll", "kl", "agreement", "teacher_nll") if name in sums}
    return {**means, "tar": sums["accepted"] / tokens}


def validation_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the sums of `StudentWithHead.measure`."""
    return {**token_metric_means(sums), "loss": sums["loss"] / (sums["denominator"] or 1.0)}
