"""Distillation head: LM heads, token selection and loss in one module, chunk by chunk.

It never holds the logits of all tokens. It walks over chunks of rows and forms loss and gradient in closed form while
the chunk's logits exist. It keeps only the gradients with respect to hidden states and head. Shapes: N tokens, n rows
of a chunk, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kd_common.checks import at_least, one_of, positive
from kd_common.errors import UserError
from llm_kd.head.linear import Gradients, LMHead, Projection, ValueWithGradients, rows_per_chunk
from llm_kd.head.rows import dense_loss, truncated_loss
from llm_kd.head.teacher_output import TeacherHiddenStates, TeacherOutput
from llm_kd.objectives import Objective
from llm_kd.selection import Selector
from llm_kd.selection.acceptance import TruncatedDistribution

# Elementwise work runs on an eighth of a chunk at a time, so its dozen temporaries weigh less than the two logits.
BLOCKS = 8
BYTES_PER_LOGIT = 4 * (2 + 12 / BLOCKS)

TeacherLogits = Tensor | TruncatedDistribution
TeacherRows = Callable[[Tensor], TeacherLogits]


class HeadOutput(NamedTuple):
    """Loss of a batch and its metrics; tensors per token have shape (N,), N valid tokens, no gradient.

    Attributes:
        loss_sum: Sum over tokens of weight * divergence (times T^2 if so set), the scalar to differentiate.
        denominator: Divisor of the sum: the number of valid tokens, or the sum of the weights.
        row_loss: Summands of loss_sum; 0 for a token of weight 0, for which no divergence is computed.
        weights: Loss weights.
        accepted: 1 where the token was accepted, 0 where not, or the probability.
    """

    loss_sum: Tensor
    denominator: Tensor
    row_loss: Tensor
    weights: Tensor
    accepted: Tensor

    @property
    def loss(self) -> Tensor:
        """Normalised loss of this batch alone; 0 where the denominator is 0."""
        return self.loss_sum / self.denominator.masked_fill(self.denominator == 0, 1.0)

    @property
    def num_tokens(self) -> int:
        """Return the number of valid tokens, the denominator of the token acceptance rate."""
        return len(self.accepted)

    @property
    def accepted_sum(self) -> Tensor:
        """Sum of `accepted`, the numerator of the token acceptance rate."""
        return self.accepted.sum()


class KDHead(nn.Module):
    """Weighted divergence between a student, given by its last hidden states, and an online or stored teacher.

    Call it inside the student's forward pass, where sharded head weights are gathered. Each call allows one backward
    pass.

    Args:
        objective: Divergence per token.
        selector: Weights per token.
        normalize: `valid`: divide by the number of valid tokens, as SelecTKD does; `selected`: by the sum of the
            weights, which is the number of selected tokens where the weights are 0 and 1.
        loss_temperature: T of the divergence.
        verify_temperature: Temperature of the logits that the selector sees.
        temperature_scale: `squared` multiplies a token's divergence by the square of its temperature; `none` does
            not.
        vocab_size: Size of the tokenizer's vocabulary; rows of either head beyond it are padding and are left out.
            None if both heads have exactly that size.
        chunk_size: Rows per chunk; None chooses it so that a chunk's work takes 64 MiB on a CPU, 1 GiB elsewhere.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        SelecTKD, arXiv 2510.24021, for the weighted loss.
    """

    def __init__(
        self,
        objective: Objective,
        selector: Selector,
        *,
        normalize: Literal["valid", "selected"] = "valid",
        loss_temperature: float = 1.0,
        verify_temperature: float = 1.0,
        temperature_scale: Literal["squared", "none"] = "squared",
        vocab_size: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        one_of("normalize", normalize, ("valid", "selected"))
        one_of("temperature_scale", temperature_scale, ("squared", "none"))
        for name, value in {"loss_temperature": loss_temperature, "verify_temperature": verify_temperature}.items():
            positive(name, value)
        for name, size in {"vocab_size": vocab_size, "chunk_size": chunk_size}.items():
            if size is not None:
                at_least(name, size, 1)
        if vocab_size is not None:
            selector.check_vocabulary(vocab_size)
        self.objective = objective
        self.selector = selector
        self.normalize = normalize
        self.loss_temperature = loss_temperature
        self.verify_temperature = verify_temperature
        self.temperature_scale = temperature_scale
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size

    def forward(self, student_hidden: Tensor, student_head: LMHead, teacher: TeacherOutput) -> HeadOutput:
        """Return the loss of a batch, with gradients for the student's hidden states, head weight and bias.

        Args:
            student_hidden: Hidden states before the student's head of the tokens that carry a loss, shape (N, H).
            student_head: The student's output layer.
            teacher: The teacher's N rows of the same tokens; no gradient is taken. A stored distribution that lacks
                tokens (K < V) is compared on K + 1 categories, see `llm_kd.head.rows.truncated_loss`.

        Returns:
            Sums and per-token values, in the order of the rows.

        Raises:
            ValueError: If shapes or vocabularies do not fit, or a stored teacher does not suffice.
        """
        if student_hidden.ndim != 2 or len(student_hidden) != len(teacher):
            raise ValueError(
                "student_hidden of shape (N, H) and the teacher must hold the same N tokens, got shape "
                f"{tuple(student_hidden.shape)} and {len(teacher)} rows; pick the supervised tokens of both first"
            )
        vocab_size = self._shared_vocab(len(student_head.weight), teacher)
        student = Projection(student_hidden, student_head, vocab_size)
        inputs = (student_hidden, student_head.weight, student_head.bias)
        gradients = Gradients(student, inputs) if torch.is_grad_enabled() else None
        teacher_rows = self._rows_of(teacher, vocab_size, student.dtype)
        with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
            ranked = teacher_rows
            if isinstance(teacher, TruncatedDistribution) and not self.selector.whole_teacher:
                ranked = teacher.__getitem__  # with the exact ranks; stored probabilities are rounded
            row_loss, weights, accepted = self._walk(student, teacher_rows, ranked, gradients)
            loss_sum = row_loss.sum()
            denominator = weights.sum() if self.normalize == "selected" else torch.full_like(loss_sum, len(weights))
        if gradients is not None:
            loss_sum = ValueWithGradients.apply(loss_sum, gradients, *inputs)
        return HeadOutput(loss_sum, denominator, row_loss, weights, accepted)

    def check_truncated(self, size: int, vocab_size: int) -> None:
        """Raise for a stored teacher that does not determine the loss; call this before training.

        Args:
            size: Number K of stored tokens.
            vocab_size: Number V of tokens of the stored teacher's vocabulary.

        Raises:
            ValueError: If the vocabularies differ, or if the selector needs more than is stored. With K < V, also if
                the objective does not obey the data-processing inequality or the loss has a temperature.
        """
        if self.vocab_size not in (None, vocab_size):
            raise UserError(
                f"the stored teacher has a vocabulary of {vocab_size} tokens, the head vocab_size={self.vocab_size}; "
                "store the teacher again with the tokenizer's size"
            )
        self.selector.check_truncated(size, vocab_size)
        if size == vocab_size:
            return
        hint = f"but only {size} of {vocab_size} tokens are stored; store all, or run the teacher online"
        if not self.objective.data_processing:
            raise UserError(
                f"the objective {type(self.objective).__name__} needs the teacher's whole distribution, {hint} "
                "(ForwardKL, ReverseKL, JensenShannon, their skewed forms and TotalVariation do without)"
            )
        if self.loss_temperature != 1:
            raise UserError(
                f"loss_temperature={self.loss_temperature} needs the teacher's whole distribution, {hint}, or set "
                "loss_temperature to 1"
            )

    def on_step(self, loss: float, step: int, total_steps: int, selected_loss: float | None = None) -> None:
        """Advance objective and selector after an optimizer step, never in validation.

        Args:
            loss: Mean loss of the step, reduced over accumulation and ranks.
            step: Number of optimizer steps done.
            total_steps: Length of training in optimizer steps.
            selected_loss: Sum divided by the sum of the weights for any `normalize`; None if equal. A mean over all
                tokens falls when the selector selects fewer, which the selector must not take for progress.
        """
        self.objective.on_step(loss, step, total_steps)
        self.selector.on_step(loss if selected_loss is None else selected_loss, step, total_steps)

    def _shared_vocab(self, rows: int, teacher: TeacherOutput) -> int:
        """Size V of the vocabulary, from the rows of the student's head and the tokens that the teacher knows."""
        teacher_rows = teacher.vocab_size if isinstance(teacher, TruncatedDistribution) else len(teacher.head.weight)
        if self.vocab_size is None and rows != teacher_rows:
            raise UserError(
                f"the student's head has {rows} rows, the teacher's {teacher_rows}; if both models share a tokenizer "
                "and the rest is padding, set vocab_size to the tokenizer's largest id + 1"
            )
        if self.vocab_size is not None and self.vocab_size > min(rows, teacher_rows):
            raise UserError(
                f"vocab_size={self.vocab_size} exceeds the {rows} rows of the student's head or the {teacher_rows} of "
                "the teacher's"
            )
        if isinstance(teacher, TruncatedDistribution):
            self.check_truncated(teacher.size, teacher.vocab_size)
        return self.vocab_size or rows

    def _rows_of(self, teacher: TeacherOutput, vocab_size: int, dtype: torch.dtype) -> TeacherRows:
        """Return a function of row indices that gives the teacher's logits, or its truncated distribution."""
        if isinstance(teacher, TeacherHiddenStates):
            live = Projection(teacher.hidden, teacher.head, vocab_size)
            return lambda rows: live.logits(rows).to(dtype)
        if teacher.size < vocab_size:
            return teacher.__getitem__
        return lambda rows: teacher[rows].dense_log_probs().to(dtype)

    def _walk(
        self, student: Projection, teacher: TeacherRows, ranked: TeacherRows, gradients: Gradients | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute losses, weights and acceptance of all N rows, scored by `ranked`, and add to the gradients."""
        rows = torch.arange(len(student.hidden), device=student.hidden.device)
        row_loss, weights, accepted, temperature = rows.new_zeros((4, len(rows)), dtype=student.dtype)
        size = self.chunk_size or rows_per_chunk(student, BYTES_PER_LOGIT)
        noise = self.selector.draw(len(rows), rows.device)

        def select(chunk: Tensor, score: Tensor) -> Tensor:
            """Record the selection among some rows and return the places of those with a weight."""
            selection = self.selector.select(score, None if noise is None else noise[chunk])
            weights[chunk], accepted[chunk], temperature[chunk] = selection
            return selection.weights.nonzero()[:, 0]

        if not self.selector.per_row:
            # The weights need the scores of all rows first, so rows with a weight are projected a second time.
            score = torch.cat([self._score(student.logits(part), ranked(part)) for part in rows.split(size)])
            rows = rows[select(rows, score)]
        for chunk in rows.split(size):
            z, z_teacher = student.logits(chunk), teacher(chunk)
            if self.selector.per_row:
                kept = select(chunk, self._score(z, z_teacher if ranked is teacher else ranked(chunk)))
                if len(kept) < len(chunk):
                    chunk, z, z_teacher = chunk[kept], z[kept], z_teacher[kept]
            tau = self.loss_temperature * temperature[chunk]
            scale = weights[chunk] * tau**2 if self.temperature_scale == "squared" else weights[chunk]
            row_loss[chunk] = self._losses(student, z, z_teacher, tau, scale, with_gradient=gradients is not None)
            if gradients is not None:
                gradients.add(chunk, z)
            del z, z_teacher  # frees them before the next chunk's logits are made
        return row_loss, weights, accepted

    def _score(self, z: Tensor, z_teacher: TeacherLogits) -> Tensor:
        """Return the selector's scores of a chunk, shape (n,)."""
        t = self.verify_temperature
        scores = []
        for z_, z_teacher_ in _blocks(z, z_teacher):
            if t != 1:
                z_ = z_ / t
                # A selector that takes a truncated teacher needs its ranks alone, which no temperature changes.
                z_teacher_ = z_teacher_ if isinstance(z_teacher_, TruncatedDistribution) else z_teacher_ / t
            scores.append(self.selector.score(z_, z_teacher_))
        return torch.cat(scores)

    def _losses(
        self, student: Projection, z: Tensor, z_teacher: TeacherLogits, tau: Tensor, scale: Tensor, with_gradient: bool
    ) -> Tensor:
        """Return the scaled divergences of a chunk, shape (n,).

        If asked, replace z by their gradient with respect to the raw student logits.
        """
        losses = []
        tempered = bool((tau != 1).any())  # if not, two passes over the logits are saved
        for z_, z_teacher_, tau_, scale_ in _blocks(z, z_teacher, tau[:, None], scale[:, None]):
            if isinstance(z_teacher_, TruncatedDistribution):
                loss, gradient = truncated_loss(self.objective, z_, z_teacher_, with_gradient=with_gradient)
            else:
                pair = (z_ / tau_, z_teacher_ / tau_) if tempered else (z_, z_teacher_)
                loss, gradient = dense_loss(self.objective, *pair, with_gradient=with_gradient)
            losses.append(scale_[:, 0] * loss)
            if gradient is not None:
                torch.mul(student.through_softcap(gradient, z_), scale_ / tau_, out=z_)
        return torch.cat(losses)


def _blocks(first: Tensor, *rest: TeacherLogits) -> Iterator[tuple[Any, ...]]:
    """Return an eighth of the rows at a time, as views; one empty block when there are no rows."""
    size = max(1, math.ceil(len(first) / BLOCKS))
    return zip(*(rows.split(size) for rows in (first, *rest)), strict=True)
