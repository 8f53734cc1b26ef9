"""DecoupledSGD against torch.optim.SGD and plain recursions; the contract of ComponentOptimizer.step."""

import copy

import pytest
import torch
from torch import nn

from kd_common.grads import component_gradients, merge, output_gradients
from kd_common.optim import DecoupledSGD

SHAPES = [(3, 4), (4,), (2, 3)]
MOMENTA = {"task": 0.975, "target": 0.825, "nontarget": 0.975}


def parameters(shapes=SHAPES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def random_components(names, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for n in names}


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.9}])
def test_equal_momenta_are_torch_sgd(extra):
    ours, theirs = parameters(), parameters()
    momenta = dict.fromkeys(MOMENTA, 0.9) | extra
    decay = "weight_decay" if extra else "target"
    groups = [[slice(0, 1), {"lr": 0.1}], [slice(1, 3), {"lr": 0.02, "weight_decay": 0.0}]]
    optimizer = DecoupledSGD(
        [{"params": ours[s], **kw} for s, kw in groups], 0.3, momenta, weight_decay=0.05, decay_component=decay
    )
    reference = torch.optim.SGD([{"params": theirs[s], **kw} for s, kw in groups], 0.3, momentum=0.9, weight_decay=0.05)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1) for o in (optimizer, reference)]
    assert len(optimizer.buckets) == 1
    for step in range(6):
        components = random_components(MOMENTA, seed=step)
        for i, param in enumerate(theirs):
            param.grad = sum(grads[i] for grads in components.values())
        optimizer.step(components=components)
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert_same(ours, theirs)


@pytest.mark.parametrize("decay_last", [False, True])
@pytest.mark.parametrize("decay_component", ["task", "target", "weight_decay"])
def test_straight_line_recursion(decay_component, decay_last):
    momenta = MOMENTA | ({"weight_decay": 0.9} if decay_component == "weight_decay" else {})
    lr, decay = 0.1, 0.05
    params = parameters()
    optimizer = DecoupledSGD(
        params, lr, momenta, weight_decay=decay, decay_component=decay_component, decay_last=decay_last
    )
    theta = [p.detach().clone() for p in params]
    velocity = {c: [torch.zeros_like(t) for t in theta] for c in momenta}
    for step in range(5):
        components = random_components(MOMENTA, seed=step)
        optimizer.step(components=components)
        for i, value in enumerate(theta):
            gradient = {c: components[c][i] if c in components else torch.zeros_like(value) for c in momenta}
            for c in momenta:
                if c != decay_component:
                    velocity[c][i] = momenta[c] * velocity[c][i] + gradient[c]
            others = sum(velocity[c][i] for c in momenta if c != decay_component)
            read = value - lr * others if decay_last else value
            velocity[decay_component][i] = (
                momenta[decay_component] * velocity[decay_component][i] + gradient[decay_component] + decay * read
            )
            theta[i] = value - lr * others - lr * velocity[decay_component][i]
    assert_same(params, theta)


def test_buckets_share_one_buffer():
    params = parameters()
    optimizer = DecoupledSGD(params, 0.1, MOMENTA | {"weight_decay": 0.9}, 1e-4, decay_component="weight_decay")
    assert optimizer.buckets == {
        "task+nontarget": ("task", "nontarget"),
        "target": ("target",),
        "weight_decay": ("weight_decay",),
    }
    optimizer.step(components=random_components(MOMENTA))
    assert {len(state) for state in optimizer.state.values()} == {3}
    last = DecoupledSGD(parameters(), 0.1, MOMENTA, decay_component="task", decay_last=True)
    assert list(last.buckets) == ["task", "target", "nontarget"]


def test_first_step_has_no_dampening():
    params = parameters([(2,)])
    before = params[0].detach().clone()
    gradient = torch.tensor([1.0, -2.0], dtype=torch.float64)
    DecoupledSGD(params, 0.5, {"task": 0.9}).step(components={"task": [gradient]})
    assert_same(params, [before - 0.5 * gradient])


def test_bucket_names_and_component_names_agree():
    by_name, by_bucket = parameters(), parameters()
    first, second = DecoupledSGD(by_name, 0.1, MOMENTA), DecoupledSGD(by_bucket, 0.1, MOMENTA)
    for step in range(3):
        components = random_components(MOMENTA, seed=step)
        first.step(components=components)
        second.step(components={b: list(g) for b, g in merge(components, second.buckets).items()})
    assert_same(by_name, by_bucket, 0.0)


def test_none_leaves_buffer_and_parameter_alone():
    params = parameters()
    momenta = MOMENTA | {"weight_decay": 0.9}
    optimizer = DecoupledSGD(params, 0.1, momenta, 0.05, decay_component="weight_decay")
    optimizer.step(components=random_components(MOMENTA))
    before = [p.detach().clone() for p in params]
    buffers = [dict(copy.deepcopy(optimizer.state[p])) for p in params]
    components = {name: [None, *grads[1:]] for name, grads in random_components(MOMENTA, seed=1).items()}
    components["target"][1] = None
    optimizer.step(components=components)

    assert torch.equal(params[0], before[0]), "no component: neither gradient nor weight decay"
    for key, value in buffers[0].items():
        assert torch.equal(optimizer.state[params[0]][key], value)
    assert torch.equal(optimizer.state[params[1]]["momentum_buffer.target"], buffers[1]["momentum_buffer.target"])
    fast = 0.975 * buffers[1]["momentum_buffer.task+nontarget"] + components["task"][1] + components["nontarget"][1]
    decay = 0.9 * buffers[1]["momentum_buffer.weight_decay"] + 0.05 * before[1]
    assert_same([params[1]], [before[1] - 0.1 * (fast + decay)])


