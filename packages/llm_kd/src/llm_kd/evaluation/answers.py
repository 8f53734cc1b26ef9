"""Answers of a model to the validation prompts, compared with reference answers."""

import dataclasses
import statistics
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_info

from kd_common.errors import UserError
from kd_common.sampling import SamplingParams
from llm_kd.data import Row, TextDataModule
from llm_kd.evaluation.rouge import rouge_l
from llm_kd.models import Backbone
from llm_kd.models.generation import generate, prompt_budget


@dataclass(frozen=True)
class Question:
    """A prompt with the reference texts of its answers.

    Attributes:
        tokens: Everything before the answer, with the generation prompt.
        text: The last user turn.
        references: One or more reference answers.
    """

    tokens: list[int]
    text: str
    references: list[str] = field(default_factory=list)


def display_text(response: str, written: str) -> str:
    """Return a response for people; one without text is described, for it may be a mere end or white space without one.

    Args:
        response: The text.
        written: Text with special tokens and white space.
    """
    return response or f"(no text, only {written!r})"


@dataclass(frozen=True)
class Answers:
    """Answers of a model to the validation prompts; all lists are parallel.

    Attributes:
        prompts: The last user turn of every prompt.
        responses: Responses of the model.
        references: One or more reference answers of every prompt.
        scores: ROUGE-L of every answer in per cent.
        written: The responses as they were written, special tokens and white space included.
        left_out: Number of prompts that were too long to be asked.
    """

    prompts: list[str]
    responses: list[str]
    references: list[list[str]]
    scores: list[float]
    written: list[str]
    left_out: int = 0

    @property
    def rouge_l(self) -> float:
        """Return the mean ROUGE-L in per cent."""
        return statistics.fmean(self.scores)


def questions(data: TextDataModule) -> list[Question]:
    """Return the validation prompts with their references; rows with equal prompts are merged.

    Args:
        data: The data; the teacher's response, if it wrote one, is the reference of a row without an answer.
    """
    data.setup("validate")
    written = {}
    if data.responses == "teacher":
        examples = data.splits["val"].examples
        written = {tuple(example.input_ids[: example.prompt_length]): example.reference for example in examples}
    found: dict[tuple[int, ...], Question] = {}
    for row in data.rows("val"):
        asked = row if data.responses == "teacher" else up_to_last_answer(row)
        tokens = data.encoder.prompt(asked)
        reference = asked.messages[-1].content if asked.answered else written.get(tuple(tokens))
        if reference is not None:  # a prompt without a response was too long for the teacher
            user = next(message for message in reversed(asked.messages) if message.role == "user")
            text = "\n\n".join(filter(None, (user.content, user.input)))
            question = found.setdefault(tuple(tokens), Question(tokens, text))
            question.references.extend([reference, *(asked.alternatives if asked.answered else ())])
    return list(found.values())


def up_to_last_answer(row: Row) -> Row:
    """Return the conversation up to its last answer that is learnt."""
    last = max(place for place, message in enumerate(row.messages) if message.role == "assistant" and message.learnt)
    return dataclasses.replace(row, messages=row.messages[: last + 1])


def answer_prompts(
    backbone: Backbone,
    data: TextDataModule,
    *,
    limit: int | None = None,
    sampling: SamplingParams | None = None,
    max_prompt: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Answers:
    """Return the answers of a model to the validation prompts, and their ROUGE-L.

    Args:
        backbone: The model, on the device it is to run on.
        data: The data; rows of the file with the same prompt are several references of one question.
        limit: Answer only the first prompts.
        sampling: How tokens are drawn; None takes the most likely ones, at most as many as the data's sampling allows.
        max_prompt: Largest number of tokens of a prompt; None takes the limit of the data and of the model's positions.
        seed: Seed of the drawing.
        batch_size: Prompts per batch.

    Raises:
        UserError, RowsError, EncodingError: From the data.
        UserError: If no prompt is short enough, or the teacher has not written the responses that the data need.
    """
    sampling = sampling or SamplingParams(temperature=0.0, max_new_tokens=data.sampling.max_new_tokens)
    everything = questions(data)
    longest = min(max_prompt or data.max_length, prompt_budget(backbone.model, sampling))
    asked = [question for question in everything if len(question.tokens) <= longest]
    left_out = len(everything) - len(asked)
    if not asked:
        raise UserError(
            f"none of the {len(everything)} validation prompts has at most {longest} tokens: raise max_prompt and "
            "data.max_length, or lower max_new_tokens if the model has no more positions"
        )
    if left_out:
        rank_zero_info(f"{left_out:,} of {len(everything):,} validation prompts exceed {longest} tokens: not asked")
    asked = asked[:limit]
    tokenizer = data.encoder.tokenizer
    written = generate(
        backbone.model,
        [question.tokens for question in asked],
        sampling,
        eos_ids=data.eos_ids,
        pad_id=data.pad_id,
        seed=seed,
        batch_size=batch_size,
        vocab_size=data.vocab_size,
    )
    responses = [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in written]
    references = [question.references for question in asked]
    prompts = [question.text for question in asked]
    as_written = [str(tokenizer.decode(tokens)) for tokens in written]
    return Answers(prompts, responses, references, rouge_l(responses, references), as_written, left_out)
