"""Image files: found or named, decoded as a viewer shows them, or refused with the file's name."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torchvision.transforms.v2 import functional as F

from vision_kd.data import CIFAR10, ImageFolder
from vision_kd.data.image_files import CHECKED, find_images, header_size, read_rgb, spread
from vision_kd.data.image_folder import clean_view

RED, WHITE = [255, 0, 0], [255, 255, 255]


def noise(height=12, width=20, channels=(3,)):
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def write(path, pixels=None, kind=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if pixels is None else pixels).save(path, kind, **options)
    return path


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def rgb(path):
    return read_rgb(path).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- pixels

UPRIGHT = {  # what the stored rows and columns are, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_stands_upright_by_its_exif_orientation(tmp_path, kind, orientation):
    stored, options = noise(), {"lossless": True} if kind == "WEBP" else {}
    plain, turned = (write(tmp_path / str(n), stored, kind, exif=exif(n), **options) for n in (1, orientation))
    expected = UPRIGHT[orientation](rgb(plain))
    assert (rgb(turned) == expected).all()
    assert header_size(turned) == expected.shape[1::-1]


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    """ExifTool writes it there."""
    path, stored = tmp_path / "a.png", noise()
    Image.fromarray(stored).save(path)
    content = path.read_bytes()
    payload = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(payload) - 4) + payload + struct.pack(">I", zlib.crc32(payload))
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert (rgb(path) == UPRIGHT[6](stored)).all()


def test_damaged_exif_data_turn_nothing(tmp_path):
    stored = noise()
    path = write(tmp_path / "a.png", stored, exif=b"Exif\0\0XX\0*\0\0\0\x08\0\xff")
    assert (rgb(path) == stored).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_greys_of_16_bits_keep_their_upper_8(tmp_path, kind):
    grey = np.array([[0, 255, 256, 32768, 65535], [1, 511, 512, 40000, 65279]], dtype=np.uint16)
    path = tmp_path / "a"
    if kind == "PPM":
        path.write_bytes(b"P5\n5 2\n65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path, kind)
    assert (rgb(path) == (grey // 256)[:, :, None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_defined_white_are_refused(tmp_path, dtype):
    path = write(tmp_path / "scan.tif", np.ones((4, 5), dtype))
    for read in (read_rgb, header_size):
        with pytest.raises(ValueError, match=r"scan\.tif .*white is not defined"):
            read(path)


@pytest.mark.parametrize("tag", [{262: 0}, {258: 12}], ids=["white is zero", "12 bits"])
def test_greys_of_16_bits_that_mean_something_else_are_refused(tmp_path, tag):
    path = write(tmp_path / "scan.tif", np.full((4, 5), 3000, np.uint16))
    content = bytearray(path.read_bytes())
    ((number, value),) = tag.items()
    place = content.index(struct.pack("<HHI", number, 3, 1))
    content[place + 8 : place + 10] = struct.pack("<H", value)
    path.write_bytes(content)
    for read in (read_rgb, header_size):
        with pytest.raises(ValueError, match=r"scan\.tif .*white is not defined"):
            read(path)


def test_transparent_parts_are_shown_on_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, 0] = [*RED, 255]
    pixels[:, 1] = [0, 0, 0, 51]  # a fifth of black
    expected = np.array([RED, [204] * 3, WHITE])
    for kind in ("PNG", "WEBP", "TIFF"):
        path = write(tmp_path / kind, pixels, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        assert (rgb(path)[0] == expected).all(), kind


def palette(colours=(RED, [0, 0, 255])):
    made = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    made.putpalette([value for colour in colours for value in colour])
    return made


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_with_transparency_is_shown_on_white(tmp_path, transparency):
    path = tmp_path / "a.png"
    palette().save(path, transparency=transparency)
    assert rgb(path).tolist() == [[RED, WHITE]]


def test_transparency_of_grey_one_colour_and_gif(tmp_path):
    write(tmp_path / "la.png", np.array([[[7, 255], [7, 0]]], np.uint8))
    assert rgb(tmp_path / "la.png").tolist() == [[[7, 7, 7], WHITE]]
    write(tmp_path / "l.png", np.array([[7, 9]], np.uint8), transparency=9)
    assert rgb(tmp_path / "l.png").tolist() == [[[7, 7, 7], WHITE]]
    write(tmp_path / "rgb.png", np.array([[RED, [0, 0, 9]]], np.uint8), transparency=(0, 0, 9))
    assert rgb(tmp_path / "rgb.png").tolist() == [[RED, WHITE]]
    palette().save(tmp_path / "a.gif", transparency=1)
    assert rgb(tmp_path / "a.gif").tolist() == [[RED, WHITE]]


def test_a_wholly_transparent_image_is_refused(tmp_path):
    path = write(tmp_path / "empty.png", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"empty\.png .*transparent"):
        read_rgb(path)


def test_modes_without_transparency(tmp_path):
    grey = noise(channels=())
    assert (rgb(write(tmp_path / "l.png", grey)) == grey[:, :, None]).all()
    bits = grey > 127
    assert (rgb(write(tmp_path / "1.png", bits)) == np.where(bits, 255, 0)[:, :, None]).all()
    palette().save(tmp_path / "p.png")
    assert rgb(tmp_path / "p.png").tolist() == [[RED, [0, 0, 255]]]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(rgb(tmp_path / "cmyk.jpg").astype(int) - RED).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"moving.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    for read in (read_rgb, header_size):
        with pytest.raises(ValueError, match=r"moving\.\w+ .*several frames or pages"):
            read(path)


def test_the_first_image_of_an_mpo_is_the_photograph(tmp_path):
    """Phones store a preview or a depth map behind it."""
    photograph, preview = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    photograph.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert np.abs(rgb(tmp_path / "a.jpg").astype(int) - RED).max() <= 2


# ---------------------------------------------------------------- damage and hostile files


def bomb():
    """A PNG of 200 million pixels in 25 kB."""
    made = io.BytesIO()
    Image.new("1", (20000, 10000)).save(made, "PNG")
    return made.getvalue()


def long_text():
    text, made = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("history", "a" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(made, "PNG", pnginfo=text)
    return made.getvalue()


def postscript():
    """Pillow would start Ghostscript on it."""
    made = io.BytesIO()
    Image.new("RGB", (8, 8)).save(made, "EPS")
    return made.getvalue()


def seeks_before_the_start():
    """A TIFF whose directory is said to lie beyond any file."""
    return b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 + 5) + bytes(40)


UNREADABLE = {
    "bomb": bomb,
    "long text": long_text,
    "postscript": postscript,
    "offset": seeks_before_the_start,
    "empty": lambda: b"",
    "web page": lambda: b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content())
    for read in (read_rgb, header_size):
        with pytest.raises(ValueError, match=r"odd\.jpg"):
            read(tmp_path / "odd.jpg")


def test_a_wrong_ending_does_not_matter(tmp_path):
    stored = noise()
    assert (rgb(write(tmp_path / "a.jpg", stored, "PNG")) == stored).all()


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_rgb(tmp_path / "gone.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF"])
def test_damage_of_any_kind_is_named_or_harmless(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content = write(tmp_path / "whole", kind=kind).read_bytes()
    path, draws = tmp_path / "damaged", np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content[: draws.integers(len(content))] if draws.random() < 0.3 else content)
        for place in draws.integers(len(damaged), size=2) if damaged else ():
            damaged[place] = draws.integers(256)
        path.write_bytes(damaged)
        for read in (read_rgb, header_size):
            with warnings.catch_warnings(action="ignore"):
                try:
                    read(path)
                except ValueError as error:
                    assert str(path) in str(error)  # noqa: PT017 (most of the files can be read)


# ---------------------------------------------------------------- folders


def tree(root, splits=("train", "val"), classes=("cat", "dog"), size=16):
    for split in splits:
        for name in classes:
            write(root / split / name / "1.png", np.zeros((size, size, 3), np.uint8))
    return root


def files(root, split="train"):
    data = ImageFolder(str(root), image_size=8, num_workers=0, batch_size=1)
    data.setup("fit")
    return [path.relative_to(root / split).as_posix() for path in data._files[split][0]]


@pytest.mark.parametrize("name", ["2.JPG", "2.jfif", "2.jpe", "2.gif", "2.pgm", "2.pbm", "2.jp2", "2.webp", "2.TIF"])
def test_every_ending_of_an_image_is_found(tmp_path, name):
    kinds = {"jpg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"}
    pixels = np.zeros((8, 8), bool if name.endswith("pbm") else np.uint8)
    write(tree(tmp_path) / "train/cat" / name, pixels, kinds.get(name[2:].lower()))
    assert files(tmp_path) == ["cat/1.png", f"cat/{name}", "dog/1.png"]


def test_sub_folders_and_links_are_followed(tmp_path):
    tree(tmp_path)
    write(tmp_path / "train/cat/black/2.png")
    write(tmp_path / "disk/3.png")
    (tmp_path / "train/cat/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "train/cat/4.png").symlink_to(tmp_path / "disk/3.png")
    (tmp_path / "train/dog").rename(tmp_path / "dog")
    (tmp_path / "train/dog").symlink_to(tmp_path / "dog")
    assert files(tmp_path) == ["cat/1.png", "cat/4.png", "cat/black/2.png", "cat/linked/3.png", "dog/1.png"]


@pytest.mark.parametrize("target", ["cat", ".", "cat/more"])
def test_a_link_that_leads_back_is_refused(tmp_path, target):
    tree(tmp_path)
    (tmp_path / "train/cat/more").mkdir()
    (tmp_path / "train/cat/more/back").symlink_to(tmp_path / "train" / target)
    with pytest.raises(ValueError, match=r"train.cat.more.back"):
        files(tmp_path)


LEFT_OUT = ["train/cat/2.heic", "train/cat/notes.txt", "train/cat/noending", "train/cat/.hidden.png", "train/3.png"]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_file_that_is_left_out_is_named(tmp_path, name):
    write(tree(tmp_path) / name, kind="PNG")
    with pytest.warns(UserWarning, match=rf"{tmp_path / 'train'}: 1 .*{tmp_path / name}"):
        assert files(tmp_path) == ["cat/1.png", "dog/1.png"]


def test_hidden_folders_and_broken_links_are_named(tmp_path):
    write(tree(tmp_path) / "train/.git/1.png")
    write(tmp_path / "train/cat/.ipynb_checkpoints/1.png")
    (tmp_path / "train/cat/2.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "train/cat/3.png")  # to open it would wait for ever
    with pytest.warns(UserWarning, match=r"train: 4 .*1 \.git"):
        assert files(tmp_path) == ["cat/1.png", "dog/1.png"]


def test_what_file_managers_write_is_neither_used_nor_named(tmp_path):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.png"):
        for folder in ("train", "train/cat"):
            path = tree(tmp_path) / folder / name
            path.write_bytes(b"\0")
    assert files(tmp_path) == ["cat/1.png", "dog/1.png"]


def test_a_class_without_images_names_what_is_there(tmp_path):
    tree(tmp_path)
    (tmp_path / "val/dog/1.png").rename(tmp_path / "val/dog/1.heic")
    with pytest.raises(ValueError, match=r"val.dog holds no image .*1\.heic"):
        files(tmp_path)


def test_names_outside_utf8(tmp_path):
    folder = os.fsencode(tree(tmp_path) / "train/cat")
    (tmp_path / "train/cat/1.png").rename(os.fsdecode(folder + b"/caf\xe9.png"))
    data = ImageFolder(str(tmp_path), image_size=8, num_workers=1, batch_size=2)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))[1]) == 2


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[2Jb", b"c\nd"])
def test_a_class_whose_name_cannot_be_shown_is_refused(tmp_path, name):
    write(tree(tmp_path) / "train" / os.fsdecode(name) / "1.png")
    with pytest.raises(ValueError, match=r"train: .*rename it") as caught:
        files(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named_before_the_run(tmp_path, split):
    (tree(tmp_path) / split / "dog/1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=rf"{split}.dog.1\.png"):
        files(tmp_path)
    cifar = tree(tmp_path / "cifar", ("train", "test"), CIFAR10.class_names, 32)
    name = {"val": "test"}.get(split, split)
    (cifar / name / "frog/1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=rf"{name}.frog.1\.png"):
        CIFAR10(str(cifar)).setup()


def test_many_headers_are_looked_at_in_part():
    assert list(spread(0)) == []
    assert list(spread(CHECKED)) == list(range(CHECKED))
    for count in (CHECKED + 1, 1_281_167):
        chosen = spread(count)
        assert CHECKED / 2 <= len(chosen) <= CHECKED
        assert chosen[-1] >= count - 2 * chosen.step


def test_a_worker_names_the_file(tmp_path):
    path = write(tree(tmp_path) / "val/dog/1.png", noise(200, 200))
    path.write_bytes(path.read_bytes()[:5000])
    data = ImageFolder(str(tmp_path), image_size=8, num_workers=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"val.dog.1\.png"):
        list(data.val_dataloader())


@pytest.mark.parametrize("shape", [(3, 1, 100_000), (3, 100_000, 1)])
def test_a_long_strip_is_cut_before_it_is_scaled(monkeypatch, shape):
    """Scaled as a whole, a strip of a million pixels by one has 65 billion."""
    scaled, resize = [], F.resize

    def recorded(image, *rest, **options):
        scaled.append(image.numel())
        return resize(image, *rest, **options)

    monkeypatch.setattr(F, "resize", recorded)
    image = torch.full(shape, 9, dtype=torch.uint8)
    image.flatten(1)[:, 49_990:50_010] = 200
    assert clean_view(image, 0, size=8)["clean"].unique().tolist() == [200]
    assert scaled[0] < 100


def test_images_are_listed_in_the_order_of_their_names(tmp_path):
    for name in ("b/1.png", "a.png", "c.png", "b/0.png"):
        write(tmp_path / name)
    images, left_out = find_images(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in images) == ["a.png", "b/0.png", "b/1.png", "c.png"]
    assert left_out == []
