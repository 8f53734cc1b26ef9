"""Schedules against hand-computed points and PyTorch's own schedulers."""

import math

import pytest
import torch

from kd_common.schedules import CosineDecay, StepDecay, TopKSchedule, linear_warmup


def test_topk_schedule_phases():
    schedule = TopKSchedule(100, 1000, k_start=0.05, k_opt=0.5, phase_ends=(0.3, 0.6))
    expected = {0: 5, 150: 28, 299: 50, 300: 50, 450: 50, 599: 50, 600: 50, 800: 74, 999: 99, 1000: 99}
    assert {step: schedule(step) for step in expected} == expected
    names = {0: "easy", 299: "easy", 300: "transition", 599: "transition", 600: "hard", 1000: "hard"}
    assert {step: schedule.phase(step) for step in names} == names
    assert schedule(-5) == 5
    assert schedule(5000) == 99
    assert schedule(450) == TopKSchedule(100, 10)(4.5)


def test_topk_schedule_reaches_all_classes_at_the_third_end():
    schedule = TopKSchedule(100, 1000, phase_ends=(0.2, 0.4, 0.8))
    assert [schedule(step) for step in (399, 600, 799, 800, 900)] == [50, 74, 99, 99, 99]
    assert TopKSchedule(100, 1000, phase_ends=(0.2, 0.4))(800) < 99


def test_topk_schedule_counts_and_fractions():
    assert TopKSchedule(100, 10, k_start=1, k_opt=1.0)(0) == 1
    assert TopKSchedule(100, 10, k_start=1, k_opt=1.0)(4) == 99
    assert TopKSchedule(10, 10, k_start=0.01)(0) == 1
    assert [TopKSchedule(2, 10)(step) for step in range(11)] == [1] * 11
    assert TopKSchedule(1000, 10)(0) == 50


@pytest.mark.parametrize("phase_ends", [(0.3, 0.6), (0.1, 0.2, 0.9), (0.5, 1.0)])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_topk_schedule_is_monotone_and_in_range(classes, phase_ends):
    schedule = TopKSchedule(classes, 500, phase_ends=phase_ends)
    ks = [schedule(step) for step in range(501)]
    assert ks == sorted(ks)
    assert ks[0] >= 1
    assert ks[-1] == classes - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"total_steps": 0}, "total_steps"),
        ({"k_start": 0}, r"k_start, a count of classes, must lie in \[1, 9\]"),
        ({"k_opt": 10}, r"k_opt, a count of classes, must lie in \[1, 9\]"),
        ({"k_opt": 1.5}, r"k_opt, a fraction"),
        ({"k_start": 0.0}, r"k_start, a fraction"),
        ({"k_start": 0.8}, "k_start must not exceed k_opt"),
        ({"phase_ends": (0.6, 0.3)}, "strictly increasing"),
        ({"phase_ends": (0.3, 0.3)}, "strictly increasing"),
        ({"phase_ends": (0.0, 0.5)}, "strictly increasing"),
        ({"phase_ends": (0.5, 1.5)}, "strictly increasing"),
        ({"phase_ends": (0.5,)}, "two or three"),
        ({"phase_ends": ()}, "two or three"),
        ({"phase_ends": (0.1, 0.2, 0.3, 0.4)}, "two or three"),
    ],
)
def test_topk_schedule_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TopKSchedule(**{"num_classes": 10, "total_steps": 100, **changes})


def learning_rates(scheduler_of, epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_step_decay_matches_torch():
    expected = learning_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6, 7], gamma=0.2), 10)
    assert [StepDecay((3, 6, 7), gamma=0.2)(epoch, 10) for epoch in range(10)] == pytest.approx(expected)
    assert StepDecay([150, 180, 210])(209.99, 240) == pytest.approx(0.01)


def test_cosine_decay_matches_torch():
    expected = learning_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.05), 10)
    assert [CosineDecay(final=0.05)(epoch, 10) for epoch in range(10)] == pytest.approx(expected)
    assert CosineDecay()(10, 10) == pytest.approx(0)
    assert CosineDecay(final=0.1)(25, 10) == pytest.approx(0.1)


def test_through_lambda_lr_in_steps():
    schedule = CosineDecay(warmup_epochs=1)
    rates = learning_rates(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step / 5, 4)), 20)
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[10] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_warmup():
    assert [linear_warmup(epoch, 20) for epoch in (0, 5, 20, 300)] == [0, 0.25, 1, 1]
    assert linear_warmup(0, 0) == 1
    assert StepDecay((3,), warmup_epochs=4)(2, 9) == pytest.approx(0.5)
    assert StepDecay((3,), warmup_epochs=4, warmup_start=0.2)(2, 9) == pytest.approx(0.6)
    assert StepDecay((1,), warmup_epochs=4)(2, 9) == pytest.approx(0.05)
    cosine = CosineDecay(warmup_epochs=2, warmup_start=0.5)
    assert [cosine(epoch, 12) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 0.75, 1, 0.5, 0])


def test_a_run_shorter_than_its_warmup_ends_within_it():
    short = CosineDecay(warmup_epochs=5, final=0.1)
    assert [short(epoch, 2) for epoch in (0, 1, 2)] == pytest.approx([0, 0.2, 0.4])
    assert short(5, 5) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StepDecay((5, 3)), "milestones must be strictly increasing"),
        (lambda: StepDecay((3,), gamma=0), "gamma"),
        (lambda: StepDecay((3,), warmup_epochs=-1), "warmup_epochs"),
        (lambda: StepDecay((3,), warmup_start=2), "warmup_start"),
        (lambda: CosineDecay(final=-0.1), "final"),
    ],
)
def test_bad_multipliers(build, message):
    with pytest.raises(ValueError, match=message):
        build()
