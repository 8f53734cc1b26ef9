"""Weight files, published weights and normalisation: what loads, what is refused, and what the message says."""

import argparse
import pickle
import urllib.error
from pathlib import Path

import jsonargparse
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from kd_common.errors import UserError
from kd_common.registry import UnknownNameError
from kd_common.run.result import count_parameters
from vision_kd.models import (
    MODELS,
    CheckpointError,
    Classifier,
    ModelSpec,
    build_classifier,
    export,
    load_classifier,
    save_student,
)

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
TINY_TORCHVISION = "shufflenet_v2_x0_5"


def build(
    name="resnet8",
    num_classes=10,
    mean=MEAN,
    std=STD,
    in_channels=3,
    mean_of_file=None,
    std_of_file=None,
    data_spec=None,
    **spec,
):
    spec = ModelSpec(name, mean=mean_of_file, std=std_of_file, **spec)
    return build_classifier(
        spec, num_classes=num_classes, in_channels=in_channels, mean=mean, std=std, **(data_spec or {})
    )


@pytest.fixture
def trained():
    """A network whose every tensor differs from a fresh one, batch norm buffers included."""
    net = MODELS.get("resnet8")(num_classes=10)
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7))
    return net.eval()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the classifier ---------------------------------------------------------------------------------------------


def test_classifier_normalises_its_input(trained):
    images = torch.rand(3, 3, 32, 32)
    expected = trained(torchvision.transforms.functional.normalize(images, MEAN, STD))
    torch.testing.assert_close(Classifier(trained, MEAN, STD, 10)(images), expected)


def test_state_dict_is_the_network_alone(trained):
    classifier = Classifier(trained, MEAN, STD, 10)
    assert list(classifier.state_dict()) == [f"network.{key}" for key in trained.state_dict()]
    assert classifier.double()._mean.dtype == torch.float64  # the constants still follow the module


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8)]
)
def test_images_of_another_kind_are_refused(trained, images):
    with pytest.raises(ValueError, match=r"images \(N, 3, H, W\)"):
        Classifier(trained, MEAN, STD, 10)(images)


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN, std) for std in ((0.2, 0.2), (0.2, 0.0, 0.2), (0.2, -1.0, 0.2), (0.2, float("nan"), 0.2))]
    + [((mean, 0.5, 0.5), STD) for mean in (float("nan"), float("inf"))],
)
def test_bad_normalisation_is_refused(trained, mean, std):
    with pytest.raises(ValueError, match=r"mean .* std"):
        Classifier(trained, mean, std, 10)


def test_count_parameters_counts_shared_ones_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, layer)) == 16


# ---- building ---------------------------------------------------------------------------------------------------


def test_spec_is_a_config_type():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--model", type=ModelSpec)
    config = parser.parse_args(["--model.name=timm/test_vit", "--model.args={img_size: 32}", "--model.pretrained=true"])
    assert parser.instantiate_classes(config).model == ModelSpec("timm/test_vit", {"img_size": 32}, None, True)


def test_build_passes_classes_channels_and_normalisation():
    classifier = build(num_classes=7, in_channels=1, mean=(0.3,), std=(0.4,))
    assert (classifier.num_classes, classifier.in_channels) == (7, 1)
    assert (classifier.mean, classifier.std) == ((0.3,), (0.4,))
    assert classifier(torch.rand(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(("name", "channels"), [("timm/test_resnet", 1), (f"torchvision/{TINY_TORCHVISION}", 3)])
def test_library_models_by_name(name, channels):
    classifier = build(name, num_classes=7, in_channels=channels, mean=MEAN[:channels], std=STD[:channels]).eval()
    assert classifier(torch.rand(2, channels, 64, 64)).shape == (2, 7)


def test_constructor_arguments_reach_library_models():
    assert build("timm/test_vit", args={"img_size": 32}).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("resnet21", "resnet20"),
        ("timm/resnet5O", "resnet50"),
        ("torchvision/resnet19", "resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision classifier"),
        ("keras/resnet50", "timm/<name> or torchvision/<name>"),
    ],
)
def test_unknown_names(name, suggested):
    with pytest.raises(UnknownNameError, match=suggested):
        build(name)


