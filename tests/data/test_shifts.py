"""ImageNet and its shifts, as folders of tiny images whose colour is their class."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from lit_cka.data import ImageNetShiftsDataModule
from lit_cka.data.imagenet_classes import MaxOverClasses, objectnet_classes, subset_synsets
from tests.data.test_test_sets import attach, write_image

pytestmark = pytest.mark.filterwarnings("ignore:ObjectNet has 18574 images")

# Some classes by their synset: tench, goldfish, great white shark, stingray, kit fox, toilet tissue.
SYNSETS = {"n01440764": 0, "n01443537": 1, "n01484850": 2, "n01498041": 6, "n02119789": 278, "n15075141": 999}
# ObjectNet's folders, and the classes that they mean: analog and digital clock, banana; bicycles for two and for
# mountains.
OBJECTNET = {"alarm_clock": (409, 530), "banana": (954,), "bicycle": (671, 444)}


def colour(number: int) -> tuple[int, int, int]:
    return (number // 256, number % 256, 0)


def number_of(image: Image.Image) -> Tensor:
    """The number that the colour of an image's first pixel stands for (1,)."""
    red, green, _ = image.getpixel((0, 0))
    return torch.tensor([256.0 * red + green])


def write_mappings(folder: Path) -> None:
    """ObjectNet's files, in an order of lines that is neither that of the labels nor that of the logits."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"chair": "Chair", "bicycle": "Bicycle", "alarm_clock": "Alarm clock", "banana": "Banana", "jam": "Jam"}
    names = {
        "Bicycle": "mountain bike, all-terrain bike; bicycle-built-for-two, tandem",
        "Banana": "banana",
        "Alarm clock": "analog clock; digital clock",
    }
    lines = ["crane", "digital clock", "mountain bike, all-terrain bike", "banana", "analog clock"]
    lines += ["bicycle-built-for-two, tandem", "crane"]
    ids = {"409": 4, "444": 5, "134": 0, "517": 6, "530": 1, "671": 2, "954": 3}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(names))
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
    (folder / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def write_sets(root: Path) -> Path:
    """All sets with a few classes each; an image's colour is its ImageNet class."""
    for synset, number in SYNSETS.items():
        write_image(root / "imagenet" / "val" / synset / "0.png", colour(number))
        write_image(root / "sketch" / synset / "0.png", colour(number))
    for number in (0, 2, 10, 999, 101):
        write_image(root / "imagenetv2-matched-frequency-format-val" / str(number) / "0.png", colour(number))
    for folder, classes in (("imagenet-r", [1, 2, 6]), ("imagenet-a", [6])):
        for synset in (synset for synset, number in SYNSETS.items() if number in classes):
            write_image(root / folder / synset / "0.png", colour(SYNSETS[synset]))
    for folder, numbers in {**OBJECTNET, "jam": (5,)}.items():
        for number in numbers:
            path = root / "objectnet-1.0" / "images" / folder / f"{number}.png"
            write_image(path, (255, 255, 255), size=12)
            image = Image.open(path)
            image.paste(colour(number), (2, 2, 10, 10))
            image.save(path)
    write_mappings(root / "objectnet-1.0" / "mappings")
    return root


def read(root: Path, *sets: str, transform: Callable[[Any], Any] = number_of, **arguments: Any) -> Any:
    arguments = {"num_workers": 0, **({"sets": sets} if sets else {}), **arguments}
    data = attach(ImageNetShiftsDataModule(str(root), **arguments), eval_transform=transform, num_classes=1000)
    data.setup("test")
    return data


def labels(data: Any, index: int = 0) -> dict[int, int]:
    """The labels of a set's images by the class that their colour stands for."""
    return {int(image): label for image, label in data.test_sets[index].dataset}


@pytest.mark.parametrize("name", ["ImageNet", "ImageNetSketch"])
def test_labels_by_synset_of_part_of_the_classes(tmp_path: Path, name: str) -> None:
    data = read(write_sets(tmp_path), name)
    assert labels(data) == {number: number for number in SYNSETS.values()}
    assert data.test_sets[0].to_classes is None


@pytest.mark.parametrize(
    ("name", "folder", "others"),
    [
        ("ImageNet", "imagenet/val_in_folder", ["imagenet/val"]),
        ("ImageNetSketch", "sketch/val", []),
        ("ImageNetSketch", "imagenet-sketch", []),
    ],
)
def test_other_places(tmp_path: Path, name: str, folder: str, others: list[str]) -> None:
    write_image(tmp_path / folder / "n02119789" / "0.png", colour(278))
    for other in others:  # images without classes
        write_image(tmp_path / other / "0.png", colour(278))
    assert labels(read(tmp_path, name)) == {278: 278}