def test_decay_acts_where_its_own_component_has_no_gradient():
    params = parameters([(2,)])
    before = params[0].detach().clone()
    optimizer = DecoupledSGD(params, 0.1, {"task": 0.9, "target": 0.8}, 0.05, decay_component="task")
    optimizer.step(components={"task": [None], "target": [torch.ones(2, dtype=torch.float64)]})
    assert_same(params, [before - 0.1 * (1 + 0.05 * before)])


@pytest.mark.parametrize("built_with", [MOMENTA, {"task": 0.1, "target": 0.2, "nontarget": 0.3}])
def test_resume_is_bitwise(built_with, tmp_path):
    momenta = MOMENTA | {"weight_decay": 0.9}

    def build(params, momenta):
        return DecoupledSGD(
            [{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], 0.1, momenta, 0.05,
            decay_component="weight_decay",
        )  # fmt: skip

    whole = parameters()
    optimizer = build(whole, momenta)
    for step in range(3):
        optimizer.step(components=random_components(MOMENTA, seed=step))
    torch.save({"params": [p.detach() for p in whole], "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for step in range(3, 6):
        optimizer.step(components=random_components(MOMENTA, seed=step))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    parts = [nn.Parameter(p) for p in saved["params"]]
    resumed = build(parts, built_with | {"weight_decay": 0.4})  # the loaded state decides
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.buckets == optimizer.buckets
    for step in range(3, 6):
        resumed.step(components=random_components(MOMENTA, seed=step))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_closure_runs_once_with_gradients_on():
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 7.0

    optimizer = DecoupledSGD(parameters(), 0.1, MOMENTA)
    assert optimizer.step(closure, components=random_components(MOMENTA)) == 7.0
    assert calls == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("nontarget"), r"\['nontarget'\] have no gradient"),
        (lambda c: c.update(relation=c["task"]), r"unknown components \['relation'\].*task"),
        (lambda c: c.update(weight_decay=c["task"]), r"unknown components \['weight_decay'\]"),
        (lambda c: c.update({"task+nontarget": c["task"]}), r"\['nontarget', 'task'\] are given twice"),
        (lambda c: c.update(target=c["target"][:-1]), "'target' has 2 gradients, expected one per parameter: 3"),
        (
            lambda c: c["target"].__setitem__(2, torch.zeros(3, 2)),
            r"'target': gradient 2 .*\(3, 2\), expected \(2, 3\)",
        ),
    ],
)
def test_bad_gradients_change_nothing(change, message):
    params = parameters()
    optimizer = DecoupledSGD(params, 0.1, MOMENTA | {"weight_decay": 0.9}, 0.1, decay_component="weight_decay")
    optimizer.step(components=random_components(MOMENTA))
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    components = random_components(MOMENTA, seed=1)
    change(components)
    with pytest.raises(ValueError, match=message):
        optimizer.step(components=components)
    assert_same(params, before, 0.0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_changed_buckets_are_an_error():
    optimizer = DecoupledSGD(parameters(), 0.1, MOMENTA)
    optimizer.step(components=random_components(MOMENTA))
    optimizer.param_groups[0]["momenta"]["nontarget"] = 0.9
    with pytest.raises(ValueError, match=r"buffers of \['task\+nontarget'\]"):
        optimizer.step(components=random_components(MOMENTA))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momenta": {"task": 1.0}}, r"momenta\['task'\] must lie in \[0, 1\), got 1.0"),
        ({"momenta": {"task": -0.1}}, "must lie in"),
        ({"momenta": {}}, "momenta is empty"),
        ({"momenta": {"a+b": 0.9}}, r"must not contain '\+'"),
        ({"lr": -1.0}, "lr .* got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"decay_component": "other"}, "decay_component 'other' has no momentum"),
        ({"momenta": {"task": 0.9, "weight_decay": 0.9}}, "decay_component is 'task'"),
        ({"params": [{"params": parameters(), "momenta": {}}]}, r"brings \['momenta'\]"),
        ({"params": [{"params": parameters(), "lr": -1.0}]}, "lr must be >= 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoupledSGD(**({"params": parameters(), "lr": 0.1, "momenta": MOMENTA} | settings))


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # lightning 2.6 on a recent torch
def test_through_lightning():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Linear(4, 3, dtype=torch.float64)
            self.hooks = 0

        def configure_optimizers(self):
            return DecoupledSGD(self.parameters(), 0.1, MOMENTA, 0.01)

        def on_before_optimizer_step(self, optimizer):
            self.hooks += 1

        def training_step(self, batch):
            optimizer = self.optimizers()
            logits = self.net(batch)
            leaf = logits.detach().requires_grad_()
            losses = {"task": leaf.square().sum(1), "target": leaf.exp().sum(1), "nontarget": leaf.sum(1)}
            at_outputs = merge(output_gradients(losses, [leaf]), optimizer.buckets)
            optimizer.step(components=component_gradients([logits], at_outputs, self.parameters()))

    module = Module()
    plain = copy.deepcopy(module.net)
    data = torch.randn(4, 4, dtype=torch.float64)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))

    optimizer = DecoupledSGD(plain.parameters(), 0.1, MOMENTA, 0.01)
    for batch in (data[:2], data[2:]) * 2:
        logits = plain(batch)
        losses = {"task": logits.square(), "target": logits.exp(), "nontarget": logits}
        optimizer.step(
            components={
                name: torch.autograd.grad(v.sum(1).mean(), list(plain.parameters()), retain_graph=True)
                for name, v in losses.items()
            }
        )
    assert trainer.global_step == 4
    assert module.hooks == 4
    assert_same(module.net.parameters(), plain.parameters())
