"""Sources of the teacher's next-token distributions: the model itself, or a cache on disk."""

from llm_kd.teacher.base import Teacher, TeacherBackbone, supervised_counts
from llm_kd.teacher.cache import CacheError, CacheHeader, TeacherCache
from llm_kd.teacher.cached import CachedTeacher
from llm_kd.teacher.fingerprint import vocabulary_fingerprint, weights_fingerprint
from llm_kd.teacher.online import OnlineTeacher
from llm_kd.teacher.writer import CacheWriter, DiskFullError

__all__ = [
    "CacheError",
    "CacheHeader",
    "CacheWriter",
    "CachedTeacher",
    "DiskFullError",
    "OnlineTeacher",
    "Teacher",
    "TeacherBackbone",
    "TeacherCache",
    "supervised_counts",
    "vocabulary_fingerprint",
    "weights_fingerprint",
]
