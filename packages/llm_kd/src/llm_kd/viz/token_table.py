"""Comparison of student and teacher token by token, for reports and notebooks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_common.functional import forward_kl
from llm_kd.data.example import Example
from llm_kd.head.linear import Projection, rows_per_chunk
from llm_kd.models import Backbone
from llm_kd.selection.acceptance import speck_accept_probability, topk_accept

BYTES_PER_LOGIT = 4 * 8


@torch.no_grad()
def token_table(
    student: Backbone, teacher: Backbone, examples: Sequence[Example], *, vocab_size: int, k: int = 5
) -> dict[str, Tensor]:
    """Return every token of some examples that carries a loss.

    Args:
        student: The student, in evaluation mode.
        teacher: The teacher, on the same device.
        examples: N supervised tokens in all.
        vocab_size: Number of tokens of the shared tokenizer.
        k: The teacher accepts the student's most likely token if it is among its own k most likely ones.

    Returns:
        Columns of shape (N,), on the CPU. int64: `example`, `position` (from 0 at an answer's first token),
        `token`, `student_top`, `teacher_top`. bool: `accepted` (Top-k). float32: `speck`, the probability
        that Spec-k accepts; in nats `kl` (teacher || student), `nll`, `teacher_nll` and `teacher_entropy`.
    """
    device = next(student.parameters()).device
    parts: list[dict[str, Tensor]] = []
    for number, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, device=device)
        places = torch.tensor(example.loss_mask, device=device).nonzero().squeeze(1)
        positions = torch.arange(len(ids), device=device)
        hidden, hidden_teacher = (
            backbone(ids[None], positions[None])[0, places - 1] for backbone in (student, teacher)
        )
        student_head = Projection(hidden, student.lm_head(), vocab_size)
        teacher_head = Projection(hidden_teacher, teacher.lm_head(), vocab_size)
        # An answer starts behind a token without a loss; its tokens are counted from there.
        first = torch.cat([places.new_tensor([True]).bool(), places.diff() > 1])
        start = torch.where(first, places, 0).cummax(0).values
        for rows in torch.arange(len(places), device=device).split(rows_per_chunk(student_head, BYTES_PER_LOGIT)):
            z, z_teacher, token = student_head.logits(rows), teacher_head.logits(rows), ids[places[rows]]
            log_p = z_teacher.log_softmax(-1)
            columns = {
                "example": torch.full_like(token, number),
                "position": (places - start)[rows],
                "token": token,
                "student_top": z.argmax(-1),
                "teacher_top": z_teacher.argmax(-1),
                "accepted": topk_accept(z, z_teacher, k),
                "speck": speck_accept_probability(z, z_teacher, k),
                "kl": forward_kl(z, z_teacher),
                "nll": F.cross_entropy(z, token, reduction="none"),
                "teacher_nll": F.nll_loss(log_p, token, reduction="none"),
                "teacher_entropy": -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1),
            }
            parts.append({name: column.cpu() for name, column in columns.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
