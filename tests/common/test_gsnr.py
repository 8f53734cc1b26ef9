"""The streaming GSNR estimator against the two-pass definitions in float64."""

import gc
import io
import math
import weakref

import pytest
import torch

from kd_common.gsnr import GradientSNR

F64 = torch.float64
SHAPES = [(3, 4), (5,)]


def gradient_stream(samples, dtype=F64, mean=1.0, std=2.0):
    return [[mean + std * torch.randn(shape, dtype=dtype) for shape in SHAPES] for _ in range(samples)]


def two_pass(stream, weights=None, unbiased=True):
    """Weighted mean and variance per tensor, straight from the definitions."""
    weights = torch.ones(len(stream), dtype=F64) if weights is None else weights
    weights = weights / weights.sum()
    correction = 1 / (1 - weights.square().sum()) if unbiased else 1.0
    means, variances = [], []
    for tensors in zip(*stream, strict=True):
        stacked = torch.stack([t.to(F64) for t in tensors])
        w = weights.reshape(-1, *[1] * (stacked.ndim - 1))
        mean = (w * stacked).sum(0)
        means.append(mean)
        variances.append(correction * (w * (stacked - mean).square()).sum(0))
    return means, variances


def check(snr, name, means, variances, **tolerance):
    tolerance = tolerance or {"rtol": 1e-11, "atol": 0.0}
    signal, noise = (sum(float(t.sum()) for t in ts) for ts in ([m.square() for m in means], variances))
    torch.testing.assert_close(snr.vector(name), signal / noise, **tolerance)
    ratios = [m.square() / v for m, v in zip(means, variances, strict=True)]
    for actual, expected in zip(snr.per_parameter(name), ratios, strict=True):
        torch.testing.assert_close(actual.to(F64), expected, **tolerance)
    average = float(torch.cat([r.flatten() for r in ratios]).mean())
    torch.testing.assert_close(snr.mean(name), average, **tolerance)
    summary = snr.compute()[name]
    assert set(summary) == {"vector", "signal", "noise", "mean", "count"}
    assert (summary["vector"], summary["mean"], summary["count"]) == (snr.vector(name), snr.mean(name), snr.count(name))
    torch.testing.assert_close(summary["signal"], signal, **tolerance)
    torch.testing.assert_close(summary["noise"], noise, **tolerance)


def feed(snr, stream, name="task"):
    for gradients in stream:
        snr.update({name: gradients})
    return snr


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("samples", [2, 3, 17])
def test_all_samples(samples, unbiased):
    stream = gradient_stream(samples)
    snr = feed(GradientSNR(unbiased=unbiased), stream)
    check(snr, "task", *two_pass(stream, unbiased=unbiased))
    assert snr.count("task") == samples
    if unbiased:
        expected = torch.stack([g[0] for g in stream]).var(0)
        torch.testing.assert_close(two_pass(stream)[1][0], expected)  # the reference itself


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.97])
def test_exponential_weights(decay, unbiased):
    stream = gradient_stream(25)
    snr = feed(GradientSNR(decay=decay, unbiased=unbiased), stream)
    weights = decay ** torch.arange(24, -1, -1, dtype=F64)
    check(snr, "task", *two_pass(stream, weights, unbiased))
    assert snr.count("task") == 25


