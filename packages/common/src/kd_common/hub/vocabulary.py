"""The vocabulary that two models of one tokenizer share, and the tokens at which an answer ends."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_common.errors import UserError
from kd_common.text import ChatEncoder


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows of a model's head that its tokenizer needs.

    This is the largest token id + 1. The rows beyond it are padding.

    The number of tokens, `len(tokenizer)`, would be wrong. Ids may have holes, as tokens were removed or added behind a
    reserved block. The last tokens, often those that end a turn, would then count as padding.
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
    """Return the size of the common vocabulary; the models' rows beyond it are padding (Qwen: 151,936 against 152,064).

    Args:
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.
        teacher_config: Configuration of the teacher, with `vocab_size`.
        student_config: Configuration of the student.
        roles: Names of the two models in messages.

    Raises:
        UserError: If a token has different ids in the two tokenizers, or a model has fewer rows than tokens.
    """
    of_student, of_teacher = student.get_vocab(), teacher.get_vocab()
    if of_student != of_teacher:
        tokens = of_student.keys() | of_teacher.keys()
        differing = sorted(token for token in tokens if of_student.get(token) != of_teacher.get(token))
        shown = ", ".join(f"{t!r} ({of_teacher.get(t)} against {of_student.get(t)})" for t in differing[:3])
        raise UserError(
            f"{roles[0]} and {roles[1]} must share a tokenizer, but {len(differing)} tokens differ: {shown}. Choose a "
            f"{roles[0]} and a {roles[1]} of one family"
        )
    size = vocabulary_size(student)
    for role, config in zip(roles, (teacher_config, student_config), strict=True):
        rows = config.vocab_size if hasattr(config, "vocab_size") else config.get_text_config().vocab_size
        if rows < size:
            raise UserError(f"the {role} has {rows} rows, but its tokenizer has ids up to {size - 1}")
    return size


def end_tokens(tokenizer: Any, *settings: Any) -> tuple[int, ...]:
    """Return the tokens at which an answer ends: all that any of a model's files names, each once.

    Args:
        tokenizer: Tokenizer; its end of text counts, and the token that closes an answer in its chat template.
        settings: Configurations (`config.json`, `generation_config.json`) whose `eos_token_id` also counts: a number, a
            list of numbers or nothing.

    Raises:
        UserError: If a configuration names something else, or the template does not end.
    """
    found = [tokenizer.eos_token_id, _closing(tokenizer), *configured_ends(*settings)]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def configured_ends(*settings: Any) -> list[int]:
    """Return the tokens that configurations name as `eos_token_id`; see `end_tokens`."""
    found: list[int] = []
    for setting in settings:
        named = getattr(setting, "eos_token_id", None)
        listed = named if isinstance(named, list | tuple) else [] if named is None else [named]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
            raise UserError(f"eos_token_id {named!r} of a {type(setting).__name__} must be a token's number or a list")
        found += [token for token in listed if token not in found and token >= 0]
    return found


def _closing(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template closes an answer; None without such a template or token."""
    return ChatEncoder(tokenizer).closing_id if getattr(tokenizer, "chat_template", None) else None
