"""What a network is asked to agree on with data, and what it may return: classes, channels, image sizes, outputs."""

import inspect
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn

from vision_kd.models import MODELS, Classifier, ModelSpec, build_classifier, load_classifier, save_student

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NAMES = ("apple", "leaf", "pear")
Pair = namedtuple("Pair", "logits aux")


def build(name="resnet8", num_classes=3, mean=HALF, std=HALF, data_spec=None, **spec):
    return build_classifier(ModelSpec(name, **spec), num_classes=num_classes, mean=mean, std=std, **(data_spec or {}))


# ---- classes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fruit_file(tmp_path):
    path = tmp_path / "student.pt"
    save_student(path, build(data_spec={"class_names": NAMES, "image_size": 16}), ModelSpec("resnet8"))
    return path


OTHER_CLASSES = {
    ("grass", "apple", "pear"): r"was trained on other classes.*only there leaf; only in the data grass",
    ("leaf", "apple", "pear"): r"in another order: its output 0 stands for 'apple', label 0 of the data for 'leaf'",
}


@pytest.mark.parametrize("names", OTHER_CLASSES)
def test_classes_of_another_name_or_order_are_refused(fruit_file, names):
    with pytest.raises(ValueError, match=rf"{fruit_file}.*{OTHER_CLASSES[names]}"):
        build(checkpoint=str(fruit_file), data_spec={"class_names": names})


def test_the_same_classes_and_unknown_ones_pass(fruit_file):
    for names in (NAMES, ()):
        assert build(checkpoint=str(fruit_file), data_spec={"class_names": names}).class_names == NAMES
    loaded = load_classifier(fruit_file)
    assert (loaded.class_names, loaded.image_size) == (NAMES, 16)


@pytest.mark.parametrize(
    "said",
    [
        {"class_names": list(NAMES)},
        {"classes": list(NAMES)},
        {"class_to_idx": {"pear": 2, "apple": 0, "leaf": 1}},
    ],
    ids=lambda said: next(iter(said)),
)
def test_classes_that_other_scripts_write_are_compared(tmp_path, said):
    torch.save({"state_dict": build().network.state_dict()} | said, tmp_path / "x.pth")
    assert build(checkpoint=str(tmp_path / "x.pth")).class_names == NAMES
    with pytest.raises(ValueError, match="another order"):
        build(checkpoint=str(tmp_path / "x.pth"), data_spec={"class_names": NAMES[::-1]})


def test_names_must_be_as_many_as_classes():
    with pytest.raises(ValueError, match="2 class names do not fit 3 classes"):
        build(data_spec={"class_names": ("a", "b")})


def test_channels_are_compared():
    grey = Classifier(MODELS.get("resnet8")(num_classes=3, in_channels=1), (0.5,), (0.5,), 3)
    with pytest.raises(ValueError, match="the teacher takes images of 1 channels, the data have 3"):
        grey.check_data("the teacher", num_classes=3, in_channels=3, class_names=(), image_size=None)


TINY = "torchvision/shufflenet_v2_x0_5"


def published(tmp_path, name=TINY):
    network = torchvision.models.get_model(name.rpartition("/")[2])
    torch.save(network.state_dict(), tmp_path / "published.pth")
    return {"checkpoint": str(tmp_path / "published.pth"), "pretrained": True, "num_classes": 1000}


def test_published_outputs_are_compared_with_the_classes(tmp_path, caplog):
    spec = published(tmp_path)
    categories = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.meta["categories"]
    build(TINY, **spec, data_spec={"class_names": categories})
    build(TINY, **spec, data_spec={"class_names": [f"n{n:08}" for n in range(1000)]})  # ImageNet's folders
    assert not caplog.text
    with pytest.raises(ValueError, match="another order: its output 0 stands for 'tench'"):
        build(TINY, **spec, data_spec={"class_names": categories[::-1]})
    build(TINY, **spec, data_spec={"class_names": [f"bird {n}" for n in range(1000)]})
    assert "have other names than the published outputs" in caplog.text


# ---- image sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "size"), [("timm/test_vit", {"img_size": 32}, 8), ("torchvision/vit_b_16", {"image_size": 32}, 48)]
)
def test_a_size_that_the_network_does_not_take_is_refused(name, args, size):
    with pytest.raises(ValueError, match=f"model '{name}' does not take images of {size} x {size} pixels"):
        build(name, args=args, data_spec={"image_size": size})


