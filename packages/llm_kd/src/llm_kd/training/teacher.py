"""The teacher of a run: loaded, asked for the responses that the data lack, or replaced by its stored outputs."""

import torch

from llm_kd.data import TextDataModule
from llm_kd.models import Backbone, TeacherSpec, check_packing, load_teacher
from llm_kd.teacher import CachedTeacher, CacheError, OnlineTeacher, Teacher, TeacherCache, weights_fingerprint


def needed_teacher(spec: TeacherSpec, data: TextDataModule) -> Backbone | None:
    """Load the teacher, or return None if it need not run."""
    if spec.cache is not None and data.responses == "dataset":
        return None
    backbone = load_teacher(spec)
    if data.packing and spec.cache is None:
        check_packing(backbone, "teacher")
    return backbone


def prepare_teacher(
    spec: TeacherSpec, data: TextDataModule, device: torch.device, backbone: Backbone | None
) -> Teacher:
    """Let the teacher write the responses that the data lack, and open its stored outputs if there are any.

    Args:
        spec: The teacher.
        data: The data.
        device: Device on which the teacher writes.
        backbone: The result of `needed_teacher`.

    Raises:
        CacheError: If the stored teacher is damaged or another one, or lacks examples.
    """
    if backbone is not None and data.responses == "teacher":
        backbone.to(device)
        data.write_responses(backbone.model)
    if spec.cache is None:
        assert backbone is not None
        return OnlineTeacher(backbone)
    cache = TeacherCache(spec.cache)
    if backbone is None:
        cache.check_source(spec.source())
    else:
        cache.check(weights=weights_fingerprint(backbone))
    data.read()
    keys = [example.key for split in data.splits.values() for example in split.examples]
    if missing := sum(key not in cache for key in keys):
        raise CacheError(
            f"{missing:,} of {len(keys):,} examples are not in model.teacher.cache {spec.cache}: run "
            "llm_kd.cache_teacher with the same --data settings into the same folder, which adds them"
        )
    return CachedTeacher(cache)
