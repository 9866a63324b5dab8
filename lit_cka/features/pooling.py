"""From a layer's output to features (n, d): which axis holds what, and how positions are pooled away.

A layout is a string with one letter per axis: `N` the samples, `C` the channels (features), any other letter a
position (tokens, height, width, time). `NTC` are the tokens of a transformer, `NCHW` the maps of a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_cka.features.flat_parameters import flat_parts, shape_of

METHODS = ("mean", "last", "cls", "flatten")
_SUMMED_AT_ONCE = 2**16  # numbers, by each thread
_THREADS_OF_TORCH = 2  # up to so many, NumPy with its one is faster
Pooling: TypeAlias = Union[str, Callable[[Tensor], Tensor]]

_CHANNELS_FIRST = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm")  # torch modules whose channels are axis 1
_CHANNELS_LAST = ("Linear", "LayerNorm", "RMSNorm", "Embedding", "MultiheadAttention", "Conv1D")  # whose are the last
# Architectures of transformers that run tokens first inside, with their modules that do; those around turn it round.
_TOKENS_FIRST = {
    "xlnet": ("XLNetLayer", "XLNetRelativeAttention", "XLNetFeedForward"),
    "fsmt": ("EncoderLayer", "DecoderLayer", "Attention"),
}


class PoolingSpec(NamedTuple):
    """A pooling as asked for: one of `METHODS` or a callable, and the layout where it was given."""

    method: str | Callable[[Tensor], Tensor]
    layout: str | None


def parse_pooling(pooling: Pooling) -> PoolingSpec:
    """Read a pooling: "mean", "last", "cls", "flatten", each optionally with a layout ("mean:NCHW"), or a callable.

    Raises:
        ValueError: if the method is unknown, or the layout is no permutation of N, C and position letters.
    """
    if callable(pooling):
        return PoolingSpec(pooling, None)
    method, _, layout = pooling.partition(":")
    if method not in METHODS:
        raise ValueError(
            f"Expected `pooling` to be one of {', '.join(map(repr, METHODS))}, with a layout after a colon if need be "
            f'("mean:NCHW"), or a callable, but got {pooling!r}.'
        )
    if layout and not (
        re.fullmatch("[A-Z]{2,}", layout) and len(set(layout)) == len(layout) and {"N", "C"} < {*layout}
    ):
        raise ValueError(
            "Expected the layout to name every axis by its own letter, N for samples, C for channels, others for "
            f'positions ("NTC", "TNC", "NCHW", "NHWC"), but got {layout!r}.'
        )
    return PoolingSpec(method, layout or None)


def pool(output: Tensor, method: str, layout: str, mask: Tensor | None = None) -> Tensor:
    """Pool a layer's output to features (n, d).

    Args:
        output: the layer's output, its axes as in `layout`.
        method: "mean" over the positions (those that `mask` keeps), "last" position that `mask` keeps, "cls" (the
            first position), or "flatten" (positions and channels become one feature axis).
        layout: one letter per axis, see the module's docstring; "NC" is returned as it is.
        mask: (n, positions), nonzero for positions that count; None if all do.

    Returns:
        Features (n, d) in the dtype of `output`, or float64 where a mean was taken. A sample whose mask keeps
        nothing is NaN.
    """
    positions = [axis for axis, letter in enumerate(layout) if letter not in "NC"]
    order = [layout.index("N"), *positions, layout.index("C")]
    tokens = output if order == sorted(order) else output.permute(order)
    if not positions:
        return tokens
    if method == "flatten":
        return tokens.flatten(1)
    tokens = tokens.flatten(1, -2)  # (n, positions, d)
    if method == "cls":
        return tokens[:, 0]
    if method == "last":
        if mask is None:
            return tokens[:, -1]
        last = (mask != 0).long().mul(torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        picked = tokens[torch.arange(len(tokens), device=tokens.device), last]
        return picked.masked_fill(~(mask != 0).any(dim=1, keepdim=True), torch.nan)
    if mask is None:
        return mean_over_positions(tokens)
    total = sum_kept(tokens, mask != 0)
    return total.div_((mask != 0).to(total.device).sum(dim=1, keepdim=True))


def mean_over_positions(tokens: Tensor) -> Tensor:
    """Returns the float64 mean (n, d) over all positions (n, positions, d)."""
    num_positions = tokens.shape[1]
    if tokens.device.type == "cpu" and tokens.dtype == torch.float32 and torch.get_num_threads() <= _THREADS_OF_TORCH:
        try:
            values = tokens.detach().numpy()
        except (RuntimeError, TypeError):  # a tensor within a transform, whose memory is not NumPy's to see
            pass
        else:
            # Converts what a CPU's cache holds at a time, where torch first writes all out in float64.
            with np.errstate(all="ignore"):  # of infinite features, or no positions
                total = np.add.reduce(values, axis=1, dtype=np.float64)
                return torch.from_numpy(np.true_divide(total, num_positions, out=total))
    return sum_kept(tokens, None).div_(num_positions)


def sum_kept(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Returns the float64 sum (n, d) over those of the positions (n, positions, d) that are kept (n, positions)."""
    if tokens.device.type == "mps":  # which has no float64
        tokens, kept = tokens.cpu(), None if kept is None else kept.cpu()
    if tokens.device.type != "cpu":
        return _summed(tokens, kept)
    _, num_positions, width = tokens.shape
    size = max(_SUMMED_AT_ONCE * torch.get_num_threads() // max(num_positions * width, 1), 1)  # a few samples
    if kept is None:
        return torch.cat([_summed(part, None) for part in tokens.split(size)])
    return torch.cat([_summed(*parts) for parts in zip(tokens.split(size), kept.split(size), strict=True)])


def _summed(tokens: Tensor, kept: Tensor | None) -> Tensor:
    if kept is not None:
        # where, not a product: what stands at a padding position may be infinite, and 0 * inf is NaN.
        tokens = torch.where(kept[:, :, None], tokens, 0)
    return tokens.sum(dim=1, dtype=torch.float64)


def pool_nested(tensor: Tensor, method: str) -> Tensor:
    """Pool what torch's encoder packs as a nested tensor: samples (tokens, d) without their padding."""
    return _pool_unequal(list(tensor.unbind()), method)


def pool_packed(rows: Tensor, method: str, lengths: list[int]) -> Tensor:
    """Pool rows (total, d) of which each sample has as many as its length, one sample after the other.

    Raises:
        ValueError: if features are to be flattened of samples of several lengths.
    """
    if method == "flatten" and len(set(lengths)) > 1:
        raise ValueError(f"Expected samples of one length to flatten, but got {', '.join(map(str, lengths[:8]))}.")
    return _pool_unequal(list(rows.split(lengths)), method)


def _pool_unequal(samples: list[Tensor], method: str) -> Tensor:
    padded = pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples], device=padded.device)
    return pool(padded, method, "NTC", torch.arange(padded.shape[1], device=padded.device) < lengths[:, None])


