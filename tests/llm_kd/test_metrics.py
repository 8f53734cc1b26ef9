"""ROUGE-L against cases counted by hand, an independent longest common subsequence, and rouge_score."""

import functools
import random

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from llm_kd.evaluation.rouge import rouge_l


@pytest.mark.parametrize(
    ("response", "references", "expected"),
    [
        ("the cat sat", ["the cat sat"], 100.0),
        ("The cat, sat!", ["the cat sat"], 100.0),  # case and punctuation do not count
        ("dog", ["the cat sat"], 0.0),
        ("", ["the cat sat"], 0.0),
        ("the cat", ["the cat sat down"], 100 * 2 * (1 * 0.5) / 1.5),  # 2 of 2 words, 2 of 4 words
        ("sat cat the", ["the cat sat"], 100 / 3),  # order counts: one word in common
        ("the big cat sat", ["the cat sat"], 100 * 2 * (0.75 * 1) / 1.75),  # gaps are allowed
        ("running dogs", ["run dog"], 100.0),  # words of more than three letters are stemmed
        ("a b", ["x y", "a c", "a b c"], 80.0),  # the closest of three references
        ("猫", ["猫"], 0.0),  # no word of Latin letters
    ],
)
def test_by_hand(response, references, expected):
    assert rouge_l([response], [references]) == [pytest.approx(expected)]


def longest_common_subsequence(a, b):
    @functools.cache
    def length(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def random_texts(seed):
    rng = random.Random(seed)
    words = ["cats", "cat", "running", "the", "of", "happily", "42", "it"]
    text = lambda: " ".join(rng.choices(words, k=rng.randint(1, 12)))  # noqa: E731
    return [text() for _ in range(20)], [[text() for _ in range(rng.randint(1, 3))] for _ in range(20)]


def test_against_a_recursion():
    stemmer = PorterStemmer()

    def f_measure(response, reference):
        a, b = ([stemmer.stem(w) if len(w) > 3 else w for w in text.split()] for text in (response, reference))
        return 200 * longest_common_subsequence(tuple(a), tuple(b)) / (len(a) + len(b))

    responses, references = random_texts(0)
    expected = [max(f_measure(r, t) for t in texts) for r, texts in zip(responses, references, strict=True)]
    assert rouge_l(responses, references) == pytest.approx(expected)


def test_against_rouge_score():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    responses, references = random_texts(1)
    expected = [
        100 * max(scorer.score(text, response)["rougeL"].fmeasure for text in texts)
        for response, texts in zip(responses, references, strict=True)
    ]
    assert rouge_l(responses, references) == pytest.approx(expected)


def test_every_response_needs_a_reference():
    with pytest.raises(ValueError, match="2 responses, but references for 1"):
        rouge_l(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 of 2 responses have no reference, the first is 1"):
        rouge_l(["a", "b"], [["a"], []])
