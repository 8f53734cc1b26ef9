"""The evaluate command: self-describing student files, foreign weight files, errors, export."""

import pytest
import torch

from vision_kd.data import Digits
from vision_kd.evaluate import accuracy, main
from vision_kd.models import ModelSpec, build_classifier, save_student

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
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
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


def test_export_runs_without_this_project(student, student_file, tmp_path):
    main(["--ckpt", str(student_file), "--device", "cpu", "--export", str(tmp_path / "student.pt2")])
    program = torch.export.load(tmp_path / "student.pt2").module()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(program(images), student(images))


def test_accuracy_of_a_perfect_model():
    target = torch.arange(10)
    loader = [({"clean": torch.nn.functional.one_hot(target).float()}, target)]
    assert accuracy(torch.nn.Identity(), loader, 10, "cpu") == {"top1": 1.0, "top5": 1.0}
