"""Training metrics: distances of the student from its teacher and from the text, summed over tokens chunk by chunk."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_common.functional import forward_kl
from llm_kd.head.linear import LMHead, Projection, rows_per_chunk
from llm_kd.head.rows import truncated_loss
from llm_kd.head.teacher_output import TeacherHiddenStates, TeacherOutput
from llm_kd.objectives.fkl import ForwardKL
from llm_kd.selection.acceptance import topk_accept

BYTES_PER_LOGIT = 4 * 6


@torch.no_grad()
def token_metrics(
    student_hidden: Tensor, student_head: LMHead, teacher: TeacherOutput, labels: Tensor, vocab_size: int, k: int
) -> dict[str, Tensor]:
    """Sum the training metrics over N tokens.

    Args:
        student_hidden: Hidden states before the student's head, shape (N, H).
        student_head: The student's output layer.
        teacher: The teacher's N rows.
        labels: The tokens of the text, shape (N,).
        vocab_size: Number of tokens of the tokenizer; rows of the heads beyond it are left out.
        k: The teacher accepts the student's most likely token if it is among its own k most likely ones, or among the
            stored ones if they are fewer. It does not depend on the run's selector, so that runs can be compared.

    Returns:
        Scalars in at least float32: `nll`, the student's negative log-likelihood in nats; `kl`, KL(teacher ||
        student), a lower bound of it with a stored teacher that lacks tokens; `agreement`, tokens both models hold
        most likely; `accepted` tokens; `teacher_nll`, unless the teacher is stored and lacks tokens.
    """
    student = Projection(student_hidden, student_head, vocab_size)
    chunks = torch.arange(len(labels), device=labels.device).split(rows_per_chunk(student, BYTES_PER_LOGIT))
    live = Projection(teacher.hidden, teacher.head, vocab_size) if isinstance(teacher, TeacherHiddenStates) else None
    sums: dict[str, Tensor] = {}
    for chunk in chunks:
        z, target = student.logits(chunk), labels[chunk]
        values = {"nll": F.cross_entropy(z, target, reduction="sum")}
        if isinstance(teacher, TeacherHiddenStates):
            z_teacher = live.logits(chunk)  # type: ignore[union-attr]  # it is there with this kind of teacher
            best, accepted = z_teacher.argmax(dim=-1), topk_accept(z, z_teacher, k)
        else:
            stored = teacher[chunk]
            whole = stored.size == vocab_size
            z_teacher = stored.dense_log_probs().to(z.dtype) if whole else None  # sums in float16 keep three digits
            # The stored order is the rank, because rounding made unequal probabilities equal.
            best, accepted = stored.indices[:, 0], topk_accept(z, stored, min(k, stored.size))
        if z_teacher is None:
            values["kl"] = truncated_loss(ForwardKL(), z, stored, with_gradient=False)[0].sum()
        else:
            values["kl"] = forward_kl(z, z_teacher).sum()
            values["teacher_nll"] = F.cross_entropy(z_teacher, target, reduction="sum")
        values["accepted"] = accepted.sum().to(z.dtype)
        values["agreement"] = (z.argmax(dim=-1) == best).sum().to(z.dtype)
        sums = {name: sums.get(name, 0) + value for name, value in values.items()}
    return sums
