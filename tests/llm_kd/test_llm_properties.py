"""Properties of token selection and of truncated teachers on random vocabularies, precisions and extreme logits."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_common.registry import subclasses
from llm_kd.head.rows import truncated_loss
from llm_kd.objectives import Objective
from llm_kd.selection import Selector
from llm_kd.selection.acceptance import (
    BLOCK,
    TruncatedDistribution,
    speck_accept_probability,
    token_weights,
    topk_accept,
)
from llm_kd.selection.base import entropy, top_share
from llm_kd.teacher.records import DTYPES as STORED
from llm_kd.teacher.records import RecordLayout

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

F64 = torch.float64
DTYPES = [F64, torch.float32, torch.bfloat16]
props = settings(max_examples=60, deadline=None, derandomize=True)

extreme = st.sampled_from([-1e4, -50.0, 0.0, 0.0, 1.0, 1e4])
KINDS = [st.floats(-30, 30, width=32), extreme, st.just(3.0)]


@st.composite
def logits(draw, rows, vocab):
    """Spread out, tied and extreme, or all equal; a vocabulary of several blocks repeats them with a drift."""
    distinct = min(vocab, 12)
    values = st.lists(draw(st.sampled_from(KINDS)), min_size=rows * distinct, max_size=rows * distinct)
    few = torch.tensor(draw(values), dtype=F64).view(rows, distinct)
    drift = draw(st.sampled_from([0.0, -0.25, 0.25]))
    ids = torch.arange(vocab)
    return few[:, ids % distinct] + drift * (ids // distinct)


@st.composite
def pairs(draw, dtypes=DTYPES, sizes=(1, 2, 5, 9)):
    """Student and teacher logits."""
    rows, vocab, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(sizes)), draw(st.sampled_from(dtypes))
    return draw(logits(rows, vocab)).to(dtype), draw(logits(rows, vocab)).to(dtype)


BLOCKS = (1, 5, 12, BLOCK - 1, BLOCK, 2 * BLOCK + 3)


# --- Top-k ---


@props
@given(pair=pairs(sizes=BLOCKS), data=st.data())
def test_topk_grows_with_k_and_the_whole_vocabulary_accepts_everything(pair, data):
    student, teacher = pair
    vocab = student.shape[-1]
    ks = sorted(data.draw(st.sets(st.integers(1, vocab), min_size=1, max_size=4)))
    accepted = [topk_accept(student, teacher, k) for k in ks]
    assert all((few <= many).all() for few, many in pairwise(accepted))
    assert topk_accept(student, teacher, vocab).all()
    assert topk_accept(teacher, teacher, 1).all()
    for k, expected in zip(ks, accepted, strict=True):
        # Only orders count: any increasing map of either model's logits leaves every decision as it is.
        assert torch.equal(topk_accept(2 * student, 0.5 * teacher, k), expected)
        stored = TruncatedDistribution.from_logits(teacher, data.draw(st.integers(k, vocab)))
        assert torch.equal(topk_accept(student, stored, k), expected)


@props
@given(pair=pairs([F64], sizes=(BLOCK - 1, 2 * BLOCK + 3)), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_topk_does_not_know_the_order_of_the_vocabulary(pair, k, seed):
    student, teacher = pair
    generator = torch.Generator().manual_seed(seed)
    # Ties go by id, so they are broken by less than any gap.
    student, teacher = (z + 1e-3 * torch.rand(z.shape, generator=generator, dtype=F64) for z in (student, teacher))
    order = torch.randperm(student.shape[-1], generator=generator)
    assert torch.equal(topk_accept(student[:, order], teacher[:, order], k), topk_accept(student, teacher, k))


# --- Spec-k ---


@props
@given(pair=pairs(), k=st.integers(1, 6), more=st.integers(1, 6), shift=st.integers(-9, 9), data=st.data())
def test_speck_probability(pair, k, more, shift, data):
    student, teacher = pair
    probability = speck_accept_probability(student, teacher, k)
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (speck_accept_probability(student, student, k) >= 1 - 1e-6).all()
    torch.testing.assert_close(speck_accept_probability(teacher, student, k), probability)
    # Proposals are independent: all of k + more are rejected where the k and the others are.
    others = speck_accept_probability(student, teacher, more)
    together = speck_accept_probability(student, teacher, k + more)
    torch.testing.assert_close(1 - together, (1 - probability) * (1 - others), rtol=1e-4, atol=1e-6)
    assert (together >= probability - 1e-6).all()
    if student.dtype == F64:
        order = data.draw(st.permutations(range(student.shape[-1])))
        moved = speck_accept_probability((student + shift)[:, order], (teacher - shift)[:, order], k)
        torch.testing.assert_close(moved, probability, rtol=1e-8, atol=1e-9)
    whole = TruncatedDistribution.from_logits(teacher, teacher.shape[-1])
    torch.testing.assert_close(speck_accept_probability(student, whole, k), probability)


# --- weights and selectors ---


@props
@given(accepted=st.lists(st.floats(0, 1), min_size=1, max_size=9), beta=st.floats(0, 1))
def test_weights_lie_between_beta_and_one(accepted, beta):
    accepted = torch.tensor(accepted)
    weights = token_weights(accepted, beta)
    assert ((weights >= beta - 1e-6) & (weights <= 1 + 1e-6)).all()
    order = accepted.argsort()
    assert (weights[order].diff() >= -1e-6).all()


@props
@given(pair=pairs(sizes=(1, 2, 9, BLOCK + 2)))
def test_entropy_is_between_zero_and_uniform(pair):
    z = pair[0].float()
    h = entropy(z)
    most = math.log(z.shape[-1])
    assert ((h >= -1e-6) & (h <= most + 1e-5)).all()
    torch.testing.assert_close(entropy(torch.zeros_like(z)), torch.full_like(h, most))


@props
@given(score=st.lists(st.sampled_from([-3.0, 0.0, 0.0, 1.0, 7.5]), min_size=1, max_size=30), shares=st.data())
def test_top_share_keeps_its_share_of_the_largest_and_is_nested(score, shares):
    score = torch.tensor(score)
    small, large = sorted(shares.draw(st.lists(st.integers(1, 20), min_size=2, max_size=2)))
    kept = [top_share(score, share / 20).bool() for share in (small, large)]
    for mask, share in zip(kept, (small, large), strict=True):
        assert mask.sum() == max(1, len(score) * share // 20)
        assert score[mask].min() >= score.masked_fill(mask, -math.inf).max()
    assert (kept[0] <= kept[1]).all()
    assert top_share(score, 1.0).all()


@pytest.mark.parametrize("name", SELECTORS)
@props
@given(pair=pairs([F64, torch.float32], sizes=(9, BLOCK + 2)), data=st.data())
def test_every_selector_on_any_logits(name, pair, data):
    student, teacher = pair
    selector = SELECTORS[name]()
    noise = selector.draw(len(student), student.device)
    score = selector.score(student, teacher)
    weights, accepted, temperature = selector.select(score, noise)
    assert score.isfinite().all()
    assert (weights >= 0).all()
    assert weights.isfinite().all()
    assert ((accepted >= 0) & (accepted <= 1)).all()
    assert (torch.as_tensor(temperature) > 0).all()
    # Scores depend on the distributions: not on a row's shift, not on the other rows.
    if name != "TopK":  # a shift may round two logits to one, and a decision is all or nothing
        torch.testing.assert_close(selector.score(student + 8, teacher - 4), score, rtol=1e-3, atol=5e-3)
    order = data.draw(st.permutations(range(len(student))))
    torch.testing.assert_close(selector.score(student[order], teacher[order]), score[order])


@pytest.mark.parametrize("name", ["TopK", "SpecK", "SpecKExpected"])
@props
@given(pair=pairs([F64, torch.float32], sizes=(9,)))
def test_a_student_equal_to_its_teacher_is_accepted_everywhere(name, pair):
    selector = SELECTORS[name]()
    student, _ = pair
    selection = selector.select(selector.score(student, student), selector.draw(len(student), student.device))
    torch.testing.assert_close(selection.accepted, torch.ones_like(selection.accepted))
    torch.testing.assert_close(selection.weights, torch.ones_like(selection.weights))


# --- truncated teachers ---


@props
@given(pair=pairs(sizes=(1, 2, 9, BLOCK + 2)), data=st.data())
def test_a_longer_truncation_begins_with_the_shorter_and_leaves_a_smaller_tail(pair, data):
    _, teacher = pair
    vocab = teacher.shape[-1]
    sizes = sorted(data.draw(st.sets(st.integers(1, vocab), min_size=1, max_size=4)) | {vocab})
    stored = [TruncatedDistribution.from_logits(teacher, size) for size in sizes]
    for part in stored:
        mass = part.log_probs.exp().sum(-1) + part.tail_mass
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
        assert (part.tail_mass >= 0).all()
        TruncatedDistribution(part.log_probs, part.indices, part.tail_mass, vocab)  # in rank order, ids in range
    for short, long in pairwise(stored):
        assert torch.equal(long.indices[:, : short.size], short.indices)
        assert torch.equal(long.log_probs[:, : short.size], short.log_probs)
        assert (long.tail_mass <= short.tail_mass).all()
    assert (stored[-1].tail_mass == 0).all()
    wide = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    assert torch.equal(stored[-1].dense_log_probs(), wide.log_softmax(-1))


@props
@given(pair=pairs(sizes=(1, 2, 9, BLOCK + 2, 300)), dtype=st.sampled_from(sorted(STORED)), data=st.data())
def test_stored_bytes_give_back_ids_and_ranks(pair, dtype, data):
    _, teacher = pair
    vocab = teacher.shape[-1]
    size = data.draw(st.integers(1, vocab))
    stored, layout = TruncatedDistribution.from_logits(teacher, size), RecordLayout(vocab, size, dtype)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), min_size=len(teacher), max_size=len(teacher))))
    records = layout.pack(tokens, stored)
    assert records.shape == (len(teacher), layout.bytes_per_token)
    again, found = layout.unpack(records)
    assert torch.equal(again, tokens)
    assert torch.equal(found.indices, stored.indices.int())
    assert torch.equal(found.tail_mass, stored.tail_mass.float())
    assert found.log_probs.isfinite().all()
    assert (found.log_probs.diff(dim=-1) <= 0).all()
    step = 2 * torch.finfo(STORED[dtype]).eps
    torch.testing.assert_close(
        found.log_probs.double(), stored.log_probs.double(), rtol=step, atol=torch.finfo(STORED[dtype]).tiny
    )


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].data_processing])
@props
@given(pair=pairs([F64, torch.float32], sizes=(2, 9)), data=st.data())
def test_truncated_losses_rise_with_the_size_to_the_divergence(name, pair, data):
    student, teacher = pair
    vocab, objective = student.shape[-1], OBJECTIVES[name]()
    largest = max(float(z.abs().max()) for z in pair)
    tolerance = 1e-5 + 1e-6 * largest  # of the logsumexp over the missing tokens in float32
    values = []
    for size in range(1, vocab):
        stored = TruncatedDistribution.from_logits(teacher, size)
        value, gradient = truncated_loss(objective, student, stored, with_gradient=True)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient.sum(-1).abs() <= tolerance * (1 + gradient.abs().sum(-1))).all()
        values.append(value)
    assert (values[0] >= -1e-5).all()
    # One missing token is a category of its own, so the last value is the divergence, but for the floor of its mass.
    if student.dtype == F64 and largest < 40:
        values.append(objective(student, teacher))
        torch.testing.assert_close(values[-2], values[-1], rtol=1e-8, atol=1e-9)
    assert all((small <= large * (1 + 1e-5) + tolerance).all() for small, large in pairwise(values))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].data_processing])
@props
@given(pair=pairs([torch.float32], sizes=(5, 9)), size=st.integers(1, 4), offset=st.sampled_from([-2e4, 300.0, 2e4]))
def test_an_offset_of_all_logits_costs_a_truncated_loss_no_digits(name, pair, size, offset):
    """Against float64 on the same rounded logits: what float32 loses in adding the offset is not the function's."""
    student, stored = pair[0] + offset, TruncatedDistribution.from_logits(pair[1], size)
    parts = truncated_loss(OBJECTIVES[name](), student, stored, with_gradient=True)
    exact = truncated_loss(OBJECTIVES[name](), student.double(), stored, with_gradient=True)
    tolerance = 2e-6 + 5e-7 * max(float((z.amax(-1) - z.amin(-1)).max()) for z in pair)
    # The gradient of total variation is a sign, which rounding flips where the two agree.
    for part, expected in list(zip(parts, exact, strict=True))[: 1 if name == "TotalVariation" else 2]:
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=tolerance)
