"""`ImageModel`, `ImageFiles` and `Digits`: the samples, their order, and what the network gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lit_cka.analysis.image_model import Digits, ImageFiles, ImageModel
from lit_cka.analysis.texts import Samples
from tests.small_models import image_folder


class Net(nn.Module):
    """Counts what it is called with."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(pixels, 6), nn.Linear(6, 5)])
        self.batches: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.batches.append(images)
        hidden: Tensor = self.blocks[1](self.blocks[0](images.flatten(1)).relu())
        return hidden


def tensors(num: int = 7, labels: list[Any] | None = None) -> Samples:
    images = torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 2
    return Samples([f"i{index}" for index in range(num)], list(images), labels, "noise")


def test_features_of_tensors() -> None:
    net = Net(4)
    samples = tensors(labels=list("aabbccd"))
    found = ImageModel(net, batch_size=3).features(samples, progress=False)
    assert [len(batch) for batch in net.batches] == [3, 3, 1]
    assert torch.equal(torch.cat(net.batches), torch.stack(samples.items))
    assert (found.model, found.data, found.pooling) == ("Net", "noise", "mean")
    assert (found.ids, found.labels) == (samples.ids, samples.labels)
    assert list(found.layers) == ["blocks.0", "blocks.1"]
    weight, bias = (each.detach().double() for each in (net.blocks[0].weight, net.blocks[0].bias))
    expected = torch.stack(samples.items).double().flatten(1) @ weight.T + bias
    torch.testing.assert_close(found.layers["blocks.0"], expected, atol=1e-5, rtol=0)


def test_without_labels_there_are_none() -> None:
    assert ImageModel(Net(4), name="net", layers="blocks.1").features(tensors(), progress=False).labels is None
    assert ImageModel(Net(4)).features(tensors(labels=[0] * 7), progress=False).labels == [0] * 7


def test_files_are_read_by_the_models_transform(tmp_path: Path) -> None:
    samples = ImageFiles(str(image_folder(tmp_path, per_class=2) / "test")).read()
    assert samples.name == "test"
    assert samples.ids == [f"{name}/{number}.png" for name in ("cat", "dog", "emu") for number in range(2)]
    assert samples.labels == ["cat", "cat", "dog", "dog", "emu", "emu"]
    net = Net(36 * 40 * 3)
    net.eval_transform = lambda image: torch.from_numpy(np.asarray(image).astype(np.float32)) / 255  # type: ignore[assignment]
    found = ImageModel(net).features(samples, progress=False)
    assert found.labels == samples.labels
    for image, path in zip(net.batches[0], samples.items, strict=True):
        np.testing.assert_allclose(image.numpy() * 255, np.asarray(Image.open(path)), atol=1e-4)
    with pytest.raises(ValueError, match="'plain' to have an `eval_transform`"):
        ImageModel(Net(36 * 40 * 3), "plain").features(samples, progress=False)


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 100).save(tmp_path / "grey.png")
    net = Net(12)
    net.eval_transform = lambda image: torch.from_numpy(np.asarray(image).astype(np.float32))  # type: ignore[assignment]
    ImageModel(net).features(ImageFiles(str(tmp_path)).read(), progress=False)
    assert net.batches[0].shape == (1, 2, 2, 3)
    assert (net.batches[0] == 100).all()


def test_some_of_the_files(tmp_path: Path) -> None:
    root = str(image_folder(tmp_path, per_class=3) / "val")
    some, again = (ImageFiles(root, num_samples=4, name="some").read() for _ in range(2))
    everything = ImageFiles(root, num_samples=99).read()
    assert some == again
    assert some.ids == [name for name in everything.ids if name in some.ids]  # in the folder's order
    assert (len(some), len(everything), some.name) == (4, 9, "some")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="Expected images below"):
            ImageFiles(str(folder)).read()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    net = Net(4)
    net.eval_transform = lambda image: image  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"broken\.png"):
        ImageModel(net).features(ImageFiles(str(tmp_path)).read(), progress=False)


def test_digits() -> None:
    samples = Digits(classes=[7, 3]).read()
    assert (samples.name, set(samples.labels or [])) == ("digits", {3, 7})
    assert samples.ids == [f"3,7 {index}" for index in range(len(samples))]  # other classes are other images
    known = load_digits()
    for image, label in zip(samples.items, samples.labels or [], strict=True):
        assert image.shape == (1, 8, 8)
        found = np.abs(known.images - (image[0].numpy() + 1) * 8).sum(axis=(1, 2)) < 1e-3
        assert label in known.target[found]
    noisy = Digits(classes=[3, 7], shift="noisy", name="harder").read()
    assert (noisy.ids, noisy.labels, noisy.name) == (samples.ids, samples.labels, "harder")
    assert not torch.equal(torch.stack(noisy.items), torch.stack(samples.items))
    with pytest.raises(ValueError, match="`shift` to be one of digits, rotated, noisy, blurred, but got 'upside'"):
        Digits(shift="upside").read()
    with pytest.raises(ValueError, match="digits from 0 to 9"):
        Digits(classes=[10]).read()
