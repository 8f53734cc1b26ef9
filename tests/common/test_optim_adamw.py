"""DecoupledAdamW against torch.optim.AdamW and a plain recursion."""

import copy

import pytest
import torch
from torch import nn

from kd_common.optim import DecoupledAdamW, decay_groups

SHAPES = [(3, 4), (4,), (2, 3)]
BETA1S = {"task": 0.975, "target": 0.825, "nontarget": 0.975}


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


def random_components(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for n in BETA1S}


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def test_equal_beta1s_are_torch_adamw():
    ours, theirs = parameters(), parameters()
    groups = [[slice(0, 1), {"lr": 0.1}], [slice(1, 3), {"lr": 0.02, "weight_decay": 0.0}]]
    optimizer = DecoupledAdamW(
        [{"params": ours[s], **kw} for s, kw in groups], 0.3, dict.fromkeys(BETA1S, 0.9), 0.99, 1e-6, 0.05
    )
    reference = torch.optim.AdamW(
        [{"params": theirs[s], **kw} for s, kw in groups], 0.3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05
    )
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1) for o in (optimizer, reference)]
    for step in range(6):
        components = random_components(step)
        if step == 3:
            components = {name: [None, *grads[1:]] for name, grads in components.items()}
        for i, param in enumerate(theirs):
            param.grad = None if step == 3 and i == 0 else sum(grads[i] for grads in components.values())
        optimizer.step(components=components)
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert_same(ours, theirs)


def test_straight_line_recursion_with_own_bias_corrections():
    params = parameters()
    lr, beta2, eps, decay = 0.1, 0.99, 1e-8, 0.05
    optimizer = DecoupledAdamW(params, lr, BETA1S, beta2, eps, decay)
    assert list(optimizer.buckets) == ["task+nontarget", "target"]
    theta = [p.detach().clone() for p in params]
    mean = {c: [torch.zeros_like(t) for t in theta] for c in BETA1S}
    count = {c: [0] * len(theta) for c in BETA1S}
    square = [torch.zeros_like(t) for t in theta]
    for step in range(5):
        components = random_components(step)
        if step < 2:
            components["target"][1] = None
        optimizer.step(components=components)
        for i, value in enumerate(theta):
            given = {c: g[i] for c, g in components.items() if g[i] is not None}
            square[i] = beta2 * square[i] + (1 - beta2) * sum(given.values()) ** 2
            scale = (square[i] / (1 - beta2 ** (step + 1))).sqrt() + eps
            moved = value * (1 - lr * decay)
            for c, g in given.items():
                count[c][i] += 1
                mean[c][i] = BETA1S[c] * mean[c][i] + (1 - BETA1S[c]) * g
                moved = moved - lr * mean[c][i] / (1 - BETA1S[c] ** count[c][i]) / scale
            theta[i] = moved
    assert_same(params, theta)


def test_resume_is_bitwise(tmp_path):
    whole = parameters()
    optimizer = DecoupledAdamW(whole, 0.1, BETA1S)
    for step in range(3):
        optimizer.step(components=random_components(step))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    parts = copy.deepcopy(whole)
    resumed = DecoupledAdamW(parts, 0.7, dict.fromkeys(BETA1S, 0.5))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        optimizer.step(components=random_components(step))
        resumed.step(components=random_components(step))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_bad_gradients_change_nothing():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = DecoupledAdamW(params, 0.1, BETA1S)
    with pytest.raises(ValueError, match=r"\['target'\] have no gradient"):
        optimizer.step(components={k: v for k, v in random_components().items() if k != "target"})
    assert_same(params, before, 0.0)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta1s": {"task": 1.0}}, r"beta1s\['task'\] must lie in \[0, 1\)"),
        ({"beta2": 1.0}, "beta2 must lie in"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"params": [{"params": parameters(), "beta1s": BETA1S}]}, r"brings \['beta1s'\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoupledAdamW(**({"params": parameters(), "lr": 0.1, "beta1s": BETA1S} | settings))


def test_decay_groups():
    """Matrices decay, everything else does not; no group is empty."""
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, others = decay_groups(net.parameters(), 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert [tuple(p.shape) for p in others["params"]] == [(2,), (2,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decay_groups(net[1].parameters(), 0.1)) == 1
