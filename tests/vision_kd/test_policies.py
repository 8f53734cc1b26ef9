"""Gradient policies: momenta, buckets, decay and groups of the optimizers they build."""

import pytest
import torch
from torch import nn

from kd_common.optim import DecoupledAdamW, DecoupledSGD
from kd_common.registry import subclasses
from vision_kd.methods import Method
from vision_kd.policies import DOT, SGD, AdamW, DeepKD, DeepKDAdamW, GradientPolicy

PARTS = ("task", "target", "nontarget")
WITH_RELATION = (*PARTS, "relation")
DECOUPLING = [DOT(), DeepKD(), DeepKD(preset="released"), DeepKDAdamW()]
ALL = [SGD(), AdamW(), *DECOUPLING]


def student():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def optimizer_of(policy, components=PARTS, *, network=None, lr=0.1, momentum=0.9, weight_decay=5e-4):
    return policy.optimizer(network or student(), components, lr=lr, momentum=momentum, weight_decay=weight_decay)


def coefficients(optimizer):
    group = optimizer.param_groups[0]
    return pytest.approx(group["momenta" if isinstance(optimizer, DecoupledSGD) else "beta1s"])


MU, LOW, HIGH = 0.9, 0.825, 0.975


@pytest.mark.parametrize(
    ("policy", "momenta", "passes"),
    [
        (SGD(), {"task": MU, "target": MU, "nontarget": MU}, 1),
        (DOT(), {"task": LOW, "target": HIGH, "nontarget": HIGH, "weight_decay": MU}, 2),
        (DeepKD(), {"task": HIGH, "target": LOW, "nontarget": HIGH, "weight_decay": MU}, 2),
        (DeepKD(preset="released"), {"task": LOW, "target": LOW, "nontarget": HIGH}, 3),
        (AdamW(), {"task": MU, "target": MU, "nontarget": MU}, 1),
        (DeepKDAdamW(), {"task": HIGH, "target": LOW, "nontarget": HIGH}, 2),
    ],
)
@pytest.mark.parametrize("components", [PARTS, WITH_RELATION], ids=["parts", "relation"])
def test_momenta_and_backward_passes(policy, momenta, passes, components):
    optimizer = optimizer_of(policy, components)
    if "relation" in components:
        momenta = momenta | {"relation": momenta["nontarget"]}
    assert momenta == coefficients(optimizer)
    assert optimizer.gradient_components == set(components)
    with_gradient = [members for members in optimizer.buckets.values() if set(members) - {"weight_decay"}]
    assert len(with_gradient) == passes, "the relation moves with the non-target bucket, at no further pass"


@pytest.mark.parametrize(
    ("policy", "decays", "last"),
    [
        (SGD(), "task", False),
        (DOT(), "weight_decay", False),
        (DeepKD(), "weight_decay", False),
        (DeepKD(decay_component="nontarget"), "nontarget", False),
        (DeepKD(preset="released"), "target", True),
    ],
)
def test_weight_decay_belongs_to_one_component(policy, decays, last):
    group = optimizer_of(policy, weight_decay=0.01).param_groups[0]
    assert (group["decay_component"], group["decay_last"], group["weight_decay"]) == (decays, last, 0.01)


def test_a_decay_component_replaces_the_decays_own_momentum():
    assert "weight_decay" not in optimizer_of(DeepKD(decay_component="task")).param_groups[0]["momenta"]


def test_delta_is_a_number_or_one_for_each_part():
    assert coefficients(optimizer_of(DOT(delta=0.05))) == {
        "task": 0.85,
        "target": 0.95,
        "nontarget": 0.95,
        "weight_decay": 0.9,
    }
    apart = {"task": 0.02, "target": 0.03, "nontarget": 0.05}
    assert coefficients(optimizer_of(DeepKD(delta=apart))) == {
        "task": 0.92,
        "target": 0.87,
        "nontarget": 0.95,
        "weight_decay": 0.9,
    }
    assert coefficients(optimizer_of(DeepKDAdamW(delta=apart))) == {"task": 0.92, "target": 0.87, "nontarget": 0.95}


@pytest.mark.parametrize("policy", [DOT(0.0), DeepKD(0.0)])
def test_delta_zero_is_sgd_in_one_backward_pass(policy):
    optimizer = optimizer_of(policy, WITH_RELATION)
    assert len(optimizer.buckets) == 1
    assert set(optimizer.param_groups[0]["momenta"].values()) == {0.9}


@pytest.mark.parametrize("policy", DECOUPLING, ids=lambda p: type(p).__name__)
def test_a_decoupling_policy_needs_the_parts_it_treats_apart(policy):
    with pytest.raises(ValueError, match=rf"{type(policy).__name__}.*target, nontarget apart.*it has: task.*SGD"):
        optimizer_of(policy, ("task",))
    with pytest.raises(ValueError, match="nontarget apart"):
        optimizer_of(policy, ("task", "target"))


@pytest.mark.parametrize("policy", DECOUPLING, ids=lambda p: type(p).__name__)
def test_a_component_without_a_momentum_is_an_error(policy):
    with pytest.raises(ValueError, match=r"\['texture'\] have no momentum.*ALIASES"):
        optimizer_of(policy, (*PARTS, "texture"))


