"""Which tokens are real: the attention mask that a module is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

# Names under which models take a (samples, tokens) mask, and whether nonzero means "a real token" there.
_MASKS = {"attention_mask": True, "src_key_padding_mask": False, "key_padding_mask": False, "padding_mask": False}


@cache
def _signature(module_type: Any) -> inspect.Signature:
    return inspect.signature(module_type.forward)


def find_mask(module_type: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Tensor | None]:
    """Returns whether a module takes a mask, and the mask that it is called with."""
    try:
        arguments = dict(_signature(module_type).bind(None, *args, **kwargs).arguments)
    except (TypeError, ValueError):
        arguments = dict(kwargs)
    passed = [item for value in arguments.values() for item in (value if isinstance(value, tuple) else (value,))]
    for value in passed:  # of *args each
        if isinstance(value, Mapping):  # **kwargs, or a batch passed as one argument
            arguments.update({key: item for key, item in value.items() if isinstance(key, str)})
    for name, nonzero_is_token in _MASKS.items():
        if name in arguments or name in _signature(module_type).parameters:
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and not nonzero_is_token:
                mask = mask == 0  # of booleans, true is padding; of numbers to add to scores, minus infinity
            return True, mask if isinstance(mask, Tensor) else None
    return False, None
