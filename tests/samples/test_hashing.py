"""Hashes of values: equal for equal content, whatever holds it; different for all that a batch can differ in."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import io
import itertools
import pathlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torchvision import tv_tensors

from lit_cka.samples.hashing import content_hash, row_hashes

# Of torch, on making such tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state:UserWarning")
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
COMPLEX = torch.complex(IMAGES[0, 0], IMAGES[1, 0])


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Sample:
    image: Any
    label: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    value: Any


class Graph:
    """An object of attributes, as batches of graphs are, which knows what it is a part of."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self.parent = self


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "one": lambda: 1,
    "one point": lambda: 1.0,
    "minus one": lambda: -1,
    "256": lambda: 256,
    "huge": lambda: 10**5000,
    "nan": lambda: float("nan"),
    "1j": lambda: 1j,
    "text": lambda: "1",
    "surrogate": lambda: "\ud800",
    "bytes": lambda: b"1",
    "bytearray": lambda: bytearray(b"1"),
    "empty list": lambda: [],
    "empty tuple": lambda: (),
    "empty dict": dict,
    "list": lambda: [1, 2],
    "tuple": lambda: (1, 2),
    "nested": lambda: [[1], 2],
    "nested otherwise": lambda: [[1, 2]],
    "named": lambda: Pair(1, 2),
    "dict": lambda: {"a": 1, "b": 2},
    "other values": lambda: {"a": 2, "b": 1},
    "ordered": lambda: collections.OrderedDict(a=1, b=2),
    "default": lambda: collections.defaultdict(list, {"a": [1]}),
    "user's dict": lambda: collections.UserDict(a=1, b=2),
    "set": lambda: {"a", "b", "c", 1},
    "frozen": lambda: frozenset({"a", "b", "c", 1}),
    "deque": lambda: collections.deque([1, 2]),
    "range": lambda: range(2),
    "slice": lambda: slice(1, 2),
    "date": lambda: datetime.date(2020, 1, 1),
    "path": lambda: pathlib.PurePosixPath("a"),
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "class": lambda: Graph,
    "function": lambda: torch.relu,
    "red": lambda: Colour.RED,
    "blue": lambda: Colour.BLUE,
    "dataclass": lambda: Sample(torch.ones(2), 1),
    "other dataclass": lambda: Sample(torch.ones(2), 2),
    "slotted": lambda: Slotted(1),
    "graph": lambda: Graph(x=torch.ones(2), edges=torch.tensor([[0], [1]])),
    "other graph": lambda: Graph(x=torch.ones(2), edges=torch.tensor([[1], [0]])),
    "module": lambda: nn.BatchNorm1d(2),
    "picture": lambda: Image.new("RGB", (2, 2), "red"),
    "other picture": lambda: Image.new("RGB", (2, 2), "blue"),
    "random": lambda: random.Random(0),
    "file in memory": lambda: io.BytesIO(b"1"),
    "what is left": lambda: iter([1, 2]),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "parameter": lambda: nn.Parameter(torch.tensor([[1.0, 2.0]])),
    "double": lambda: torch.tensor([1.0, 2.0]).double(),
    "half": lambda: torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "eighth": lambda: torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "bools": lambda: torch.tensor([True, False]),
    "conjugate": COMPLEX.conj,
    "not conjugate": COMPLEX.clone,
    "negative": lambda: COMPLEX.conj().imag,
    "scalar": lambda: torch.tensor(1.0),
    "one row": lambda: torch.tensor([1.0]),
    "no rows": lambda: torch.zeros(0, 2),
    "no columns": lambda: torch.zeros(2, 0),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "other sparse": lambda: (2 * torch.eye(2)).to_sparse(),
    "rows": lambda: torch.eye(2).to_sparse_csr(),
    "columns": lambda: torch.eye(2).to_sparse_csc(),
    "strided nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested shapes": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
    "box": lambda: tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(4, 4)),
    "box elsewhere": lambda: tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(4, 5)),
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "turned array": lambda: np.arange(6.0).reshape(3, 2),
    "texts": lambda: np.array(["a", "bc"]),
    "objects": lambda: np.array([1, "a", None], dtype=object),
    "records": lambda: np.array([(1, 2.0)], dtype=[("a", "i1"), ("b", "f8")]),
    "masked": lambda: np.ma.array([1, 2], mask=[False, True]),
    "number": lambda: np.float64(1),
    "single number": lambda: np.float32(1),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
}


