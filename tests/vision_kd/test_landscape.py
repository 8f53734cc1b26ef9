"""Loss surfaces: the centre is the plain loss, directions have the filters' lengths, the network stays as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vision_kd.viz.landscape import filter_direction, loss_surface


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_directions_have_the_lengths_of_the_filters():
    parameters = dict(network().named_parameters())
    direction = filter_direction(parameters, torch.Generator().manual_seed(1))
    for name, weight in parameters.items():
        if weight.ndim < 2:
            assert not direction[name].any()
        else:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    again = filter_direction(parameters, torch.Generator().manual_seed(1))
    assert all(torch.equal(direction[name], again[name]) for name in parameters)


def test_surface_by_hand():
    net = network().train()
    before = copy.deepcopy(net.state_dict())
    images, target = torch.randn(7, 3, 8, 8), torch.randint(5, (7,))
    parameters = dict(net.named_parameters())
    generator = torch.Generator().manual_seed(2)
    directions = [filter_direction(parameters, generator) for _ in range(2)]
    offsets = torch.tensor([-0.5, 0.0, 1.0])
    surface = loss_surface(net, directions, offsets, images, target, batch_size=3)
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value), key
    for i, a in enumerate(offsets):
        for j, b in enumerate(offsets):
            moved = copy.deepcopy(net).eval()
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    parameter.add_(a * directions[0][name] + b * directions[1][name])
                expected = F.cross_entropy(moved(images), target)
            assert float(surface[i, j]) == pytest.approx(float(expected), rel=1e-5)
