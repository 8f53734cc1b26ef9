"""Divergences against probability space in float64, the closed-form gradients, PyTorch's own KL, and their limits."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from kd_common.functional import (
    alpha_beta,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    standardize_logits,
    total_variation,
)

F64 = torch.float64


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def js(p, q, b):
    m = b * p + (1 - b) * q
    return b * kl(p, m) + (1 - b) * kl(q, m)


def ab(p, q, a, b):
    s = a + b
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def ab_student_slope(p, q, a, b):
    return -(p**a * q**b - q ** (a + b)) / a


def table_entry(name, function, value, slope):
    return pytest.param(function, value, slope, id=name)


# Name, function, probability-space value, and h = df/dlog q of the design's gradient table.
TABLE = [
    table_entry("fkl", forward_kl, kl, lambda p, q: -p),
    table_entry("rkl", reverse_kl, lambda p, q: kl(q, p), lambda p, q: q * ((q / p).log() + 1)),
    *(
        table_entry(
            f"js-{b}",
            partial(jensen_shannon, beta=b),
            partial(js, b=b),
            lambda p, q, b=b: (1 - b) * q * (q / (b * p + (1 - b) * q)).log(),
        )
        for b in (0.1, 0.5, 0.9)
    ),
    *(
        table_entry(
            f"sfkl-{a}",
            partial(skew_forward_kl, alpha=a),
            lambda p, q, a=a: kl(p, a * p + (1 - a) * q),
            lambda p, q, a=a: -(1 - a) * p * q / (a * p + (1 - a) * q),
        )
        for a in (0.0, 0.1, 0.7)
    ),
    *(
        table_entry(
            f"srkl-{a}",
            partial(skew_reverse_kl, alpha=a),
            lambda p, q, a=a: kl(q, (1 - a) * p + a * q),
            lambda p, q, a=a: q * ((q / ((1 - a) * p + a * q)).log() + 1 - a * q / ((1 - a) * p + a * q)),
        )
        for a in (0.0, 0.1, 0.7)
    ),
    table_entry(
        "tv", total_variation, lambda p, q: 0.5 * (p - q).abs().sum(-1), lambda p, q: 0.5 * q * torch.sign(q - p)
    ),
    *(
        table_entry(
            f"ab-{a}-{b}",
            partial(alpha_beta, alpha=a, beta=b),
            partial(ab, a=a, b=b),
            partial(ab_student_slope, a=a, b=b),
        )
        for a, b in ((0.2, 0.7), (1.0, 1.0), (2.0, 0.5))
    ),
    *(
        table_entry(
            f"ab-{a}-0",
            partial(alpha_beta, alpha=a, beta=0.0),
            lambda p, q, a=a: (a * p**a * (p / q).log() - p**a + q**a).sum(-1) / a**2,
            partial(ab_student_slope, a=a, b=0.0),
        )
        for a in (0.5, 1.0)
    ),
    *(
        table_entry(
            f"ab-0-{b}",
            partial(alpha_beta, alpha=0.0, beta=b),
            lambda p, q, b=b: (b * q**b * (q / p).log() - q**b + p**b).sum(-1) / b**2,
            lambda p, q, b=b: q**b * (q / p).log(),
        )
        for b in (0.5, 1.0)
    ),
]
FUNCTIONS = [pytest.param(param.values[0], id=param.id) for param in TABLE]
BOUNDED = [param for param in FUNCTIONS if param.id[:2] in ("js", "tv") or param.id in ("sfkl-0.1", "srkl-0.1")]


def random_pair(*shape, dtype=F64, scale=3.0):
    return scale * torch.randn(*shape, dtype=dtype), scale * torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("function", "value", "slope"), TABLE)
def test_value_and_gradient_match_probability_space(function, value, slope, temperature):
    student, teacher = random_pair(8, 11)
    student.requires_grad_()
    result = function(student, teacher, temperature=temperature)
    q, p = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(result, value(p, q), rtol=1e-11, atol=1e-13)
    h = slope(p, q)
    (gradient,) = torch.autograd.grad(result.sum(), student)
    torch.testing.assert_close(gradient, (h - q * h.sum(-1, keepdim=True)) / temperature, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_in_student_and_teacher(function):
    student, teacher = random_pair(2, 3, 5, scale=1.5)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: function(s, t, temperature=1.7), inputs)


def test_kl_matches_torch():
    student, teacher = random_pair(6, 9)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), expected)
    expected = kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reverse_kl(student, teacher), expected)


def test_limits():
    student, teacher = random_pair(6, 9, scale=1.0)
    fkl, rkl = forward_kl(student, teacher), reverse_kl(student, teacher)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    close(jensen_shannon(student, teacher, beta=1e-6) / 1e-6, fkl)
    close(jensen_shannon(student, teacher, beta=1 - 1e-6) / 1e-6, rkl)
    close(alpha_beta(student, teacher, 1.0, 1e-6), fkl)
    close(alpha_beta(student, teacher, 1e-6, 1.0), rkl)
    for exact, reference in [
        (alpha_beta(student, teacher, 1, 0), fkl),
        (alpha_beta(student, teacher, 0, 1), rkl),
        (alpha_beta(student, teacher, 1, 1), 0.5 * (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)),
        (skew_forward_kl(student, teacher, alpha=0), fkl),
        (skew_reverse_kl(student, teacher, alpha=0), rkl),
    ]:
        torch.testing.assert_close(exact, reference, rtol=1e-12, atol=1e-14)


def test_disjoint_distributions_reach_the_upper_bounds():
    student, teacher = torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0])
    assert total_variation(student, teacher) == 1
    assert jensen_shannon(student, teacher).item() == pytest.approx(math.log(2))
    assert skew_forward_kl(student, teacher, alpha=0.1).item() == pytest.approx(-math.log(0.1))
    assert skew_reverse_kl(student, teacher, alpha=0.1).item() == pytest.approx(-math.log(0.1))
    assert forward_kl(student, teacher) == reverse_kl(student, teacher) == 1e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("function", "value", "slope"), TABLE)
def test_extreme_logits_stay_finite_and_correct(function, value, slope, dtype):
    base = torch.tensor([[1e4, 0.0, -1e4, 3.0], [-1e4, 1e4, 1e4, 0.0], [0.5, 1e4, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0]])
    for student, teacher in [(base, base.flip(-1)), (base, base.flip(0)), (base.flip(0), base), (base, base)]:
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        result = function(student, teacher)
        assert result.dtype == torch.float32
        (gradient,) = torch.autograd.grad(result.sum(), student)
        assert gradient.dtype == dtype
        assert result.isfinite().all()
        assert gradient.isfinite().all()
        # The largest gap makes q underflow even in float64, so the reference is the function itself, tested above.
        wide = function(student.detach().to(F64), teacher.to(F64))
        torch.testing.assert_close(result.to(F64), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_input_is_computed_in_fp32(function):
    student, teacher = random_pair(4, 50, dtype=torch.float32)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    torch.testing.assert_close(function(student, teacher), function(student.float(), teacher.float()), rtol=0, atol=0)
    assert function(student, teacher.double()).dtype == F64


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_vocabulary_equals_the_shorter_vocabulary(function):
    student, teacher = random_pair(5, 7)
    absent = torch.tensor([0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    masked = student.masked_fill(absent, -math.inf).requires_grad_()
    short = student[:, ~absent].requires_grad_()
    result = function(masked, teacher.masked_fill(absent, -math.inf))
    expected = function(short, teacher[:, ~absent])
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), masked)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), short)
    torch.testing.assert_close(gradient[:, ~absent], expected_gradient)
    assert (gradient[:, absent] == 0).all()


def one_sided(function, masked_side):
    """Value and student gradient where one side alone has a class of probability 0."""
    student, teacher = torch.tensor([0.3, -1.0, 0.7], dtype=F64), torch.tensor([1.0, 0.2, -0.4], dtype=F64)
    (student if masked_side == "student" else teacher)[1] = -math.inf
    student.requires_grad_()
    result = function(student, teacher)
    return result.detach(), torch.autograd.grad(result, student)[0], student.detach().softmax(-1), teacher.softmax(-1)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("function", [*BOUNDED, pytest.param(partial(alpha_beta, alpha=0.2, beta=0.7), id="ab")])
def test_one_sided_mask_is_finite_where_the_divergence_is(function, side):
    result, gradient, q, p = one_sided(function, side)
    # A probability of e^-500 in place of 0: the same to all digits.
    student, teacher = q.log().clamp(min=-500), p.log().clamp(min=-500)
    torch.testing.assert_close(result, function(student, teacher))
    assert gradient.isfinite().all()


def test_one_sided_mask_of_the_kl_divergences():
    result, gradient, q, p = one_sided(forward_kl, "teacher")
    torch.testing.assert_close(result, torch.xlogy(p, p / q).sum())
    torch.testing.assert_close(gradient, q - p)
    assert one_sided(forward_kl, "student")[0] == math.inf
    assert one_sided(reverse_kl, "teacher")[0] == math.inf
    result, gradient, q, p = one_sided(reverse_kl, "student")
    torch.testing.assert_close(result, torch.xlogy(q, q / p).sum())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_and_class_order(function):
    student, teacher = random_pair(2, 3, 4, 6)
    result = function(student, teacher)
    assert result.shape == (2, 3, 4)
    torch.testing.assert_close(result[1, 2, 3], function(student[1, 2, 3], teacher[1, 2, 3]))
    order = torch.randperm(6)
    torch.testing.assert_close(function(student[..., order], teacher[..., order]), result)
    torch.testing.assert_close(function(student + 7, teacher - 5), result)
    assert function(student[:0], teacher[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 4\)"):
        function(torch.zeros(2, 3), torch.zeros(2, 4))
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a positive"):
            function(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


def test_bad_coefficients():
    z = torch.zeros(2, 3)
    for beta in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="use forward_kl in place of beta = 0 and reverse_kl"):
            jensen_shannon(z, z, beta=beta)
    for function in (skew_forward_kl, skew_reverse_kl):
        for alpha in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\)"):
                function(z, z, alpha=alpha)
    for alpha, beta in ((0, 0), (-1, 2), (2, -1), (math.nan, 1), (1, math.inf)):
        with pytest.raises(ValueError, match="alpha and beta must be finite"):
            alpha_beta(z, z, alpha, beta)


logit_rows = st.integers(2, 8).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-60, 60), min_size=size, max_size=size)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows, temperature=st.floats(0.2, 10))
def test_properties(rows, temperature):
    student, teacher = (torch.tensor(row, dtype=F64) for row in rows)
    for param in FUNCTIONS:
        function = param.values[0]
        assert function(student, teacher, temperature=temperature) >= -1e-13, param.id
        assert function(student, student, temperature=temperature).abs() <= 1e-13, param.id
    for function in (jensen_shannon, total_variation):
        torch.testing.assert_close(function(student, teacher), function(teacher, student), rtol=1e-12, atol=1e-14)
    assert total_variation(student, teacher) <= 1 + 1e-13
    assert jensen_shannon(student, teacher) <= math.log(2) + 1e-13


def test_standardize_logits_is_the_z_score():
    logits = 5 * torch.randn(3, 4, 9, dtype=F64) + 2
    expected = (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(standardize_logits(logits, eps=1e-3), expected)
    scores = standardize_logits(logits)
    torch.testing.assert_close(scores.std(-1), torch.ones(3, 4, dtype=F64))
    torch.testing.assert_close(standardize_logits(3 * logits - 8), scores, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(standardize_logits, logits.requires_grad_())
    assert standardize_logits(logits.bfloat16()).dtype == torch.float32


def test_standardize_logits_of_a_constant_row():
    logits = torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]], requires_grad=True)
    scores = standardize_logits(logits)
    assert (scores[0] == 0).all()
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), logits)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="at least 2 classes"):
        standardize_logits(torch.zeros(3, 1))
