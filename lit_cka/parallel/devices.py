"""Where to compute: a device as the user names it, and as it is here."""

from __future__ import annotations

import os

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 where the device has no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def usable_device(device: torch.device | str, dtype: torch.dtype = torch.float32) -> torch.device:
    """Returns the device, tried out; "cuda" is the GPU of this process where torchrun started several.

    Raises:
        ValueError: if it isn't there, or does not compute in the dtype.
    """
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None and "LOCAL_RANK" in os.environ:
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        probe = torch.zeros(1, dtype=dtype, device=chosen)
        probe.item()
    except Exception as error:  # of several kinds, by device
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"Expected `device` to be one that computes in {name} here, but got {str(device)!r}: {error}"
        ) from error
    return probe.device