@pytest.mark.parametrize("policy", [DOT(0.2), DeepKD(0.2), DeepKDAdamW(0.2)], ids=lambda p: type(p).__name__)
def test_a_momentum_outside_its_range_is_an_error(policy):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        optimizer_of(policy)


def test_every_policy_takes_every_method_but_vanilla_which_needs_one_momentum():
    assert {type(p) for p in ALL} == set(subclasses(GradientPolicy).values())
    for cls in subclasses(Method).values():
        for policy in ALL:
            if cls.components == ("task",) and policy in DECOUPLING:
                with pytest.raises(ValueError, match=r"model\.policy"):
                    optimizer_of(policy, cls.components)
            else:
                assert optimizer_of(policy, cls.components).gradient_components == set(cls.components)


@pytest.mark.parametrize("policy", [AdamW(0.95), DeepKDAdamW(beta2=0.95)])
def test_adamw_spares_biases_and_normalisation_weights(policy):
    network = student()
    optimizer = optimizer_of(policy, network=network, lr=0.01, weight_decay=0.05)
    assert isinstance(optimizer, DecoupledAdamW)
    decayed, spared = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[3].weight)}
    others = [network[0].bias, network[1].weight, network[1].bias, network[3].bias]
    assert {id(p) for p in spared["params"]} == {id(p) for p in others}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}
    assert {g["beta2"] for g in optimizer.param_groups} == {0.95}


@pytest.mark.parametrize("policy", [SGD(), DOT(), DeepKD(), DeepKD(preset="released")])
def test_sgd_policies_decay_every_parameter(policy):
    network = student()
    (group,) = optimizer_of(policy, network=network).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


def test_adamw_works_when_all_parameters_have_two_axes():
    network = nn.Linear(3, 2, bias=False)
    assert len(optimizer_of(AdamW(), network=network).param_groups) == 1


# ---------------------------------------------------------------- two steps by hand

LR, WD, THETA = 0.1, 0.01, 2.0
FIRST = {"task": 0.5, "target": -0.25, "nontarget": 1.0}
SECOND = {"task": -0.125, "target": 0.75, "nontarget": 0.5}


def two_steps(policy):
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, THETA)
    optimizer = optimizer_of(policy, network=network, lr=LR, weight_decay=WD)
    for gradients in (FIRST, SECOND):
        optimizer.step(components={name: [torch.full((1, 1), g, dtype=torch.float64)] for name, g in gradients.items()})
    return network.weight.item()


def test_two_steps_of_deepkd_paper_by_hand():
    """v_task = .975 v + g, v_target = .825 v + g, v_nontarget = .975 v + g, v_decay = .9 v + wd theta."""
    theta = THETA - LR * (0.5 - 0.25 + 1.0 + WD * THETA)
    assert theta == pytest.approx(1.873, abs=1e-15)
    task = 0.975 * 0.5 - 0.125
    target = 0.825 * -0.25 + 0.75
    nontarget = 0.975 * 1.0 + 0.5
    decay = 0.9 * WD * THETA + WD * theta
    assert two_steps(DeepKD()) == pytest.approx(theta - LR * (task + target + nontarget + decay), abs=1e-15)


def test_two_steps_of_dot_by_hand():
    theta = THETA - LR * (0.5 - 0.25 + 1.0 + WD * THETA)
    task = 0.825 * 0.5 - 0.125
    distillation = 0.975 * (-0.25 + 1.0) + 0.75 + 0.5
    decay = 0.9 * WD * THETA + WD * theta
    assert two_steps(DOT()) == pytest.approx(theta - LR * (task + distillation + decay), abs=1e-15)


def test_two_steps_of_sgd_by_hand():
    theta = THETA - LR * (1.25 + WD * THETA)
    velocity = 0.9 * (1.25 + WD * THETA) + (1.125 + WD * theta)
    assert two_steps(SGD()) == pytest.approx(theta - LR * velocity, abs=1e-15)


def test_two_steps_of_the_released_deepkd_by_hand():
    """Task at the target's momentum; the decay reads the parameters that task and non-target have moved."""
    v_target = -0.25 + WD * (THETA - LR * 1.5)
    theta = THETA - LR * (1.5 + v_target)
    task, nontarget = 0.825 * 0.5 - 0.125, 0.975 * 1.0 + 0.5
    v_target = 0.825 * v_target + 0.75 + WD * (theta - LR * (task + nontarget))
    expected = theta - LR * (task + nontarget + v_target)
    assert two_steps(DeepKD(preset="released")) == pytest.approx(expected, abs=1e-15)


def test_adamw_spares_what_a_timm_network_lists():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
            self.head = nn.Linear(8, 3)

        def no_weight_decay(self):
            return {"pos_embed"}

    network = nn.Sequential(Transformer())
    decayed, spared = AdamW().optimizer(network, PARTS, lr=0.1, momentum=0.9, weight_decay=0.05).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 8)]
    assert {tuple(p.shape) for p in spared["params"]} == {(1, 4, 8), (3,)}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
