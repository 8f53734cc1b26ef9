"""The data sets: their recipes, what they need on disk, and what they say when it is not there."""

import gzip
import hashlib
import pickle
import urllib.request
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.datasets import load_digits

from vision_kd.data import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageDataModule, ImageFolder, base, fashion_mnist
from vision_kd.data.base import stratified_order


@pytest.fixture(autouse=True)
def no_data_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_DATA", str(tmp_path / "kd_data"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")


def rank(rank, world_size):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix=".gz", counts=(40, 20)):
    generator = np.random.default_rng(0)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        write_idx(
            folder / f"{split}-images-idx3-ubyte{suffix}", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        )
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


def write_tree(root, splits=("train", "val"), classes=("cat", "dog"), images=3, size=32):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = np.full((size, size, 3), 20 * label + index, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def check_contract(data, channels, size, classes):
    """A data module holds what the LightningModule relies on."""
    assert isinstance(data, ImageDataModule)
    assert (data.in_channels, data.image_size, data.num_classes) == (channels, size, classes)
    assert len(data.class_names) == classes
    assert len(data.mean) == len(data.std) == channels
    data.prepare_data()
    data.setup("fit")
    data.views = ("weak", "strong")
    views, target = next(iter(data.train_dataloader()))
    assert list(views) == ["weak", "strong"]
    clean, val_target = next(iter(data.val_dataloader()))
    assert list(clean) == ["clean"]
    for view, labels in ((views["weak"], target), (views["strong"], target), (clean["clean"], val_target)):
        assert view.dtype == torch.float32
        assert view.shape == (len(labels), channels, size, size)
        assert 0 <= view.min() < 0.1
        assert 0.1 < view.max() <= 1
        assert labels.dtype == torch.int64
    assert len(target) == data.batch_size
    assert not torch.equal(views["weak"], views["strong"])


def test_digits():
    data = Digits()
    check_contract(data, 1, 8, 10)
    (train, _), (val, val_labels) = data._splits[True], data._splits[False]
    assert (len(train), len(val)) == (1297, 500)
    everything = torch.cat([train, val])
    original = torch.from_numpy(load_digits().images).float()
    assert torch.allclose(everything.float().sum(), original.sum() * 255 / 16, rtol=1e-3)
    assert len(torch.cat([train, val]).flatten(1).unique(dim=0)) == len(original.flatten(1).unique(dim=0))
    assert val_labels.bincount().min() >= 49
    assert val_labels.bincount().max() <= 51
    assert (train.float() / 255).mean().item() == pytest.approx(data.mean[0], abs=2e-3)
    assert (train.float() / 255).std().item() == pytest.approx(data.std[0], abs=2e-3)
    again = Digits(seed=5)
    again.setup()
    assert torch.equal(again._splits[True][0], train), "the split must not depend on the seed"


def test_stratified_order_is_balanced_in_every_prefix():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    order = stratified_order(labels)
    assert sorted(order.tolist()) == list(range(100))
    counts = torch.nn.functional.one_hot(labels[order]).cumsum(0)
    expected = torch.arange(1, 101)[:, None] * torch.tensor([0.6, 0.3, 0.1])
    assert (counts - expected).abs().max() < 2
    assert not torch.equal(order, stratified_order(labels, seed=1))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["root", "torchvision", "default", "debian"])
def test_fashion_mnist_is_found(tmp_path, place, suffix):
    folders = {
        "root": tmp_path / "mine",
        "torchvision": tmp_path / "mine" / "FashionMNIST" / "raw",
        "default": tmp_path / "kd_data",
        "debian": tmp_path / "debian",
    }
    write_fashion(folders[place], suffix)
    root = str(tmp_path / "mine") if place in ("root", "torchvision") else None
    check_contract(FashionMNIST(root, batch_size=8), 1, 28, 10)


def test_fashion_mnist_equals_torchvisions_reader(tmp_path):
    write_fashion(tmp_path / "FashionMNIST" / "raw", "")
    data = FashionMNIST(str(tmp_path))
    data.setup()
    for train in (True, False):
        reference = torchvision.datasets.FashionMNIST(tmp_path, train=train)
        assert torch.equal(data._splits[train][0][:, 0], reference.data)
        assert torch.equal(data._splits[train][1], reference.targets)


