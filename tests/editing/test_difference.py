"""Every kind of difference between checkpoint files, and the numbers against an SVD in NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_cka.editing import Diff, TensorDiff, diff_files
from tests.sync_worker import run_to_end

WORKER = str(Path(__file__).with_name("files_worker.py"))


def base() -> dict[str, Tensor]:
    """Tensors of many kinds, the floats far off zero."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (10 + torch.randn(shape, generator=generator)).to(dtype)

    weights = {f"layers.{index}.weight": values(12, 20) for index in range(3)}
    return weights | {
        "conv.weight": values(8, 3, 3, 3),
        "bfloat": values(30, 9, dtype=torch.bfloat16),
        "double": values(7, 7, dtype=torch.float64),
        "bias": values(13),
        "scalar": values(),
        "empty": torch.zeros(0, 4),
        "zeros": torch.zeros(5, 4),
        "counts": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False]),
        "eight": values(4, 4).to(torch.float8_e4m3fn),
    }


def moved(weights: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """All floats of more than 8 bits changed a little, the rest left as it is."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (W.double() + 0.1 * torch.randn(W.shape, generator=generator, dtype=torch.float64)).to(W.dtype)
        if W.is_floating_point() and W.dtype.itemsize > 1
        else W.clone()
        for name, W in weights.items()
    }


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def diff(*paths: Path, **options: Any) -> Diff:
    return diff_files(*paths, progress=False, **options)


def by_name(found: Diff, index: int = 0) -> dict[str, TensorDiff]:
    assert len({each["name"] for each in found.tensors[index]}) == len(found.tensors[index])
    return {each["name"]: each for each in found.tensors[index]}


def check_numbers(record: TensorDiff, W0: Tensor, W1: Tensor, s: Tensor | None) -> None:
    w0, delta = W0.double().numpy(), W1.double().numpy() - W0.double().numpy()
    change, norm = np.linalg.norm(delta.ravel()), np.linalg.norm(w0.ravel())
    assert record["change_norm"] == pytest.approx(change, rel=1e-10)
    assert record["base_norm"] == pytest.approx(norm, rel=1e-10)
    assert record["relative_change"] == pytest.approx(change / norm if norm else math.inf, rel=1e-10)
    if W0.ndim < 2:
        assert (record["effective_rank"], record["stable_rank"], record["full_rank"], s) == (None,) * 4
        return
    expected = np.linalg.svd(delta.reshape(len(delta), -1), compute_uv=False)
    assert s is not None
    np.testing.assert_allclose(s, expected, rtol=1e-8)
    p = expected / expected.sum()
    assert record["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-8)
    assert record["stable_rank"] == pytest.approx((expected**2).sum() / expected[0] ** 2, rel=1e-8)
    assert record["full_rank"] == len(expected)


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors"), ("a.pt", "b.safetensors"), ("a.pt", "b.pt")])
def test_numbers(tmp_path: Path, names: tuple[str, str]) -> None:
    W0 = base()
    W1 = moved(W0)
    found = diff(saved(tmp_path / names[0], W0), saved(tmp_path / names[1], W1))
    records = by_name(found)
    assert list(records) == (list(W0) if names[0] == "a.pt" else sorted(W0))
    for name, record in records.items():
        if name in ("empty", "counts", "mask", "eight"):
            assert record["kind"] == "unchanged"
        else:
            assert record["kind"] == "changed"
            check_numbers(record, W0[name], W1[name], found.spectra[0].get(name))
        assert record["shape"] == record["base_shape"] == list(W0[name].shape)
        assert record["dtype"] == record["base_dtype"] == str(W0[name].dtype).removeprefix("torch.")
    assert records["eight"]["note"] == "float8_e4m3fn: compared for equality alone"
    measured = [name for name in W0 if name not in ("counts", "mask", "eight")]
    change, norm = (
        np.linalg.norm(np.concatenate([W.double().numpy().ravel() for W in weights]))
        for weights in ([W1[name].double() - W0[name].double() for name in measured], [W0[name] for name in measured])
    )
    assert found.relative_change() == pytest.approx(change / norm, rel=1e-10)
    assert found.num_by_kind() == {"changed": 9, "unchanged": 4}
    assert not found.is_identical()
    assert math.isnan(found.cosine())


def test_without_spectra(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.pt", base()), saved(tmp_path / "b.pt", moved(base()))
    found = diff(a, b, spectra=False)
    assert found.spectra == ({},)
    assert all(each["effective_rank"] is None for each in found.tensors[0])
    assert found.relative_change() == diff(a, b).relative_change()


def test_every_kind_of_difference(tmp_path: Path) -> None:
    W0 = base() | {"other shape": torch.ones(3, 4), "gone": torch.ones(2), "was whole": torch.ones(3)}
    W0 |= {"infinite": torch.tensor([1.0, math.inf]), "still nan": torch.tensor([math.nan, 1.0])}
    W1 = {name: W.clone() for name, W in W0.items() if name != "gone"}
    W1 |= {"other shape": torch.ones(4, 3), "was whole": torch.ones(3, dtype=torch.int32), "new": torch.ones(2)}
    W1["layers.1.weight"][2, 3] += 1
    W1["layers.2.weight"][0, :2] = math.nan
    W1["bfloat"] = W0["bfloat"].float()
    W1["counts"] += 1
    W1["eight"] = W0["eight"].float().add(1).to(torch.float8_e4m3fn)
    W1["infinite"] = torch.ones(2)
    found = diff(saved(tmp_path / "a.safetensors", W0), saved(tmp_path / "b.pt", W1))
    records = by_name(found)
    kinds = {name: record["kind"] for name, record in records.items() if record["kind"] != "unchanged"}
    assert kinds == {
        "layers.1.weight": "changed", "layers.2.weight": "not finite", "counts": "changed", "eight": "changed",
        "other shape": "other shape", "gone": "missing", "was whole": "other type", "infinite": "not finite",
        "new": "added",
    }  # fmt: skip
    assert sum(found.num_by_kind().values()) == len(records) == len(W0) + 1
    one = records["layers.1.weight"]  # a single element
    assert (one["effective_rank"], one["stable_rank"]) == (pytest.approx(1), pytest.approx(1))
    assert one["change_norm"] == pytest.approx(1, rel=1e-5)
    assert (records["layers.2.weight"]["base_num_not_finite"], records["layers.2.weight"]["num_not_finite"]) == (0, 2)
    assert (records["infinite"]["base_num_not_finite"], records["infinite"]["num_not_finite"]) == (1, 0)
    assert records["still nan"]["num_not_finite"] == 1
    assert records["layers.2.weight"]["relative_change"] is None
    assert (records["bfloat"]["base_dtype"], records["bfloat"]["dtype"]) == ("bfloat16", "float32")
    assert (records["other shape"]["base_shape"], records["other shape"]["shape"]) == ([3, 4], [4, 3])
    assert (records["gone"]["shape"], records["new"]["base_shape"]) == (None, None)
    assert math.isfinite(found.relative_change())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_same_file_twice(tmp_path: Path, suffix: str) -> None:
    a = saved(tmp_path / f"a.{suffix}", base())
    found = diff(a, a)
    assert found.is_identical()
    assert found.relative_change() == 0
    assert found.spectra == ({},)
    assert found.num_by_kind() == {"unchanged": len(base())}
    # The same values in other types are not the same file.
    other = saved(tmp_path / "b.pt", {name: W.float() if name == "bfloat" else W for name, W in base().items()})
    assert diff(a, other).num_by_kind() == found.num_by_kind()
    assert not diff(a, other).is_identical()


def test_tied_weights(tmp_path: Path) -> None:
    """In torch's files a tied weight has all its names; `save_pretrained` keeps one of them."""
    W0, W1 = torch.ones(3, 4), torch.full((3, 4), 2.0)
    tied_a = saved(tmp_path / "a.pt", {"embed": W0, "head": W0})
    tied_b = saved(tmp_path / "b.pt", {"embed": W1, "head": W1})
    first = saved(tmp_path / "first.safetensors", {"embed": W1})
    last = saved(tmp_path / "last.safetensors", {"head": W0})
    apart = saved(tmp_path / "apart.safetensors", {"embed": W0, "head": 3 * W0})
    other = saved(tmp_path / "other.pt", {"body": W0})

    def kinds(*paths: Path) -> dict[str, Any]:
        return {name: (each["kind"], each["tied_to"]) for name, each in by_name(diff(*paths)).items()}

    assert kinds(tied_a, tied_b) == {"embed": ("changed", None), "head": ("tied", "embed")}
    assert kinds(tied_a, first) == {"embed": ("changed", None), "head": ("tied", "embed")}
    assert kinds(last, tied_b) == {"head": ("tied", "embed"), "embed": ("changed", None)}
    assert diff(tied_a, tied_a).is_identical()
    # Where they are two tensors on one side, each is compared.
    assert kinds(tied_a, apart) == {"embed": ("unchanged", None), "head": ("changed", None)}
    assert kinds(apart, tied_a) == {"embed": ("unchanged", None), "head": ("changed", None)}
    assert kinds(other, tied_a) == {"body": ("missing", None), "embed": ("added", None), "head": ("tied", "embed")}


def test_quantised_weights_are_compared_for_equality_alone(tmp_path: Path) -> None:
    W0 = {"a.qweight": torch.ones(4, 4, dtype=torch.int32), "a.scales": torch.ones(4), "b.weight": torch.ones(4, 4)}
    W1 = W0 | {"a.scales": torch.full((4,), 2.0)}
    records = by_name(diff(saved(tmp_path / "a.safetensors", W0), saved(tmp_path / "b.safetensors", W1)))
    assert {name: record["kind"] for name, record in records.items()} == {
        "a.qweight": "unchanged", "a.scales": "changed", "b.weight": "unchanged"
    }  # fmt: skip
    assert records["a.scales"]["relative_change"] is None
    assert records["a.scales"]["note"] == "part of quantised weights: compared for equality alone"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_sparse_tensors_are_not_compared(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pt", {"sparse": torch.eye(3).to_sparse(), "b": torch.ones(2)})
    record = by_name(diff(a, a))["sparse"]
    assert (record["kind"], record["note"]) == ("not compared", "stored as sparse_coo")
    assert not diff(a, a).is_identical()


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_numbers_whose_squares_float64_does_not_hold(tmp_path: Path, scale: float) -> None:
    a, b = (saved(tmp_path / f"{n}.pt", {"w": n * scale * torch.eye(3, dtype=torch.float64)}) for n in (1, 2))
    (record,) = diff(a, b).tensors[0]
    assert record["kind"] == "changed"
    assert record["relative_change"] is None
    assert record["note"] == "its squares are beyond float64"


def test_three_checkpoints(tmp_path: Path) -> None:
    W0 = base()
    W1, W2 = moved(W0, 1), moved(W0, 2)
    W2["layers.0.weight"] = W0["layers.0.weight"] + 0.5 * (W1["layers.0.weight"] - W0["layers.0.weight"])
    W2["layers.1.weight"] = W0["layers.1.weight"].clone()
    W2["conv.weight"] = torch.ones(2, 2)
    del W2["bias"]
    W1["only b"] = torch.ones(2)
    paths = [saved(tmp_path / f"{name}.pt", weights) for name, weights in (("a", W0), ("b", W1), ("c", W2))]
    found = diff(*paths)
    assert found.labels == ("B", "C")
    alone = [diff(paths[0], path) for path in paths[1:]]
    for index in range(2):
        assert found.tensors[index] == alone[index].tensors[0]
        for name, s in alone[index].spectra[0].items():
            assert torch.equal(found.spectra[index][name], s)
    expected, deltas = {}, ([], [])
    for name in ("layers.0.weight", "layers.1.weight", "layers.2.weight", "bfloat", "double", "scalar", "zeros"):
        b, c = ((W[name].double() - W0[name].double()).numpy().ravel() for W in (W1, W2))
        deltas[0].append(b)
        deltas[1].append(c)
        if name != "layers.1.weight":
            expected[name] = b @ c / np.linalg.norm(b) / np.linalg.norm(c)
    assert found.cosines == pytest.approx(expected, abs=1e-10)
    assert found.cosines["layers.0.weight"] == pytest.approx(1, abs=1e-6)
    b, c = map(np.concatenate, deltas)
    assert found.cosine() == pytest.approx(b @ c / np.linalg.norm(b) / np.linalg.norm(c), rel=1e-9)
    records = [by_name(found, index) for index in range(2)]
    assert (records[0]["bias"]["kind"], records[1]["bias"]["kind"]) == ("changed", "missing")
    assert records[1]["conv.weight"]["kind"] == "other shape"
    assert "only b" not in records[1]


def test_shards_and_wrappers(tmp_path: Path) -> None:
    W0 = {name: W for name, W in base().items() if name != "eight"}
    W1 = moved(W0)
    folder = tmp_path / "folder"
    folder.mkdir()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(W0)}
    for shard in set(weight_map.values()):
        saved(folder / shard, {name: W0[name] for name in W0 if weight_map[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"state_dict": {f"module.{name}": W for name, W in W1.items()}, "epoch": 3}, tmp_path / "b.ckpt")
    found = diff(folder, tmp_path / "b.ckpt")
    whole = diff(saved(tmp_path / "a.safetensors", W0), saved(tmp_path / "b.safetensors", W1))
    assert found.tensors == whole.tensors


def test_a_prefix_of_all_names(tmp_path: Path) -> None:
    """As between a LightningModule's checkpoint and the weights of the model in it."""
    W0 = {name: W for name, W in base().items() if name != "eight"}
    W1 = moved(W0)
    a, b = saved(tmp_path / "a.pt", W0), saved(tmp_path / "b.pt", W1)
    torch.save({"state_dict": {f"model.{name}": W for name, W in W1.items()}}, tmp_path / "b.ckpt")
    torch.save({"state_dict": {f"model.{name}": W for name, W in W0.items()}}, tmp_path / "a.ckpt")
    plain = diff(a, b)
    found = diff(a, tmp_path / "b.ckpt", tmp_path / "b.pt")
    assert found.tensors == plain.tensors * 2
    assert found.renamings == ("without 'model.'", None)
    found = diff(tmp_path / "a.ckpt", b, tmp_path / "b.ckpt")
    assert [each["name"] for each in found.tensors[0]] == [f"model.{name}" for name in W0]
    assert found.tensors[0] == found.tensors[1]
    assert found.renamings == ("with 'model.' in front", None)
    assert not diff(a, tmp_path / "a.ckpt").is_identical()


def test_several_sets_of_weights_and_other_mistakes(tmp_path: Path) -> None:
    W0 = base()
    a = saved(tmp_path / "a.pt", W0)
    torch.save({"state_dict": W0, "state_dict_ema": moved(W0)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="one set of weights, but it holds 2: 'state_dict'"):
        diff(a, tmp_path / "two.pt")
    assert diff(a, tmp_path / "two.pt", weights="state_dict").num_by_kind() == {"unchanged": len(W0)}
    assert diff(a, tmp_path / "two.pt", weights="state_dict_ema").num_by_kind()["changed"] == 9
    with pytest.raises(ValueError, match="a set of weights called 'x', but none has one"):
        diff(a, a, weights="x")
    with pytest.raises(FileNotFoundError, match=r"checkpoint file or folder at .*missing"):
        diff(a, tmp_path / "missing.pt")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        diff(a, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="a base and two others, but got 1"):
        diff(a)
    torch.save({"w": torch.ones(2), "other": Path("a")}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match=r"--trusted true"):
        diff(a, tmp_path / "pickle.pt")
    assert by_name(diff(a, tmp_path / "pickle.pt", trusted=True))["w"]["kind"] == "added"


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    """Three times the largest tensor of four, whatever the files' size; tall ones, which are split fast."""
    size = 2**24
    for index, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(index)
        tensors = {str(number): torch.randn(size // 128, 32, generator=generator) for number in range(4)}
        saved(tmp_path / f"{name}.safetensors", tensors)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    run_to_end(WORKER, "diff_memory", tmp_path / "memory.json", *paths, seconds=60)
    measured = json.loads((tmp_path / "memory.json").read_text())
    assert measured["names"] == 4
    assert size < measured["bytes"] < 3 * size + 6e7  # chunks in float64, and what libraries take