def test_v2_is_labelled_by_number_not_by_sorting(tmp_path: Path) -> None:
    root = write_sets(tmp_path)
    assert labels(read(root, "ImageNetV2")) == {0: 0, 2: 2, 10: 10, 101: 101, 999: 999}
    sorted_labels = ImageFolder(str(root / "imagenetv2-matched-frequency-format-val"), number_of)
    assert {int(image): label for image, label in sorted_labels} == {0: 0, 10: 1, 101: 2, 2: 3, 999: 4}


@pytest.mark.parametrize(
    ("name", "total", "first", "last"),
    # Of the lists that wise-ft evaluates with.
    [("ImageNetA", 102178, [6, 11, 13], [986, 987, 988]), ("ImageNetR", 86135, [1, 2, 4], [981, 983, 988])],
)
def test_a_and_r_are_scored_among_their_own_classes(
    tmp_path: Path, name: str, total: int, first: list[int], last: list[int]
) -> None:
    data = read(write_sets(tmp_path), name)
    logits = torch.stack([torch.arange(1000.0), -torch.arange(1000.0)])
    scores = data.test_sets[0].to_classes(logits)
    columns = scores[0].int().tolist()
    assert len(set(columns)) == 200
    assert sum(columns) == total
    assert (columns[:3], columns[-3:]) == (first, last)
    assert torch.equal(scores[1], -scores[0])
    assert {number: columns[label] for number, label in labels(data).items()} == {
        number: number for number in labels(data)
    }
    with pytest.raises(ValueError, match="1000 classes, but got 10"):
        data.test_sets[0].to_classes(torch.zeros(2, 10))


def test_classes_of_a_complete_subset_without_timms_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = subset_synsets("ImageNetR", [])
    monkeypatch.setattr("lit_cka.data.imagenet_classes.files", lambda package: tmp_path)
    assert subset_synsets("ImageNetR", expected[::-1]) == expected
    with pytest.raises(FileNotFoundError, match="all 200 class folders of ImageNetR, but got 199"):
        subset_synsets("ImageNetR", expected[1:])


def test_objectnet_takes_the_largest_logit_of_each_class(tmp_path: Path) -> None:
    data = read(write_sets(tmp_path), "ObjectNet")
    # Sorted folders: alarm_clock, banana, bicycle. Images of jam, which ImageNet has not, are left out.
    assert labels(data) == {409: 0, 530: 0, 954: 1, 444: 2, 671: 2}
    logits = torch.full((2, 1000), 9.0)
    logits[0, [409, 530, 954, 444, 671]] = torch.tensor([1.0, 2.0, -3.0, -4.0, -5.0])
    logits[1, [409, 530, 954, 444, 671]] = torch.tensor([2.0, 1.0, 0.0, -5.0, -4.0])
    assert data.test_sets[0].to_classes(logits).tolist() == [[2.0, -3.0, -4.0], [2.0, 0.0, -4.0]]


def test_objectnets_border_is_cut_off_before_the_preprocessing(tmp_path: Path) -> None:
    sizes = []

    def inner(image: Image.Image) -> Tensor:
        sizes.append(image.size)
        assert {number for _, number in image.getcolors()} == {image.getpixel((0, 0))}
        return number_of(image)

    data = read(write_sets(tmp_path), "ObjectNet", transform=inner)
    assert set(labels(data)) == {409, 530, 954, 444, 671}
    assert set(sizes) == {(8, 8)}


def test_objectnet_with_too_few_images_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has 18574 images .* has 5: incomplete download"):
        read(write_sets(tmp_path), "ObjectNet")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("objectnet_to_imagenet_1k.json", {"Banana": "banana; plantain"}, r"one class for each of \['plantain'\]"),
        ("objectnet_to_imagenet_1k.json", {"Banana": "crane"}, r"one class for each of \['crane'\]"),
        ("objectnet_to_imagenet_1k.json", {"Plum": "banana"}, "a folder for 'Plum'"),
    ],
)
def test_objectnet_with_damaged_mappings(tmp_path: Path, file: str, content: dict[str, str], message: str) -> None:
    write_mappings(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        objectnet_classes(tmp_path)
    write_mappings(tmp_path)
    (tmp_path / "imagenet_to_label_2012_v2").write_text("crane\n")
    with pytest.raises(ValueError, match="one class for each of"):
        objectnet_classes(tmp_path)


def test_objectnet_without_common_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "objectnet-1.0" / "images" / "jam" / "0.png", (0, 0, 0))
    write_mappings(tmp_path / "objectnet-1.0" / "mappings")
    with pytest.raises(ValueError, match="such as alarm_clock"):
        read(tmp_path, "ObjectNet")


