"""Properties of divergences, decoupled losses, masks and schedules on random shapes, precisions and extreme logits."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_common.functional import (
    alpha_beta,
    decoupled_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    standardize_logits,
    topk_class_mask,
    total_variation,
)
from kd_common.schedules import CosineDecay, StepDecay, TopKSchedule, linear_warmup

F64 = torch.float64
DTYPES = [F64, torch.float32, torch.bfloat16]
props = settings(max_examples=60, deadline=None, derandomize=True)

F_DIVERGENCES = [
    pytest.param(forward_kl, id="fkl"),
    pytest.param(reverse_kl, id="rkl"),
    pytest.param(partial(jensen_shannon, beta=0.3), id="js"),
    pytest.param(partial(skew_forward_kl, alpha=0.1), id="skew fkl"),
    pytest.param(partial(skew_reverse_kl, alpha=0.1), id="skew rkl"),
    pytest.param(total_variation, id="tv"),
]
divergences = pytest.mark.parametrize(
    "function", [*F_DIVERGENCES, pytest.param(partial(alpha_beta, alpha=0.4, beta=0.9), id="ab")]
)

extreme = st.sampled_from([-1e4, -50.0, 0.0, 0.0, 1.0, 1e4])
KINDS = [st.floats(-30, 30, width=32), extreme, st.just(3.0)]


def rows_of(draw, rows, classes):
    """Logits of one tensor: spread out, tied and extreme, or all equal."""
    values = st.lists(draw(st.sampled_from(KINDS)), min_size=rows * classes, max_size=rows * classes)
    return torch.tensor(draw(values), dtype=F64).view(rows, classes)


@st.composite
def batches(draw, dtypes=DTYPES, min_classes=1):
    """Student and teacher logits, and a target per row."""
    rows, classes = draw(st.integers(1, 3)), draw(st.integers(min_classes, 7))
    dtype = draw(st.sampled_from(dtypes))
    student, teacher = (rows_of(draw, rows, classes).to(dtype) for _ in range(2))
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    return student, teacher, target


temperatures = st.sampled_from([0.5, 1.0, 4.0])


# --- divergences ---


@divergences
@props
@given(batch=batches(), temperature=temperatures)
def test_non_negative_with_finite_gradients_that_sum_to_zero(function, batch, temperature):
    student, teacher, _ = batch
    student.requires_grad_()
    value = function(student, teacher, temperature=temperature)
    assert value.dtype == (F64 if student.dtype == F64 else torch.float32)
    assert value.isfinite().all()
    assert (value >= -1e-5).all()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    # Shifting a row changes nothing, so its gradient has no component along the ones, up to the rounding of log-ratios
    # as large as the range of the logits and of the gradient itself.
    largest = max(float(z.detach().abs().max()) for z in (student, teacher)) / temperature
    step = 1e-2 if student.dtype == torch.bfloat16 else 1e-6
    tolerance = 1e-6 * (1 + largest) + step * gradient.double().abs().sum(-1)
    assert (gradient.double().sum(-1).abs() <= tolerance).all()


@divergences
@props
@given(batch=batches(), temperature=temperatures)
def test_zero_at_equality(function, batch, temperature):
    student, _, _ = batch
    student.requires_grad_()
    value = function(student, student.detach(), temperature=temperature)
    assert (value.abs() <= 1e-6).all()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert (gradient.abs() <= 1e-5).all()


@divergences
@props
@given(batch=batches([F64]), temperature=temperatures, shift=st.integers(-1000, 1000), data=st.data())
def test_invariant_to_shifts_and_to_the_order_of_classes(function, batch, temperature, shift, data):
    student, teacher, _ = batch
    value = function(student, teacher, temperature=temperature)
    order = data.draw(st.permutations(range(student.shape[-1])))
    moved = function((student + shift)[:, order], (teacher - shift)[:, order], temperature=temperature)
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", F_DIVERGENCES)
@props
@given(batch=batches([F64], min_classes=2), temperature=temperatures)
def test_merging_two_classes_lowers_every_f_divergence(function, batch, temperature):
    """The data-processing inequality, on which the bound of a truncated teacher rests."""
    student, teacher = (z / temperature for z in batch[:2])
    merged = [torch.cat([z[:, :2].logsumexp(-1, keepdim=True), z[:, 2:]], dim=-1) for z in (student, teacher)]
    assert (function(*merged) <= function(student, teacher) * (1 + 1e-9) + 1e-9).all()


@props
@given(batch=batches([F64]), weight=st.floats(0.05, 0.95))
def test_bounds_and_relations_between_divergences(batch, weight):
    student, teacher, _ = batch
    forward, tv = forward_kl(student, teacher), total_variation(student, teacher)
    js = jensen_shannon(student, teacher, beta=weight)
    assert (tv <= (forward / 2).sqrt() + 1e-9).all()  # Pinsker
    assert (js <= -weight * math.log(weight) - (1 - weight) * math.log1p(-weight) + 1e-9).all()
    torch.testing.assert_close(js, jensen_shannon(teacher, student, beta=1 - weight))
    torch.testing.assert_close(forward, reverse_kl(teacher, student), rtol=0, atol=0)
    skew = skew_forward_kl(student, teacher, alpha=weight)
    assert (skew <= -math.log(weight) + 1e-9).all()
    assert (skew <= (1 - weight) * forward + 1e-9).all()  # convex in the second argument
    assert (skew_reverse_kl(student, teacher, alpha=weight) <= (1 - weight) * reverse_kl(student, teacher) + 1e-9).all()


@props
@given(batch=batches([F64], min_classes=2), scale=st.sampled_from([0.25, 2.0, 16.0]), shift=st.integers(-50, 50))
def test_standardised_logits_ignore_a_rows_shift_and_scale(batch, scale, shift):
    logits, _, _ = batch
    plain = standardize_logits(logits)
    assert plain.isfinite().all()
    assert (plain.sum(-1).abs() <= 1e-6).all()
    # A row that is all but constant is standardised by eps instead.
    spread = logits.std(-1) > 1
    moved = standardize_logits(scale * logits + shift)
    torch.testing.assert_close(moved[spread], plain[spread], rtol=1e-6, atol=1e-6)


offsets = st.sampled_from([-2e4, 300.0, 2e4])


@divergences
@props
@given(batch=batches([torch.float32]), temperature=st.sampled_from([1.0, 3.0, 4.0]), offset=offsets)
def test_an_offset_of_all_logits_costs_no_digits(function, batch, temperature, offset):
    """On the same rounded logits: what float32 loses in adding the offset is not the function's."""
    assert_as_in_float64(partial(function, temperature=temperature), batch[0] + offset, batch[1] - offset)


