"""Which tokens count: what a mask means that a model was called with. This is where padding is told from text.

A mask may be of zeros and ones in any dtype, of what is added to attention scores (0 keeps, a large negative number
drops), boolean in torch's sense (True drops, under the name `key_padding_mask`) or in everybody else's (True keeps),
and of keys alone or of queries by keys. Its name and its values tell which. Where they don't, nothing is assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order in which they are asked for where several are passed.
NAMES = (
    "attention_mask",
    "decoder_attention_mask",
    "input_mask",
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
    "padding_mask",
    "attn_mask",
    "mask",
    "pixel_attention_mask",
    "patch_valid",
    "patch_attention_mask",
)
PATCH_NAMES = NAMES[-3:]  # of patches of images, in transformers and timm; the last is (n, height, width)
_TORCH_NAMES = tuple(name for name in NAMES if name.endswith("key_padding_mask"))  # torch's other masks are of scores
_DROPS = -1e3  # what is added to a score to drop it is at most this


def names_of(module_type: type) -> tuple[str, ...]:
    """Returns the names under which modules of this type may be given a mask of tokens."""
    return _TORCH_NAMES if module_type.__module__.startswith("torch.nn.") else NAMES


def tokens_kept(name: str, mask: Tensor, *, library: str = "") -> Tensor | None:
    """Returns the tokens that count, boolean (n, tokens); None if that is not clear.

    What is kept depends on a sample's own values, name and dtype alone, so that it is the same in any batch.

    Args:
        name: of the argument, one of `NAMES`; any other is taken for a mask whose nonzero values keep.
        mask: (n, tokens), (n, tokens, 1), (n, 1 or queries, tokens) or (n, heads, 1 or queries, tokens), any dtype.
        library: that the module is from, in which a name may have another sense.
    """
    if name in PATCH_NAMES and mask.ndim > 2:
        return (mask != 0).flatten(1) if name == "patch_attention_mask" and mask.ndim == 3 else None
    if not 2 <= mask.ndim <= 4 or not mask.numel() or mask.is_complex():
        return None
    if name in ("attn_mask", "mask") and mask.ndim == 2 and len(mask) == mask.shape[1] and _is_of_scores(mask):
        return None  # of positions by positions?
    mask = mask.squeeze(2) if mask.ndim == 3 and mask.shape[2] == 1 < mask.shape[1] else mask
    kept = _kept_by_scores(mask) if _is_of_scores(mask) else _kept_by_truth(name, mask, library)
    if kept is None or kept.ndim == 2:
        return kept
    return _of_keys(kept if kept.ndim == 3 else kept.any(dim=1))


def is_of_positions(name: str, mask: Tensor, shape: tuple[int, int]) -> bool:
    """Returns whether a mask says which positions see which, the same for all samples, and nothing of padding.

    Args:
        name: of the argument.
        mask: what was passed.
        shape: (n, tokens) of a layer's output.
    """
    n, tokens = shape
    if name not in ("attn_mask", "mask") or mask.shape != (tokens, tokens):
        return False
    kept = mask > _DROPS if _is_of_scores(mask) else mask != 0
    causal = torch.ones_like(kept).tril()
    return n != tokens or torch.equal(kept, causal) or torch.equal(kept, ~causal)


def _is_of_scores(mask: Tensor) -> bool:
    """Returns whether a mask is one to be added to scores. One of floating-point zeros alone drops nothing then, where
    as one of zeros and ones it would drop everything.
    """
    if mask.is_floating_point() and not mask.any():
        return True
    return mask.is_signed() and bool((mask < 0).any())


def _kept_by_scores(mask: Tensor) -> Tensor | None:
    drops = mask <= _DROPS
    return ~drops if bool((drops | (mask >= 0)).all()) else None


def _kept_by_truth(name: str, mask: Tensor, library: str) -> Tensor | None:
    """Returns where a mask keeps that says so by zero and nonzero."""
    if mask.is_floating_point() and not bool((mask == mask.round()).all()):
        return None  # weights, or NaN
    true = mask != 0
    if name.endswith("key_padding_mask"):
        return ~true
    if name == "padding_mask" and library != "transformers":
        return ~true if mask.dtype == torch.bool else None
    # Of booleans under these names, some libraries keep what is True, and some drop it.
    return None if name in ("attn_mask", "mask") and mask.dtype == torch.bool else true


def _of_keys(allowed: Tensor) -> Tensor:
    """Returns the keys (n, keys) that a mask (n, queries, keys) of booleans lets any query see.

    A query at a padding position sees all, where a library means to keep its softmax finite: it does not tell.
    """
    sees_all = allowed.all(dim=2)
    sees_all[:, -1] = False  # the last one in a causal mask does
    everything = allowed.flatten(1).all(dim=1)
    return (allowed & ~sees_all[..., None]).any(dim=1) | everything[:, None]