@pytest.mark.parametrize("name", ["resnet8", "timm/test_resnet", "torchvision/resnet18"])
@pytest.mark.parametrize("argument", ["nonsense", "num_classes"])
def test_rejected_arguments_are_named(name, argument):
    with pytest.raises(ValueError, match=f"'{name}' .*{argument}"):
        build(name, args={argument: 5})


def test_torchvision_needs_three_channels():
    with pytest.raises(ValueError, match="3 channels"):
        build("torchvision/resnet18", in_channels=1, mean=(0.5,), std=(0.5,))


# ---- published weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet8", "published"),
        ("timm/botnet50ts_256", "published"),
        ("timm/test_vit", "1000 classes"),
        ("torchvision/resnet18", "1000 classes"),
    ],
)
def test_published_weights_that_are_not_there_or_of_other_classes(name, problem):
    with pytest.raises(UserError, match=f"'{name}' .*{problem}"):
        build(name, pretrained=True)


def test_torchvision_weights_come_with_their_normalisation(tmp_path, monkeypatch, caplog):
    weights = torchvision.models.get_model_weights(TINY_TORCHVISION).DEFAULT
    published = torchvision.models.get_model(TINY_TORCHVISION)
    cached = tmp_path / "hub/checkpoints" / Path(weights.url).name
    cached.parent.mkdir(parents=True)
    torch.save(published.state_dict(), cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = f"torchvision/{TINY_TORCHVISION}"
    for spec in ({"pretrained": True}, {"pretrained": True, "checkpoint": str(cached)}):
        classifier = build(name, num_classes=1000, **spec)
        assert same_weights(classifier.network, published)
        assert (classifier.mean, classifier.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert build(name, num_classes=1000, checkpoint=str(cached)).mean == MEAN
    assert f"{cached} does not say with which mean and std it was trained" in caplog.text


def test_timm_weights_come_with_their_normalisation(tmp_path):
    import timm

    published = timm.create_model("test_vit")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    spec = {"num_classes": 1000, "checkpoint": str(tmp_path / "model.safetensors")}
    classifier = build("timm/test_vit", pretrained=True, **spec)
    assert same_weights(classifier.network, published)
    assert (classifier.mean, classifier.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert build("timm/test_vit", **spec).mean == (0.5, 0.5, 0.5)  # as timm's training takes them
    stated = build("timm/test_vit", mean_of_file=(0.1, 0.2, 0.3), std_of_file=(0.4, 0.5, 0.6), **spec)
    assert (stated.mean, stated.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_failed_torchvision_download_names_file_and_remedy(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"https://download.pytorch.org/models/resnet18-\w+.pth: .*set checkpoint"):
        build("torchvision/resnet18", num_classes=1000, pretrained=True)


def test_failed_timm_download_names_file_and_remedy(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ValueError, match=r"https://huggingface.co/timm/test_vit.r160_in1k: .*set checkpoint"):
        build("timm/test_vit", num_classes=1000, pretrained=True)


# ---- weight files that load -------------------------------------------------------------------------------------

LAYOUTS = {
    "bundle": lambda state: {"model": state},
    "bundle with options": lambda state: {"model": state, "opt": argparse.Namespace(lr=0.05), "epoch": 240},
    "lightning": lambda state: {"state_dict": {f"student.network.{key}": t for key, t in state.items()}, "epoch": 3},
    "data parallel": lambda state: {"model": {f"module.{key}": t for key, t in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{key}": t for key, t in state.items()},
    "plain": dict,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_layouts(layout, legacy, tmp_path, trained):
    path = tmp_path / "teacher.pth"
    torch.save(LAYOUTS[layout](trained.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    assert same_weights(build(checkpoint=str(path)).network, trained)


def test_safetensors(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "teacher.safetensors")
    assert same_weights(build(checkpoint=str(tmp_path / "teacher.safetensors")).network, trained)


def test_files_older_than_the_batch_counter(tmp_path, trained):
    state = {key: t for key, t in trained.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "old.pth")
    loaded = build(checkpoint=str(tmp_path / "old.pth")).network.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "student.",
    "network.",
    "model.network.module.",
    "ema.",
    "anything.else.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers(tmp_path, trained, prefix):
    torch.save({"state_dict": {f"{prefix}{k}": t for k, t in trained.state_dict().items()}}, tmp_path / "x.ckpt")
    assert same_weights(build(checkpoint=str(tmp_path / "x.ckpt")).network, trained)


def test_prefixes_inside_of_names(tmp_path, trained):
    """As torch.compile, FSDP and activation checkpointing of single blocks leave them."""
    state = {
        key.replace("layer1.0.", "layer1.0._orig_mod.").replace("layer2.0.", "layer2._fsdp_wrapped_module.0."): tensor
        for key, tensor in trained.state_dict().items()
    }
    torch.save(state, tmp_path / "x.pth")
    assert same_weights(build(checkpoint=str(tmp_path / "x.pth")).network, trained)


def test_averaged_model(tmp_path, trained):
    averaged = torch.optim.swa_utils.AveragedModel(trained, use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    assert same_weights(build(checkpoint=str(tmp_path / "swa.pth")).network, trained)


def test_tensors_beside_the_network_are_listed_unless_it_is_named(tmp_path, trained):
    state = {f"model.{k}": t for k, t in trained.state_dict().items()} | {"criterion.weight": torch.ones(4)}
    path = str(tmp_path / "x.ckpt")
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"criterion\.weight.*entry"):
        build(checkpoint=path)
    for entry in ("state_dict.model", "model", "model."):
        assert same_weights(build(checkpoint=path, entry=entry).network, trained)
    with pytest.raises(CheckpointError, match=r"no entry 'modle'; it holds state_dict"):
        build(checkpoint=path, entry="modle")


def other_weights(network):
    return {key: tensor + 1 for key, tensor in network.state_dict().items()}


AVERAGES = {
    "timm": lambda plain, average: {"state_dict": plain, "state_dict_ema": average},
    "torchvision": lambda plain, average: {
        "model": plain,
        "model_ema": {f"module.{k}": t for k, t in average.items()} | {"n_averaged": torch.tensor(3)},
    },
    "RT-DETR": lambda plain, average: {"model": plain, "ema": {"module": average, "updates": 7}},
    "Lightning": lambda plain, average: {
        "state_dict": {f"model.{k}": t for k, t in plain.items()} | {f"model_ema.{k}": t for k, t in average.items()}
    },
    "ours": lambda plain, average: {
        "state_dict": {f"student.network.{k}": t for k, t in plain.items()}
        | {f"ema.module.network.{k}": t for k, t in average.items()}
        | {"ema.n_averaged": torch.tensor(3), "auxiliary.0.weight": torch.ones(2)}
    },
}


@pytest.mark.parametrize("layout", AVERAGES)
def test_a_moving_average_goes_before_what_it_averages_and_is_named(tmp_path, trained, layout, caplog):
    average = other_weights(trained)
    torch.save(AVERAGES[layout](trained.state_dict(), average), tmp_path / "x.ckpt")
    loaded = build(checkpoint=str(tmp_path / "x.ckpt")).network.state_dict()
    assert all(torch.equal(loaded[key], average[key]) for key in average)
    assert "holds several networks that fit" in caplog.text
    assert "ema" in caplog.text


def test_the_plain_weights_beside_an_average_can_be_named(tmp_path, trained, caplog):
    torch.save({"model": trained.state_dict(), "model_ema": other_weights(trained)}, tmp_path / "x.pth")
    assert same_weights(build(checkpoint=str(tmp_path / "x.pth"), entry="model").network, trained)
    assert not caplog.text


@pytest.mark.parametrize(
    "layout",
    [
        lambda one, two: {"student": one, "teacher": two},
        lambda one, two: {"state_dict": {f"a.{k}": t for k, t in one.items()} | {f"b.{k}": t for k, t in two.items()}},
    ],
)
def test_several_networks_that_fit_are_refused_unless_one_is_named(tmp_path, trained, layout):
    content = layout(trained.state_dict(), other_weights(trained))
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"several networks that fit: .*entry"):
        build(checkpoint=str(tmp_path / "x.pth"))
    entry = "student" if "student" in content else "state_dict.a"
    assert same_weights(build(checkpoint=str(tmp_path / "x.pth"), entry=entry).network, trained)


def test_copies_of_one_network_are_one(tmp_path, trained, caplog):
    torch.save({"student": trained.state_dict(), "best": trained.state_dict(), "epoch": 4}, tmp_path / "x.pth")
    assert same_weights(build(checkpoint=str(tmp_path / "x.pth")).network, trained)
    assert not caplog.text


def test_the_network_that_fits_is_taken(tmp_path, trained):
    """A distillation checkpoint of another teacher and optimizer."""
    teacher = MODELS.get("resnet14")(num_classes=10)
    torch.save(
        {
            "model": {f"module.student.{k}": t for k, t in trained.state_dict().items()}
            | {f"module.teacher.{k}": t for k, t in teacher.state_dict().items()},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        },
        tmp_path / "x.pth",
    )
    path = str(tmp_path / "x.pth")
    assert same_weights(build(checkpoint=path).network, trained)
    assert same_weights(build("resnet14", checkpoint=path).network, teacher)


# ---- tensors that cannot be used --------------------------------------------------------------------------------

BAD = {
    "nan": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")),
    "overflow": lambda t: t.double() * 1e300,
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.round().to(torch.int8),
    "boolean": lambda t: t > 0,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*", "ignore:.*TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:.*sparse tensor")
@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_are_no_weights_are_listed(tmp_path, trained, kind):
    state = trained.state_dict()
    state["layer2.0.conv1.weight"] = BAD[kind](state["layer2.0.conv1.weight"])
    message = error_of(tmp_path, state)
    assert "layer2.0.conv1.weight" in message
    assert "cannot use" in message


def test_a_broken_running_variance_is_listed(tmp_path, trained):
    state = trained.state_dict()
    state["bn1.running_var"][2] = float("nan")
    assert "bn1.running_var (1 of 16 values are not finite)" in error_of(tmp_path, state)


def test_counts_that_were_averaged_as_numbers_load(tmp_path, trained):
    state = trained.state_dict()
    state["bn1.num_batches_tracked"] = torch.tensor(12.0)
    torch.save(state, tmp_path / "x.pth")
    assert build(checkpoint=str(tmp_path / "x.pth")).network.state_dict()["bn1.num_batches_tracked"] == 12


# ---- weight files that do not fit -------------------------------------------------------------------------------


def error_of(tmp_path, state, **spec):
    path = tmp_path / "teacher.pth"
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError) as caught:
        build(checkpoint=str(path), **spec)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_other_class_count_names_both(tmp_path, trained):
    message = error_of(tmp_path, trained.state_dict(), num_classes=100)
    for part in ("'resnet8' with 100", "fc.weight (file (10, 64), model (100, 64))", "missing in the file: none"):
        assert part in message


def test_a_file_without_the_head_says_so(tmp_path, trained):
    state = {key: t for key, t in trained.state_dict().items() if not key.startswith("fc.")}
    message = error_of(tmp_path, {f"backbone.{key}": t for key, t in state.items()})
    assert "without its head (fc.weight, fc.bias)" in message


def test_the_names_of_another_library_are_explained(tmp_path, trained):
    state = {f"part{n}.x": t for n, t in enumerate(trained.state_dict().values())}
    assert "shapes in the model's order" in error_of(tmp_path, state)


def test_other_network_names_first_keys(tmp_path, trained):
    message = error_of(tmp_path, trained.state_dict(), name="vgg8")
    assert "missing in the file: block0.0.weight" in message
    assert "not in the model: conv1.weight" in message


def test_deeper_and_shallower_networks(tmp_path, trained):
    assert "missing in the file: layer1.1.conv1.weight" in error_of(tmp_path, trained.state_dict(), name="resnet14")
    state = trained.state_dict()
    state["layer4.0.conv1.weight"] = torch.zeros(3)
    assert "not in the model: layer4.0.conv1.weight;" in error_of(tmp_path, state)


def test_same_names_other_widths(tmp_path, trained):
    message = error_of(tmp_path, MODELS.get("wrn_40_2")(num_classes=10).state_dict(), name="wrn_40_1")
    assert "other shapes: block1.layer.0.conv1.weight (file (32, 16, 3, 3), model (16, 16, 3, 3))" in message


def test_one_channel_teacher_on_colour_images(tmp_path):
    state = MODELS.get("resnet8")(num_classes=10, in_channels=1).state_dict()
    assert "conv1.weight (file (16, 1, 3, 3), model (16, 3, 3, 3))" in error_of(tmp_path, state)


# ---- weight files that are refused ------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(tmp_path, trained, legacy):
    path, marker = tmp_path / "teacher.pth", tmp_path / "executed"
    content = {"model": trained.state_dict(), "bonus": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"teacher.pth is refused: .* could run code"):
        build(checkpoint=str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is armed
    assert marker.exists()


def test_plain_pickle_with_code_does_not_run(tmp_path):
    path, marker = tmp_path / "teacher.pkl", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"teacher\.pkl is refused"):
        build(checkpoint=str(path))
    assert not marker.exists()


def test_pickled_module_is_refused_with_a_remedy(tmp_path, trained):
    torch.save(trained, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"Save `model.state_dict\(\)` alone"):
        build(checkpoint=str(tmp_path / "net.pth"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_named(tmp_path, trained, legacy):
    path = tmp_path / "teacher.pth"
    torch.save({"model": trained.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    damaged = [data[: len(data) * cut // 40] for cut in range(40)] + [b"<html>not found</html>", bytes(500), b"PK" * 99]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"teacher\.pth (cannot be read: damaged|is refused)"):
            build(checkpoint=str(path))


def test_damaged_safetensors_are_named(tmp_path, trained):
    path = tmp_path / "teacher.safetensors"
    save_file(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors cannot be read: damaged"):
        build(checkpoint=str(path))


@pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, [1, 2], torch.zeros(3), {"model": {"conv1": 3}}])
def test_files_without_weights_are_named(tmp_path, content):
    torch.save(content, tmp_path / "teacher.pth")
    with pytest.raises(CheckpointError, match=r"teacher\.pth"):
        build(checkpoint=str(tmp_path / "teacher.pth"))


def test_missing_file_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/teachers"):
        build(checkpoint="teachers/no.pth")


# ---- student files ----------------------------------------------------------------------------------------------


def test_student_file_loads_with_plain_pytorch(tmp_path, trained):
    path = tmp_path / "new folder/student.pt"
    save_student(path, Classifier(trained, MEAN, STD, 10), ModelSpec("resnet8"), {"top1": 71.5, "note": ["a", None]})
    content = torch.load(path, weights_only=True)
    fresh = MODELS.get("resnet8")(num_classes=10)
    fresh.load_state_dict(content["model"])
    assert all(tensor.is_contiguous() for tensor in content["model"].values())
    assert same_weights(fresh, trained)
    assert content["meta"] == {
        "format": "vision_kd.student/1",
        "name": "resnet8",
        "args": {},
        "num_classes": 10,
        "in_channels": 3,
        "mean": list(MEAN),
        "std": list(STD),
        "top1": 71.5,
        "note": ["a", None],
    }


@pytest.mark.parametrize("spec", [ModelSpec("vgg8"), ModelSpec("timm/test_vit", {"img_size": 32})])
def test_student_file_rebuilds_the_classifier(tmp_path, spec):
    path, images = tmp_path / "student.pt", torch.rand(2, 3, 32, 32)
    classifier = build_classifier(spec, num_classes=7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    save_student(path, classifier, spec)
    loaded = load_classifier(path)
    assert (loaded.mean, loaded.std, loaded.num_classes) == (classifier.mean, classifier.std, 7)
    assert not loaded.training
    assert torch.equal(loaded(images), classifier(images))


def test_student_file_as_teacher_keeps_its_own_normalisation(tmp_path, trained):
    save_student(tmp_path / "s.pt", Classifier(trained, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 10), ModelSpec("resnet8"))
    teacher = build(checkpoint=str(tmp_path / "s.pt"))
    assert same_weights(teacher.network, trained)
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_normalisation_of_other_channels_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match=r"'resnet8': mean \(0.5,\) does not fit 3 image channels"):
        build(mean=(0.5,), std=(0.5,))


def test_student_file_does_not_drag_a_shared_storage_along(tmp_path, trained):
    base = torch.zeros(10_000_000)
    trained.fc.bias.data = base[:10]
    save_student(tmp_path / "student.pt", Classifier(trained, MEAN, STD, 10), ModelSpec("resnet8"))
    assert (tmp_path / "student.pt").stat().st_size < 1_000_000


def test_interrupted_save_keeps_the_old_file(tmp_path, trained, monkeypatch):
    path, classifier = tmp_path / "student.pt", Classifier(trained, MEAN, STD, 10)
    save_student(path, classifier, ModelSpec("resnet8"))
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_student(path, classifier, ModelSpec("resnet8"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [torch.tensor(1.0), Path("x"), {1: 2}, [object()]])
def test_values_that_need_code_are_not_written(tmp_path, trained, value):
    with pytest.raises(TypeError, match="'top1'"):
        save_student(tmp_path / "s.pt", Classifier(trained, MEAN, STD, 10), ModelSpec("resnet8"), {"top1": value})
    assert not list(tmp_path.iterdir())


def test_extra_entries_cannot_replace_ours(tmp_path, trained):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'name'"):
        save_student(tmp_path / "s.pt", Classifier(trained, MEAN, STD, 10), ModelSpec("resnet8"), {"name": "vgg8"})


@pytest.mark.parametrize("meta", [{}, {"meta": "notes"}, {"meta": {"format": "vision_kd.student/2"}}])
def test_other_files_do_not_rebuild_a_classifier(tmp_path, trained, meta):
    torch.save({"model": trained.state_dict()} | meta, tmp_path / "teacher.pth")
    with pytest.raises(CheckpointError, match=r"teacher\.pth does not describe its network .*build_classifier"):
        load_classifier(tmp_path / "teacher.pth")


# ---- exported programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV2"])
@pytest.mark.quick("resnet8")
def test_exported_program_round_trip(tmp_path, name):
    classifier, path = build(name), tmp_path / "student.pt2"
    export(classifier, path, torch.rand(1, 3, 32, 32))
    assert classifier.training
    program = torch.export.load(path).module()
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        torch.testing.assert_close(program(images), classifier.eval()(images))


def test_export_wants_its_own_suffix(tmp_path, trained):
    with pytest.raises(ValueError, match=r"end in \.pt2, got"):
        export(Classifier(trained, MEAN, STD, 10), tmp_path / "student.onnx", torch.rand(1, 3, 32, 32))


def test_unknown_set_of_published_weights_lists_those_there_are():
    with pytest.raises(ValueError, match=r"IMAGENET1K_V9.* IMAGENET1K_V1"):
        build("torchvision/resnet50", num_classes=1000, pretrained="IMAGENET1K_V9")