def test_trying_a_size_changes_nothing():
    torch.manual_seed(1)
    first = build(data_spec={"image_size": 8})
    draw = torch.rand(1)
    torch.manual_seed(1)
    second = build()
    assert torch.equal(draw, torch.rand(1))
    assert first.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_another_size_than_in_training_is_said(fruit_file, tmp_path, caplog):
    build(checkpoint=str(fruit_file), data_spec={"image_size": 16})
    assert not caplog.text
    build(checkpoint=str(fruit_file), data_spec={"image_size": 24})
    assert f"{fruit_file} was trained on images of 16 pixels, the data have 24" in caplog.text
    build(TINY, **published(tmp_path), data_spec={"image_size": 64})
    assert "was trained on images of 224 pixels, the data have 64" in caplog.text


# ---- outputs ----------------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Several(nn.Module):
    def __init__(self, num_classes, in_channels, kind="list"):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(in_channels, num_classes)

    def forward(self, images):
        logits = self.layer(images.mean((-1, -2)))
        made = {
            "dict": {"aux": logits + 1, "logits": logits},
            "named tuple": Pair(logits, logits + 1),
            "dataclass": Output(logits, logits + 1),
            "list": [logits, logits + 1],
            "tuple": (logits, logits + 1),
            "other dict": {"out": logits},
            "features": images.mean((-1, -2), keepdim=True),
            "wide": torch.cat([logits, logits], dim=-1),
        }
        return made[self.kind]


@pytest.fixture
def several():
    MODELS.register("test_several")(Several)
    yield "test_several"
    del MODELS._entries["test_several"]


@pytest.mark.parametrize("kind", ["dict", "named tuple", "dataclass"])
def test_the_output_called_logits_is_the_main_one(several, kind):
    classifier = build(several, args={"kind": kind}, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.rand(2, 3, 4, 4)
    for mode in (True, False):
        expected = classifier.network.layer(images.mean((-1, -2)))
        torch.testing.assert_close(classifier.train(mode)(images), expected)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("list", "a list of 2 entries"),
        ("tuple", "a tuple of 2 entries"),
        ("other dict", "a dict of 1 entries"),
        ("features", r"a tensor of shape \(2, 3, 1, 1\)"),
        ("wide", r"a tensor of shape \(2, 6\)"),
    ],
)
def test_outputs_of_which_none_is_known_to_be_the_main_one_are_refused(several, kind, shown):
    with pytest.raises(ValueError, match=rf"model 'test_several' returns {shown} while training, not logits \(N, 3\)"):
        build(several, args={"kind": kind})(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="model 'test_several' returns"):
        build(several, args={"kind": kind}, data_spec={"image_size": 4})


AUXILIARY = {"googlenet": 64, "inception_v3": 75}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_heads_of_torchvision(tmp_path, monkeypatch, name):
    """Published weights give torchvision's own network, whose input is normalised twice, and survive saving."""
    size = AUXILIARY[name]
    plain = {"num_classes": 1000, "init_weights": False, "aux_logits": True}
    reference = torchvision.models.get_model(name, transform_input=True, **plain).eval()
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = tmp_path / "hub/checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: torch.load(file, weights_only=True))
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = reference(torchvision.transforms.functional.normalize(images, *IMAGENET))
    args = {} if name == "googlenet" else {"init_weights": False}
    for spec in ({}, {"checkpoint": str(file)}):
        made = build(f"torchvision/{name}", 1000, *IMAGENET, args=args, pretrained=True, **spec).eval()
        with torch.no_grad():
            torch.testing.assert_close(made(images), expected, rtol=1e-3, atol=1e-4)
        save_student(tmp_path / "student.pt", made, ModelSpec(f"torchvision/{name}", args))
        again = load_classifier(tmp_path / "student.pt")
        with torch.no_grad():
            torch.testing.assert_close(again(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_old_names_in_published_densenets(tmp_path):
    network = torchvision.models.get_model("densenet121")
    old = {
        key.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if "denselayer" in key
        else key: tensor
        for key, tensor in network.state_dict().items()
    }
    assert old.keys() != network.state_dict().keys()
    torch.save(old, tmp_path / "densenet.pth")
    spec = {"checkpoint": str(tmp_path / "densenet.pth"), "pretrained": True}
    made = build("torchvision/densenet121", 1000, **spec).network.state_dict()
    assert all(torch.equal(made[key], tensor) for key, tensor in network.state_dict().items())


def test_what_torchvision_does_with_published_weights_is_known():
    """No other builder changes a network for its published weights."""
    special = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        if "transform_input" in inspect.getsource(builder):
            special.add(name)
    assert special == set(AUXILIARY)
