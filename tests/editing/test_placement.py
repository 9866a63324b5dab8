"""Sets of weights in one module: what it computes with each is what a module of its own would; and tensors in files."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_cka.editing.placement import FileBacked, Placement
from lit_cka.editing.sources import module_weights

BOTH_MODES = pytest.mark.parametrize("copies", [False, True], ids=["pointers", "copies"])


class Network(nn.Module):
    """With a weight under two names, buffers, one of them of whole numbers and one that is not saved."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale[0] * self.out(torch.tanh(self.inner(self.norm(self.embedding(tokens)))))


TOKENS = torch.arange(11)


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Network()
        for buffer in (module.norm.running_mean, module.norm.running_var):
            assert buffer is not None
            nn.init.uniform_(buffer, 0.5, 2)
        for parameter in module.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
    assert module.norm.num_batches_tracked is not None
    module.norm.num_batches_tracked.fill_(seed)
    return module.eval()


def weights(seed: int) -> dict[str, Tensor]:
    return module_weights(network(seed))


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        output = module(TOKENS)
    assert isinstance(output, Tensor)
    return output


def some_sets() -> dict[str, dict[str, Tensor]]:
    """The second shares some tensors with the first."""
    first, second = weights(1), weights(2)
    second["inner.weight"] = first["inner.weight"]
    return {"first": first, "second": second}


