"""Fingerprints that identify a teacher and a vocabulary in a cache."""

import hashlib
import json
from collections.abc import Mapping

from llm_kd.models.fingerprint import tensors_fingerprint
from llm_kd.teacher.base import TeacherBackbone


def weights_fingerprint(backbone: TeacherBackbone) -> str:
    """Return the SHA-256 of a teacher's settings and of all its weights: their names, dtypes, shapes and bytes.

    Equal weights belong to different teachers if the rotary base, a window or a norm's epsilon differs.

    Returns:
        64 hexadecimal digits.
    """
    head = backbone.lm_head()
    tensors = {**backbone.state_dict(), "head.weight": head.weight, "head.bias": head.bias}
    note = json.dumps({"softcap": head.softcap, **backbone.settings()}, sort_keys=True, default=str)
    return tensors_fingerprint(tensors, note=note)


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 over the tokens and their ids, as `tokenizer.get_vocab()` gives them.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
