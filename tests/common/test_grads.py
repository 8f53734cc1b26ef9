"""Component gradients against one plain backward pass per component."""

import pytest
import torch
from torch import nn

from kd_common.distributed import average_batchnorm_buffers
from kd_common.grads import (
    accumulate,
    all_reduce_mean,
    clip_components,
    component_cosines,
    component_gradients,
    component_norms,
    merge,
    output_gradients,
    sum_gradients,
)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 5, dtype=torch.float64)
        self.logits = nn.Linear(5, 3, dtype=torch.float64)
        self.feature = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return [self.logits(hidden), self.feature(hidden)]


def losses(outputs):
    logits, feature = outputs
    return {
        "task": logits.logsumexp(1) - logits[:, 0],
        "relation": feature.square().mean() + logits.pow(3).mean(),
        "feature": feature.exp().sum(1),
    }


def leaves(outputs):
    return [out.detach().requires_grad_() for out in outputs]


def reference(net, x, name):
    return torch.autograd.grad(losses(net(x))[name].mean(), list(net.parameters()), allow_unused=True)


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture
def setup():
    return TwoHeads(), torch.randn(6, 4, dtype=torch.float64)


def test_components_match_separate_backward_passes(setup):
    net, x = setup
    outputs = net(x)
    detached = leaves(outputs)
    at_outputs = output_gradients(losses(detached), detached)
    assert at_outputs["task"][1] is None
    assert at_outputs["feature"][0] is None
    components = component_gradients(outputs, at_outputs, net.parameters())
    for name, grads in components.items():
        assert_same(grads, reference(net, x, name))
    assert components["task"][4] is None
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        outputs[0].sum().backward()


def test_merged_bucket_is_the_sum(setup):
    net, x = setup
    outputs = net(x)
    detached = leaves(outputs)
    buckets = {"task+feature": ("task", "feature"), "relation": ("relation",), "weight_decay": ("weight_decay",)}
    at_outputs = merge(output_gradients(losses(detached), detached), buckets)
    assert list(at_outputs) == ["task+feature", "relation"]
    components = component_gradients(outputs, at_outputs, net.parameters())
    both = [reference(net, x, name) for name in ("task", "feature")]
    assert_same(components["task+feature"], sum_gradients(both))
    assert_same(components["relation"], reference(net, x, "relation"))


def test_merge_rejects_components_without_bucket():
    with pytest.raises(ValueError, match=r"\['relation'\] belong to no bucket of \['task'\]"):
        merge({"task": [None], "relation": [None]}, {"task": ("task",)})


def test_entries_without_gradient_and_frozen_parameters(setup):
    net, x = setup
    net.trunk.bias.requires_grad_(False)
    outputs = net(x)
    grad = torch.ones_like(outputs[0])
    components = component_gradients(
        outputs, {"a": [None, None], "b": [grad, None], "c": [None, None]}, net.parameters()
    )
    assert components["a"] == components["c"] == [None] * 6
    assert [g is None for g in components["b"]] == [False, True, False, False, True, True]


def test_output_gradients_rejects_bad_components():
    leaf = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"'task' must have shape \(N,\) or \(\), got \(3, 2\)"):
        output_gradients({"task": leaf}, [leaf])
    with pytest.raises(ValueError, match="'task' carries no gradient"):
        output_gradients({"task": leaf.detach().sum(1)}, [leaf])


def test_sum_gradients_counts_none_as_zero():
    a, b = torch.randn(2), torch.randn(3)
    total = sum_gradients([[a, None, None, a], [None, b, None, a], [None, b, None, a]])
    assert_same(total, [a, 2 * b, None, 3 * a], 1e-6)


def test_accumulated_halves_are_the_whole(setup):
    net, x = setup
    sums = {}
    for half in x.chunk(2):
        accumulate(sums, {name: reference(net, half, name) for name in ("task", "feature")}, 0.5)
    for name in ("task", "feature"):
        assert_same(sums[name], reference(net, x, name))


def test_accumulate_does_not_keep_or_change_its_input():
    grad = torch.ones(2)
    sums = {}
    for _ in range(2):
        accumulate(sums, {"task": [None, grad]}, 1.0)
    assert torch.equal(grad, torch.ones(2))
    assert sums["task"][0] is None
    assert torch.equal(sums["task"][1], torch.full((2,), 2.0))


@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_clipping_equals_clipping_the_sum(setup, max_norm):
    net, x = setup
    components = {name: list(reference(net, x, name)) for name in ("task", "relation", "feature")}
    sum(value.mean() for value in losses(net(x)).values()).backward()
    expected = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    norm = clip_components(components, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    assert_same(sum_gradients(list(components.values())), [p.grad for p in net.parameters()])


def test_clip_rejects_nonpositive_norm():
    with pytest.raises(ValueError, match="max_norm must be > 0, got 0"):
        clip_components({"task": [torch.ones(2)]}, 0)


def test_component_norms():
    norms = component_norms({"task": [torch.tensor([3.0]), None, torch.tensor([[4.0]])], "none": [None]})
    assert norms["task"] == 5
    assert norms["none"] == 0


def test_single_process_collectives_are_identities():
    grad = torch.ones(2)
    assert all_reduce_mean({"task": [grad, None]})["task"][0] is grad
    norm = nn.BatchNorm1d(2)
    norm.running_mean.copy_(grad)
    average_batchnorm_buffers(norm)
    assert torch.equal(norm.running_mean, grad)


def test_component_cosines():
    components = {
        "b": [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]]), None],
        "a": [torch.tensor([3.0, 4.0]), None, torch.tensor([12.0])],
        "zero": [torch.zeros(2), None, None],
    }
    cosines = component_cosines(components)
    assert set(cosines) == {("a", "b"), ("a", "zero"), ("b", "zero")}
    assert cosines["a", "b"].item() == pytest.approx(3 / (13 * 5**0.5))
    assert cosines["a", "zero"].item() == cosines["b", "zero"].item() == 0
