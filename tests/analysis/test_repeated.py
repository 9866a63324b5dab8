"""Samples that come up more than once, in a comparison: counted, said, and what they do to intervals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lit_cka.analysis import Features, Settings, compare, compare_features
from lit_cka.commands import compare as command
from lit_cka.commands import plan
from lit_cka.commands.results import as_json
from lit_cka.functional.kernels import linear_gram
from lit_cka.statistics.repeated import num_repeated, num_repeated_rows

SAID = (
    r"{} of {} samples of digits have the features of another one in every layer of the models\. If they repeat it, "
    r"intervals are too narrow, and p-values too small: they are for independent samples\."
)


def digits(num: int) -> Tensor:
    return torch.from_numpy(load_digits().data[:num]).float() / 16


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh())


def compared(images: Tensor, **options: Any) -> Any:
    """Of float32 features, from batches of other sizes than 1, so that those of the same sample differ by rounding."""
    settings = Settings(**options)
    return compare(network(0), network(1), images.split(37), layers=["1", "3"], data="digits", settings=settings,
                   progress=False)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_permutations": 9, "intervals": False}, {"null": "moments"}], ids=str)
def test_many_are_said_and_counted(options: dict[str, Any]) -> None:
    images = digits(300)
    order = torch.randperm(330, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=SAID.format(30, 330)):
        found = compared(torch.cat([images, images[40:70]])[order], **options)
    assert found.num_repeated == as_json(found)["num_repeated"] == 30


def test_few_and_none_are_not_said() -> None:
    """The scan has no image twice; a layer of few values has many of its rows twice, but not every layer."""
    images = digits(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compared(images).num_repeated == 0
        assert compared(torch.cat([images, images[:15]])).num_repeated == 15  # of 315
        assert compared(torch.cat([images, images[:30]]), intervals=False).num_repeated == 0  # nothing that is too sure
        ids = [str(number) for number in range(300)]
        signs = Features({"signs": (images[:, 20:22] > 0.5).double(), "pixels": images.double()}, ids)
        assert compare_features(signs, signs).num_repeated == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_counted_as_pairs_of_them_are(dtype: torch.dtype) -> None:
    images = digits(200).to(dtype)
    X = torch.cat([images, images[:50], images[:20], images[:20]]) + 3
    ids = X.numpy().round(6).tolist()
    assert num_repeated_rows(X) == len(ids) - len(set(map(tuple, ids))) == 90
    K = linear_gram(X.double() - X.double().mean(0))
    assert num_repeated(K).item() == 90
    assert num_repeated_rows(X * 1e-30) == num_repeated_rows(X * 1e15) == 90
    assert num_repeated_rows(torch.ones(5, 3)) == 4
    assert num_repeated_rows(torch.full((5, 3), torch.nan)) == 0


def test_the_width_of_intervals_is_that_of_fewer_samples() -> None:
    """Of each sample twice, an interval is as narrow as of twice as many: too narrow by the square root of 2."""
    images = digits(250)
    alone = compared(images)
    with pytest.warns(UserWarning, match="have the features of another one"):
        twice = compared(torch.cat([images, images]))
    assert twice.num_repeated == 250
    widths = [np.diagonal(each.high - each.low) for each in (alone, twice)]
    np.testing.assert_allclose(widths[0] / widths[1], np.sqrt(2), rtol=0.1)


@pytest.mark.slow
def test_the_commands_say_it_and_have_it_in_their_results(tmp_path: Path) -> None:
    images = digits(100).double()
    images = torch.cat([images, images[:20]])
    ids = [str(number) for number in range(120)]
    files = []
    for seed in (0, 1):
        net = network(seed).double()
        path = tmp_path / f"{seed}.safetensors"
        layers = {"1": net[:2](images).detach(), "3": net(images).detach()}
        Features(layers, ids, model=str(seed), data="digits").save(path)
        files.append(str(path))
    with pytest.warns(UserWarning, match=SAID.format(20, 120)):
        command.main(["--features", *files, "--output", str(tmp_path / "compared")])
    (found,) = json.loads((tmp_path / "compared" / "comparison.json").read_text())["comparisons"]
    assert (found["num_repeated"], found["num_samples"]) == (20, 120)
    with pytest.warns(UserWarning, match="20 of 120 .* more samples are needed than is said here"):
        plan.main(["--features", *files, "--output", str(tmp_path / "planned")])
