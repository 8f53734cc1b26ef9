"""The teacher itself, run beside the student."""

import torch

from llm_kd.data.batch import TokenBatch
from llm_kd.head import TeacherHiddenStates
from llm_kd.teacher.base import Teacher, TeacherBody


class OnlineTeacher(Teacher):
    """Runs the teacher on every batch, without gradients.

    Args:
        body: The teacher, such as :class:`llm_kd.models.Body`; it is frozen and put into evaluation mode.
    """

    def __init__(self, body: TeacherBody) -> None:
        body.eval()
        body.requires_grad_(False)
        self.body = body

    @torch.no_grad()
    def output(self, batch: TokenBatch) -> TeacherHiddenStates:
        """Hidden states of the supervised tokens, and the head; see :meth:`Teacher.output`."""
        hidden = self.body(batch.input_ids, batch.position_ids)
        return TeacherHiddenStates(hidden[batch.predict], self.body.lm_head())

    def to(self, device: torch.device | str) -> "OnlineTeacher":
        """Move the teacher to a device; returns itself."""
        self.body.to(device)
        return self
