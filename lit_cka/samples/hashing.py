"""A 128-bit hash of what a value holds, of any type: the same in every process, on every device, for equal content.

It covers every byte at its position, with dtypes, shapes and types. An object counts by what `pickle` would keep of it;
what has no such content (an open file, a generator, a lock, a function without a name) has no hash. Python's `hash()`
and `repr()` are never asked, since they know addresses.
"""

from __future__ import annotations

import copyreg
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from xxhash import xxh3_128, xxh3_128_digest

_DEEPEST = 64  # levels of containers within containers
_SPARSE: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class _NoContentError(Exception):
    """There is a value whose content can't be told."""


def content_hash(value: Any) -> bytes | None:
    """A hash of 16 bytes of all that the value holds; None where that can't be told."""
    try:
        return _hash(value, ())
    except (_NoContentError, RecursionError):
        return None


def row_hashes(batch: Any, num_rows: int, *, shared: bool = True) -> list[bytes] | None:
    """A hash of 16 bytes for each of the samples of a batch, of all that the batch holds of it.

    A tensor, array or list whose leading axis has `num_rows` entries is taken apart, also within tuples, lists,
    mappings and dataclasses. Everything else belongs to all samples: a sample's hash changes with it.

    Args:
        batch: what a dataloader returns.
        num_rows: the number of samples.
        shared: False to leave out what belongs to all samples.

    Returns:
        None where the content of some value can't be told, and, without what is shared, where nothing is taken apart.
    """
    try:
        parts = _rows(batch, num_rows, shared)
        if isinstance(parts, list):
            return parts
        return [_join("whole", [parts])] * num_rows if shared else None
    except (_NoContentError, RecursionError):
        return None


def _rows(value: Any, n: int, shared: bool) -> list[bytes] | bytes:
    """A hash for each row, or the one of a value that is no row's own."""
    if isinstance(value, Tensor) and value.ndim and len(value) == n:
        return _tensor_rows(value)
    if isinstance(value, np.ndarray) and value.ndim and len(value) == n:
        return _array_rows(value)
    if _list_of(value, n) == "rows":
        return [_hash(item, ()) for item in value]
    children = None if _list_of(value, n) == "either" else _children(value)
    if children is None:
        return _hash(value, ()) if shared else b""
    names, items = children
    parts = [_rows(item, n, shared) for item in items]
    kind = _join(_name_of(type(value)), [_hash(name, ()) for name in names])
    if not any(isinstance(part, list) for part in parts):
        return _join("no rows", [kind, *(part for part in parts if isinstance(part, bytes))]) if shared else b""
    return [
        _join("row", [kind, *(part[row] if isinstance(part, list) else part for part in parts)]) for row in range(n)
    ]


def _list_of(value: Any, n: int) -> Literal["rows", "columns", "either"]:
    """Whether a list or tuple holds one thing for each of n samples, or different things of all of them."""
    if type(value) not in (list, tuple) or len(value) != n:
        return "columns"
    are_tensors = [isinstance(item, (Tensor, np.ndarray)) for item in value]
    if any(are_tensors) and not all(are_tensors):
        return "columns"
    if all(isinstance(item, (Tensor, np.ndarray, list, tuple)) and _length(item) == n for item in value):
        return "columns" if all(are_tensors) else "either"
    return "rows"


def _length(item: Any) -> int | None:
    return len(item) if isinstance(item, (list, tuple)) or item.ndim else None


