"""Many sets of weights for one module: `Placement` puts them in, `FileBacked` keeps them out of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lit_cka.editing.sources import module_weights


class FileBacked:
    """Tensors whose memory is a file: the system reads it as needed, and may forget it again.

    Args:
        folder: where to write them; it has to stay as long as the tensors are used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._numbers = count()
        self._placed: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()  # keeps no original in memory

    def place(self, value: Tensor) -> Tensor:
        """Returns a copy of the tensor in a file; of the same tensor always the same copy."""
        if value not in self._placed:
            copy = value
            if value.numel():
                file = self.folder / f"{next(self._numbers)}.bin"
                flat = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype)
                copy = flat.view(value.shape).copy_(value.detach())
            self._placed[value] = self._placed[copy] = copy
        return self._placed[value]


class Placement:
    """Puts sets of weights into a module, one at a time, and in the end the ones that it had.

    Args:
        module: the module.
        sets: weights by name, as `module_weights` names them; what a set lacks is as the module has it.
        copy: copy the weights into the module's tensors each time, rather than hold all sets on its device and have
            the tensors point at them.
    """

    def __init__(self, module: nn.Module, sets: Mapping[str, Mapping[str, Tensor]], *, copy: bool = False) -> None:
        self._tensors = dict(_named_tensors(module))
        self._copy = copy
        # Sets share most of their tensors: on the device, too.
        moved: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

        def like(value: Tensor, target: Tensor) -> Tensor:
            if copy:
                return value
            dtype = target.dtype if value.is_floating_point() else value.dtype
            return moved.setdefault((id(value), target.device, dtype), value.to(target.device, dtype))

        self._sets = {
            key: {name: like(value, self._tensors[name]) for name, value in weights.items() if name in self._tensors}
            for key, weights in sets.items()
        }
        self._keep = sets  # so that no identity is used twice
        self._originals = {  # copies not on a GPU, which has to hold one model alone
            name: tensor.detach().to("cpu", copy=True) if copy else tensor.detach()
            for name, tensor in self._tensors.items()
        }

    @contextmanager
    def all_in_turn(self) -> Iterator[Iterator[str]]:
        """Yields an iterator over the keys: while one is current, the module has its weights, and in the end the
        original ones.
        """
        try:
            yield self._each()
        finally:
            self._put(self._originals)

    def _each(self) -> Iterator[str]:
        for key, weights in self._sets.items():
            self._put({**self._originals, **weights})
            yield key

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                if self._copy:
                    self._tensors[name].copy_(value)
                else:
                    self._tensors[name].data = value


def _named_tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """Returns the parameters and persistent buffers themselves, by the names of `module_weights`."""
    names = list(module_weights(module))
    return dict(zip(names, module.state_dict(keep_vars=True).values(), strict=True))