def test_extra_sets_by_synset_index_or_order(tmp_path: Path) -> None:
    root = write_sets(tmp_path / "root")
    for number in (10, 2):
        write_image(tmp_path / "indices" / str(number) / "0.png", colour(number))
    for number in range(1000):
        write_image(tmp_path / "order" / f"class{number:03}" / "0.png", colour(number), size=1)
    extra = {"Drawn": str(root / "sketch"), "Numbered": str(tmp_path / "indices"), "Sorted": str(tmp_path / "order")}
    data = read(root, "ImageNet", extra=extra)
    assert data.test_names == ["ImageNet", "Drawn", "Numbered", "Sorted"]
    for index, numbers in [(1, SYNSETS.values()), (2, [10, 2]), (3, range(1000))]:
        assert labels(data, index) == {number: number for number in numbers}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["n01440764", "n99999999"], r"1000 synsets .* but got \['n99999999'\]"),
        (["0", "1000"], r"named 0 to 999, but got \['1000'\]"),
        (["0", "cat"], r"named 0 to 999, but got \['cat'\]"),
        (["cat", "dog"], r"in the classes' order, but got 2: cat, dog"),
    ],
)
def test_extra_sets_of_unknown_classes(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        write_image(tmp_path / "odd" / folder / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match=f"of Odd .*{message}"):
        read(write_sets(tmp_path), "ImageNet", extra={"Odd": str(tmp_path / "odd")})


@pytest.mark.parametrize(
    ("name", "folder", "synset"),
    [
        ("ImageNet", "imagenet/val", "n99999999"),
        ("ImageNetA", "imagenet-a", "n01440764"),  # of ImageNet, but not of the 200
        ("ImageNetV2", "imagenetv2-matched-frequency-format-val", "n01440764"),
    ],
)
def test_unknown_classes_are_named(tmp_path: Path, name: str, folder: str, synset: str) -> None:
    write_image(write_sets(tmp_path) / folder / synset / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match=rf"folders of {name} .*\['{synset}'\]"):
        read(tmp_path, name)


def test_all_that_is_missing_is_in_one_message(tmp_path: Path) -> None:
    write_image(tmp_path / "imagenet-r" / "n01443537" / "0.png", (0, 0, 0))
    (tmp_path / "imagenet-a").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path, extra={"Own": str(tmp_path / "own")})
    lines = str(caught.value).splitlines()
    places = ["imagenet/val", "imagenetv2-matched-frequency-format-val", "sketch/val", "objectnet-1.0/images"]
    names = ["ImageNet: ", "ImageNetV2: ", "ImageNetSketch: ", "ObjectNet: ", "ImageNetA: ", "Own: "]
    for line, name, place in zip(lines[1:7], names, [*places, "imagenet-a", "own"], strict=True):
        assert line.startswith(f"  {name}{tmp_path / place}")
    assert [line.rsplit("/")[-1] for line in lines[7:11]] == [
        "folder_to_objectnet_label.json",
        "objectnet_to_imagenet_1k.json",
        "pytorch_to_imagenet_2012_id.json",
        "imagenet_to_label_2012_v2",
    ]
    assert "by `sets=`" in lines[11]
    assert len(lines) == 12


def test_sets_and_models_that_do_not_fit(tmp_path: Path) -> None:
    root = write_sets(tmp_path)
    with pytest.raises(ValueError, match=r"ImageNetV2.*but got \['ImageNetC'\]"):
        ImageNetShiftsDataModule(str(root), sets=("ImageNet", "ImageNetC"))
    with pytest.raises(ValueError, match="names of test sets to differ"):
        read(root, "ImageNet", extra={"ImageNet": str(root / "sketch")})
    data = attach(ImageNetShiftsDataModule(str(root)), eval_transform=number_of, num_classes=21843)
    with pytest.raises(ValueError, match="1000 classes, but it has 21843"):
        data.setup("test")


class KnowsAll(LightningModule):
    """Reads an image's class from its colour, and counts what it got right on each set."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 1000
        self.right: dict[str, list[bool]] = {}

    def eval_transform(self, image: Image.Image) -> Tensor:
        return number_of(image)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        test_set = self.trainer.datamodule.test_sets[dataloader_idx]
        logits = -(images - torch.arange(1000.0)).abs()
        if test_set.to_classes is not None:
            logits = test_set.to_classes(logits)
        self.right.setdefault(test_set.name, []).extend((logits.argmax(dim=1) == labels).tolist())


def test_a_model_that_knows_all_is_right_on_all(tmp_path: Path) -> None:
    model = KnowsAll()
    trainer = Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.test(model, datamodule=ImageNetShiftsDataModule(str(write_sets(tmp_path)), batch_size=2, num_workers=0))
    counts = {"ImageNet": 6, "ImageNetV2": 5, "ImageNetSketch": 6, "ImageNetR": 3, "ObjectNet": 5, "ImageNetA": 1}
    assert model.right == {name: [True] * count for name, count in counts.items()}


def test_largest_logit_of_groups_reaches_other_processes() -> None:
    scores = pickle.loads(pickle.dumps(MaxOverClasses(((3, 1, 2), (0,)))))
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    expected = [[max(row[3], row[1], row[2]), row[0]] for row in logits.tolist()]
    assert torch.equal(scores(logits), torch.tensor(expected))