def test_a_given_root_is_the_only_place(tmp_path):
    write_fashion(tmp_path / "debian")
    with pytest.raises(ValueError, match="mine") as caught:
        FashionMNIST(str(tmp_path / "mine")).setup()
    assert "debian" not in str(caught.value)


def test_missing_fashion_mnist_names_all_places_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="download=true") as caught:
        FashionMNIST().setup()
    for part in (tmp_path / "kd_data", tmp_path / "debian", "apt-get install dataset-fashion-mnist", "KD_DATA"):
        assert str(part) in str(caught.value)


@pytest.mark.parametrize(("cls", "name"), [(CIFAR10, "cifar-10-batches-py"), (CIFAR100, "cifar-100-python")])
def test_missing_cifar_names_all_places_and_the_remedy(tmp_path, cls, name):
    with pytest.raises(ValueError, match="download=true") as caught:
        cls().setup()
    assert str(tmp_path / "kd_data" / name) in str(caught.value)
    assert str(tmp_path / "kd_data" / "train") in str(caught.value)


def test_download_is_asked_for_only_when_needed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda root, download: calls.append((root, download)))
    FashionMNIST(download=False).prepare_data()
    FashionMNIST(download=True).prepare_data()
    write_fashion(tmp_path / "kd_data")
    FashionMNIST(download=True).prepare_data()
    monkeypatch.setattr(CIFAR10, "archive", type("Archive", (), {"base_folder": "a", "__init__": _record(calls)}))
    CIFAR10(download=False).prepare_data()
    CIFAR10(download=True).prepare_data()
    assert calls == [(tmp_path / "kd_data", True)] * 2


@pytest.mark.parametrize("data", [FashionMNIST, CIFAR10, CIFAR100])
def test_a_download_without_network_names_setting_and_folder(tmp_path, monkeypatch, data):
    def refused(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    with pytest.raises(ValueError, match=rf"(?s)data\.download: .*{tmp_path / 'kd_data'}"):
        data(download=True).prepare_data()


def _record(calls):
    return lambda self, root, download: calls.append((root, download))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["packed", "unpacked", "empty", "flipped"])
def test_a_damaged_idx_file_is_named(tmp_path, file, damage):
    write_fashion(tmp_path)
    content = (tmp_path / file).read_bytes()
    middle = len(content) // 2
    damaged = {
        "packed": content[:middle],
        "unpacked": gzip.compress(gzip.decompress(content)[:-3]),
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
    }[damage]
    (tmp_path / file).write_bytes(damaged)
    with pytest.raises(ValueError, match=file):
        FashionMNIST(str(tmp_path)).setup()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_that_unpacks_to_more_than_is_possible_is_refused(tmp_path, monkeypatch, suffix):
    write_fashion(tmp_path, suffix)
    monkeypatch.setattr(fashion_mnist, "MOST_BYTES", 40 * 28 * 28 + 15)  # one byte less than the training images take
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte{suffix} unpacks to more"):
        FashionMNIST(str(tmp_path)).setup()


def test_a_data_set_without_images_is_refused(tmp_path):
    write_fashion(tmp_path, counts=(0, 20))
    with pytest.raises(ValueError, match="train-images"):
        FashionMNIST(str(tmp_path)).setup()


