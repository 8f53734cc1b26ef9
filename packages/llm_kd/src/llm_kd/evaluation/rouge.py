"""ROUGE-L of written answers against reference texts."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the ROUGE-L of every response.

    It is the F-measure of the longest common subsequence of words with the closest reference.

    Words are lower-cased runs of a-z and 0-9, Porter-stemmed; text in other scripts has none and scores 0.

    Args:
        responses: Answers.
        references: One or more reference texts per answer.

    Returns:
        Scores in per cent, [0, 100].

    Raises:
        ValueError: If there are not as many lists of references as responses, or one is empty.

    References:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, eq. 2-4; computed by `rouge-score`.
    """
    if len(responses) != len(references):
        raise ValueError(f"{len(responses)} responses, but references for {len(references)}")
    missing = [number for number, texts in enumerate(references) if not texts]
    if missing:
        raise ValueError(f"{len(missing)} of {len(responses)} responses have no reference, the first is {missing[0]}")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(responses, references, strict=True)
    return [100 * float(scorer.score_multi(texts, response)["rougeL"].fmeasure) for response, texts in pairs]