def test_equal_values_have_equal_hashes_and_no_two_others() -> None:
    hashes = {name: content_hash(build()) for name, build in VALUES.items()}
    assert hashes == {name: content_hash(build()) for name, build in VALUES.items()}
    assert None not in hashes.values()
    for (one, a), (other, b) in itertools.combinations(hashes.items(), 2):
        assert a != b, f"{one} and {other}"


@pytest.mark.slow
def test_hashes_are_the_same_in_another_process() -> None:
    """Where strings, sets and addresses are hashed by Python, they are not."""
    script = (
        "from tests.samples.test_hashing import VALUES, content_hash\n"
        "print({name: content_hash(build()) for name, build in VALUES.items()})"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str({name: content_hash(build()) for name, build in VALUES.items()})


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda: 0,
        (i for i in [1]),
        threading.Lock(),
        {}.items(),
        Graph(lock=threading.Lock()),
        torch.ones(2, device="meta"),
        FakeTensorMode().from_tensor(torch.ones(2)),
        torch.ones(2).untyped_storage(),
    ],
    ids=["object", "lambda", "generator", "lock", "view", "holder", "meta", "fake", "storage"],
)
def test_what_has_no_content_has_no_hash(value: object) -> None:
    assert content_hash(value) is None
    assert content_hash({"a": [value]}) is None
    assert row_hashes({"a": torch.ones(3, 2), "b": value}, 3) is None


def test_containers_may_hold_themselves_but_not_be_endlessly_deep() -> None:
    def looped(value: int) -> list[Any]:
        items: list[Any] = [value]
        items.append({"up": items})
        return items

    assert content_hash(looped(1)) == content_hash(looped(1)) != content_hash(looped(2))
    assert content_hash(looped(1)) is not None
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert content_hash(deep) is None


def two_bytes(x: Tensor) -> Tensor:
    """Two bytes changed, in one row and one column each, by what cancels in every sum."""
    content = x.mul(100).to(torch.uint8).reshape(8, -1)
    content[2, 3] += 1
    content[2, 7] -= 1
    content[5, 3] -= 1
    content[5, 7] += 1
    return content


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "two rows swapped": lambda x: x[torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
    "rolled": lambda x: x.roll(1, 0),
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "shifted by one": lambda x: x.flatten().roll(1).view_as(x),
    "two columns swapped": lambda x: x[..., torch.tensor([1, 0, *range(2, 16)])],
    "turned": lambda x: x.transpose(-1, -2),
    "turned twice": lambda x: x.flip(-1, -2),
    "channels": lambda x: x.flip(1),
    "brighter": lambda x: x + 1e-6,
    "zero with a sign": lambda x: x * -0.0,
    "zero": lambda x: x * 0,
    "fewer": lambda x: x[:7],
    "dtype": lambda x: x.double(),
    "the same bytes": lambda x: x.view(torch.int32),
    "shape": lambda x: x.reshape(8, 3, 256),
    "bytes": lambda x: x.mul(100).to(torch.uint8).reshape(8, -1),
    "bytes that cancel": two_bytes,
    "blocks swapped": lambda x: x.reshape(4, -1)[torch.tensor([2, 3, 0, 1])].view_as(x),
    "two pairs swapped": lambda x: x.flatten()[torch.tensor([1, 0, 3, 2, *range(4, x.numel())])].view_as(x),
}


