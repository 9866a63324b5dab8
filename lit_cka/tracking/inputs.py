"""What a step passes to the model, as far as it can be told without reading it: `PassedTensors`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_cka.features.nested import tensors_in

_COMPUTED = -1


class PassedTensors:
    """Notes which of a batch's tensors a step passes to the model, and which others.

    A step that passes something else for the same batch than it did when the reference was recorded (in some epochs
    another view, say) is not to be compared with that. Where tensors are, is enough to tell most of these.
    """

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}
        self._calls: list[list[int]] = []

    def begin(self, batch: Any) -> None:
        """Begin a step on this batch."""
        self._places = {_place(tensor): number for number, tensor in enumerate(tensors_in(batch))}
        self._calls = []

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call of the model, or of the outermost module around some layer, with these arguments."""
        self._calls.append([self._places.get(_place(tensor), _COMPUTED) for tensor in tensors_in((args, kwargs))])

    def __str__(self) -> str:
        """For each call, the numbers of the batch's tensors, and -1 for any other."""
        return ";".join(",".join(map(str, call)) for call in self._calls)


def _place(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    except (RuntimeError, NotImplementedError):  # one without memory of its own (sparse, nested, a wrapper)
        return id(tensor)
