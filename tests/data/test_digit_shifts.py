"""The shifted digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from lit_cka.data import DigitsDataModule, DigitShiftsDataModule


def tensors(**arguments: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of each set."""
    data = DigitShiftsDataModule(**arguments)
    data.setup("test")
    batches = [list(loader) for loader in data.test_dataloader()]
    return {
        name: (torch.cat([images for images, _ in loader]), torch.cat([labels for _, labels in loader]))
        for name, loader in zip(data.test_names, batches, strict=True)
    }


@pytest.fixture(scope="module")
def sets() -> dict[str, tuple[Tensor, Tensor]]:
    return tensors()


def test_digits_are_the_test_part_of_the_training_data(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    data = DigitsDataModule()
    data.setup("test")
    batches = list(data.test_dataloader())
    assert torch.equal(sets["digits"][0], torch.cat([images for images, _ in batches]))
    assert torch.equal(sets["digits"][1], torch.cat([labels for _, labels in batches]))


def test_shifted_images_are_as_many_and_other_ones(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert list(sets) == ["digits", "rotated", "noisy", "blurred"]
    for name, (images, labels) in sets.items():
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
        assert torch.equal(labels, sets["digits"][1])
        if name != "digits":
            assert (images != sets["digits"][0]).flatten(1).any(dim=1).float().mean() > 0.99


def test_shifts_are_the_same_every_time(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(1)
    again = tensors(batch_size=100)
    assert all(torch.equal(again[name][0], images) for name, (images, _) in sets.items())


def test_classes_are_those_of_the_digits() -> None:
    few = tensors(classes=[7, 5])
    assert all(labels.unique().tolist() == [5, 7] and len(labels) == 73 for _, labels in few.values())
    with pytest.raises(ValueError, match="digits from 0 to 9"):
        DigitShiftsDataModule(classes=[10])


def test_rotation_is_of_up_to_30_degrees_on_background(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Each image is found again among scipy's rotations, with angles of both signs over the whole range."""
    originals, rotated = (sets[name][0][:40, 0].double().numpy() for name in ("digits", "rotated"))
    angles = []
    for original, image in zip(originals, rotated, strict=True):
        candidates = range(-45, 46)
        # With a margin, since scipy blends the image's edge with what lies outside in another way.
        errors = [
            abs(
                ndimage.rotate(original, angle, reshape=False, order=1, mode="constant", cval=-1.0)[2:6, 2:6]
                - image[2:6, 2:6]
            ).max()
            for angle in candidates
        ]
        angles.append(candidates[min(range(len(errors)), key=errors.__getitem__)])
        assert min(errors) < 0.05
    assert -30 <= min(angles) < -20
    assert 20 < max(angles) <= 30
    # The corners come from outside of the image.
    assert rotated[:, [0, 0, -1, -1], [0, -1, 0, -1]].max(axis=0).max() < -0.5


def test_noise_has_its_standard_deviation(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    originals, noisy = sets["digits"][0], sets["noisy"][0]
    between = originals.abs() < 1e-6  # halfway, where clamping to [-1, 1] cuts off little
    noise = (noisy - originals)[between]
    assert abs(noise.mean()) < 0.05
    expected = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).mul(0.4).clamp(-1, 1).std()
    assert torch.allclose(noise.std(), expected, rtol=0.1)


def test_blur_is_a_gaussian(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    originals, blurred = (sets[name][0][:, 0].double().numpy() for name in ("digits", "blurred"))
    expected = ndimage.gaussian_filter(originals, sigma=(0, 0.8, 0.8), mode="mirror", truncate=2.5)
    assert abs(blurred - expected).max() < 1e-5


def test_versions_of_an_image_are_one_group() -> None:
    """Each of two parts comes once, however often it is drawn; only what is random is drawn several times."""
    data = DigitShiftsDataModule([3, 4], parts=["val", "test"], draws=3)
    data.setup("test")
    digits = DigitsDataModule([3, 4])
    digits.setup("fit")
    num_val = len(digits.loader("val").dataset)  # type: ignore[arg-type]
    clean, rotated, noisy, blurred = (each.dataset.tensors for each in data.test_sets)  # type: ignore[attr-defined]
    n = len(clean[0])
    assert torch.equal(clean[0][:num_val], torch.cat([images for images, _ in digits.val_dataloader()]))
    assert [len(each[0]) for each in (rotated, noisy, blurred)] == [3 * n, 3 * n, n]
    for test_set in data.test_sets:
        images, labels = test_set.dataset.tensors  # type: ignore[attr-defined]
        assert test_set.groups is not None
        assert torch.equal(labels, clean[1][test_set.groups])
        assert sorted(set(test_set.groups.tolist())) == list(range(n))
    for images, _ in (rotated, noisy):
        assert not torch.equal(images[:n], images[n : 2 * n])
    first = DigitShiftsDataModule([3, 4], parts=["val", "test"])
    first.setup("test")
    assert torch.equal(first.test_sets[1].dataset.tensors[0], rotated[0][:n])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "Expected `draws` to be at least 1"),
        ({"parts": []}, "Expected `parts` to be some of train, val and test"),
        ({"parts": ["all"]}, "but got .'all'."),
        ({"parts": ["val", "val"]}, "each once"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitShiftsDataModule(**arguments)


def train_images(**arguments: Any) -> tuple[Tensor, Tensor]:
    data = DigitsDataModule(batch_size=500, **arguments)
    data.setup("fit")
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_few_images_to_train_on_are_those_of_the_seed() -> None:
    images, labels = train_images(num_train=7)
    assert labels.bincount().tolist() == [7] * 10
    known = {image.numpy().tobytes() for image in train_images()[0]}
    chosen = {image.numpy().tobytes() for image in images}
    assert chosen <= known
    assert chosen == {image.numpy().tobytes() for image in train_images(num_train=7)[0]}
    assert chosen != {image.numpy().tobytes() for image in train_images(num_train=7, seed=1)[0]}
    assert len(train_images(num_train=10_000)[0]) == len(known)
    with pytest.raises(ValueError, match="Expected `num_train` to be at least 1"):
        DigitsDataModule(num_train=0)


def test_shifted_training_images_are_other_ones_each_time_and_a_quarter_clean() -> None:
    data = DigitsDataModule(batch_size=2000, shifted=True)
    data.setup("fit")
    known = {image.numpy().tobytes() for image, _ in data._sets["train"]}
    epochs = [next(iter(data.train_dataloader()))[0] for _ in range(2)]
    for images in epochs:
        clean = sum(image.numpy().tobytes() in known for image in images) / len(images)
        assert 0.2 < clean < 0.3
        assert -1 <= images.min() <= images.max() <= 1
    assert {image.numpy().tobytes() for image in epochs[0]} != {image.numpy().tobytes() for image in epochs[1]}
    (images, _), *_ = data.val_dataloader()
    val = {image.numpy().tobytes() for image, _ in data._sets["val"]}
    assert {image.numpy().tobytes() for image in images} <= val