def find_layout(
    name: str, module: nn.Module, output: Tensor, batch_sizes: set[int], parent: nn.Module | None = None
) -> str:
    """Returns the layout of a layer's output, if shape and module leave one reading.

    The evidence: the batch size of the model's inputs; `batch_first` of what the module or its parent holds;
    whether it is built of modules whose channels come last (Linear, LayerNorm) or first (convolutions, BatchNorm);
    the widths of its normalisation layers; and height equal to width.

    Args:
        name: the layer's name, for the error.
        module: the layer.
        output: its output.
        batch_sizes: sizes of the first axis of the model's inputs.
        parent: the module that holds the layer.

    Raises:
        ValueError: if more than one layout fits, or none.
    """
    shape = output.shape
    batch_first = _batch_first(module)
    sizes = batch_sizes or set(shape)
    if batch_first is False and output.ndim == 3 and (_speaks_for_itself(module) or shape[1] in sizes):
        return "TNC"  # as the module says; the model's inputs may be tokens first, too, where their sizes mislead
    fitting = [layout for layout in _candidates(output.ndim) if shape[layout.index("N")] in sizes]
    if batch_first is None and parent is not None:
        batch_first = _batch_first(parent)
    if batch_first is not None and output.ndim > 2:
        agreeing = [layout for layout in fitting if (layout[0] == "N") is batch_first]
        # Against the batch size, what is around a layer makes its layout a question, no more.
        fitting = agreeing or fitting + (["TNC"] if batch_first is False and output.ndim == 3 else [])
    if batch_first and fitting == ["TNC"] and (shape[0] == 1 or shape[0] % shape[1] == 0):
        fitting = []  # rather positions of all samples alike, or parts of samples in their place
    if not fitting:
        raise ValueError(
            f"Layer {name!r} returned shape {tuple(shape)}, and no axis that could be the samples has the inputs' "
            f"batch size ({', '.join(map(str, sorted(batch_sizes)))}). Choose other `layers`, or pass a callable "
            "`pooling` that returns (samples, features)."
        )
    for evidence in (_kind, _norm_widths, _square):
        if len(fitting) > 1:
            fitting = [layout for layout in fitting if evidence(layout, module, shape)] or fitting
    if len(fitting) > 1:
        choices = " or ".join(f'pooling="mean:{layout}"' for layout in fitting)
        raise ValueError(
            f"Layer {name!r} returned shape {tuple(shape)}, which can be read as {' or '.join(fitting)} "
            f"(N samples, C channels, other letters positions). Say which: {choices}."
        )
    return fitting[0]