def assert_as_in_float64(function, student, teacher):
    """Up to the rounding of log-ratios as large as the range of a row."""
    largest = max(float((z.detach().amax(-1) - z.detach().amin(-1)).max()) for z in (student, teacher))
    found, expected = function(student, teacher), function(student.double(), teacher.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 + 5e-7 * largest)


# --- decoupled losses ---


@pytest.mark.parametrize("part", [0, 1], ids=["tckd", "nckd"])
@props
@given(batch=batches([torch.float32], min_classes=2), temperature=st.sampled_from([1.0, 3.0, 4.0]), offset=offsets)
def test_an_offset_costs_the_decoupled_parts_and_their_gradients_no_digits(part, batch, temperature, offset):
    student, teacher, target = batch

    def value(s, t):
        return decoupled_kl(s, t, target, temperature=temperature)[part]

    def gradient(s, t):
        return torch.autograd.grad(value(s, t).sum(), s)[0]

    pair = (student + offset).requires_grad_(), teacher - offset
    assert_as_in_float64(value, *pair)
    assert_as_in_float64(gradient, *pair)


@props
@given(batch=batches(), temperature=temperatures)
def test_kl_is_tckd_plus_the_rest_of_nckd(batch, temperature):
    student, teacher, target = batch
    tckd, nckd = decoupled_kl(student, teacher, target, temperature=temperature)
    p = (teacher.double() / temperature).softmax(-1)
    rest = p.scatter(-1, target.unsqueeze(-1), 0.0).sum(-1)  # 1 - p_target, which would cancel
    whole = forward_kl(student, teacher, temperature=temperature).double()
    largest = max(float(z.abs().max()) for z in (student, teacher)) / temperature
    atol = 1e-5 + 5e-7 * largest  # of the logsumexp over the rest in float32
    torch.testing.assert_close(tckd + rest * nckd.double(), whole, rtol=1e-5, atol=atol)


@props
@given(batch=batches(), temperature=temperatures, data=st.data())
def test_both_parts_are_divergences(batch, temperature, data):
    student, teacher, target = batch
    rows, classes = student.shape
    mask = None
    if data.draw(st.booleans()):
        kept = data.draw(st.lists(st.booleans(), min_size=rows * classes, max_size=rows * classes))
        mask = torch.tensor(kept).view(rows, classes)
    student.requires_grad_()
    parts = decoupled_kl(student, teacher, target, temperature=temperature, class_mask=mask)
    for part in parts:
        assert (part >= -1e-5).all()
        assert part.isfinite().all()
        (gradient,) = torch.autograd.grad(part.sum(), student, retain_graph=True)
        assert gradient.isfinite().all()
    same = decoupled_kl(student, student.detach(), target, temperature=temperature, class_mask=mask)
    assert all((part == 0).all() for part in same)
    if student.dtype == F64:
        order = torch.tensor(data.draw(st.permutations(range(classes))))
        moved = decoupled_kl(
            student[:, order] + 3,
            teacher[:, order] - 7,
            order.argsort()[target],
            temperature=temperature,
            class_mask=None if mask is None else mask[:, order],
        )
        torch.testing.assert_close(moved, parts, rtol=1e-9, atol=1e-9)


