"""Correlation, calibration and per-class accuracy against plain loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from vision_kd.viz.diagnosis import (
    BINS,
    calibration_error,
    class_accuracy,
    class_correlation,
    collect_logits,
    reliability,
)


@pytest.fixture
def samples():
    torch.manual_seed(3)
    return 3 * torch.randn(400, 6), torch.randint(5, (400,))  # class 5 has no sample


def test_correlation(samples):
    logits = samples[0].clone()
    logits[:, 2] = -2 * logits[:, 1] + 1
    logits[:, 4] = 7.0
    found = class_correlation(logits)
    assert float(found[1, 2]) == pytest.approx(-1, abs=1e-5)
    assert not found[4].any()
    assert float(found[0, 3]) == pytest.approx(float(np.corrcoef(logits[:, 0], logits[:, 3])[0, 1]), abs=1e-5)


def test_class_accuracy(samples):
    logits, target = samples
    found = class_accuracy(logits, target)
    for c in range(5):
        assert float(found[c]) == pytest.approx(float((logits.argmax(-1) == c)[target == c].float().mean()))
    assert found[5] == 0


def test_reliability_and_calibration_error(samples):
    logits, target = samples
    confidence, accuracy, counts = reliability(logits, target)
    best, predicted = logits.softmax(-1).max(-1)
    edges, at, gap = np.linspace(0, 1, BINS + 1), 0, 0.0
    for low, high in pairwise(edges):
        inside = (best >= low) & (best < high)
        if not inside.any():
            continue
        right = (predicted == target)[inside].float().mean()
        assert float(confidence[at]) == pytest.approx(float(best[inside].mean()), rel=1e-5)
        assert float(accuracy[at]) == pytest.approx(float(right))
        assert int(counts[at]) == int(inside.sum())
        gap += float(inside.float().mean()) * abs(float(best[inside].mean()) - float(right))
        at += 1
    assert at == len(counts)
    assert calibration_error(logits, target) == pytest.approx(gap, rel=1e-4)


def test_collect_logits_stops_at_the_limit():
    loader = [({"clean": torch.full((3, 2), float(i))}, torch.full((3,), i)) for i in range(4)]
    logits, target = collect_logits(torch.nn.Identity(), loader, "cpu", limit=5)
    assert target.tolist() == [0, 0, 0, 1, 1]
    assert logits[:, 0].tolist() == [0, 0, 0, 1, 1]
