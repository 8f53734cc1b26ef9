"""Image data sets with weak and strong views."""

from vision_kd.data.augment import ImageDraws, random_crop_flip
from vision_kd.data.base import ImageDataModule, TensorDataModule
from vision_kd.data.cifar import CIFAR10, CIFAR100
from vision_kd.data.digits import Digits
from vision_kd.data.fashion_mnist import FashionMNIST
from vision_kd.data.image_folder import ImageFolder
from vision_kd.data.loader import DeviceLoader

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DeviceLoader",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageDraws",
    "ImageFolder",
    "TensorDataModule",
    "random_crop_flip",
]
