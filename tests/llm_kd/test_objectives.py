"""Closed-form gradients against autograd and probability space, extreme logits, and TAID's clock."""

import math

import pytest
import torch

from kd_common.functional import alpha_beta, forward_kl, jensen_shannon, reverse_kl
from kd_common.registry import subclasses
from llm_kd.objectives import Objective
from llm_kd.objectives.taid import TAID

OBJECTIVES = subclasses(Objective)

F64 = torch.float64
CASES = [
    ("ForwardKL", {}),
    ("ReverseKL", {}),
    *(("JensenShannon", {"beta": b}) for b in (0.1, 0.5, 0.9)),
    *((name, {"alpha": a}) for name in ("SkewForwardKL", "SkewReverseKL") for a in (0.0, 0.1, 0.7)),
    ("TotalVariation", {}),
    *(
        ("AlphaBeta", {"alpha": a, "beta": b})
        for a, b in ((0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.0, 0.5), (0.5, 0.0), (2.0, 0.5))
    ),
    *(("TAID", {"t_start": t}) for t in (0.2, 0.4, 1.0)),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def objective(request):
    name, settings = request.param
    return OBJECTIVES[name](**settings)


def closed_form(objective, student, teacher, temperature=1.0):
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    h = objective.grad_log_q(log_q, log_p)
    return (h - log_q.exp() * h.sum(-1, keepdim=True)) / temperature


def autograd(objective, student, teacher, temperature=1.0):
    student = student.clone().requires_grad_()
    value = objective(student, teacher, temperature)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def test_every_objective_is_tested():
    assert {name for name, _ in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_closed_form_gradient_is_autograds(objective, temperature):
    student, teacher = torch.randn(2, 3, 5, 20, dtype=F64) * 3
    value, gradient = autograd(objective, student, teacher, temperature)
    assert value.shape == (3, 5)
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    torch.testing.assert_close(objective(log_q, log_p, None), value)
    both = objective.value_and_grad(log_q, log_p)
    torch.testing.assert_close(both[0], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both[1], objective.grad_log_q(log_q, log_p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(closed_form(objective, student, teacher, temperature), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [50.0, 104.0, 1000.0, 1e6])
def test_extreme_logits(objective, gap):
    student, teacher = gap * torch.randn(2, 8, 16)
    student[0], teacher[0] = teacher[0], teacher[0]
    student[1] = -teacher[1]
    value, gradient = autograd(objective, student, teacher)
    ours = closed_form(objective, student, teacher)
    assert value.isfinite().all()
    assert ours.isfinite().all()
    exact = closed_form(objective, student.double(), teacher.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3 * (1 + exact.abs().max().item()))
    torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-3 * (1 + exact.abs().max().item()))


def test_absent_tokens_change_nothing(objective):
    student, teacher = torch.randn(2, 4, 9, dtype=F64)
    padded = [torch.cat([z, torch.full((4, 3), -math.inf, dtype=F64)], dim=-1) for z in (student, teacher)]
    value, _ = autograd(objective, student, teacher)
    torch.testing.assert_close(objective(*padded), value)
    torch.testing.assert_close(objective.value_and_grad(*(z.log_softmax(-1) for z in padded))[0], value)
    gradient = closed_form(objective, *padded)
    assert (gradient[:, 9:] == 0).all()
    torch.testing.assert_close(gradient[:, :9], closed_form(objective, student, teacher))


def test_slope_leaves_its_arguments_alone(objective):
    log_q, log_p = torch.randn(2, 4, 9).log_softmax(-1)
    kept = log_q.clone(), log_p.clone()
    for h in (objective.grad_log_q(log_q, log_p), objective.value_and_grad(log_q, log_p)[1]):
        assert torch.equal(log_q, kept[0])
        assert torch.equal(log_p, kept[1])
        assert h.data_ptr() not in (log_q.data_ptr(), log_p.data_ptr())


def test_slopes_are_the_papers():
    q, p = torch.randn(2, 6, 10, dtype=F64).softmax(-1)
    m = 0.3 * p + 0.7 * q
    n = 0.7 * p + 0.3 * q
    table = [
        ("ForwardKL", {}, -p),
        ("ReverseKL", {}, q * ((q / p).log() + 1)),
        ("JensenShannon", {"beta": 0.3}, 0.7 * q * (q / m).log()),
        ("SkewForwardKL", {"alpha": 0.3}, -0.7 * p * q / m),
        ("SkewReverseKL", {"alpha": 0.3}, q * ((q / n).log() + 1 - 0.3 * q / n)),
        ("TotalVariation", {}, 0.5 * q * (q - p).sign()),
        ("AlphaBeta", {"alpha": 0.4, "beta": 0.5}, -(p**0.4 * q**0.5 - q**0.9) / 0.4),
        ("TAID", {"t_start": 0.3}, -(p**0.3 * q**0.7) / (p**0.3 * q**0.7).sum(-1, keepdim=True)),
    ]
    assert {name for name, *_ in table} == set(OBJECTIVES)
    for name, settings, h in table:
        torch.testing.assert_close(OBJECTIVES[name](**settings).grad_log_q(q.log(), p.log()), h)


def test_values_are_the_shared_divergences():
    student, teacher = torch.randn(2, 6, 10, dtype=F64)
    for name, settings, expected in [
        ("ForwardKL", {}, forward_kl(student, teacher, temperature=2.0)),
        ("ReverseKL", {}, reverse_kl(student, teacher, temperature=2.0)),
        ("JensenShannon", {"beta": 0.2}, jensen_shannon(student, teacher, temperature=2.0, beta=0.2)),
        ("AlphaBeta", {"alpha": 0.2, "beta": 0.7}, alpha_beta(student, teacher, 0.2, 0.7, temperature=2.0)),
    ]:
        assert torch.equal(OBJECTIVES[name](**settings)(student, teacher, 2.0), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("JensenShannon", {"beta": 0.0}),
        ("JensenShannon", {"beta": 1.5}),
        ("SkewForwardKL", {"alpha": 1.0}),
        ("SkewReverseKL", {"alpha": -0.1}),
        ("AlphaBeta", {"alpha": 0.0, "beta": 0.0}),
        ("TAID", {"t_start": 0.0}),
        ("TAID", {"t_start": 0.5, "t_end": 0.4}),
        ("TAID", {"momentum": 1.0}),
        ("TAID", {"rate": -1.0}),
    ],
)
def test_bad_settings_fail_at_once(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        OBJECTIVES[name](**settings)


def test_taid_is_cross_entropy_to_the_interpolated_teacher():
    student, teacher = torch.randn(2, 5, 11, dtype=F64)
    objective = TAID(t_start=0.3)
    target = ((0.7 * student + 0.3 * teacher) / 2).softmax(-1)
    torch.testing.assert_close(objective(student, teacher, 2.0), -(target * (student / 2).log_softmax(-1)).sum(-1))
    _, gradient = autograd(objective, student, teacher, 2.0)
    torch.testing.assert_close(gradient, ((student / 2).softmax(-1) - target) / 2)


def test_taid_follows_the_formula():
    objective = TAID(t_start=0.2, t_end=0.9, rate=0.3, momentum=0.5)
    losses = [2.0, 1.8, 1.9, 1.2, 1.1, 0.4]
    t, trend, previous = 0.2, 0.0, None
    for step, loss in enumerate(losses, start=1):
        objective.on_step(loss, step, 40)
        if previous is not None:
            trend = 0.5 * trend + 0.5 * (previous - loss) / (previous + 1e-15)
            t = min(0.9, max(0.2 + 0.7 * step / 40, t + 0.3 / (1 + math.exp(-trend)) * (1 - t)))
        previous = loss
        assert objective.t == pytest.approx(t)
    assert 0.5 < objective.t < 0.9
    objective.on_step(0.4, 40, 40)
    assert objective.t == pytest.approx(0.9)


def test_taid_ramp_is_a_floor():
    objective = TAID(t_start=0.4, rate=0.0)
    for step in range(1, 11):
        objective.on_step(1.0, step, 10)
        assert objective.t == pytest.approx(0.4 + 0.06 * step if step > 1 else 0.4)


def test_taid_does_not_advance_in_forward_and_is_saved():
    objective = TAID(rate=0.1)
    objective.on_step(2.0, 1, 100)
    objective.on_step(1.5, 2, 100)
    t = objective.t
    for mode in (True, False):
        objective.train(mode)
        objective(torch.randn(3, 5), torch.randn(3, 5))
    assert objective.t == t > 0.4
    twin = TAID(rate=0.1)
    twin.load_state_dict(objective.state_dict())
    for module in (objective, twin):
        module.on_step(1.1, 3, 100)
    assert twin.t == objective.t > t


def test_taid_survives_a_jump_and_refuses_nan():
    objective = TAID()
    for loss in (0.0, 5.0):
        objective.on_step(loss, 1, 100)
    assert 0.4 <= objective.t < 0.41
    with pytest.raises(ValueError, match="which is nan after step 3"):
        objective.on_step(math.nan, 3, 100)