def _children(value: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Names and values of what a container holds; None for what is no container."""
    if isinstance(value, Mapping):
        return list(value.keys()), list(value.values())
    if isinstance(value, (list, tuple)):
        return (), value
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return names, [getattr(value, name) for name in names]
    return None


def _tensor_rows(tensor: Tensor) -> list[bytes]:
    if tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized and tensor.numel():
        kind, content = _plain_tensor(tensor, tensor.shape[1:])
        return [_join("row", [kind, xxh3_128_digest(row)]) for row in content.reshape(len(tensor), -1)]
    return [_hash(row, ()) for row in tensor.unbind()]


def _array_rows(array: Any) -> list[bytes]:
    return [_hash(row, ()) for row in array]


def _join(kind: str, parts: Sequence[bytes]) -> bytes:
    """A hash of hashes."""
    return xxh3_128_digest(b"".join([kind.encode(), b"\0", *parts]))


def _leaf(kind: str, content: Any) -> bytes:
    state = xxh3_128(kind.encode() + b"\0")
    state.update(content)
    return state.digest()


def _name_of(named: Any) -> str:
    """The full name of a class or function, if it has one to be found by."""
    name = f"{named.__module__}.{named.__qualname__}"
    if "<" in name:
        raise _NoContentError
    return name


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    bool: lambda value: b"\1" if value else b"\0",
    int: lambda value: value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True),
    float: lambda value: struct.pack(">d", value),
    complex: lambda value: struct.pack(">dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: bytes,
}


def _hash(value: Any, around: tuple[int, ...]) -> bytes:
    """The content's hash; `around` are the ids of the containers that the value is in."""
    if (scalar := _SCALARS.get(type(value))) is not None:
        return _leaf(type(value).__name__, scalar(value))
    if id(value) in around:
        return _join(f"the container {len(around) - around.index(id(value))} levels up", [])
    if len(around) > _DEEPEST:
        raise _NoContentError
    around = (*around, id(value))
    if isinstance(value, Tensor):
        return _of_tensor(value, around)
    if isinstance(value, (np.ndarray, np.generic)) and type(value) is not np.ma.MaskedArray:
        return _of_array(value, around)
    if type(value) in (list, tuple):
        return _join(type(value).__name__, [_hash(item, around) for item in value])
    if type(value) in (set, frozenset):
        return _join(type(value).__name__, sorted(_hash(item, around) for item in value))
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, dict)):
        return _join(_name_of(type(value)), [_hash(part, around) for item in value.items() for part in item])
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return _leaf("named", _name_of(value).encode())
    return _of_object(value, around)


def _of_object(value: Any, around: tuple[int, ...]) -> bytes:
    """By what it takes to build the object again: for most, its class and its attributes."""
    if type(value) is object or isinstance(value, torch.UntypedStorage | torch.TypedStorage):
        raise _NoContentError
    try:
        reducer = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
    except Exception as error:  # of whatever kind: it can't be pickled
        raise _NoContentError from error
    if isinstance(reduced, str):
        return _join("global", [_hash(type(value), ()), _hash(reduced, ())])
    parts = [list(part) if index in (3, 4) and part is not None else part for index, part in enumerate(reduced)]
    return _join("object", [_hash(part, around) for part in parts])


def _of_array(array: Any, around: tuple[int, ...]) -> bytes:
    if isinstance(array, np.generic):
        return _join("number", [_of_array(np.asarray(array), around)])
    if type(array) not in (np.ndarray, np.memmap):
        return _of_object(array, around)
    kind = f"array {array.dtype.str} {array.shape}"
    if array.dtype.names is not None:  # between the fields there may be bytes of no meaning
        return _join(kind, [_hash((name, array[name]), around) for name in array.dtype.names])
    if array.dtype.kind in "OT":  # addresses
        return _join(kind, [_hash(item, around) for item in array.ravel().tolist()])
    return _leaf(kind, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _of_tensor(tensor: Tensor, around: tuple[int, ...]) -> bytes:
    if tensor.is_nested:
        return _join("nested", [_hash(part, around) for part in tensor.unbind()])
    if tensor.is_quantized:
        return _join("quantised", [_hash(part, around) for part in (tensor.int_repr(), *_scales(tensor))])
    if tensor.layout in _SPARSE:
        whole = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
        parts = [_hash(getattr(whole, name)(), around) for name in _SPARSE[tensor.layout]]
        return _join(f"{tensor.layout} {tuple(tensor.shape)}", parts)
    kind, content = _plain_tensor(tensor, tensor.shape)
    attributes = [_hash(vars(tensor), around)] if type(tensor) not in (Tensor, Parameter) else []
    return _join("tensor", [kind, xxh3_128_digest(content), *attributes])


def _scales(tensor: Tensor) -> Iterable[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return str(tensor.qscheme()), tensor.q_scale(), tensor.q_zero_point()
    zero_points, axis = tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
    return str(tensor.qscheme()), tensor.q_per_channel_scales(), zero_points, axis


def _plain_tensor(tensor: Tensor, shape: Sequence[int]) -> tuple[bytes, Any]:
    """The hash of the type, dtype and shape, and the bytes."""
    is_plain = tensor.layout is torch.strided and tensor.device.type != "meta"
    if not is_plain or is_traceable_wrapper_subclass(tensor):
        raise _NoContentError
    kind = _name_of(Tensor if type(tensor) is Parameter else type(tensor))
    try:
        values = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()
        content = values.reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # no memory of its own (fake, batched by vmap)
        raise _NoContentError from error
    return _leaf("tensor", f"{kind} {tensor.dtype} {tuple(shape)}".encode()), content
