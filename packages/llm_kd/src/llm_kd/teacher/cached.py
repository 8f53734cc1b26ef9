"""Teacher that reads a cache on disk."""

import torch

from llm_kd.data.batch import TokenBatch
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher.base import Teacher, supervised_counts
from llm_kd.teacher.cache import CacheError, TeacherCache


class CachedTeacher(Teacher):
    """Teacher that reads truncated distributions from a cache.

    Call `KDHead.check_truncated` before training: it raises if the stored tokens are not enough for the loss.

    Args:
        cache: An open cache.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def output(self, batch: TokenBatch) -> TruncatedDistribution:
        """Return the stored rows of the supervised tokens; see `Teacher.output`.

        Raises:
            CacheError: If an example is missing or damaged, or was stored with other supervised tokens.
        """
        counts = supervised_counts(batch)
        stored = self.cache.read(batch.keys)
        labels = batch.labels[batch.predict].cpu()
        if stored.counts != counts or not torch.equal(stored.tokens, labels):
            wanted = labels.split(counts)
            found = stored.tokens.split(stored.counts)
            key = next(k for k, a, b in zip(batch.keys, wanted, found, strict=True) if not torch.equal(a, b))
            raise CacheError(
                f"example {key} was stored in {self.cache.folder} with other supervised tokens than it has now; its "
                "key should have changed with them. Cache the teacher again"
            )
        return stored.distribution.to(batch.input_ids.device)
