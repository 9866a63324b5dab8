"""Other packages for CKA on the Python package index, each behind the same call.

What they do with a layer's output and with the batches, read in their sources:

- pytorch-cka 1.1.3 (`import cka`): all tokens of a sample in one long row; unbiased HSIC of each batch, averaged, in
  float32, not centred; the whole matrix layers x layers; cut to [0, 1].
- torch-cka 0.21 (`import torch_cka`): the same estimator, one pair of layers after the other; leaves gradients on and
  its hooks in the models; stops where the average is negative (NaN).
- ckatorch 1.0.3 (`import ckatorch`): needs outputs of three axes, and takes the first for batches and the second for
  samples: on a transformer it compares the tokens of each image. Every batch overwrites the value of the batch before,
  so that the last one alone counts. Ten passes over the data unless told otherwise; one here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

Compare = Callable[[nn.Module, nn.Module, "DataLoader[tuple[Tensor, ...]]", Sequence[str]], Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and advice on names and shuffling."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def pytorch_cka(
    first: nn.Module, second: nn.Module, loader: DataLoader[tuple[Tensor, ...]], layers: Sequence[str]
) -> Tensor:
    """CKA (layers, layers) by pytorch-cka. Batches begin with the model's input; both models are on one device."""
    from cka import compute_cka

    parameter = next(first.parameters(), torch.empty(0))
    return compute_cka(first, second, loader, layers=list(layers), device=parameter.device, progress=False)[0]


def torch_cka(
    first: nn.Module, second: nn.Module, loader: DataLoader[tuple[Tensor, ...]], layers: Sequence[str]
) -> Tensor:
    """CKA (layers, layers) by torch-cka, with gradients off. Its hooks stay in the models: pass copies."""
    from torch_cka import CKA

    with _quiet(), torch.no_grad():
        cka = CKA(first, second, "first", "second", list(layers), list(layers))
        cka.compare(loader, loader)
    return cka.export()["CKA"]


def ckatorch(
    first: nn.Module, second: nn.Module, loader: DataLoader[tuple[Tensor, ...]], layers: Sequence[str]
) -> Tensor:
    """CKA (layers, layers) by ckatorch. Batches hold the model's input alone. Its hooks stay: pass copies."""
    from ckatorch import CKA

    with _quiet():
        return CKA(first, second, list(layers), first_name="first", second_name="second")(loader, epochs=1)


PEERS: dict[str, tuple[str, Compare]] = {
    "pytorch-cka": ("cka", pytorch_cka),
    "torch-cka": ("torch_cka", torch_cka),
    "ckatorch": ("ckatorch", ckatorch),
}


def missing(name: str) -> str | None:
    """Why the peer of this name can't be imported, or None if it can."""
    try:
        import_module(PEERS[name][0])
    except ImportError as error:
        return f"not installable: {error}"
    return None
