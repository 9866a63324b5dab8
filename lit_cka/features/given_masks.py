"""Which mask counts for a layer, of those that the modules around it are called with: `MaskCall`, `mask_for`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias, Union

import torch
from torch import Tensor

from lit_cka.features.masks import PATCH_NAMES, is_of_positions, names_of, tokens_kept

Mask: TypeAlias = Union[str, Callable[..., Tensor]]

# What a module is given that reads something else than the tokens that the masks around it are for.
_OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "encoder_hidden_states")
# Architectures of transformers whose masks of the patches of images are True at padding.
_TRUE_DROPS = ("mask2former", "oneformer")


class MaskCall(NamedTuple):
    """What a module was called with.

    Attributes:
        masks: by name, in the order in which they count.
        other_input: what it reads that the masks of modules around it are not for; "" if there is no such thing.
        library: that the module is from.
    """

    masks: dict[str, Tensor]
    other_input: str = ""
    library: str = ""


@cache
def _signature(module_type: Any) -> inspect.Signature:
    return inspect.signature(module_type.forward)


def mask_call(module_type: type, arguments: Mapping[str, Any]) -> MaskCall | None:
    """Returns the masks that a module is called with, by the names of its arguments; None if there are none and nothing
    speaks against those of modules around it.
    """
    masks = {name: arguments[name] for name in names_of(module_type) if isinstance(arguments.get(name), Tensor)}
    if any(part in _TRUE_DROPS for part in module_type.__module__.split(".")):
        masks = {name: ~mask if mask.dtype == torch.bool else mask for name, mask in masks.items()}
    if "input_ids" in arguments:  # beside text, a mask of the patches of images is for a tower inside
        masks = {name: mask for name, mask in masks.items() if name not in PATCH_NAMES}
    other_input = next((name for name in _OTHER_INPUTS if isinstance(arguments.get(name), Tensor)), "")
    if other_input == "encoder_hidden_states" and not any(
        isinstance(value, Tensor) and not ("mask" in name or name.startswith("encoder_"))
        for name, value in arguments.items()
    ):
        other_input = ""  # these are the tokens that it runs on itself
    if not masks and not other_input:
        return None
    return MaskCall(masks, other_input, module_type.__module__.partition(".")[0])


def named_arguments(module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, and what mappings among them hold, such as a batch that is one."""
    return dict(_named(module_type, args, kwargs))


def _named(module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        arguments = dict(_signature(module_type).bind(None, *args, **kwargs).arguments)
    except (TypeError, ValueError):
        arguments = dict(kwargs)
    yield from ((name, value) for name, value in arguments.items() if value is not None)
    for value in arguments.values():  # of *args each
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Mapping):  # **kwargs, or a batch passed as one argument
                yield from ((key, each) for key, each in item.items() if isinstance(key, str))


def said_tokens(mask: Mask, module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the tokens that count, (n, tokens), by what the user says: see `mask` of `FeatureExtractor`.

    Where a name leaves open what is meant, nonzero keeps.

    Raises:
        ValueError: if there is no such argument, or the callable returns something else.
    """
    if callable(mask):
        return checked_tokens(mask(*args, **kwargs))
    arguments = named_arguments(module_type, args, kwargs)
    if not isinstance(arguments.get(mask), Tensor):
        raise ValueError(
            f"Expected the model to be called with a mask named {mask!r}, but its arguments are "
            f"{', '.join(arguments) or 'without names'}."
        )
    kept = tokens_kept(mask, arguments[mask], library=module_type.__module__.partition(".")[0])
    return checked_tokens(arguments[mask] if kept is None else kept)


def tokens_of_batch(mask: Mask | None, batch: Any) -> Tensor | None:
    """Returns the tokens that count, (n, tokens), by a step's batch: what a callable makes of it, or what it holds
    under a name; None where it holds nothing of that name.

    Raises:
        ValueError: as `said_tokens`.
    """
    if callable(mask):
        return checked_tokens(mask(batch))
    held = batch.get(mask) if mask is not None and isinstance(batch, Mapping) else None
    if mask is None or not isinstance(held, Tensor):
        return None
    kept = tokens_kept(mask, held)
    return checked_tokens(held if kept is None else kept)


def checked_tokens(tokens: Any) -> Tensor:
    """Returns what a callable mask has returned, if it is one tensor (n, tokens); raises a ValueError if not."""
    if isinstance(tokens, Tensor) and tokens.ndim == 2:
        return tokens
    got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
    raise ValueError(f"Expected `mask` to be a tensor (samples, tokens), nonzero for those that count, but got {got}.")


def mask_for(
    layer: str, shape: tuple[int, int], calls: Mapping[str, MaskCall], warn: Callable[[str, str], None]
) -> Tensor | None:
    """Returns the tokens of a layer that count, boolean (n, tokens); None if all do.

    The mask is that of the outermost call, as the user has passed it, since a model may rewrite it on the way inside.
    Further inside it is looked for where it is not of the layer's tokens; in a decoder, or the tower of another
    kind of input, only from there on, or under the decoder's name.

    Args:
        layer: its name.
        shape: (n, tokens) of what it returns.
        calls: by the names of the modules around layers.
        warn: called with a mask's name and a message if one was passed, but none could be used.
    """
    around = [name for name in calls if name == "" or layer.startswith(f"{name}.")]
    around.sort(key=len)
    inside = next((index for index, name in enumerate(around) if index and calls[name].other_input), 0)
    in_decoder = inside > 0 and calls[around[inside]].other_input == "encoder_hidden_states"
    problem = None
    for index, ancestor in enumerate(around):
        for name, mask in calls[ancestor].masks.items():
            for_decoder = name == "decoder_attention_mask"
            if (index < inside) != for_decoder or (for_decoder and not in_decoder):
                continue
            if is_of_positions(name, mask, shape):
                continue
            kept = tokens_kept(name, mask, library=calls[ancestor].library)
            if kept is not None and kept.shape == shape:
                return kept
            problem = problem or (name, _problem(layer, shape, name, mask, kept))
    if problem is not None:
        warn(*problem)
    return None


def _problem(layer: str, shape: tuple[int, int], name: str, mask: Tensor, kept: Tensor | None) -> str:
    what = f"the mask `{name}` is of shape {tuple(mask.shape)}"
    if kept is None:
        what = f"it is not clear what the mask `{name}` of {mask.dtype} and shape {tuple(mask.shape)} keeps"
    return (
        f"Layer {layer!r} has {shape[1]} positions, but {what}: all positions are pooled. Say with `mask` which count."
    )
