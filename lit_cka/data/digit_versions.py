"""The handwritten digits in versions that a model may not have seen: rotated, noisy, blurred."""

from __future__ import annotations

import torch
from torch import Tensor

# So strong that a ViT as in configs/digits.yaml, trained on all digits, falls from an accuracy of 0.91 to about 0.65.
ANGLE = 30.0  # degrees
NOISE = 0.4  # standard deviation, where ink is 1 and background -1
BLUR = 0.8  # standard deviation in pixels
SHIFTS = ("rotated", "noisy", "blurred")


def shifted_versions(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns each of `SHIFTS` of images (n, 1, 8, 8) in [-1, 1], likewise.

    Each image is rotated by another angle between -30 and 30 degrees; the noise is normal with a standard deviation of
    0.4, the blur Gaussian with 0.8 pixels, the same for all.

    Args:
        images: the originals.
        generator: of the angles and the noise.
    """
    from torchvision.transforms.functional import InterpolationMode, gaussian_blur, rotate

    angles = (ANGLE * (2 * torch.rand(len(images), generator=generator) - 1)).tolist()
    noise = NOISE * torch.randn(images.shape, generator=generator)
    rotated = [
        rotate(image, angle, InterpolationMode.BILINEAR, fill=[-1.0])
        for image, angle in zip(images, angles, strict=True)
    ]
    versions = torch.stack(rotated), images + noise, gaussian_blur(images, kernel_size=[5, 5], sigma=[BLUR, BLUR])
    return {name: version.clamp(-1, 1) for name, version in zip(SHIFTS, versions, strict=True)}


class AtRandom:
    """A collate function: each image of a batch as it is or in one of its shifted versions, another one each time.

    Args:
        seed: of all choices, whatever else draws random numbers.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = (torch.stack(each) for each in zip(*items, strict=True))
        versions = torch.stack([images, *shifted_versions(images, self._generator).values()])
        choice = torch.randint(len(versions), (len(images),), generator=self._generator)
        return versions[choice, torch.arange(len(images))], labels