@props
@given(batch=batches(min_classes=2), temperature=temperatures, data=st.data())
def test_nckd_knows_neither_the_target_nor_masked_classes(batch, temperature, data):
    student, teacher, target = batch
    k = data.draw(st.integers(1, student.shape[-1] - 1))
    mask = topk_class_mask(teacher, target, k)
    _, nckd = decoupled_kl(student, teacher, target, temperature=temperature, class_mask=mask)
    noise = data.draw(extreme)
    changed = [torch.where(mask, z, torch.full_like(z, noise)) for z in (student, teacher)]
    assert torch.equal(decoupled_kl(*changed, target, temperature=temperature, class_mask=mask)[1], nckd)
    student.requires_grad_()
    value = decoupled_kl(student, teacher, target, temperature=temperature, class_mask=mask)[1].sum()
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[~mask] == 0).all()


@props
@given(batch=batches(min_classes=2), data=st.data())
def test_topk_masks_keep_exactly_k_are_nested_and_end_without_a_mask(batch, data):
    student, teacher, target = batch
    classes = teacher.shape[-1]
    masks = [topk_class_mask(teacher, target, k) for k in range(1, classes)]
    for k, mask in enumerate(masks, start=1):
        assert (mask.sum(-1) == k).all()
        assert not mask.gather(-1, target.unsqueeze(-1)).any()
        out = ~mask.scatter(-1, target.unsqueeze(-1), True)
        least = teacher.masked_fill(~mask, math.inf).amin(-1)
        assert (least >= teacher.masked_fill(~out, -math.inf).amax(-1)).all()
    assert all((small <= large).all() for small, large in pairwise(masks))
    # The target's own logit is irrelevant, and so is everything but the order.
    k = data.draw(st.integers(1, classes - 1))
    moved = (2 * teacher.double()).scatter(-1, target.unsqueeze(-1), data.draw(extreme))
    assert torch.equal(topk_class_mask(moved, target, k), masks[k - 1])
    student.requires_grad_()
    for whole, part in zip(
        decoupled_kl(student, teacher, target),
        decoupled_kl(student, teacher, target, class_mask=masks[-1]),
        strict=True,
    ):
        assert torch.equal(whole, part)
        pair = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (whole, part)]
        assert torch.equal(*pair)


# --- schedules ---

shares = st.lists(st.integers(1, 20), min_size=2, max_size=3, unique=True).map(lambda s: [x / 20 for x in sorted(s)])


@props
@given(data=st.data(), classes=st.integers(2, 1000), total=st.integers(1, 400), phase_ends=shares)
def test_topk_schedule_is_monotone_bounded_and_a_function_of_progress(data, classes, total, phase_ends):
    first, held = sorted(data.draw(st.lists(st.integers(1, classes - 1), min_size=2, max_size=2)))
    schedule = TopKSchedule(classes, total, k_start=first, k_opt=held, phase_ends=phase_ends)
    steps = [i * total / 50 for i in range(-2, 56)]
    ks = [schedule(step) for step in steps]
    assert ks == sorted(ks)
    assert (ks[0], ks[-1]) == (first, classes - 1)
    longer = TopKSchedule(classes, 4 * total, k_start=first, k_opt=held, phase_ends=phase_ends)
    ranges = {"easy": (first, held), "transition": (held, held), "hard": (held, classes - 1)}
    for step, k in zip(steps, ks, strict=True):
        assert longer(4 * step) == k
        low, high = ranges[schedule.phase(step)]
        assert low <= k <= high
    order = ["easy", "transition", "hard"]
    phases = [order.index(schedule.phase(step)) for step in steps]
    assert phases == sorted(phases)


@props
@given(
    total=st.floats(0.5, 300),
    warmup=st.floats(0, 400),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    gamma=st.floats(0.01, 1),
    milestones=st.lists(st.integers(1, 300), max_size=4, unique=True).map(sorted),
)
def test_multipliers_rise_during_the_warmup_then_fall_within_their_bounds(
    total, warmup, start, final, gamma, milestones
):
    epochs = [total * i / 40 for i in range(44)]
    cosine = CosineDecay(warmup_epochs=warmup, final=final, warmup_start=start)
    step = StepDecay([warmup + m for m in milestones], gamma, warmup_epochs=warmup, warmup_start=start)
    for schedule, floor in ((cosine, min(start, final)), (step, min(start, gamma ** len(milestones)))):
        values = [schedule(epoch, total) for epoch in epochs]
        assert all(floor - 1e-9 <= value <= 1 + 1e-9 for value in values)
        rising = [v for v, epoch in zip(values, epochs, strict=True) if epoch < warmup]
        falling = [v for v, epoch in zip(values, epochs, strict=True) if epoch >= warmup]
        assert all(a <= b + 1e-12 for a, b in pairwise(rising))
        assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    if warmup < total:
        assert cosine(total, total) == pytest.approx(final, abs=1e-9)
    ramp = [linear_warmup(epoch, warmup) for epoch in epochs]
    assert ramp == sorted(ramp)
    assert all(0 <= value <= 1 for value in ramp)
