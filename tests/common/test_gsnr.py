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


def two_pass(stream):
    """GSNR straight from the definition."""
    stacked = [torch.stack([t.to(F64) for t in tensors]) for tensors in zip(*stream, strict=True)]
    return float(sum(t.mean(0).square().sum() for t in stacked) / sum(t.var(0).sum() for t in stacked))


def check(snr, name, expected, **tolerance):
    torch.testing.assert_close(snr.vector(name), expected, **(tolerance or {"rtol": 1e-11, "atol": 0.0}))


def feed(snr, stream, name="task"):
    for gradients in stream:
        snr.update({name: gradients})
    return snr


@pytest.mark.parametrize("samples", [2, 3, 17])
def test_all_samples(samples):
    stream = gradient_stream(samples)
    snr = feed(GradientSNR(), stream)
    check(snr, "task", two_pass(stream))
    assert snr.count("task") == samples


def test_large_mean_and_small_variance():
    stream = gradient_stream(200, mean=1e6, std=1e-3)
    # E[g^2] - E[g]^2 would lose all digits here: 1e12 * 2e-16 is far above 1e-6.
    check(feed(GradientSNR(), stream), "task", two_pass(stream), rtol=1e-5, atol=0.0)
    stream = gradient_stream(200, mean=100.0, std=0.1, dtype=torch.float32)
    check(feed(GradientSNR(), stream), "task", two_pass(stream), rtol=1e-3, atol=0.0)


def test_gaussian_gradients_with_known_gsnr():
    mean, std = torch.linspace(-1, 1, 400, dtype=F64), torch.linspace(0.5, 2, 400, dtype=F64)
    snr = GradientSNR()
    for _ in range(2000):
        snr.update({"noisy": mean + std * torch.randn(400, dtype=F64), "noise": torch.randn(400, dtype=F64)})
    expected = float(mean.square().sum() / std.square().sum())
    assert snr.vector("noisy") == pytest.approx(expected, rel=0.02)
    assert snr.vector("noise") == pytest.approx(1 / 2000, rel=0.3)


def test_half_precision_gradients_are_accumulated_in_fp32():
    stream = gradient_stream(50, dtype=torch.bfloat16)
    snr = feed(GradientSNR(), stream)
    assert {t.dtype for t in snr.state_dict()["task"]["mean"]} == {torch.float32}
    check(snr, "task", two_pass(stream), rtol=1e-4, atol=1e-5)


def test_components_are_independent_and_a_tensor_is_a_list_of_one():
    stream = gradient_stream(6)
    snr = GradientSNR()
    for i, (first, second) in enumerate(stream):
        snr.update({"a": first, **({"b": [first, second]} if i >= 2 else {})})
    check(snr, "a", two_pass([[first] for first, _ in stream]))
    check(snr, "b", two_pass(stream[2:]))
    assert snr.names == ["a", "b"]
    assert (snr.count("a"), snr.count("b"), snr.count("c")) == (6, 4, 0)


def test_none_is_zero_once_the_shape_is_known():
    first, second, third, fourth = gradient_stream(4)
    snr = feed(GradientSNR(), [first, second, [None, third[1]], fourth])
    check(snr, "task", two_pass([first, second, [torch.zeros(3, 4, dtype=F64), third[1]], fourth]))
    for bad in ([], [None], [first[0], None]):
        with pytest.raises(ValueError, match="first sample of component 'new' is empty or contains None"):
            snr.update({"new": bad})


def test_entries_without_variance():
    snr = feed(GradientSNR(), [[torch.tensor([0.0, 2.0, 1.0])], [torch.tensor([0.0, 2.0, 3.0])]])
    assert snr.vector("task") == 4.0
    constant = feed(GradientSNR(), [[torch.ones(2)]] * 3)
    assert constant.vector("task") == math.inf
    assert math.isnan(feed(GradientSNR(), [[torch.zeros(2)]] * 3).vector("task"))


def test_gradients_are_read_but_neither_kept_nor_changed():
    snr = GradientSNR()
    gradient = torch.ones(4, requires_grad=True) * 2
    snr.update({"task": gradient})
    snr.update({"task": [gradient + 1]})
    assert gradient.tolist() == [2] * 4
    assert not snr.state_dict()["task"]["mean"][0].requires_grad
    reference = weakref.ref(gradient)
    del gradient
    gc.collect()
    assert reference() is None


def test_memory_is_constant():
    snr = feed(GradientSNR(), gradient_stream(20))
    state = snr.state_dict()["task"]
    assert len(state["mean"]) + len(state["variance"]) == 2 * len(SHAPES)


def test_state_dict_resumes_exactly():
    stream = gradient_stream(13, dtype=torch.float32)
    straight = feed(GradientSNR(), stream[:7])
    file = io.BytesIO()
    snapshot = straight.state_dict()
    torch.save(snapshot, file)
    feed(straight, stream[7:])
    file.seek(0)
    for state in (snapshot, snapshot, torch.load(file, weights_only=True)):  # twice: loading must copy
        resumed = GradientSNR()
        resumed.load_state_dict(state)
        feed(resumed, stream[7:])
        assert resumed.vector("task") == straight.vector("task")
        assert resumed.count("task") == straight.count("task")


def test_reset_forgets_everything():
    snr = feed(GradientSNR(), gradient_stream(5))
    snr.reset()
    assert snr.names == []
    assert snr.count("task") == 0
    stream = [[torch.randn(7, dtype=F64)] for _ in range(2)]
    check(feed(snr, stream), "task", two_pass(stream))


def test_errors():
    snr = GradientSNR()
    with pytest.raises(KeyError, match="component 'task'"):
        snr.vector("task")
    snr.update({"task": [torch.ones(2), torch.ones(3)]})
    with pytest.raises(RuntimeError, match="at least 2 samples, got 1"):
        snr.vector("task")
    with pytest.raises(ValueError, match="had 2 gradients before, now 1"):
        snr.update({"task": torch.ones(2)})
    with pytest.raises(ValueError, match="changed shape"):
        snr.update({"task": [torch.ones(2), torch.ones(4)]})
