"""The evaluate command: self-describing student files, foreign weight files, errors, export."""

import pytest
import torch
import torchvision

from vision_kd.data import Digits
from vision_kd.evaluate import main
from vision_kd.fit import build, run
from vision_kd.models import ModelSpec, build_classifier, save_student
from vision_kd.training.metrics import accuracy

DATA = {"class_path": "vision_kd.data.Digits", "init_args": {"batch_size": 32}}


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(1)
    return build_classifier(ModelSpec("resnet8"), num_classes=10, in_channels=1, mean=(0.3,), std=(0.4,)).eval()


@pytest.fixture
def student_file(student, tmp_path):
    path = tmp_path / "student.pt"
    save_student(path, student, ModelSpec("resnet8"), extra={"data": DATA})
    return path


def expected_accuracy(model):
    data = Digits()
    data.setup("validate")
    images, target = (
        torch.cat(parts) for parts in zip(*[(v["clean"], t) for v, t in data.val_dataloader()], strict=True)
    )
    with torch.no_grad():
        ranks = model(images).argsort(-1, descending=True)
    hits = ranks == target[:, None]
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits[:, :5].any(-1).float().mean().item()}


def test_student_file_needs_nothing_else(student, student_file, capsys):
    result = main(["--ckpt", str(student_file), "--device", "cpu"])
    assert result == pytest.approx(expected_accuracy(student))
    assert "Digits validation set" in capsys.readouterr().out


def test_other_files_need_model_and_data(student, tmp_path):
    path = tmp_path / "bundle.pt"
    torch.save({"model": student.network.state_dict()}, path)
    with pytest.raises(ValueError, match="does not say which data"):
        main(["--ckpt", str(path)])
    result = main(["--ckpt", str(path), "--model.name", "resnet8", "--data", "Digits", "--device", "cpu"])
    data = Digits()
    bare = build_classifier(
        ModelSpec("resnet8", checkpoint=str(path)), num_classes=10, in_channels=1, mean=data.mean, std=data.std
    ).eval()
    assert result == pytest.approx(expected_accuracy(bare))


def test_classes_must_agree(tmp_path):
    model = build_classifier(ModelSpec("resnet8"), num_classes=7, in_channels=1, mean=(0.3,), std=(0.4,))
    path = tmp_path / "seven.pt"
    save_student(path, model, ModelSpec("resnet8"), extra={"data": DATA})
    with pytest.raises(ValueError, match="has 7 classes, the data 10"):
        main(["--ckpt", str(path)])


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.pt"):
        main(["--ckpt", "nowhere.pt"])


@pytest.mark.parametrize(
    ("flag", "path", "message"),
    [
        ("--images", "file", r"file: .*file is a file; name a folder"),
        ("--results", "", "is a folder; name a file"),
        ("--export", "file/x", r"file is a file; name a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, flag, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^{flag} {tmp_path}.*{message}$"):
        main(["--ckpt", "nowhere.pt", flag, str(tmp_path / path)])


def test_a_program_of_another_kind_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"exported programs end in \.pt2, got 'x\.onnx'"):
        main(["--ckpt", "nowhere.pt", "--export", "x.onnx"])


def write_folder(root, names, splits=("val",)):
    for split in splits:
        for label, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            picture = torch.full((3, 8, 8), 0.2 + 0.3 * label)
            torchvision.utils.save_image(picture, root / split / name / "0.png")
    return ["--data=ImageFolder", f"--data.root={root}", "--data.image_size=8", "--data.num_workers=0"]


@pytest.fixture
def fruit_file(tmp_path):
    data_spec = {
        "num_classes": 2,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "class_names": ("apple", "pear"),
        "image_size": 8,
    }
    path = tmp_path / "fruit.pt"
    save_student(path, build_classifier(ModelSpec("resnet8"), **data_spec), ModelSpec("resnet8"))
    return path


def test_a_folder_with_pictures_to_evaluate_alone(fruit_file, tmp_path):
    data = write_folder(tmp_path / "data", ("apple", "pear"))
    assert main(["--ckpt", str(fruit_file), "--device=cpu", *data])["top5"] == 1


@pytest.mark.parametrize(
    ("names", "message"), [(("grass", "tomato"), "only there apple, pear"), (("apple", "fig"), "only there pear")]
)
def test_classes_of_other_names_are_refused(fruit_file, tmp_path, names, message):
    data = write_folder(tmp_path / "data", names)
    with pytest.raises(ValueError, match=rf"{fruit_file} was trained on other classes.*{message}"):
        main(["--ckpt", str(fruit_file), "--device=cpu", *data])
    with pytest.raises(ValueError, match=message):  # also where the command line names the network
        main(["--ckpt", str(fruit_file), "--model.name=resnet8", "--device=cpu", *data])


def test_channels_and_sizes_are_compared(fruit_file, tmp_path, caplog):
    torch.save({"model": torch.load(fruit_file, weights_only=True)["model"]}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"has 2 classes.* with 10 classes"):
        main(["--ckpt", str(tmp_path / "bare.pth"), "--model.name=resnet8", "--data=Digits", "--device=cpu"])
    data = write_folder(tmp_path / "data", ("apple", "pear"))
    main(["--ckpt", str(fruit_file), "--device=cpu", *data, "--data.image_size=16"])
    assert "was trained on images of 8 pixels, the data have 16" in caplog.text


def test_a_training_checkpoint_describes_itself(digits_args, tmp_path):
    result = run(build([*digits_args, "--config=methods/vanilla", "--model.topk=null", "--model.gsnr_every=0"]))
    path = tmp_path / "run/checkpoints/last.ckpt"
    found = main(["--ckpt", str(path), "--device=cpu"])
    assert found == pytest.approx({name: result.last[name] for name in ("top1", "top5")})
    with pytest.raises(ValueError, match=r"last\.ckpt was trained on other classes.*only there 0, 1, 2"):
        main(["--ckpt", str(path), "--model.name=resnet8", "--data=CIFAR10", "--device=cpu"])


def test_export_runs_without_this_project(student, student_file, tmp_path):
    main(["--ckpt", str(student_file), "--device", "cpu", "--export", str(tmp_path / "student.pt2")])
    program = torch.export.load(tmp_path / "student.pt2").module()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(program(images), student(images))


def test_accuracy_of_a_perfect_model():
    target = torch.arange(10)
    loader = [({"clean": torch.nn.functional.one_hot(target).float()}, target)]
    assert accuracy(torch.nn.Identity(), loader, 10, "cpu") == {"top1": 1.0, "top5": 1.0}


def test_logits_that_are_no_numbers_are_no_first_class():
    images = torch.eye(3)
    images[1, 2] = torch.nan
    loader = [({"clean": images}, torch.tensor([0, 0, 2]))]
    with pytest.raises(ValueError, match=r"^1 images have logits"):
        accuracy(torch.nn.Identity(), loader, 3, "cpu")