def test_structured_changes_change_the_hash() -> None:
    hashes = {"none": content_hash(IMAGES), **{name: content_hash(change(IMAGES)) for name, change in CHANGES.items()}}
    assert len(set(hashes.values())) == len(hashes)


def test_every_byte_counts_at_its_position() -> None:
    content = torch.arange(2500).remainder(251).to(torch.uint8)
    hashes = {content_hash(content)}
    for position in range(0, 2500, 7):
        changed = content.clone()
        changed[position] ^= 1
        hashes.add(content_hash(changed))
    assert len(hashes) == 1 + len(range(0, 2500, 7))
    # Hadamard matrices have the same sums along all axes in any order of their rows.
    signs = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    hadamard = torch.kron(torch.kron(signs, signs), signs)
    orders = list(itertools.permutations(range(8)))[::20]
    assert len({content_hash(hadamard[list(order)]) for order in orders}) == 2016


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_value_of_a_sample_counts_for_it_alone(dtype: torch.dtype) -> None:
    content = torch.arange(120).reshape(3, 40).to(dtype)
    hashes = row_hashes(content, 3)
    assert hashes is not None
    for position in range(40):
        changed = content.clone()
        changed[1, position] += 1
        others = row_hashes(changed, 3)
        assert others is not None
        assert [one == other for one, other in zip(hashes, others, strict=True)] == [True, False, True]


def test_the_same_in_other_layouts_of_memory() -> None:
    assert content_hash(IMAGES.to(memory_format=torch.channels_last)) == content_hash(IMAGES)
    assert content_hash(IMAGES[:, :, ::2]) == content_hash(IMAGES[:, :, ::2].clone())
    assert content_hash(COMPLEX.conj()) == content_hash(COMPLEX.conj().resolve_conj())
    assert content_hash(COMPLEX.conj().imag) == content_hash(COMPLEX.conj().imag.resolve_neg())
    assert content_hash(IMAGES.clone().requires_grad_()) == content_hash(IMAGES)
    assert content_hash(nn.Parameter(IMAGES)) == content_hash(IMAGES)
    pairs = torch.sparse_coo_tensor(torch.tensor([[1, 0, 1], [0, 0, 0]]), torch.ones(3), check_invariants=True)
    assert not pairs.is_coalesced()
    assert content_hash(pairs) == content_hash(pairs.coalesce())
    array = np.arange(12).reshape(3, 4)
    assert content_hash(np.asfortranarray(array)) == content_hash(array) == content_hash(np.repeat(array, 2, 0)[::2])
    with torch.inference_mode():
        assert content_hash(IMAGES + 0) == content_hash(IMAGES)


@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
def test_quantised_tensors_count_with_their_scales() -> None:
    x = torch.tensor([[0.5, 1.0], [1.5, 2.0]])
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 0])
    values = [
        torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        torch.quantize_per_tensor(2 * x, 0.2, 0, torch.quint8),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8),
        torch.quantize_per_channel(x, scales, zeros, 1, torch.qint8),
    ]
    assert torch.equal(values[0].int_repr(), values[1].int_repr())
    assert len({content_hash(value) for value in values} - {None}) == 5
    assert row_hashes(values[0], 2) != row_hashes(values[1], 2)


def batch() -> dict[str, Any]:
    """Eight samples in all the ways in which a batch may hold them."""
    return {
        "image": IMAGES,
        "pair": (IMAGES[:, 0].double(), [f"sample {i}" for i in range(8)]),
        "sample": Sample(torch.arange(8), 3),
        "arrays": Pair(np.arange(16).reshape(8, 2), np.array([f"{i}" for i in range(8)])),
        "sparse": torch.diag(torch.arange(8.0) + 1).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(i + 1) for i in range(8)], layout=torch.jagged),
        "boxes": [torch.ones(i, 4) for i in range(8)],
        "objects": [Graph(index=i) for i in range(8)],
    }