def test_images_and_labels_of_different_length_are_refused(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(39, dtype=np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        FashionMNIST(str(tmp_path)).setup()


def test_train_subset_is_balanced_and_bounded(tmp_path):
    data = Digits(train_subset=100)
    data.setup()
    assert len(data._splits[True][0]) == 100
    assert data._splits[True][1].bincount().min() >= 9
    assert len(data._splits[False][0]) == 500
    for size in (0, 1298):
        with pytest.raises(ValueError, match=rf"train_subset must be in \[1, 1297\].*got {size}"):
            Digits(train_subset=size).setup()


def test_setup_reads_only_the_splits_it_needs(tmp_path):
    write_fashion(tmp_path)
    data = FashionMNIST(str(tmp_path), batch_size=8)
    data.setup("validate")
    assert list(data._splits) == [False]
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    data.setup("fit")  # the validation split is kept
    assert set(data._splits) == {True, False}


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"val_batch_size": -1}])
def test_batch_sizes_are_positive(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Digits(**options)


@pytest.mark.parametrize("views", [(), ("weak", "mild")])
def test_unknown_views_are_refused(views):
    with pytest.raises(ValueError, match="views must be some of"):
        Digits().views = views


def test_the_order_of_the_views_has_no_say():
    data = Digits()
    data.views = ("strong", "weak")
    assert data.views == ("weak", "strong")


def test_two_ranks_equal_one_process_with_the_doubled_batch():
    batches = []
    for options, trainer in (({"batch_size": 64}, None), *(({"batch_size": 32}, rank(r, 2)) for r in (0, 1))):
        data = Digits(seed=3, **options)
        data.trainer = trainer
        data.setup()
        batches.append(list(data.train_dataloader()))
    assert len({len(part) for part in batches}) == 1
    for (views, target), first, second in zip(*batches, strict=True):
        for r, (part, part_target) in enumerate((first, second)):
            assert torch.equal(part_target, target[r::2])
            assert torch.equal(part["weak"], views["weak"][r::2])


def test_tensors_move_to_the_trainers_device_once():
    data = Digits()
    data.setup()
    before = data._splits[True][0].data_ptr()
    data.trainer = rank(0, 1)
    assert data.train_dataloader().images.data_ptr() == before
    data.trainer.strategy.root_device = torch.device("meta")
    assert data.train_dataloader().images.device.type == "meta"


def write_cifar(folder, monkeypatch, cls):
    """A small archive in torchvision's layout, with the checksums that torchvision will look for."""
    archive = cls.archive
    (folder / archive.base_folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    key = "labels" if cls is CIFAR10 else "fine_labels"
    labels = [index % cls().num_classes for index in range(20)]
    names = {"label_names": list(cls.class_names), "fine_label_names": list(cls.class_names)}

    def write(name, content):
        data = pickle.dumps(content)
        (folder / archive.base_folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    monkeypatch.setattr(archive, "train_list", [write("first", {"data": pixels, key: labels})])
    monkeypatch.setattr(archive, "test_list", [write("second", {"data": pixels, key: labels})])
    name, digest = write("names", names)
    monkeypatch.setattr(archive, "meta", {**archive.meta, "filename": name, "md5": digest})
    return pixels.reshape(20, 3, 32, 32)


@pytest.mark.parametrize(("cls", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_archive(tmp_path, monkeypatch, cls, classes):
    pixels = write_cifar(tmp_path, monkeypatch, cls)
    data = cls(str(tmp_path), batch_size=8)
    check_contract(data, 3, 32, classes)
    assert torch.equal(data._splits[True][0], torch.from_numpy(pixels))
    assert data._splits[True][1].tolist() == [index % classes for index in range(20)]
    file = tmp_path / cls.archive.base_folder / "first"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=cls.archive.base_folder):
        cls(str(tmp_path)).setup()


def test_cifar_class_names_are_torchvisions_sorted_names():
    assert list(CIFAR10.class_names) == sorted(CIFAR10.class_names)
    assert list(CIFAR100.class_names) == sorted(set(CIFAR100.class_names))


def test_cifar_from_an_image_tree(tmp_path):
    write_tree(tmp_path, ("train", "test"), CIFAR10.class_names)
    data = CIFAR10(str(tmp_path), batch_size=8)
    check_contract(data, 3, 32, 10)
    images, labels = data._splits[True]
    assert labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([20 * i + j for i in range(10) for j in range(3)]).byte())


def test_cifar_tree_refuses_other_sizes_and_classes(tmp_path):
    write_tree(tmp_path / "large", ("train", "test"), CIFAR10.class_names, size=33)
    with pytest.raises(ValueError, match=r"airplane.0\.png .*33, 33"):
        CIFAR10(str(tmp_path / "large")).setup()
    write_tree(tmp_path / "other", ("train", "test"), (*CIFAR10.class_names[1:], "plane"))
    with pytest.raises(ValueError, match=r"airplane.*plane"):
        CIFAR10(str(tmp_path / "other")).setup()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_folder(tmp_path, num_workers):
    write_tree(tmp_path, classes=("ant", "bee", "cat"), images=4, size=40)
    data = ImageFolder(str(tmp_path), image_size=32, num_workers=num_workers, batch_size=5)
    check_contract(data, 3, 32, 3)
    assert data.class_names == ("ant", "bee", "cat")
    clean = [(views["clean"], target) for views, target in data.val_dataloader()]
    assert torch.cat([target for _, target in clean]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = torch.tensor([20 * label + index for label in range(3) for index in range(4)]) / 255
    assert torch.allclose(torch.cat([images for images, _ in clean])[:, 1, 16, 16], expected)


def test_image_folder_views_depend_on_seed_and_epoch_alone(tmp_path):
    write_tree(tmp_path, images=4)
    for file in tmp_path.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)

    def epoch(number, rank_=0, world_size=1, **options):
        data = ImageFolder(str(tmp_path), image_size=16, **{"num_workers": 0, "batch_size": 4, **options})
        data.views = ("weak", "strong")
        data.trainer = rank(rank_, world_size)
        data.setup()
        torch.manual_seed(len(options))
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)  # as Lightning does
        batches = list(loader)
        return {name: torch.stack([views[name] for views, _ in batches]) for name in data.views}

    first = epoch(1)
    workers, later, reseeded = epoch(1, num_workers=2), epoch(2), epoch(1, seed=9)
    halves = [epoch(1, r, 2, batch_size=2) for r in (0, 1)]
    for name in ("weak", "strong"):
        assert torch.equal(first[name], workers[name])
        assert not torch.equal(first[name], later[name])
        assert not torch.equal(first[name], reseeded[name])
        assert torch.equal(first[name], torch.stack([half[name] for half in halves], dim=2).flatten(1, 2))


def test_image_folder_needs_both_splits(tmp_path):
    write_tree(tmp_path, splits=("train",))
    with pytest.raises(ValueError, match=str(tmp_path / "val")):
        ImageFolder(str(tmp_path)).setup()


def test_image_folder_classes_must_agree(tmp_path):
    write_tree(tmp_path, ("train",), ("cat", "dog"))
    write_tree(tmp_path, ("val",), ("cat", "fox"))
    with pytest.raises(ValueError, match=r"val .*dog.*fox"):
        ImageFolder(str(tmp_path)).setup()


def test_empty_folders_are_named(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "val" / "eel").mkdir()
    with pytest.raises(ValueError, match="eel"):
        ImageFolder(str(tmp_path)).setup()
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train .*data\.root"):
        _ = ImageFolder(str(tmp_path / "empty")).num_classes


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    write_tree(tmp_path, images=1)
    file = tmp_path / "val" / "dog" / f"0{suffix}"
    (tmp_path / "val" / "dog" / "0.png").unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    data = ImageFolder(str(tmp_path), image_size=32, num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match=rf"dog.0\{suffix}"):
        list(data.val_dataloader())


@pytest.mark.parametrize("cls", [Digits, FashionMNIST, CIFAR10, CIFAR100])
def test_the_command_line_can_build_every_data_set(cls):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    arguments = [f"--data=vision_kd.data.{cls.__name__}", "--data.batch_size=7", "--data.train_subset=20"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert type(data) is cls
    assert (data.batch_size, data.train_subset) == (7, 20)


def test_data_root_prefers_argument_then_environment(monkeypatch, tmp_path):
    assert base.data_root("/somewhere").as_posix() == "/somewhere"
    assert base.data_root() == tmp_path / "kd_data"
    monkeypatch.delenv("KD_DATA")
    assert base.data_root().parts[-2:] == (".cache", "kd_data")
