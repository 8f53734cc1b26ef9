"""Building detectors: sizes, weights from torchvision and from files, errors that name the setting."""

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from kd_common.registry import UnknownNameError
from kd_common.run.result import count_parameters
from vision_kd.detection import BACKBONES, build_detector, load_detector, zoo
from vision_kd.models import (
    CheckpointError,
    ModelSpec,
    build_classifier,
    load_classifier,
    save_student,
)

DATA_SPEC = {"class_names": [str(n) for n in range(90)], "mean": (0.5,) * 3, "std": (0.25,) * 3}
PARAMETERS = {
    "fasterrcnn_resnet18_fpn": 28_730_006,
    "fasterrcnn_resnet50_fpn": 41_755_286,  # torchvision states 41755286
    "fasterrcnn_resnet101_fpn": 60_695_190,
    "fasterrcnn_mobilenet_v2_fpn": 19_218_326,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_frozen_norm_and_five_levels(name):
    detector = build_detector(ModelSpec(name), **DATA_SPEC)
    assert count_parameters(detector) == PARAMETERS[name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in detector.modules())
    assert all(parameter.requires_grad for parameter in detector.parameters())
    maps = detector.network.backbone.body(torch.rand(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2]
    assert [m.shape[1] for m in maps.values()] == list(BACKBONES.get(name).channels)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet18_fpn", "fasterrcnn_mobilenet_v2_fpn"])
def test_trainable_layers_freeze_the_first_stages(name):
    body = build_detector(ModelSpec(name, {"trainable_layers": 3}), **DATA_SPEC).network.backbone.body
    frozen, trained = BACKBONES.get(name).stages[:2], BACKBONES.get(name).stages[2:]
    for stages, expected in ((frozen, False), (trained, True)):
        flags = {p.requires_grad for stage in stages for m in stage for p in body.get_submodule(m).parameters()}
        assert flags == {expected}


def test_a_saved_detector_is_rebuilt_with_its_classes(tools, tmp_path):
    detector = tools.detector("xyz", dtype=torch.float32).eval()
    save_student(tmp_path / "d.pt", detector, ModelSpec(tools.name, tools.args), extra={"AP": 0.5})
    again = load_detector(tmp_path / "d.pt")
    assert (again.class_names, again.mean, again.std) == (("x", "y", "z"), detector.mean, detector.std)
    images = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        for key, value in detector(images)[0].items():
            assert torch.equal(value, again(images)[0][key])
    detector.network.load_state_dict(torch.load(tmp_path / "d.pt", weights_only=True)["model"])


def test_the_epsilon_of_published_weights_travels_with_a_saved_detector(tools, tmp_path):
    detector = tools.detector("xyz", dtype=torch.float32, norm="frozen").eval()
    overwrite_eps(detector.network, 0.0)
    save_student(tmp_path / "d.pt", detector, ModelSpec(tools.name, tools.args | {"norm": "frozen"}))
    frozen = [m for m in load_detector(tmp_path / "d.pt").modules() if isinstance(m, FrozenBatchNorm2d)]
    assert {module.eps for module in frozen} == {0.0}


def test_a_detector_behind_a_prefix_loads_whole_or_not_at_all(tools, tmp_path):
    detector = tools.detector("xyz", dtype=torch.float32)
    data_spec = {"class_names": "xyz", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    state = {f"module.{key}": tensor for key, tensor in detector.network.state_dict().items()}
    torch.save({"model": state}, tmp_path / "d.pth")
    spec = ModelSpec(tools.name, tools.args, checkpoint=str(tmp_path / "d.pth"), mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    loaded = build_detector(spec, **data_spec)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), detector.parameters(), strict=True))
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    state["module.roi_heads.box_predictor.cls_score.bias"][1] = float("nan")
    del state["module.rpn.head.bbox_pred.bias"]
    torch.save({"model": state}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match=r"missing in the file: rpn\.head\.bbox_pred\.bias"):
        build_detector(spec, **data_spec)


def test_files_of_classifiers_and_detectors_are_not_confused(tools, tmp_path):
    save_student(tmp_path / "d.pt", tools.detector(), ModelSpec(tools.name, tools.args))
    with pytest.raises(CheckpointError, match=r"vision_kd\.detector/1"):
        load_classifier(tmp_path / "d.pt")
    model = build_classifier(ModelSpec("resnet8"), num_classes=3, in_channels=1, mean=(0.5,), std=(0.5,))
    save_student(tmp_path / "c.pt", model, ModelSpec("resnet8"))
    with pytest.raises(CheckpointError, match="does not describe a detector"):
        load_detector(tmp_path / "c.pt")


@pytest.mark.slow
def test_a_local_copy_of_torchvisions_coco_weights_gives_torchvisions_detections(tmp_path):
    """In the layout of the published file, which is older than torchvision's code: epsilon 0, RPN key without index."""
    reference = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), num_classes=91).eval()
    for module in reference.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
            module.running_var.uniform_(0.5, 2.0)
    state = {k.replace("rpn.head.conv.0.0.", "rpn.head.conv."): v for k, v in reference.state_dict().items()}
    torch.save(state, tmp_path / "coco.pth")
    spec = ModelSpec("fasterrcnn_resnet50_fpn", checkpoint=str(tmp_path / "coco.pth"), pretrained=True)
    detector = build_detector(
        spec, class_names=["person"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ).eval()
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert detector.class_names == tuple(names[1:])
    assert detector.class_indices(["person", "toothbrush"]) == [0, 1, 90]
    reference.transform.min_size, reference.transform.max_size = (64,), 96
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        expected, found = reference([image])[0], detector([image])[0]
    assert len(expected["boxes"]) > 0
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)


