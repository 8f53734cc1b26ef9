"""Two gloo processes against one: DDP and FSDP2 component gradients, optimizer steps, BatchNorm buffers."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kd_common.distributed import average_batchnorm_buffers
from kd_common.grads import (
    all_reduce_mean,
    clip_components,
    component_gradients,
    component_norms,
    merge,
    output_gradients,
)
from kd_common.optim import DecoupledAdamW, deepkd_sgd

pytestmark = pytest.mark.ddp
WORLD = 2


def worker(rank, rendezvous, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for case in cases:
        torch.manual_seed(0)
        case(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Finalising the interpreter beside gloo's threads under FSDP2 aborts now and then ("terminate called ...").
    os._exit(0)


class Net(nn.Module):
    """Two outputs; ``feature`` is reached by one component only, ``idle`` by none."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.feature = nn.Linear(6, 2)
        self.idle = nn.Linear(6, 2)
        self.double()

    def forward(self, x):
        hidden = self.trunk(x)
        return self.head(hidden), self.feature(hidden)


def components_of(forward, params, x, buckets):
    outputs = forward(x)
    leaves = [out.detach().requires_grad_() for out in outputs]
    logits, feature = leaves
    losses = {
        "task": logits.logsumexp(1) - logits[:, 0],
        "target": logits.square().sum(1) + feature.exp().sum(1),
        "nontarget": logits.pow(3).sum(1),
    }
    return component_gradients(outputs, merge(output_gradients(losses, leaves), buckets), params)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a = a.full_tensor() if hasattr(a, "full_tensor") else a
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-12)


def optimizers(params):
    yield deepkd_sgd(params, lr=0.1, weight_decay=0.01)
    yield deepkd_sgd(params, lr=0.1, weight_decay=0.01, preset="released")
    yield DecoupledAdamW(params, 0.01, {"task": 0.95, "target": 0.8, "nontarget": 0.95})


def ddp_case(rank):
    start, batches = Net(), torch.randn(3, 8, 4, dtype=torch.float64)
    for variant in range(3):
        single, net = copy.deepcopy(start), copy.deepcopy(start)
        wrapped = nn.parallel.DistributedDataParallel(net)
        reference = list(optimizers(list(single.parameters())))[variant]
        optimizer = list(optimizers(list(net.parameters())))[variant]
        for batch in batches:
            expected = components_of(single, single.parameters(), batch, reference.buckets)
            with wrapped.no_sync():
                local = components_of(wrapped, net.parameters(), batch.chunk(WORLD)[rank], optimizer.buckets)
            found = all_reduce_mean(local)
            assert any(not torch.allclose(a, b) for a, b in zip(local["target"][:4], found["target"][:4], strict=True))
            for name, grads in expected.items():
                assert_same(found[name], grads)
            reference.step(components=expected)
            optimizer.step(components=found)
        assert_same(net.parameters(), single.parameters())
        assert not torch.allclose(net.head.weight, start.head.weight)


def fsdp_case(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    start, batches = Net(), torch.randn(3, 8, 4, dtype=torch.float64)
    for variant in range(3):
        single, net = copy.deepcopy(start), copy.deepcopy(start)
        for layer in (net.trunk[0], net.trunk[2], net):
            fully_shard(layer, mesh=mesh)
        params = list(net.parameters())
        reference = list(optimizers(list(single.parameters())))[variant]
        optimizer = list(optimizers(params))[variant]
        for batch in batches:
            expected = components_of(single, single.parameters(), batch, reference.buckets)
            local = components_of(net, params, batch.chunk(WORLD)[rank], optimizer.buckets)
            found = all_reduce_mean(local)
            assert all(param.grad is None for param in params)
            for name, grads in expected.items():
                assert_same(found[name], grads)
            norms, expected_norms = component_norms(found), component_norms(expected)
            assert_same([norms[name] for name in expected], expected_norms.values())
            assert_same([clip_components(found, 0.1)], [clip_components(expected, 0.1)])
            reference.step(components=expected)
            optimizer.step(components=found)
        assert_same(net.parameters(), single.parameters())

    outputs = net(batches[0])
    with pytest.raises(ValueError, match="mixes sharded and plain"):
        component_gradients(outputs, {"task": outputs}, net.parameters())
    params[0].grad = torch.zeros_like(params[0])
    with pytest.raises(RuntimeError, match="would be lost"):
        component_gradients(outputs, {"task": outputs}, params)


def batchnorm_case(rank):
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm2d(4))
    first, _, last = net
    first.running_mean.fill_(float(rank))
    last.running_var.fill_(3.0 + rank)
    first.num_batches_tracked.fill_(7)
    average_batchnorm_buffers(net)
    assert torch.equal(first.running_mean, torch.full((2,), 0.5))
    assert torch.equal(first.running_var, torch.ones(2))
    assert torch.equal(last.running_var, torch.full((4,), 3.5))
    assert first.num_batches_tracked == 7


def flat_reduction_case(rank):
    grads = {"task": [torch.full((2,), float(rank)), None], "target": [torch.full((1, 2), 2.0 * rank).half(), None]}
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))
    means = all_reduce_mean(grads)
    dist.all_reduce = reduce
    assert len(calls) == 1
    assert_same(means["task"], [torch.full((2,), 0.5), None])
    assert_same(means["target"], [torch.ones(1, 2).half(), None])


@pytest.mark.parametrize("cases", [(ddp_case, batchnorm_case, flat_reduction_case), (fsdp_case,)], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(cases, tmp_path):
    mp.start_processes(worker, args=(tmp_path / "rendezvous", cases), nprocs=WORLD, start_method="fork")