def _candidates(ndim: int) -> list[str]:
    layouts = {2: ["NC"], 3: ["NTC", "TNC", "NCT"], 4: ["NHWC", "NCHW"], 5: ["NTHWC", "NCTHW"]}
    return layouts.get(ndim, [])


def _speaks_for_itself(module: nn.Module) -> bool:
    """Returns whether a module takes batches as it says, rather than turning them round for a part that says so."""
    bases = [base for base in type(module).__mro__ if base is not nn.Module]
    return hasattr(module, "batch_first") or any(base.__module__.startswith("torch.nn.modules.") for base in bases)


def _batch_first(module: nn.Module) -> bool | None:
    """Returns whether the samples are the first axis, by that attribute or by library; None if nothing tells."""
    values = (getattr(child, "batch_first", None) for child in module.modules())
    flags = {value for value in values if isinstance(value, bool)}
    library, *path = type(module).__module__.split(".")
    if not flags and library in ("transformers", "timm"):  # throughout, with few exceptions
        exceptions = next((_TOKENS_FIRST[part] for part in path if part in _TOKENS_FIRST), None)
        return True if exceptions is None else False if type(module).__name__ in exceptions else None
    return flags.pop() if len(flags) == 1 else None


def _kind(layout: str, module: nn.Module, shape: torch.Size) -> bool:
    kinds = {type(child).__name__ for child in module.modules()}
    first = any(kind.startswith(_CHANNELS_FIRST) and kind != "Conv1D" for kind in kinds)
    last = any(kind.endswith(_CHANNELS_LAST) for kind in kinds)
    if first == last:
        return True
    return (layout[-1] == "C") == last


def _norm_widths(layout: str, module: nn.Module, shape: torch.Size) -> bool:
    parts = flat_parts(module)
    shapes = [
        shape_of(parameter, parts)
        for child in module.modules()
        if "norm" in type(child).__name__.lower()
        for parameter in child.parameters(recurse=False)
    ]
    return (shape[layout.index("C")],) in shapes


def _square(layout: str, module: nn.Module, shape: torch.Size) -> bool:
    return "H" not in layout or shape[layout.index("H")] == shape[layout.index("W")]
