"""Views against torchvision: every outcome, and how often each occurs."""

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vision_kd.data.augment import (
    SEED_RANGE,
    ImageDraws,
    cutout,
    distort,
    rand_augment,
    random_crop_flip,
    strong,
)


def noise(count, channels=3, height=32, width=32):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def draws(count, seed=0):
    return ImageDraws(torch.randint(SEED_RANGE, (count,), generator=torch.Generator().manual_seed(seed)))


def test_digits_of_a_seed_are_its_mixed_radix_digits():
    stream = ImageDraws(torch.tensor([5 + 7 * (2 + 3 * 11)]))
    assert [stream.below(base).item() for base in (7, 3, 100)] == [5, 2, 11]


def test_digits_are_uniform_and_independent():
    stream = draws(50_000)
    first, second = stream.below(9), stream.below(14)
    table = torch.bincount(first * 14 + second, minlength=9 * 14)
    assert chisquare(table).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width", "channels", "padding"), [(8, 8, 1, 1), (32, 32, 3, 4), (5, 7, 2, 3)])
def test_every_crop_and_flip_equals_torchvision(height, width, channels, padding):
    offsets = 2 * padding + 1
    outcomes = [(top, left, flip) for flip in (0, 1) for left in range(offsets) for top in range(offsets)]
    seeds = torch.tensor([top + offsets * (left + offsets * flip) for top, left, flip in outcomes])
    images = noise(len(outcomes), channels, height, width)
    views = random_crop_flip(images, ImageDraws(seeds), padding=padding)
    for image, view, (top, left, flip) in zip(images, views, outcomes, strict=True):
        expected = F.crop(F.pad(image, [padding]), top, left, height, width)
        assert torch.equal(view, F.horizontal_flip(expected) if flip else expected), (top, left, flip)


def test_no_padding_and_no_flip_leaves_the_images():
    images = noise(5)
    assert torch.equal(random_crop_flip(images, draws(5), padding=0, flip=False), images)


def test_without_flip_every_view_is_a_crop():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    views = random_crop_flip(image.expand(300, 1, 3, 3), draws(300), padding=1, flip=False)
    padded = F.pad(image[0], [1])
    crops = {F.crop(padded, top, left, 3, 3).numpy().tobytes() for top in range(3) for left in range(3)}
    assert {view.numpy().tobytes() for view in views} == crops


def test_outcomes_are_as_frequent_as_torchvisions():
    padding, count = 1, 9000
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    outcomes = {}
    for index in range(18):
        view = random_crop_flip(image[None], ImageDraws(torch.tensor([index])), padding=padding)
        outcomes[view.numpy().tobytes()] = index
    assert len(outcomes) == 18

    def frequencies(views):
        return torch.bincount(torch.tensor([outcomes[view.numpy().tobytes()] for view in views]), minlength=18)

    torchvision = v2.Compose([v2.RandomCrop(3, padding=padding), v2.RandomHorizontalFlip()])
    ours = frequencies(random_crop_flip(image.expand(count, 1, 3, 3), draws(count), padding=padding))
    theirs = frequencies(torchvision(image) for _ in range(count))
    assert chisquare(ours).pvalue > 1e-3
    assert chi2_contingency([ours.tolist(), theirs.tolist()]).pvalue > 1e-3


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
@pytest.mark.parametrize("magnitude", [10, 23])
def test_each_randaugment_operation_equals_torchvision(monkeypatch, channels, size, magnitude):
    names = list(v2.RandAugment._AUGMENTATION_SPACE)
    images = noise(2, channels, size, size)
    for code in range(2 * len(names)):
        name, negative = names[code // 2], code % 2
        single = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}
        reference = v2.RandAugment(num_ops=1, magnitude=magnitude)
        reference._AUGMENTATION_SPACE = single
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, negative=negative: torch.tensor(0.0 if negative else 1.0))
            expected = torch.stack([reference(image) for image in images])
        seeds = ImageDraws(torch.full((2,), code))
        view = rand_augment(images, seeds, num_ops=1, magnitude=magnitude)
        assert torch.equal(view, expected), (name, negative)


@pytest.mark.parametrize("augment", [random_crop_flip, distort])
def test_an_image_gets_the_same_view_in_any_batch(augment):
    images, seeds = noise(12), torch.randint(2**62, (12,))
    together = augment(images, ImageDraws(seeds))
    alone = [augment(images[i : i + 1], ImageDraws(seeds[i : i + 1])) for i in range(12)]
    assert torch.equal(together, torch.cat(alone))


def test_two_operations_follow_each_other():
    images, seeds = noise(20), torch.randint(2**62, (20,))
    stream = ImageDraws(seeds)
    once = rand_augment(images, stream, num_ops=1)
    assert torch.equal(rand_augment(images, ImageDraws(seeds), num_ops=2), rand_augment(once, stream, num_ops=1))


def test_cutout_covers_the_square_around_a_uniform_centre():
    height, width, size = 5, 7, 4
    centres = [(row, column) for column in range(width) for row in range(height)]
    images = noise(len(centres), 2, height, width)
    views = cutout(images, ImageDraws(torch.arange(len(centres))), size=size)
    for image, view, (row, column) in zip(images, views, centres, strict=True):
        expected = image.clone()
        expected[:, max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] = 127  # FixMatch's grey
        assert torch.equal(view, expected)


def test_strong_is_weak_then_randaugment_then_half_size_cutout():
    images, seeds = noise(10), torch.randint(2**62, (10,))
    stream = ImageDraws(seeds)
    expected = cutout(rand_augment(random_crop_flip(images, stream), stream), stream, size=16)
    assert torch.equal(strong(images, ImageDraws(seeds), weak=random_crop_flip), expected)
    assert expected.dtype == torch.uint8


def test_views_leave_images_and_global_random_state_alone():
    images = noise(10)
    before, state = images.clone(), torch.get_rng_state()
    strong(images, draws(10), weak=random_crop_flip)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
