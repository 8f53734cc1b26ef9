"""Online teacher: the model runs together with the student."""

import torch

from llm_kd.data.batch import TokenBatch
from llm_kd.head import TeacherHiddenStates
from llm_kd.teacher.base import Teacher, TeacherBackbone


class OnlineTeacher(Teacher):
    """Teacher that runs on every batch, without gradients.

    Args:
        backbone: The teacher, such as `llm_kd.models.Backbone`; it is frozen and put into evaluation mode.
    """

    def __init__(self, backbone: TeacherBackbone) -> None:
        backbone.eval()
        backbone.requires_grad_(False)
        self.backbone = backbone

    @torch.no_grad()
    def output(self, batch: TokenBatch) -> TeacherHiddenStates:
        """Return the hidden states of the supervised tokens, and the head; see `Teacher.output`."""
        hidden = self.backbone(batch.input_ids, batch.position_ids)
        return TeacherHiddenStates(hidden[batch.predict], self.backbone.lm_head())

    def to(self, device: torch.device | str) -> "OnlineTeacher":
        """Move the teacher to a device and return it."""
        self.backbone.to(device)
        return self
