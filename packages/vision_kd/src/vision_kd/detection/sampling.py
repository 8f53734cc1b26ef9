"""Sampling of anchors and proposals for training, as a function of the image's seed alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class SeededSampler(BalancedPositiveNegativeSampler):
    """Sampler of foreground and background as in torchvision, with a seed for every image.

    So the draw depends neither on the other images of the batch nor on the number of processes.

    Args:
        batch_size_per_image: Number of samples of an image.
        positive_fraction: Largest share of foreground among them, in [0, 1].

    Attributes:
        seeds: One seed per image of the next batch.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: Sequence[int] = ()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the masks of the chosen foreground and background.

        Args:
            matched_idxs: Per image the class of every box, shape (B,): 0 is background, below 0 is ignored.

        Returns:
            Two lists of uint8 masks of shape (B,).

        Raises:
            ValueError: If there is not one seed per image.
        """
        if len(self.seeds) != len(matched_idxs):
            raise ValueError(f"{len(matched_idxs)} images need as many seeds, got {len(self.seeds)}")
        chosen = []
        device = matched_idxs[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for matched, seed in zip(matched_idxs, self.seeds, strict=True):
                torch.manual_seed(seed)
                (positive,), (negative,) = super().__call__([matched])
                chosen.append((positive, negative))
        return [positive for positive, _ in chosen], [negative for _, negative in chosen]
