"""Teachers and students: loading, depth pruning, adapters, and the split into body and head."""

from llm_kd.models.body import Body, build_student, load_teacher
from llm_kd.models.prune import depth_prune
from llm_kd.models.specs import LoRASpec, StudentSpec, TeacherSpec
from llm_kd.models.vocabulary import shared_vocabulary, vocabulary_size

__all__ = [
    "Body",
    "LoRASpec",
    "StudentSpec",
    "TeacherSpec",
    "build_student",
    "depth_prune",
    "load_teacher",
    "shared_vocabulary",
    "vocabulary_size",
]
