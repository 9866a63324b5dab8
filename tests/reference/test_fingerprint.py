"""Fingerprints of batches: equal for equal content, different for all that data loading can change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_cka.reference.fingerprint import fingerprint

IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(8, 3, 32, 32), (3, 5), (1,), (), (0, 4), (5, 1021)], ids=str)
def test_equal_tensors_have_equal_fingerprints(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(200).to(dtype)
    copy = torch.cat([torch.zeros(1, dtype=dtype), values.flatten()])[1:].view(shape)  # at an odd address
    assert fingerprint(values) == fingerprint(copy) is not None
    if values.numel():
        copy = values.clone()
        copy.view(-1)[-1] = not copy.view(-1)[-1]
        assert fingerprint(values) != fingerprint(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
        lambda x: x.roll(1, 0),
        lambda x: x.flip(-1),
        lambda x: x.flip(-2),
        lambda x: x.roll(1, -1),
        lambda x: x.roll(2, -2),
        lambda x: x.flip(1),
        lambda x: x + 1e-6,
        lambda x: x.masked_fill(torch.arange(x.numel()).view_as(x) == 777, 0.5),
        lambda x: x[:7],
        lambda x: x.double(),
        lambda x: x.view(8, 3, 1024),
        lambda x: x.transpose(-1, -2),
    ],
    ids=[
        "two swapped",
        "rolled",
        "mirrored",
        "upside down",
        "shifted",
        "lowered",
        "channels",
        "brighter",
        "a pixel",
        "fewer",
        "dtype",
        "shape",
        "turned",
    ],
)
def test_what_changes_a_batch_changes_its_fingerprint(change: Callable[[Tensor], Tensor]) -> None:
    assert fingerprint(change(IMAGES)) != fingerprint(IMAGES)


@pytest.mark.parametrize("size", [1, 2, 7, 1021, 1022, 2042, 5000])
def test_every_single_element_counts(size: int) -> None:
    values = torch.arange(size)
    seen = {fingerprint(values)}
    for index in range(0, size, max(1, size // 50)):
        changed = values.clone()
        changed[index] += 1
        seen.add(fingerprint(changed))
    assert len(seen) == 1 + len(range(0, size, max(1, size // 50)))


def test_swapped_tokens_differ() -> None:
    tokens = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(0))
    seen = {fingerprint(tokens[torch.randperm(16, generator=torch.Generator().manual_seed(i))]) for i in range(500)}
    assert len(seen) == 500


def test_nested_values() -> None:
    batch = {"ids": torch.arange(6), "more": [torch.ones(2), (None, "text", 3, 0.5, True)]}
    same = {"ids": torch.arange(6), "more": [torch.ones(2), (None, "text", 3, 0.5, True)]}
    assert fingerprint(batch) == fingerprint(same) is not None
    for other in (
        {**batch, "ids": torch.arange(1, 7)},
        {"other": batch["ids"], "more": batch["more"]},
        {**batch, "more": [torch.ones(2), (None, "texts", 3, 0.5, True)]},
        {**batch, "more": [torch.ones(2), (None, "text", 3, 0.5, 1)]},
    ):
        assert fingerprint(other) != fingerprint(batch)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        torch.eye(2).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        nn.Identity(),
    ],
    ids=["object", "sparse", "nested", "module"],
)
def test_what_cannot_be_compared_has_none(value: object) -> None:
    assert fingerprint(value) is None
    assert fingerprint(([value],)) is None


def test_the_same_in_other_layouts_of_memory() -> None:
    assert fingerprint(IMAGES.to(memory_format=torch.channels_last)) == fingerprint(IMAGES)
    assert fingerprint(IMAGES[:, :, ::2]) == fingerprint(IMAGES[:, :, ::2].clone())
