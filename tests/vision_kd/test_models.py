"""The network zoo: published sizes and key names, independent implementations, any image size."""

import copy
from collections import OrderedDict
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from kd_common.run.result import count_parameters
from vision_kd.models import MODELS

# name: (parameters, 10^6 multiply-adds at 32x32), 100 classes: the table of design/peers_vision.md, section (c)
PUBLISHED = {
    "resnet8": (83_892, 12.5),
    "resnet14": (181_108, 26.7),
    "resnet20": (278_324, 40.8),
    "resnet32": (472_756, 69.1),
    "resnet44": (667_188, 97.4),
    "resnet56": (861_620, 125.8),
    "resnet110": (1_736_564, 253.2),
    "resnet8x4": (1_233_540, 177.1),
    "resnet32x4": (7_433_860, 1083.0),
    "ResNet18": (11_220_132, 555.5),
    "ResNet50": (23_705_252, 1298.0),
    "wrn_16_1": (180_916, 26.7),
    "wrn_16_2": (703_284, 101.1),
    "wrn_40_1": (569_780, 83.3),
    "wrn_40_2": (2_255_156, 327.6),
    "vgg8": (3_965_028, 96.2),
    "vgg11": (9_277_284, 209.4),
    "vgg13": (9_462_180, 284.9),
    "vgg16": (14_774_436, 398.2),
    "vgg19": (20_086_692, 511.4),
    "MobileNetV2": (812_836, 6.5),
    "ShuffleV1": (949_258, 38.7),
    "ShuffleV2": (1_355_528, 44.5),
    "MobileNetV1": (3_309_476, 11.7),  # 4,231,976 with 1000 classes
}
LARGE = {"resnet110", "resnet32x4", "ResNet50", "vgg16", "vgg19"}
SMALL = sorted(PUBLISHED.keys() - LARGE)


@cache
def network(name: str) -> nn.Module:
    return MODELS.get(name)(num_classes=100)


def randomised(name: str) -> nn.Module:
    """A float64 copy with batch norms far from the identity, so that each one matters."""
    net = copy.deepcopy(network(name)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def assert_same_function(ours: nn.Module, theirs: nn.Module, *shape: int) -> None:
    """Compare with a network that holds the same layers in the same order, under whatever names."""
    state, theirs = ours.state_dict(), theirs.double().eval()
    names = theirs.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in names.values()]
    theirs.load_state_dict(dict(zip(names, state.values(), strict=True)))
    images = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)


