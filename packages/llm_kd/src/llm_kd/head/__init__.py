"""The distillation head: the only code that sees tensors with a vocabulary axis."""

from llm_kd.head.kd_head import HeadOutput, KDHead
from llm_kd.head.linear import LMHead
from llm_kd.head.teacher_output import TeacherHiddenStates, TeacherOutput, truncate

__all__ = ["HeadOutput", "KDHead", "LMHead", "TeacherHiddenStates", "TeacherOutput", "truncate"]
