"""Verification against brute force: stable ranks, every possible set of draws, and sampling statistics."""

import itertools
import math

import pytest
import torch

from llm_kd.selection import acceptance as selection
from llm_kd.selection.acceptance import (
    TruncatedDistribution,
    speck_accept_probability,
    token_weights,
    topk_accept,
)

F64 = torch.float64


def logits_pair(*shape, dtype=F64, scale=2.0):
    return scale * torch.randn(*shape, dtype=dtype), scale * torch.randn(*shape, dtype=dtype)


def enumerate_speck(q, p, k):
    """Chance of an acceptance over all V^k proposals, as the method describes it."""
    total = 0.0
    for draws in itertools.product(range(len(q)), repeat=k):
        drawn = math.prod(q[y] for y in draws)
        rejected = math.prod(1 - min(1.0, p[y] / q[y]) for y in draws)
        total += drawn * (1 - rejected)
    return total


def literal_speck(q, p, k, trials):
    """k draws per trial, each accepted with chance min(1, p / q)."""
    draws = torch.multinomial(q, trials * k, replacement=True).view(trials, k)
    coins = torch.rand(trials, k, dtype=F64)
    return (coins < (p / q)[draws]).any(dim=1).to(F64).mean().item()


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_topk_is_the_stable_rank_of_the_proposal(k):
    student, teacher = (torch.randint(0, 4, (3, 40, 9)).double() for _ in range(2))  # full of ties
    expected = torch.empty(3, 40, dtype=torch.bool)
    for i, j in itertools.product(range(3), range(40)):
        proposal = max(range(9), key=lambda v: (student[i, j, v].item(), -v))
        ranking = sorted(range(9), key=lambda v: (-teacher[i, j, v].item(), v))
        expected[i, j] = proposal in ranking[:k]
    accepted = topk_accept(student, teacher, k)
    assert accepted.dtype == torch.bool
    assert torch.equal(accepted, expected)
    assert k < 9 or accepted.all()


@pytest.mark.parametrize("block", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("levels", [2, 6, 1000])
def test_topk_by_blocks_is_the_stable_rank(block, levels, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", block)
    student, teacher = (torch.randint(0, levels, (4, 200, 19)).float() for _ in range(2))
    proposal = student.argsort(dim=-1, descending=True, stable=True)[..., :1]
    ranking = teacher.argsort(dim=-1, descending=True, stable=True)
    for k in (1, 2, 5, 18, 19):
        assert torch.equal(topk_accept(student, teacher, k), (ranking[..., :k] == proposal).any(dim=-1))


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 50_257])
def test_topk_of_any_vocabulary(vocab):
    student, teacher = (torch.randn(8, vocab) for _ in range(2))
    student = student + 4 * teacher
    k = min(3, vocab)
    expected = (teacher.topk(k).indices == student.argmax(-1, keepdim=True)).any(-1)
    assert torch.equal(topk_accept(student, teacher, k), expected)
    assert torch.equal(topk_accept(student[:0], teacher[:0], k), expected[:0])


def test_topk_default_is_five():
    teacher = -torch.arange(8.0)
    students = torch.eye(8)
    assert topk_accept(students, teacher.expand(8, 8)).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_speck_probability_by_enumeration(k):
    student, teacher = logits_pair(3, 4)
    expected = [
        enumerate_speck(q.softmax(-1).tolist(), p.softmax(-1).tolist(), k)
        for q, p in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(speck_accept_probability(student, teacher, k), torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("k", [1, 5])
def test_speck_probability_is_one_minus_tv_to_the_k(k):
    student, teacher = logits_pair(2, 3, 30)
    tv = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(speck_accept_probability(student, teacher, k), 1 - tv**k)


@pytest.mark.parametrize("k", [1, 3])
def test_speck_probability_is_how_often_the_literal_procedure_accepts(k):
    student, teacher = logits_pair(8, scale=2.5)
    q, p = student.softmax(-1), teacher.softmax(-1)
    trials = 20_000
    chance = speck_accept_probability(student, teacher, k).item()
    assert 0.1 < chance < 0.95
    margin = 4 * math.sqrt(chance * (1 - chance) / trials)
    assert literal_speck(q, p, k, trials) == pytest.approx(chance, abs=margin)


def test_speck_keeps_the_digits_of_a_tiny_overlap():
    gap = torch.tensor([30.0, 0.0])
    expected = -math.expm1(5 * math.log1p(-2 * math.exp(-30.0)))
    assert speck_accept_probability(gap, gap.flip(0), 5).item() == pytest.approx(expected, rel=1e-5)


def test_speck_ends():
    logits = torch.randn(5, 7)
    assert torch.allclose(speck_accept_probability(logits, logits), torch.ones(5))
    apart = torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [0.0, -math.inf]])
    chance = speck_accept_probability(apart[:2], apart[:2].flip(0))
    assert chance.tolist() == [0.0, 0.0]
    assert speck_accept_probability(apart[2], apart[2].flip(0)).item() == 0.0


def test_nothing_carries_a_gradient():
    student, teacher = (z.requires_grad_() for z in logits_pair(4, 6))
    for value in (
        speck_accept_probability(student, teacher),
        token_weights(student),
        topk_accept(student, teacher),
    ):
        assert not value.requires_grad


