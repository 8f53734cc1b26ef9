"""Teachers and students: loading, depth pruning, adapters, and the split into backbone and head."""

from kd_common.hub.vocabulary import shared_vocabulary, vocabulary_size
from llm_kd.models.backbone import Backbone, build_student, check_packing, load_teacher
from llm_kd.models.prune import depth_prune
from llm_kd.models.specs import LoRASpec, StudentSpec, TeacherSpec

__all__ = [
    "Backbone",
    "LoRASpec",
    "StudentSpec",
    "TeacherSpec",
    "build_student",
    "check_packing",
    "depth_prune",
    "load_teacher",
    "shared_vocabulary",
    "vocabulary_size",
]