def test_zoo_is_the_published_list():
    # Other test files register toy networks under names that start with "test_".
    assert {name for name in MODELS.names() if not name.startswith("test_")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    assert count_parameters(network(name)) == PUBLISHED[name][0]


def test_mobilenet_v1_has_the_published_imagenet_size():
    assert count_parameters(MODELS.get("MobileNetV1")(num_classes=1000)) == 4_231_976


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_and_shape_at_32(name):
    total = 0

    def count(module, _, output):
        nonlocal total
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        total += module.weight.numel() * positions

    net = network(name).eval()
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        logits = net(torch.rand(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert logits.shape == (1, 100)
    assert round(total / 1e6, 1) == PUBLISHED[name][1]


BASIC, DEEP = "conv1 bn1 conv2 bn2", "conv1 bn1 conv2 bn2 conv3 bn3"
# (model, block): the block's layers in the public teacher files
LAYERS = {
    ("resnet20", "layer1.2."): BASIC,
    ("resnet20", "layer2.0."): BASIC + " downsample.0 downsample.1",
    ("resnet8x4", "layer1.0."): BASIC + " downsample.0 downsample.1",
    ("ResNet18", "layer1.0."): BASIC,
    ("ResNet18", "layer2.0."): BASIC + " shortcut.0 shortcut.1",
    ("ResNet50", "layer1.0."): DEEP + " shortcut.0 shortcut.1",
    ("ResNet50", "layer1.1."): DEEP,
    ("wrn_40_2", "block1.layer.0."): "bn1 conv1 bn2 conv2 convShortcut",
    ("wrn_40_2", "block1.layer.1."): "bn1 conv1 bn2 conv2",
    ("wrn_16_1", "block1.layer.0."): "bn1 conv1 bn2 conv2",
    ("vgg8", "block2."): "0 1",
    ("vgg13", "block2."): "0 1 3 4",
    ("MobileNetV2", "blocks.1.0.conv."): "0 1 3 4 6 7",
    ("ShuffleV1", "layer1.0."): DEEP,
    ("ShuffleV2", "layer3.0."): DEEP + " conv4 bn4 conv5 bn5",
    ("ShuffleV2", "layer3.1."): DEEP,
    ("MobileNetV1", "model.13."): "0 1 3 4",
}


@pytest.mark.parametrize(("name", "block"), LAYERS)
def test_block_layers_are_those_of_the_public_teacher_files(name, block):
    keys = [key.removeprefix(block) for key in network(name).state_dict() if key.startswith(block)]
    assert list(dict.fromkeys(key.rpartition(".")[0] for key in keys)) == LAYERS[name, block].split()


# A few literal (key, shape) pairs per family: stem, a strided block, the last block, the classifier.
SHAPES = {
    "resnet56": {
        "conv1.weight": (16, 3, 3, 3),
        "bn1.running_var": (16,),
        "layer1.8.conv2.weight": (16, 16, 3, 3),
        "layer2.0.downsample.0.weight": (32, 16, 1, 1),
        "layer3.8.bn2.weight": (64,),
        "fc.weight": (100, 64),
        "fc.bias": (100,),
    },
    "resnet32x4": {
        "conv1.weight": (32, 3, 3, 3),
        "layer1.0.downsample.0.weight": (64, 32, 1, 1),
        "layer3.4.conv2.weight": (256, 256, 3, 3),
        "fc.weight": (100, 256),
    },
    "ResNet50": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "linear.weight": (100, 2048),
    },
    "wrn_40_2": {
        "conv1.weight": (16, 3, 3, 3),
        "block2.layer.0.convShortcut.weight": (64, 32, 1, 1),
        "block3.layer.5.conv2.weight": (128, 128, 3, 3),
        "bn1.weight": (128,),
        "fc.weight": (100, 128),
    },
    "vgg13": {
        "block0.0.weight": (64, 3, 3, 3),
        "block0.3.bias": (64,),
        "block4.4.running_mean": (512,),
        "classifier.weight": (100, 512),
    },
    "MobileNetV2": {
        "conv1.0.weight": (16, 3, 3, 3),
        "blocks.0.0.conv.3.weight": (16, 1, 3, 3),
        "blocks.6.0.conv.6.weight": (160, 480, 1, 1),
        "conv2.0.weight": (1280, 160, 1, 1),
        "classifier.0.weight": (100, 1280),
    },
    "ShuffleV1": {
        "conv1.weight": (24, 3, 1, 1),
        "layer1.0.conv1.weight": (54, 24, 1, 1),
        "layer2.0.conv1.weight": (60, 80, 1, 1),
        "layer2.7.conv3.weight": (480, 40, 1, 1),
        "linear.weight": (100, 960),
    },
    "ShuffleV2": {
        "conv1.weight": (24, 3, 1, 1),
        "layer1.0.conv2.weight": (58, 24, 1, 1),
        "layer2.7.conv3.weight": (116, 116, 1, 1),
        "conv2.weight": (1024, 464, 1, 1),
        "bn2.weight": (1024,),
        "linear.weight": (100, 1024),
    },
    "MobileNetV1": {
        "model.0.0.weight": (32, 3, 3, 3),
        "model.1.0.weight": (32, 1, 3, 3),
        "model.13.3.weight": (1024, 1024, 1, 1),
        "fc.weight": (100, 1024),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_public_teacher_files(name):
    state = network(name).state_dict()
    assert {key: tuple(state[key].shape) for key in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [8, 28])
def test_one_channel_and_other_sizes(name, size):
    net = MODELS.get(name)(num_classes=10, in_channels=1).eval()
    images = torch.rand(2, 1, size, size)
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(logits, net(images))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_gradient_reaches_every_parameter(name):
    net = MODELS.get(name)(num_classes=10).train()
    F.cross_entropy(net(torch.rand(4, 3, 16, 16)), torch.arange(4)).backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    assert not [key for key, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()]


WIDTHS = {"resnet14": (16, 16, 32, 64), "resnet8x4": (32, 64, 128, 256)}


@pytest.mark.parametrize("name", WIDTHS)
def test_three_stage_resnet_against_torchvision_blocks(name):
    ours = randomised(name)
    stem, *widths = WIDTHS[name]
    inputs, depth, layers = stem, len(ours.layer1), []
    for index, width in enumerate(widths):
        stride = 1 if index == 0 else 2
        shortcut = None
        if stride > 1 or inputs != width:
            shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        blocks = [BasicBlock(inputs, width, stride, shortcut), *(BasicBlock(width, width) for _ in range(depth - 1))]
        layers.append((f"layer{index + 1}", nn.Sequential(*blocks)))
        inputs = width
    first = [
        ("conv1", nn.Conv2d(3, stem, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(stem)),
        ("relu", nn.ReLU()),
    ]
    last = [("pool", nn.AvgPool2d(8)), ("flatten", nn.Flatten()), ("fc", nn.Linear(inputs, 100))]
    theirs = nn.Sequential(OrderedDict(first + layers + last))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert_same_function(ours, theirs, 2, 3, 32, 32)


FOUR_STAGE = {"ResNet18": (BasicBlock, [2, 2, 2, 2]), "ResNet50": (Bottleneck, [3, 4, 6, 3])}


@pytest.mark.parametrize("name", FOUR_STAGE)
def test_four_stage_resnet_against_torchvision(name):
    ours = randomised(name)
    theirs = torchvision.models.ResNet(*FOUR_STAGE[name], num_classes=100)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    assert_same_function(ours, theirs, 1, 3, 16, 16)


@pytest.mark.parametrize("size", [32, 64])
def test_vgg_against_torchvision(size):
    # At 32x32 the published networks pool three times, at 64x64 four times, then average.
    ours = randomised("vgg11")
    layers = list(torchvision.models.vgg11_bn(num_classes=100, init_weights=False).features)
    pools = [index for index, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    for index in pools[4 if size == 64 else 3 :]:
        layers[index] = nn.Identity()
    theirs = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))
    assert_same_function(ours, theirs, 1, 3, size, size)


def test_shufflenet_v2_against_torchvision():
    ours = randomised("ShuffleV2")
    theirs = torchvision.models.ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=100)
    theirs.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    theirs.maxpool = nn.Identity()
    assert_same_function(ours, theirs, 2, 3, 32, 32)


def reference_norm(state, prefix, x):
    stats = [state[f"{prefix}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *stats, training=False, eps=1e-5)


def test_wide_resnet_against_its_definition():
    ours = randomised("wrn_16_2")
    state = ours.state_dict()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for stage, stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        for index in range(2):
            at, step = f"{stage}.layer.{index}", stride if index == 0 else 1
            active = F.relu(reference_norm(state, f"{at}.bn1", x))
            inner = F.relu(
                reference_norm(state, f"{at}.bn2", F.conv2d(active, state[f"{at}.conv1.weight"], None, step, 1))
            )
            if index == 0:
                x = F.conv2d(active, state[f"{at}.convShortcut.weight"], None, step)
            x = x + F.conv2d(inner, state[f"{at}.conv2.weight"], padding=1)
    pooled = F.relu(reference_norm(state, "bn1", x)).mean((2, 3))
    torch.testing.assert_close(
        ours(images), F.linear(pooled, state["fc.weight"], state["fc.bias"]), rtol=1e-10, atol=1e-10
    )


def test_shufflenet_v1_unit_against_its_definition():
    unit = randomised("ShuffleV1").layer2[0]
    state = unit.state_dict()
    x = torch.rand(2, 240, 8, 8, dtype=torch.float64)
    out = F.relu(reference_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], groups=3)))
    order = [group * 20 + member for member in range(20) for group in range(3)]
    out = reference_norm(state, "bn2", F.conv2d(out[:, order], state["conv2.weight"], None, 2, 1, groups=60))
    out = reference_norm(state, "bn3", F.conv2d(F.relu(out), state["conv3.weight"], groups=3))
    expected = F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
    torch.testing.assert_close(unit(x), expected, rtol=1e-10, atol=1e-10)


def test_inverted_residual_adds_its_input_only_where_shapes_agree():
    blocks = randomised("MobileNetV2").blocks
    assert [[block.has_shortcut for block in stage] for stage in blocks[:3]] == [
        [False],
        [False, True],
        [False, True, True],
    ]
    x = torch.rand(1, 12, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(blocks[1][1](x), x + blocks[1][1].conv(x))


def test_initial_weights_follow_the_fan_out():
    torch.manual_seed(0)
    net = MODELS.get("vgg8")(num_classes=100)
    assert net.block2[0].weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not net.block2[0].bias.any()
    assert not net.classifier.bias.any()


def test_too_small_image_for_vgg_says_so():
    with pytest.raises(ValueError, match="at least 8x8 pixels"):
        network("vgg8")(torch.rand(1, 3, 7, 32))


def test_wide_resnet_depth_must_fit():
    with pytest.raises(ValueError, match=r"6 n \+ 4.* got 17"):
        MODELS.get("wrn_16_1").func(17, 1, num_classes=10)


def test_unknown_model_is_not_guessed():
    with pytest.raises(ValueError, match="did you mean resnet8x4"):
        MODELS.get("resnet8x")
