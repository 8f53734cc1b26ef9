"""The decoupled KL divergence and the top-k class mask against loops in probability space."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_common.functional import decoupled_kl, forward_kl, topk_class_mask

F64 = torch.float64


def batch(*shape, dtype=F64, scale=3.0):
    target = torch.randint(shape[-1], shape[:-1])
    return scale * torch.randn(*shape, dtype=dtype), scale * torch.randn(*shape, dtype=dtype), target


def brute_force(student, teacher, target, temperature, survivors):
    """TCKD and NCKD of one row, class by class."""
    q, p = (student / temperature).softmax(-1).tolist(), (teacher / temperature).softmax(-1).tolist()
    tckd = p[target] * math.log(p[target] / q[target])
    tckd += (1 - p[target]) * math.log((1 - p[target]) / (1 - q[target]))
    p_sum, q_sum = sum(p[c] for c in survivors), sum(q[c] for c in survivors)
    return tckd, sum(p[c] / p_sum * math.log(p[c] / p_sum / (q[c] / q_sum)) for c in survivors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_brute_force(temperature, masked):
    student, teacher, target = batch(12, 9)
    class_mask = torch.rand(12, 9) < 0.6 if masked else None
    tckd, nckd = decoupled_kl(student, teacher, target, temperature=temperature, class_mask=class_mask)
    for row, t in enumerate(target.tolist()):
        survivors = [c for c in range(9) if c != t and (class_mask is None or class_mask[row, c])]
        expected = brute_force(student[row], teacher[row], t, temperature, survivors)
        assert (tckd[row].item(), nckd[row].item()) == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_parts_add_up_to_forward_kl(temperature):
    student, teacher, target = batch(4, 5, 30)
    tckd, nckd = decoupled_kl(student, teacher, target, temperature=temperature)
    assert tckd.shape == nckd.shape == (4, 5)
    rest = 1 - (teacher / temperature).softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    expected = forward_kl(student, teacher, temperature=temperature)
    torch.testing.assert_close(tckd + rest * nckd, expected, rtol=0, atol=1e-12)


def test_gradients():
    student, teacher, target = batch(3, 6, scale=1.0)
    class_mask = topk_class_mask(teacher, target, 3)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    for mask in (None, class_mask):
        assert torch.autograd.gradcheck(
            lambda s, t, mask=mask: decoupled_kl(s, t, target, temperature=2.0, class_mask=mask), inputs
        )
    tckd, nckd = decoupled_kl(student, teacher, target, class_mask=class_mask)
    (gradient,) = torch.autograd.grad(nckd.sum(), student, retain_graph=True)
    assert (gradient[~class_mask] == 0).all()
    # Closed forms: q - p among the survivors; for TCKD (b_S - b_T) at the target, spread over the rest by share.
    q, p = (z.detach().masked_fill(~class_mask, -math.inf).softmax(-1) for z in (student, teacher))
    torch.testing.assert_close(gradient, q - p)
    (gradient,) = torch.autograd.grad(tckd.sum(), student)
    index = target.unsqueeze(-1)
    q, p = student.detach().softmax(-1), teacher.detach().softmax(-1)
    slope = q.gather(-1, index) - p.gather(-1, index)
    expected = (-slope * q / (1 - q.gather(-1, index))).scatter(-1, index, slope)
    torch.testing.assert_close(gradient, expected)


def test_target_in_the_mask_does_not_count_and_tckd_is_never_masked():
    student, teacher, target = batch(8, 10)
    mask = topk_class_mask(teacher, target, 4)
    with_target = mask.scatter(-1, target.unsqueeze(-1), True)
    tckd, nckd = decoupled_kl(student, teacher, target, class_mask=mask)
    for one, other in zip((tckd, nckd), decoupled_kl(student, teacher, target, class_mask=with_target), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(tckd, decoupled_kl(student, teacher, target)[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_all_classes_equal_the_unmasked_loss_bitwise(dtype):
    student, teacher, target = batch(16, 20, dtype=dtype)
    mask = topk_class_mask(teacher, target, 19)
    masked, plain = (decoupled_kl(student, teacher, target, temperature=3.0, class_mask=m)[1] for m in (mask, None))
    assert torch.equal(masked, plain)


@pytest.mark.parametrize("classes", [2, 6])
def test_without_survivors_nckd_is_zero(classes):
    student, teacher, target = batch(5, classes, dtype=torch.float32, scale=1e3)
    student.requires_grad_()
    mask = torch.zeros(5, classes, dtype=torch.bool) if classes > 2 else None
    tckd, nckd = decoupled_kl(student, teacher, target, class_mask=mask)
    assert (nckd == 0).all()
    (gradient,) = torch.autograd.grad(nckd.sum(), student)
    assert (gradient == 0).all()
    torch.testing.assert_close(tckd, brute_tckd(student, teacher, target))


def brute_tckd(student, teacher, target):
    """TCKD through binary logits z_t - lse(rest) in float64."""
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)
    pairs = []
    for z in (student.detach().double(), teacher.double()):
        rest = z.masked_fill(is_target, -math.inf).logsumexp(-1)
        pairs.append(torch.stack([z[is_target], rest], dim=-1))
    return forward_kl(*pairs).to(student.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype):
    row = torch.tensor([1e4, 0.0, -1e4, 3.0, 2.0])
    student = torch.stack([row, row.flip(0), row.roll(2), -row]).to(dtype).requires_grad_()
    teacher = torch.stack([row.flip(0), row, -row, -row]).to(dtype)
    target = torch.tensor([0, 0, 2, 1])
    for mask in (None, topk_class_mask(teacher, target, 2)):
        tckd, nckd = decoupled_kl(student, teacher, target, class_mask=mask)
        reference = decoupled_kl(student.detach().double(), teacher.double(), target, class_mask=mask)
        for part, expected in zip((tckd, nckd), reference, strict=True):
            assert part.dtype == torch.float32
            torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(part.sum(), student, retain_graph=True)
            assert gradient.isfinite().all()


def test_masked_vocabulary_equals_the_shorter_one():
    student, teacher, _ = batch(4, 6)
    target = torch.tensor([0, 1, 2, 3])
    absent = torch.zeros(6, dtype=torch.bool)
    absent[4:] = True
    masked = student.masked_fill(absent, -math.inf).requires_grad_()
    parts = decoupled_kl(masked, teacher.masked_fill(absent, -math.inf), target)
    for part, expected in zip(parts, decoupled_kl(student[:, :4], teacher[:, :4], target), strict=True):
        torch.testing.assert_close(part, expected)
        (gradient,) = torch.autograd.grad(part.sum(), masked, retain_graph=True)
        assert gradient.isfinite().all()


def test_bad_input():
    student, teacher, target = batch(4, 6)
    with pytest.raises(ValueError, match=r"target must have shape \(4,\).*got \(4, 1\)"):
        decoupled_kl(student, teacher, target.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"dtype torch\.int64, got torch\.int32"):
        decoupled_kl(student, teacher, target.int())
    for mask in (torch.ones(6, dtype=torch.bool), torch.ones(4, 6)):
        with pytest.raises(ValueError, match=r"class_mask must be a torch\.bool tensor of the logits' shape \(4, 6\)"):
            decoupled_kl(student, teacher, target, class_mask=mask)
    with pytest.raises(ValueError, match="same shape"):
        decoupled_kl(student, teacher[:, :5], target)
    with pytest.raises(ValueError, match="temperature"):
        decoupled_kl(student, teacher, target, temperature=0)
    for bad_class in (6, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            decoupled_kl(student, teacher, target.fill_(bad_class))


def ranked_mask(teacher_row, target, k):
    ranking = sorted((c for c in range(len(teacher_row)) if c != target), key=lambda c: (-teacher_row[c], c))
    return [c in ranking[:k] for c in range(len(teacher_row))]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), classes=st.integers(2, 9))
def test_topk_mask_matches_a_sort_with_ties_and_masked_classes(data, classes):
    values = st.sampled_from([-math.inf, -1.0, 0.0, 0.0, 2.0, math.inf])
    row = data.draw(st.lists(values, min_size=classes, max_size=classes))
    target, k = data.draw(st.integers(0, classes - 1)), data.draw(st.integers(1, classes - 1))
    mask = topk_class_mask(torch.tensor(row), torch.tensor(target), k)
    assert mask.tolist() == ranked_mask(row, target, k)


def test_topk_mask_on_batches_of_any_shape():
    _, teacher, target = batch(3, 4, 50, dtype=torch.float32)
    for k in (1, 7, 49):
        mask = topk_class_mask(teacher, target, k)
        assert mask.dtype == torch.bool
        assert (mask.sum(-1) == k).all()
        assert not mask.gather(-1, target.unsqueeze(-1)).any()
        assert mask[2, 1].tolist() == ranked_mask(teacher[2, 1].tolist(), target[2, 1].item(), k)
    assert torch.equal(
        topk_class_mask(teacher.bfloat16(), target, 7), topk_class_mask(teacher.bfloat16().float(), target, 7)
    )


def test_topk_mask_bad_input():
    _, teacher, target = batch(4, 6)
    for k in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"k must lie in \[1, 5\].*got {k}"):
            topk_class_mask(teacher, target, k)
    with pytest.raises(ValueError, match="target must have shape"):
        topk_class_mask(teacher, target[:2], 3)
