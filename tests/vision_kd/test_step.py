"""distillation_step against plain autograd of the total loss, in float64."""

import pytest
import torch
from torch import nn

from kd_common.registry import subclasses
from vision_kd.methods import Method
from vision_kd.methods.crld import CRLD
from vision_kd.methods.kd import KD
from vision_kd.methods.mlkd import MLKD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.policies import DOT, SGD, DeepKD
from vision_kd.training.step import distillation_step, teacher_logits

N, C = 4, 6
POLICIES = [SGD(), DOT(), DeepKD(), DeepKD(preset="released")]


def network(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, C)]
    return nn.Sequential(*body).to(dtype)


@pytest.fixture
def student():
    return network(1)


@pytest.fixture
def teacher():
    return network(2).eval().requires_grad_(False)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    views = {v: torch.rand(N, 2, 6, 6, generator=generator, dtype=torch.float64) for v in ("weak", "strong")}
    return views, torch.randint(C, (N,), generator=generator)


def sum_of(gradients):
    """Sum over components, a missing gradient counting as zero."""
    return [sum(g for g in column if g is not None) for column in zip(*gradients.values(), strict=True)]


def assert_all_close(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def plain_gradients(student, teacher, method, views, target, params, **settings):
    """Gradient of the mean over samples of the summed components, by one backward pass of autograd."""
    logits = {v: student(views[v]) for v in method.views}
    with torch.no_grad():
        soft = {v: teacher(views[v]) for v in method.views}
    total = sum(method(logits, soft, target, **settings).values()).mean()
    return torch.autograd.grad(total, params)


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
def test_components_sum_to_the_gradient_of_the_total_loss(cls, student, teacher, batch):
    views, target = batch
    params = list(student.parameters())
    settings = {"epoch": 7.0, "k": None if cls is Vanilla else 3}
    step = distillation_step(student, teacher, cls(), views, target, params, **settings)
    assert tuple(step.gradients) == cls.components
    expected = plain_gradients(student, teacher, cls(), views, target, params, **settings)
    assert_all_close(sum_of(step.gradients), expected)


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
def test_each_component_has_its_own_gradient(cls, student, teacher, batch):
    views, target = batch
    params = list(student.parameters())
    method = cls()
    step = distillation_step(student, teacher, method, views, target, params, epoch=7.0)
    for name in cls.components:
        logits = {v: student(views[v]) for v in cls.views}
        part = method(logits, teacher_logits(teacher, views, cls.views), target, epoch=7.0)[name]
        assert_all_close(step.gradients[name], torch.autograd.grad(part.mean(), params))
        torch.testing.assert_close(step.components[name], part.mean().detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=["sgd", "dot", "deepkd", "released"])
@pytest.mark.parametrize("method", [KD(), MLKD()], ids=["KD", "MLKD"])
def test_a_bucket_is_the_sum_of_its_components(method, policy, student, teacher, batch):
    views, target = batch
    params = list(student.parameters())
    buckets = policy.optimizer(student, method.components, lr=0.1, momentum=0.9, weight_decay=5e-4).buckets
    apart = distillation_step(student, teacher, method, views, target, params).gradients
    merged = distillation_step(student, teacher, method, views, target, params, buckets=buckets).gradients
    for bucket, gradients in merged.items():
        members = {name: apart[name] for name in buckets[bucket]}
        assert_all_close(gradients, sum_of(members))
    assert {name for bucket in merged for name in buckets[bucket]} == set(method.components)


def test_passes_through_the_network_are_as_many_as_buckets(student, teacher, batch):
    views, target = batch
    params = list(student.parameters())
    passes = []
    student[4].register_full_backward_hook(lambda *_: passes.append(1))
    counts = {}
    for name, policy in [("sgd", SGD()), ("dot", DOT()), ("paper", DeepKD()), ("released", DeepKD(preset="released"))]:
        passes.clear()
        buckets = policy.optimizer(student, KD.components, lr=0.1, momentum=0.9, weight_decay=5e-4).buckets
        distillation_step(student, teacher, KD(), views, target, params, buckets=buckets)
        counts[name] = len(passes)
    assert counts == {"sgd": 1, "dot": 2, "paper": 2, "released": 3}


def test_both_views_reach_the_student_and_one_view_methods_ignore_the_second(student, teacher, batch):
    views, target = batch
    params = list(student.parameters())
    changed = {**views, "strong": 1 - views["strong"]}
    for method, depends in [(KD(), False), (CRLD(weak_threshold=0.0, strong_threshold=0.0), True), (MLKD(), True)]:
        plain, other = (distillation_step(student, teacher, method, v, target, params) for v in (views, changed))
        assert set(plain.outputs) == set(method.views)
        for name in method.components:
            same = all(torch.equal(a, b) for a, b in zip(plain.gradients[name], other.gradients[name], strict=True))
            assert same != depends, (type(method).__name__, name)


def test_the_teacher_and_grad_fields_are_left_alone(student, teacher, batch):
    views, target = batch
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    step = distillation_step(student, teacher, KD(), views, target, list(student.parameters()))
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    tensors = [*step.components.values(), *step.outputs.values(), *(g for gs in step.gradients.values() for g in gs)]
    assert not any(t.requires_grad for t in tensors)


def test_vanilla_runs_without_teacher(student, batch):
    views, target = batch
    params = list(student.parameters())
    step = distillation_step(student, None, Vanilla(), views, target, params)
    loss = nn.functional.cross_entropy(student(views["weak"]), target)
    assert_all_close(step.gradients["task"], torch.autograd.grad(loss, params))


def test_float64_is_not_rounded_on_the_way(student, teacher, batch):
    views, target = batch
    step = distillation_step(student, teacher, KD(), views, target, list(student.parameters()))
    assert {z.dtype for z in step.outputs.values()} == {torch.float64}
    assert teacher_logits(teacher, views, ["weak"])["weak"].dtype == torch.float64


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
def test_bf16_autocast_keeps_losses_and_gradients_in_fp32(cls, batch):
    student, teacher = network(1, torch.float32), network(2, torch.float32).eval()
    views, target = {v: x.float() for v, x in batch[0].items()}, batch[1]
    params = list(student.parameters())
    exact = distillation_step(student, teacher, cls(), views, target, params, epoch=7.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert student(views["weak"]).dtype == torch.bfloat16
        step = distillation_step(student, teacher, cls(), views, target, params, epoch=7.0)
        assert torch.is_autocast_enabled("cpu")
    assert {z.dtype for z in step.outputs.values()} == {torch.float32}
    assert {value.dtype for value in step.components.values()} == {torch.float32}
    assert {g.dtype for gs in step.gradients.values() for g in gs} == {torch.float32}
    for name in cls.components:
        rounded, reference = (torch.cat([g.flatten() for g in s.gradients[name]]) for s in (step, exact))
        torch.testing.assert_close(rounded, reference, rtol=0, atol=0.05 * reference.norm().item())


class Scaled(nn.Module):
    """Pixels times weights as logits: nothing that autocast would round."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images):
        return images.flatten(1)[:, :C] * self.weight


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
def test_losses_are_computed_outside_autocast(cls, batch):
    student, teacher = Scaled(1), Scaled(2)
    views, target = {v: 5 * x.float() for v, x in batch[0].items()}, batch[1]
    logits, soft = ({v: net(views[v]) for v in cls.views} for net in (student, teacher))
    expected = cls()(logits, {v: z.detach() for v, z in soft.items()}, target, epoch=7.0)
    with torch.autocast("cpu", torch.bfloat16):
        step = distillation_step(student, teacher, cls(), views, target, [student.weight], epoch=7.0)
    for name, part in expected.items():
        assert torch.equal(step.components[name], part.mean()), name
        (gradient,) = torch.autograd.grad(part.mean(), student.weight, retain_graph=True)
        torch.testing.assert_close(step.gradients[name][0], gradient, rtol=1e-5, atol=1e-7)
