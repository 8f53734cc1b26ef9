"""The distillation head: the only code that sees tensors with a vocabulary axis."""

from llm_kd.head.kd_head import HeadOutput, KDHead
from llm_kd.head.linear import LMHead
from llm_kd.head.signal import HiddenSignal, TeacherSignal, truncate

__all__ = ["HeadOutput", "HiddenSignal", "KDHead", "LMHead", "TeacherSignal", "truncate"]