def test_a_file_with_torchvisions_91_outputs_brings_its_categories(tools, tmp_path):
    """Any network in that layout can teach COCO's 80 categories; another number of outputs is named."""
    network = zoo.build_network(tools.name, 91, **tools.args)
    torch.save(network.state_dict(), tmp_path / "coco.pth")
    spec = ModelSpec(tools.name, tools.args, checkpoint=str(tmp_path / "coco.pth"))
    data_spec = DATA_SPEC | {"class_names": ["person", "toothbrush"]}
    detector = build_detector(spec, **data_spec)
    assert detector.class_indices(["person", "toothbrush"]) == [0, 1, 90]
    torch.save(zoo.build_network(tools.name, 12, **tools.args).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"has 12 classes and does not fit .* with 3 classes"):
        build_detector(ModelSpec(tools.name, tools.args, checkpoint=str(tmp_path / "other.pth")), **data_spec)


def test_anchors_of_low_precision_maps_are_exact():
    """bfloat16 counts in steps of 8 pixels above 1,024."""
    network = zoo.build_network("fasterrcnn_resnet10_quarter_fpn", 3, norm="group")
    maps = [torch.zeros(1, 8, 200 // 2**n, 340 // 2**n) for n in range(5)]
    images = ImageList(torch.zeros(1, 3, 800, 1360), [(800, 1360)])
    wide = network.rpn.anchor_generator(images, maps)[0]
    low = network.rpn.anchor_generator(images, [m.bfloat16() for m in maps])[0]
    assert low.dtype == torch.float32
    assert float(low.max()) > 1024
    assert torch.equal(low, wide)


def test_group_norm_of_channels_that_16_does_not_divide():
    detector = build_detector(ModelSpec("fasterrcnn_mobilenet_v2_fpn", {"norm": "group"}), **DATA_SPEC)
    groups = {module.num_groups for module in detector.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {8, 16}


def test_backbone_weights_from_a_file(tmp_path):
    for name, published in (("fasterrcnn_resnet18_fpn", "resnet18"), ("fasterrcnn_mobilenet_v2_fpn", "mobilenet_v2")):
        classifier = get_model(published)
        torch.save(classifier.state_dict(), tmp_path / "imagenet.pth")
        detector = build_detector(ModelSpec(name, {"backbone_weights": str(tmp_path / "imagenet.pth")}), **DATA_SPEC)
        stem = "conv1" if "resnet" in name else "0.0"
        theirs = classifier if "resnet" in name else classifier.features
        assert torch.equal(detector.network.backbone.body.get_submodule(stem).weight, theirs.get_submodule(stem).weight)
    with pytest.raises(CheckpointError, match="does not fit the backbone of fasterrcnn_resnet18_fpn"):
        build_detector(
            ModelSpec("fasterrcnn_resnet18_fpn", {"backbone_weights": str(tmp_path / "imagenet.pth")}), **DATA_SPEC
        )


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(zoo.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.__class__, "get_state_dict", offline)
    with pytest.raises(ValueError, match=r"fasterrcnn_resnet50_fpn_coco.*local path as checkpoint"):
        build_detector(ModelSpec("fasterrcnn_resnet50_fpn", pretrained=True), **DATA_SPEC)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (ModelSpec("fasterrcnn_resnet19_fpn"), UnknownNameError, "did you mean fasterrcnn_resnet1"),
        (ModelSpec("fasterrcnn_resnet18_fpn", {"box_batch": 3}), ValueError, r"no settings \['box_batch'\]"),
        (ModelSpec("fasterrcnn_resnet18_fpn", {"norm": "batch"}), ValueError, "frozen, group"),
        (ModelSpec("fasterrcnn_resnet18_fpn", {"trainable_layers": 6}), ValueError, r"\[0, 5\], got 6"),
        (ModelSpec("fasterrcnn_resnet18_fpn", {"anchor_sizes": [8, 16]}), ValueError, "each of the 5 levels"),
        (
            ModelSpec("fasterrcnn_resnet18_fpn", {"backbone_weights": "V9"}),
            ValueError,
            "one of IMAGENET1K_V1, DEFAULT, got 'V9'",
        ),
        (ModelSpec("fasterrcnn_resnet18_fpn", {"num_classes": 3}), ValueError, "rejects args"),
        (ModelSpec("fasterrcnn_resnet101_fpn", pretrained=True), ValueError, "no COCO weights of .*resnet101"),
        (ModelSpec("fasterrcnn_resnet50_fpn", pretrained="V9"), ValueError, "pretrained can be COCO_V1"),
        (ModelSpec("fasterrcnn_resnet18_fpn", checkpoint="model_final.pkl"), CheckpointError, "detectron2 checkpoint"),
    ],
)
def test_what_cannot_be_built_is_named(spec, error, message):
    with pytest.raises(error, match=message):
        build_detector(spec, **DATA_SPEC)


def test_detectron2_weights_are_refused_whatever_the_file_is_called(tmp_path):
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="stride in the 1x1 convolutions"):
        build_detector(ModelSpec("fasterrcnn_resnet50_fpn", checkpoint=str(tmp_path / "model.pth")), **DATA_SPEC)


def test_detecting_needs_evaluation_mode_and_images_floating_point(tools):
    detector = tools.detector(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"call \.eval\(\)"):
        detector.train()([torch.rand(3, 64, 64)])
    with pytest.raises(ValueError, match=r"torch.uint8 \(3, 64, 64\)"):
        detector.eval()([torch.zeros(3, 64, 64, dtype=torch.uint8)])
