"""The vocabulary that two models of one tokenizer share.

Needs the extra ``kd-common[hub]``.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of rows of a model's head that its tokenizer needs: the largest token id + 1; rows beyond are padding.

    Not the number of tokens, ``len(tokenizer)``: ids may have holes (tokens removed, or added behind a reserved block),
    and the last tokens, often those that end a turn, would then be taken for padding.
    """
    return max(tokenizer.get_vocab().values()) + 1


def shared_vocabulary(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_config: Any,
    student_config: Any,
    *,
    roles: tuple[str, str] = ("teacher", "student"),
) -> int:
    """Size of the common vocabulary; the models' rows beyond it are padding (Qwen: 151,936 against 152,064).

    Args:
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.
        teacher_config: Configuration of the teacher, with ``vocab_size``.
        student_config: Configuration of the student.
        roles: What the two models are called in messages.

    Raises:
        ValueError: If a token has different ids in the two tokenizers, or a model has fewer rows than tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        shown = ", ".join(f"{t!r} ({theirs.get(t)} against {ours.get(t)})" for t in differing[:3])
        raise ValueError(
            f"{roles[0]} and {roles[1]} must share a tokenizer, but {len(differing)} tokens differ: {shown}. Choose a "
            f"{roles[0]} and a {roles[1]} of one family"
        )
    size = vocabulary_size(student)
    for role, config in zip(roles, (teacher_config, student_config), strict=True):
        if config.vocab_size < size:
            raise ValueError(f"the {role} has {config.vocab_size} rows, but its tokenizer has ids up to {size - 1}")
    return size
