"""Which tensors belong to quantised weights, and mean nothing without each other: `quantised_names`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Types that weights are stored in by numbers of a few bits, as safetensors and as torch call them. Not 64-bit integers
# nor booleans, which are the positions and masks of models that are not quantised.
_FEW_BITS = re.compile(r"F4(_|$)|F[68]_|float[468]_")
_WHOLE = re.compile(r"[IU](4|8|16|32)$|q?u?int([1-8]|16|32)(x\d)?$|bits\d")
_BYTES = {"U8", "uint8"}
_FLOAT = re.compile(r"B?F\d|b?float\d")


def quantised_names(kinds: Mapping[str, tuple[str, int]]) -> set[str]:
    """Returns the names of all tensors in modules whose weights are quantised, with their scales, zeros and codebooks.

    What a scale is called differs between formats (block-FP8, GPTQ, AWQ, bitsandbytes, compressed-tensors, MXFP4, HQQ,
    Quanto, MLX and others). What they have in common tells instead: a module is quantised if it holds floats of 8 bits
    or less with others, a matrix of whole numbers of 32 bits or less with floats, or tensors below the name of another
    tensor ("layer.weight.absmax" of "layer.weight"). At the root, where models keep parameters such as class tokens, a
    tensor beside floats of 8 bits is their scale if its name says so. What is below a quantised module is part of it,
    unless its whole numbers are bytes, which may be an attention's mask.

    Args:
        kinds: type, as safetensors or torch calls it, and number of dimensions, by name.

    Example:
        >>> sorted(quantised_names({"a.qweight": ("I32", 2), "a.scales": ("F16", 2), "b.weight": ("F16", 2)}))
        ['a.qweight', 'a.scales']
    """
    modules: dict[str, list[str]] = {}
    composite = set()
    for name in kinds:
        owner = _tensor_above(name, kinds)
        module = (owner or name).rpartition(".")[0]
        modules.setdefault(module, []).append(name)
        if owner is not None:
            composite.add(module)
    found: set[str] = set()
    whole = []
    for module, names in modules.items():
        few_bits = [name for name in names if _FEW_BITS.match(kinds[name][0])]
        numbers = [kinds[name][0] for name in names if _WHOLE.match(kinds[name][0]) and kinds[name][1] > 1]
        has_float = any(_FLOAT.match(kinds[name][0]) and kinds[name][1] > 0 for name in names)
        if module in composite or (numbers and has_float) or (few_bits and module and len(names) > 1):
            found.update(names)
            whole += [f"{module}."] if module and {*numbers} - _BYTES else []
        else:
            scales = {name for name in names for scaled in few_bits if name != scaled and _is_scale(name, scaled)}
            found |= scales | (set(few_bits) if scales else set())
    return found | {name for name in kinds if name.startswith(tuple(whole))}


def quantised_tensors(weights: Mapping[str, Tensor]) -> set[str]:
    """Returns `quantised_names` of tensors."""
    return quantised_names({name: (type_name(value), value.ndim) for name, value in weights.items()})


def type_name(value: Tensor) -> str:
    """Returns the tensor's type as torch calls it, such as "float32"."""
    return str(value.dtype).removeprefix("torch.")


def _tensor_above(name: str, kinds: Mapping[str, object]) -> str | None:
    """Returns the tensor that this one is an attachment of: the first beginning of its name that is a tensor's."""
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((beginning for beginning in beginnings if beginning in kinds), None)


def _is_scale(name: str, scaled: str) -> bool:
    return scaled in name or "scale" in name