def test_tumbling_window():
    stream = gradient_stream(17)
    snr = GradientSNR(window=5)
    for n, gradients in enumerate(stream, start=1):
        snr.update({"task": gradients})
        start, end = (0, n) if n < 5 else (5 * (n // 5) - 5, 5 * (n // 5))
        assert snr.count("task") == end - start
        if n >= 2:
            check(snr, "task", *two_pass(stream[start:end]))


def test_large_mean_and_small_variance():
    stream = gradient_stream(200, mean=1e6, std=1e-3)
    # E[g^2] - E[g]^2 would lose all digits here: 1e12 * 2e-16 is far above 1e-6.
    check(feed(GradientSNR(), stream), "task", *two_pass(stream), rtol=1e-5, atol=0.0)
    stream = gradient_stream(200, mean=100.0, std=0.1, dtype=torch.float32)
    check(feed(GradientSNR(), stream), "task", *two_pass(stream), rtol=1e-3, atol=0.0)


def test_gaussian_gradients_with_known_gsnr():
    mean, std = torch.linspace(-1, 1, 400, dtype=F64), torch.linspace(0.5, 2, 400, dtype=F64)
    snr = GradientSNR()
    for _ in range(2000):
        snr.update({"noisy": mean + std * torch.randn(400, dtype=F64), "noise": torch.randn(400, dtype=F64)})
    expected = float(mean.square().sum() / std.square().sum())
    assert snr.vector("noisy") == pytest.approx(expected, rel=0.02)
    assert snr.mean("noisy") == pytest.approx(float((mean / std).square().mean()), rel=0.03)
    assert snr.vector("noise") == pytest.approx(1 / 2000, rel=0.3)


def test_half_precision_gradients_are_accumulated_in_fp32():
    stream = gradient_stream(50, dtype=torch.bfloat16)
    snr = feed(GradientSNR(), stream)
    assert {t.dtype for t in snr.per_parameter("task")} == {torch.float32}
    check(snr, "task", *two_pass(stream), rtol=1e-4, atol=1e-5)


def test_components_are_independent_and_a_tensor_is_a_list_of_one():
    stream = gradient_stream(6)
    snr = GradientSNR()
    for i, (first, second) in enumerate(stream):
        snr.update({"a": first, **({"b": [first, second]} if i >= 2 else {})})
    check(snr, "a", *two_pass([[first] for first, _ in stream]))
    check(snr, "b", *two_pass(stream[2:]))
    assert snr.names == ["a", "b"]
    assert (snr.count("a"), snr.count("b"), snr.count("c")) == (6, 4, 0)


@pytest.mark.parametrize("settings", [{}, {"window": 2}])
def test_none_is_zero_once_the_shape_is_known(settings):
    first, second, third, fourth = gradient_stream(4)
    snr = feed(GradientSNR(**settings), [first, second, [None, third[1]], fourth])
    stream = [first, second, [torch.zeros(3, 4, dtype=F64), third[1]], fourth]
    check(snr, "task", *two_pass(stream[-settings.get("window", 4) :]))
    for bad in ([], [None], [first[0], None]):
        with pytest.raises(ValueError, match="first sample of component 'new' is empty or contains None"):
            snr.update({"new": bad})


def test_entries_without_variance():
    snr = feed(GradientSNR(), [[torch.tensor([0.0, 2.0, 1.0])], [torch.tensor([0.0, 2.0, 3.0])]])
    ratios = snr.per_parameter("task")[0]
    assert ratios[0].isnan()
    assert ratios[1:].tolist() == [math.inf, 2.0]
    assert snr.mean("task") == 2.0
    assert snr.vector("task") == 4.0
    constant = feed(GradientSNR(), [[torch.ones(2)]] * 3)
    assert constant.vector("task") == math.inf
    assert math.isnan(constant.mean("task"))
    assert math.isnan(feed(GradientSNR(), [[torch.zeros(2)]] * 3).vector("task"))


def test_gradients_are_read_but_neither_kept_nor_changed():
    snr = GradientSNR()
    gradient = torch.ones(4, requires_grad=True) * 2
    snr.update({"task": gradient})
    snr.update({"task": [gradient + 1]})
    assert gradient.tolist() == [2] * 4
    assert not snr.per_parameter("task")[0].requires_grad
    reference = weakref.ref(gradient)
    del gradient
    gc.collect()
    assert reference() is None


def test_memory_is_constant():
    snr = GradientSNR(window=3)
    sizes = []
    for gradients in gradient_stream(20):
        snr.update({"task": gradients})
        state = snr.state_dict()
        sizes.append(
            sum(len(m["mean"]) + len(m["variance"]) for k in ("running", "completed") for m in state[k].values())
        )
    assert max(sizes) == 4 * len(SHAPES)


@pytest.mark.parametrize("settings", [{}, {"window": 4}, {"decay": 0.8}, {"unbiased": False}])
def test_state_dict_resumes_exactly(settings):
    stream = gradient_stream(13, dtype=torch.float32)
    straight = feed(GradientSNR(**settings), stream[:7])
    file = io.BytesIO()
    snapshot = straight.state_dict()
    torch.save(snapshot, file)
    feed(straight, stream[7:])
    file.seek(0)
    for state in (snapshot, snapshot, torch.load(file, weights_only=True)):  # twice: loading must copy
        resumed = GradientSNR(**settings)
        resumed.load_state_dict(state)
        feed(resumed, stream[7:])
        assert resumed.compute() == straight.compute()
        for a, b in zip(resumed.per_parameter("task"), straight.per_parameter("task"), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"recorded with .* same settings"):
        GradientSNR(window=9).load_state_dict(snapshot)


def test_reset_forgets_everything():
    snr = feed(GradientSNR(window=2), gradient_stream(5))
    snr.reset()
    assert snr.names == []
    assert snr.count("task") == 0
    stream = [[torch.randn(7, dtype=F64)] for _ in range(2)]
    check(feed(snr, stream), "task", *two_pass(stream))


def test_errors():
    snr = GradientSNR()
    with pytest.raises(RuntimeError, match="got none"):
        snr.compute()
    with pytest.raises(KeyError, match="component 'task'"):
        snr.vector("task")
    snr.update({"task": [torch.ones(2), torch.ones(3)]})
    for statistic in (snr.vector, snr.mean, snr.per_parameter, lambda _: snr.compute()):
        with pytest.raises(RuntimeError, match="at least 2 samples, got 1"):
            statistic("task")
    with pytest.raises(ValueError, match="had 2 gradients before, now 1"):
        snr.update({"task": torch.ones(2)})
    with pytest.raises(ValueError, match="changed shape"):
        snr.update({"task": [torch.ones(2), torch.ones(4)]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window must be at least 2"),
        ({"decay": 1.0}, r"decay must lie in \(0, 1\)"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\)"),
        ({"window": 5, "decay": 0.5}, "exclude each other"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientSNR(**settings)