def expected_outputs(sets: dict[str, dict[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
    """Of a copy that loads each set, over its own weights."""
    expected = {}
    for key, values in sets.items():
        other = copy.deepcopy(module)
        other.load_state_dict(values, strict=False)
        expected[key] = outputs(other)
    return expected


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_as_before(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@BOTH_MODES
def test_the_module_computes_with_each_set(copies: bool) -> None:
    module, sets = network(), some_sets()
    before, own = state(module), outputs(module)
    parameters = {name: (id(value), value.data_ptr()) for name, value in module.named_parameters()}
    expected = expected_outputs(sets, module)
    assert not torch.allclose(expected["first"], expected["second"])
    placement = Placement(module, sets, copy=copies)
    for _ in range(3):  # batches
        with placement.all_in_turn() as keys:
            seen = []
            for key in keys:
                seen.append(key)
                assert torch.equal(outputs(module), expected[key])
                assert module.norm.num_batches_tracked == {"first": 1, "second": 2}[key]
                assert module.out.weight is module.embedding.weight
        assert seen == list(sets)
        assert_as_before(module, before)
        assert torch.equal(outputs(module), own)
    assert {name: (id(value), value.data_ptr()) for name, value in module.named_parameters()} == parameters


@BOTH_MODES
def test_the_sets_are_not_changed(copies: bool) -> None:
    module, sets = network(), some_sets()
    with Placement(module, sets, copy=copies).all_in_turn() as keys:
        for _ in keys:
            outputs(module)
    assert all(torch.equal(value, some_sets()[key][name]) for key, held in sets.items() for name, value in held.items())


@BOTH_MODES
def test_whatever_ends_the_turn_the_module_gets_its_own_back(copies: bool) -> None:
    module = network()
    before = state(module)
    placement = Placement(module, some_sets(), copy=copies)
    with pytest.raises(KeyError, match="second"), placement.all_in_turn() as keys:
        {"first": 1}[next(keys) and next(keys)]
    assert_as_before(module, before)
    with placement.all_in_turn() as keys:
        next(keys)  # and no further
        assert not torch.equal(module.inner.weight, before["inner.weight"])
    assert_as_before(module, before)
    with placement.all_in_turn():
        pass
    assert_as_before(module, before)


@BOTH_MODES
def test_what_a_set_lacks_is_the_module_s_own(copies: bool) -> None:
    """And not what the set before it had."""
    module, sets = network(), some_sets()
    part = {name: sets["second"][name] for name in ("inner.bias", "norm.weight")}
    sets = {**sets, "part": {**part, "unknown.weight": torch.ones(3)}, "none": {}}
    expected = expected_outputs(sets, module)
    assert torch.equal(expected["none"], outputs(module))
    with Placement(module, sets, copy=copies).all_in_turn() as keys:
        for key in keys:
            assert torch.equal(outputs(module), expected[key]), key


@BOTH_MODES
def test_in_inference_mode(copies: bool) -> None:
    """As `trainer.test` runs; what comes later may be training."""
    module, sets = network(), some_sets()
    before, expected = state(module), expected_outputs(sets, module)
    with torch.inference_mode():
        placement = Placement(module, sets, copy=copies)
        with placement.all_in_turn() as keys:
            for key in keys:
                assert torch.equal(module(TOKENS), expected[key])
    assert_as_before(module, before)
    assert not any(value.is_inference() for value in module.state_dict(keep_vars=True).values())
    module(TOKENS).sum().backward()
    assert module.inner.weight.grad is not None
    with torch.no_grad():
        module.inner.weight += 1


@BOTH_MODES
def test_gradients_and_what_needs_them_stay(copies: bool) -> None:
    module, sets = network(), some_sets()
    module.inner.weight.requires_grad_(False)
    module(TOKENS).sum().backward()
    gradients = {name: value.grad for name, value in module.named_parameters()}
    with Placement(module, sets, copy=copies).all_in_turn() as keys:
        for _ in keys:
            assert [value.requires_grad for value in module.inner.parameters()] == [False, True]
    assert all(value.grad is gradients[name] for name, value in module.named_parameters())


def test_no_copies_are_made_where_pointers_will_do() -> None:
    module, sets = network(), some_sets()
    own = {name: value.data_ptr() for name, value in module_weights(module).items()}
    with Placement(module, sets).all_in_turn() as keys:
        for key in keys:
            for name, value in module_weights(module).items():
                expected = sets[key]["out.weight" if name == "embedding.weight" else name]
                assert value.data_ptr() == expected.data_ptr(), (key, name)
    assert {name: value.data_ptr() for name, value in module_weights(module).items()} == own


def test_copies_are_made_into_the_module_s_own_memory() -> None:
    module, sets = network(), some_sets()
    own = {name: value.data_ptr() for name, value in module_weights(module).items()}
    with Placement(module, sets, copy=True).all_in_turn() as keys:
        for _ in keys:
            assert {name: value.data_ptr() for name, value in module_weights(module).items()} == own


@BOTH_MODES
def test_sets_of_another_precision_are_taken_in_the_module_s(copies: bool) -> None:
    module, sets = network().bfloat16(), some_sets()
    rounded = {
        key: {name: value.bfloat16() if value.is_floating_point() else value for name, value in held.items()}
        for key, held in sets.items()
    }
    before, expected = state(module), expected_outputs(rounded, module)
    pointers = []
    with Placement(module, sets, copy=copies).all_in_turn() as keys:
        for key in keys:
            output = outputs(module)
            assert output.dtype == torch.bfloat16
            assert torch.equal(output, expected[key])
            assert module.norm.num_batches_tracked is not None
            assert module.norm.num_batches_tracked.dtype == torch.int64
            pointers.append(module.inner.weight.data_ptr())
    assert pointers[0] == pointers[1]  # what the sets share is held once
    assert_as_before(module, before)


def test_sets_in_files(tmp_path: Path) -> None:
    module, sets = network(), some_sets()
    expected = expected_outputs(sets, module)
    files = FileBacked(tmp_path)
    placed = {key: {name: files.place(value) for name, value in held.items()} for key, held in sets.items()}
    with Placement(module, placed, copy=True).all_in_turn() as keys:
        for key in keys:
            assert torch.equal(outputs(module), expected[key])


@pytest.mark.gpu
@BOTH_MODES
def test_sets_of_another_device(copies: bool) -> None:
    module, sets = network().cuda(), some_sets()
    with Placement(module, sets, copy=copies).all_in_turn() as keys:
        for key in keys:
            for name, value in module_weights(module).items():
                expected = sets[key]["out.weight" if name == "embedding.weight" else name]
                assert value.is_cuda
                assert torch.equal(value.cpu(), expected)


# Files


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(5, 7),
        torch.randn(5, 7).double().T,
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6).bfloat16(),
        torch.randn(6).half(),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.empty(0, 4),
        nn.Parameter(torch.ones(2, 2)),
        torch.arange(10.0)[3:6],
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}",
)
def test_a_tensor_in_a_file_has_the_same_values(value: Tensor, tmp_path: Path) -> None:
    files = FileBacked(tmp_path)
    placed = files.place(value)
    assert (placed.shape, placed.dtype, placed.requires_grad) == (value.shape, value.dtype, False)
    assert torch.equal(placed, value)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert sizes == ([value.numel() * value.element_size()] if value.numel() else [])
    assert files.place(value) is placed
    assert files.place(placed) is placed
    assert len(list(tmp_path.iterdir())) == len(sizes)
    if value.numel():
        with torch.no_grad():
            placed.zero_()
        assert not any(next(tmp_path.iterdir()).read_bytes())  # what the tensor holds is what the file holds


def test_each_tensor_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = FileBacked(str(tmp_path))
    values = [torch.full((3,), float(i)) for i in range(20)]
    placed = [files.place(value) for value in values]
    assert all(torch.equal(first, second) for first, second in zip(placed, values, strict=True))
    assert len(list(tmp_path.iterdir())) == 20


def test_originals_are_not_kept_in_memory(tmp_path: Path) -> None:
    """Nor taken for others that come to lie in their place."""
    files = FileBacked(tmp_path)
    placed = []
    for i in range(50):
        value = torch.full((100,), float(i))
        original = weakref.ref(value)
        placed.append(files.place(value))
        del value
        assert original() is None
    assert [int(value[0]) for value in placed] == list(range(50))