def taken(value: Any, order: list[int]) -> Any:
    """The samples of a batch, or of a part of one, in this order."""
    if isinstance(value, dict):
        return {key: taken(item, order) for key, item in value.items()}
    if isinstance(value, Pair):
        return Pair(*(taken(item, order) for item in value))
    if isinstance(value, tuple):
        return tuple(taken(item, order) for item in value)
    if isinstance(value, list):
        return [value[i] for i in order]
    if isinstance(value, Sample):
        return Sample(taken(value.image, order), value.label)
    if isinstance(value, Tensor) and value.is_nested:
        parts = value.unbind()
        return torch.nested.nested_tensor([parts[i] for i in order], layout=torch.jagged)
    return value.index_select(0, torch.tensor(order)) if isinstance(value, Tensor) else value[order]


def test_a_sample_has_its_hash_in_any_batch() -> None:
    whole = row_hashes(batch(), 8)
    assert whole is not None
    assert len(set(whole)) == 8
    for order in ([7, 2, 3, 1, 0, 5, 4, 6], [3, 1, 4], [5], [0, 0]):
        assert row_hashes(taken(batch(), order), len(order)) == [whole[i] for i in order]


@pytest.mark.parametrize("name", list(batch()))
def test_all_that_a_batch_holds_of_a_sample_counts(name: str) -> None:
    """One part with two of its samples exchanged: these two change, whatever the other parts are."""
    changed = batch()
    changed[name] = taken(changed[name], [0, 1, 3, 2, 4, 5, 6, 7])
    one, other = row_hashes(batch(), 8), row_hashes(changed, 8)
    assert one is not None
    assert other is not None
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False, True, True, True, True]


def test_what_is_no_samples_own_counts_for_all() -> None:
    def hashes(**shared: Any) -> list[bytes] | None:
        return row_hashes({"x": IMAGES, **shared}, 8)

    plain = hashes()
    assert plain is not None
    for other in (hashes(scale=1.0), hashes(scale=2.0), hashes(weights=torch.ones(5)), hashes(name="a dataset")):
        assert other is not None
        assert not set(plain) & set(other)
    one, other = (row_hashes({"x": IMAGES, "scale": scale}, 8, shared=False) for scale in (1.0, 2.0))
    assert one == other is not None
    assert row_hashes({"scale": 1.0}, 8, shared=False) is None
    whole = row_hashes({"scale": 1.0}, 2)
    assert whole is not None
    assert len(whole) == 2
    assert len(set(whole)) == 1


def test_a_list_of_tensors_of_all_samples_is_taken_apart_by_sample() -> None:
    crops = [IMAGES[:5], IMAGES[:5] + 1, IMAGES[:5, :, :4]]
    one = row_hashes([crops, torch.arange(5)], 5)
    order = [4, 3, 2, 1, 0]
    other = row_hashes([[crop[order] for crop in crops], torch.tensor(order)], 5)
    assert one is not None
    assert other == one[::-1]


def test_as_many_parts_as_samples_are_not_mistaken_for_samples() -> None:
    texts = [["a", "a"], ["b", "c"]]  # may be two texts and two labels, or two samples
    hashes = row_hashes(texts, 2)
    assert hashes is not None
    for other in ([["a", "a"], ["b", "d"]], [["a", "d"], ["b", "c"]]):
        changed = row_hashes(other, 2)
        assert changed is not None
        assert not set(hashes) & set(changed)
    two = row_hashes([IMAGES[:2], ["a", "b"], None], 2)
    assert two is not None
    assert row_hashes([IMAGES[:2], ["a", "c"], None], 2) == [two[0], row_hashes([IMAGES[1:2], ["c"], None], 1)[0]]  # type: ignore[index]
    assert row_hashes((IMAGES[:2], ["a", "b"]), 2) == [
        row_hashes((IMAGES[i : i + 1], ["ab"[i]]), 1)[0]  # type: ignore[index]
        for i in range(2)
    ]