def test_truncated_teacher_gives_the_dense_topk():
    student, teacher = (torch.randint(0, 3, (50, 12)).float() for _ in range(2))
    stored = TruncatedDistribution.from_logits(teacher, 6)
    for k in range(1, 7):
        assert torch.equal(topk_accept(student, stored, k), topk_accept(student, teacher, k))
    with pytest.raises(ValueError, match="k=7"):
        topk_accept(student, stored, 7)


@pytest.mark.parametrize("size", [1, 4, 11, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_truncation_is_the_start_of_a_stable_sort(size, dtype):
    teacher = torch.randint(0, 3, (2, 50, 12)).to(dtype)  # full of ties
    teacher[0, 0, :10] = -math.inf
    stored = TruncatedDistribution.from_logits(teacher, size)
    order = teacher.double().argsort(dim=-1, descending=True, stable=True)
    log_probs = teacher.double().log_softmax(-1).gather(-1, order)
    assert torch.equal(stored.indices, order[..., :size])
    torch.testing.assert_close(stored.log_probs.double(), log_probs[..., :size], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored.tail_mass.double(), log_probs[..., size:].exp().sum(-1), rtol=1e-6, atol=1e-9)


def test_truncated_teacher_is_cut_and_joined_by_rows():
    stored = TruncatedDistribution.from_logits(torch.randn(7, 12), 4)
    parts = stored.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [len(part) for part in stored[:0].split(3)] == [0]
    again = TruncatedDistribution.cat(parts).to("cpu")
    rows = torch.tensor([5, 0])
    for whole, part in ((stored, again), (stored[rows], again[rows])):
        assert part.vocab_size == 12
        for name in ("log_probs", "indices", "tail_mass"):
            assert torch.equal(getattr(whole, name), getattr(part, name))
    assert torch.equal(again[rows].indices, stored.indices[rows])


def test_truncated_teacher_holds_the_mass():
    teacher = torch.randn(5, 12, dtype=F64)
    stored = TruncatedDistribution.from_logits(teacher, 4)
    torch.testing.assert_close(stored.log_probs.exp().sum(-1) + stored.tail_mass, torch.ones(5, dtype=F64))
    assert (stored.tail_mass > 0).all()


def test_speck_on_a_truncated_teacher_is_exact_or_refused():
    student, teacher = logits_pair(5, 12)
    whole = TruncatedDistribution.from_logits(teacher, 12)
    torch.testing.assert_close(
        speck_accept_probability(student, whole), speck_accept_probability(student, teacher), atol=1e-12, rtol=0
    )
    part = TruncatedDistribution.from_logits(teacher, 11)
    with pytest.raises(ValueError, match="tail mass"):
        speck_accept_probability(student, part)
    empty_tail = teacher.clone()
    empty_tail[:, 3] = -math.inf
    exact = TruncatedDistribution.from_logits(empty_tail, 11)
    torch.testing.assert_close(
        speck_accept_probability(student, exact), speck_accept_probability(student, empty_tail), atol=1e-12, rtol=0
    )


def test_truncated_teacher_refuses_wrong_order_and_shapes():
    stored = TruncatedDistribution.from_logits(torch.randn(2, 6), 3)
    with pytest.raises(ValueError, match="rank order"):
        TruncatedDistribution(stored.log_probs.flip(-1), stored.indices, stored.tail_mass, 6)
    with pytest.raises(ValueError, match="same shape"):
        TruncatedDistribution(stored.log_probs, stored.indices[:, :2], stored.tail_mass, 6)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        TruncatedDistribution(stored.log_probs, stored.indices, stored.tail_mass, 2)
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=r"token ids in \[0, 6\)"):
            TruncatedDistribution(stored.log_probs, stored.indices.fill_(wrong), stored.tail_mass, 6)
    with pytest.raises(ValueError, match="vocabulary of 6"):
        topk_accept(torch.randn(2, 7), TruncatedDistribution.from_logits(torch.randn(2, 6), 3), 1)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN"):
            TruncatedDistribution.from_logits(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, wrong]]), 1)
    with pytest.raises(ValueError, match=r"size must lie in \[1, 6\]"):
        TruncatedDistribution.from_logits(torch.randn(2, 6), 7)


def test_bad_input():
    for k in (0, -1, 7):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 6\]"):
            topk_accept(torch.randn(2, 6), torch.randn(2, 6), k)
    with pytest.raises(ValueError, match="at least 1"):
        speck_accept_probability(torch.randn(2, 6), torch.randn(2, 6), 0)
    for verify in (topk_accept, speck_accept_probability):
        with pytest.raises(ValueError, match="same shape"):
            verify(torch.randn(2, 6), torch.randn(2, 7), 2)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        token_weights(torch.tensor([True]), 1.5)


def test_weights():
    accepted = torch.tensor([True, False])
    assert token_weights(accepted).tolist() == pytest.approx([1.0, 0.01])
    assert token_weights(accepted, 0.0).tolist() == [1.0, 0.0]
    assert token_weights(accepted, 1.0).tolist() == [1.0, 1.0]
    torch.testing.assert_close(token_weights(torch.tensor([0.25], dtype=F64), 0.2), torch.tensor([0.4], dtype=F64))
