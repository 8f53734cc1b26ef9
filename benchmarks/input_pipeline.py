"""Images per second of the on-device input path against a torchvision DataLoader, on the same images.

Run: uv run python benchmarks/input_pipeline.py [--dataset synthetic|fashion_mnist] [--n 10000] [--json out.json]

Both sides deliver shuffled, randomly cropped and mirrored, normalised float32 batches on the CPU.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd_common.run.errors import run_command
from vision_kd.data import CIFAR10, DeviceLoader, FashionMNIST, random_crop_flip


class PilImages(Dataset):
    """What torchvision's CIFAR and MNIST classes do: an array in memory, a PIL image and a transform per item."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.images = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def read_images(dataset: str, count: int) -> tuple[Tensor, Tensor, type, int]:
    """Images, labels, the data module whose recipe applies, and its crop padding."""
    if dataset == "fashion_mnist":
        data = FashionMNIST(train_subset=count)
        data.setup("fit")
        loader = data.train_dataloader()
        return loader.images, loader.labels, FashionMNIST, 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator), CIFAR10, 4


def device_epoch(loader: DeviceLoader, mean: Tensor, std: Tensor) -> None:
    """One pass over the on-device path, normalised as a model would do it."""
    for views, _ in loader:
        views["weak"].sub_(mean).div_(std)


def torchvision_epoch(loader: DataLoader) -> None:
    """One pass over the usual path; its transform normalises."""
    for _ in loader:
        pass


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes read and written per second by a plain memory copy."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)


def measure(paths: dict[str, Callable[[], None]], count: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of every path, `repeats` times, taken in turns so that a busy moment hits all of them."""
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, run in paths.items():
            start = time.perf_counter()
            run()
            if repeat > 0:  # the first round warms up
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("synthetic", "fashion_mnist"), default="synthetic")
    parser.add_argument("--n", type=int, default=10_000, help="images in an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the main process")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="DataLoader worker processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    images, labels, recipe, padding = read_images(args.dataset, args.n)
    augment = {"weak": partial(random_crop_flip, padding=padding)}
    loader = DeviceLoader(images, labels, args.batch_size, augment, shuffle=True, drop_last=False)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (recipe.mean, recipe.std))
    transform = transforms.Compose(
        [
            transforms.RandomCrop(images.shape[-1], padding=padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )
    paths: dict[str, Callable[[], None]] = {"on device": partial(device_epoch, loader, mean, std)}
    for workers in args.workers:
        usual = DataLoader(
            PilImages(images, labels, transform),
            args.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        paths[f"torchvision, {workers} workers"] = partial(torchvision_epoch, usual)

    load = os.getloadavg()[0]
    rates = measure(paths, args.n, args.repeats)
    bandwidth = copy_bandwidth()
    floor = bandwidth / (images[0].numel() * (1 + 4))  # every byte is read once and written once as float32
    fast = statistics.median(rates["on device"])

    print(
        f"{args.dataset}: {args.n} images {tuple(images.shape[1:])}, batch {args.batch_size}, {args.threads} threads, "
        f"{os.cpu_count()} cores, load {load:.2f} at the start, median of {args.repeats} epochs (lowest to highest)"
    )
    print(f"{'path':24s} {'images/s':>12s} {'spread':>24s} {'on device is faster by':>24s}")
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:24s} {rate:12,.0f} {f'{min(values):,.0f} to {max(values):,.0f}':>24s} {fast / rate:23.1f}x")
    print(f"{'floor (memory copy)':24s} {floor:12,.0f} {f'{bandwidth / 1e9:.1f} GB/s':>24s} {fast / floor:23.2f}x")
    if args.json:
        result = {**vars(args), "json": str(args.json), "load": load, "images_per_second": rates, "floor": floor}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
