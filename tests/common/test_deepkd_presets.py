"""DeepKD's presets: the paper's rule, and the published optimizer written down in straight lines."""

import pytest
import torch
from torch import nn

from kd_common.optim import deepkd_adamw, deepkd_momenta, deepkd_sgd

NAMES = ("task", "target", "nontarget")


def random_components(step, names=NAMES, shape=(3, 2)):
    generator = torch.Generator().manual_seed(step)
    return {name: [torch.randn(shape, generator=generator, dtype=torch.float64)] for name in names}


def parameter():
    return nn.Parameter(torch.arange(6, dtype=torch.float64).reshape(3, 2) / 3 - 1)


def test_momenta():
    assert deepkd_momenta() == pytest.approx({"task": 0.975, "target": 0.825, "nontarget": 0.975})
    delta = {"task": 0.01, "target": 0.02, "nontarget": 0.03}
    assert deepkd_momenta(0.9, delta) == pytest.approx({"task": 0.91, "target": 0.88, "nontarget": 0.93})
    released = deepkd_momenta(0.9, delta, "released")
    assert released == pytest.approx({"task": 0.88, "target": 0.88, "nontarget": 0.93})


def test_released_is_the_published_optimizer():
    lr, decay = 0.1, 5e-2
    param = parameter()
    optimizer = deepkd_sgd([param], preset="released", lr=lr, weight_decay=decay)
    w = param.detach().clone()
    tog = tcg = ncg = torch.zeros_like(w)
    for step in range(8):
        grads = random_components(step)
        optimizer.step(components=grads)
        tog = 0.825 * tog + grads["task"][0]  # the target's momentum, not 0.975
        w = w - lr * tog
        ncg = 0.975 * ncg + grads["nontarget"][0]
        w = w - lr * ncg
        tcg = 0.825 * tcg + (grads["target"][0] + decay * w)  # w has moved already
        w = w - lr * tcg
    torch.testing.assert_close(param.detach(), w, rtol=0, atol=1e-12)
    assert list(optimizer.buckets) == list(NAMES)


def test_paper_rule():
    lr, decay = 0.1, 5e-2
    param = parameter()
    optimizer = deepkd_sgd([param], lr=lr, weight_decay=decay)
    assert list(optimizer.buckets) == ["task+nontarget", "target", "weight_decay"]
    w = param.detach().clone()
    momenta = {"task": 0.975, "target": 0.825, "nontarget": 0.975, "weight_decay": 0.9}
    v = {name: torch.zeros_like(w) for name in momenta}
    for step in range(8):
        grads = {name: g[0] for name, g in random_components(step).items()}
        optimizer.step(components={name: [g] for name, g in grads.items()})
        grads["weight_decay"] = decay * w
        v = {name: m * v[name] + grads[name] for name, m in momenta.items()}
        w = w - lr * sum(v.values())
    torch.testing.assert_close(param.detach(), w, rtol=0, atol=1e-12)


def test_paper_decay_is_that_of_the_sgd_baseline():
    ours, theirs = parameter(), parameter()
    optimizer = deepkd_sgd([ours], lr=0.1, weight_decay=0.05)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.05)
    theirs.grad = torch.zeros_like(theirs)
    for _ in range(20):
        optimizer.step(components={name: [torch.zeros(3, 2, dtype=torch.float64)] for name in NAMES})
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_zero_delta_is_torch_sgd():
    ours, theirs = parameter(), parameter()
    optimizer = deepkd_sgd([ours], lr=0.1, delta=0.0, weight_decay=0.05)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.05)
    assert list(optimizer.buckets) == ["task+target+nontarget+weight_decay"]
    for step in range(5):
        grads = random_components(step)
        theirs.grad = sum(g[0] for g in grads.values())
        optimizer.step(components=grads if step % 2 else {"task+target+nontarget+weight_decay": [theirs.grad]})
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_components_aliases_and_decay_component():
    optimizer = deepkd_sgd(
        [parameter()], lr=0.1, components=("task", "target"), aliases={"relation": "target"}, decay_component="task"
    )
    assert optimizer.buckets == {"task": ("task",), "target+relation": ("target", "relation")}
    optimizer.step(components=random_components(0, ("task", "target", "relation")))
    assert optimizer.param_groups[0]["decay_component"] == "task"


def test_adamw_takes_the_paper_rule():
    optimizer = deepkd_adamw([parameter()], lr=0.1, delta=0.05, aliases={"relation": "task"})
    expected = {"task": 0.95, "target": 0.85, "nontarget": 0.95, "relation": 0.95}
    assert optimizer.param_groups[0]["beta1s"] == pytest.approx(expected)
    assert list(optimizer.buckets) == ["task+nontarget+relation", "target"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_momentum": 0.95}, r"momentum of 'task' is 1.025, outside \[0, 1\)"),
        ({"base_momentum": 0.05}, "momentum of 'target' is -0.025"),
        ({"delta": {"task": 0.1}}, "delta must name exactly"),
        ({"preset": "other"}, "preset must be one of paper, released, got 'other'"),
        ({"preset": "released", "decay_component": "task"}, "'released' decays within 'target'"),
        ({"preset": "released", "components": ("task",)}, "decay_component 'target' has no momentum"),
        ({"components": ("task", "relation")}, r"unknown components \['relation'\]"),
        ({"aliases": {"relation": "feature"}}, r"unknown components \['feature'\]"),
        ({"aliases": {"weight_decay": "task"}}, r"aliases \['weight_decay'\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        deepkd_sgd([parameter()], **({"lr": 0.1} | settings))
