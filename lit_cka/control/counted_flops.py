"""The FLOPs of matrix products, convolutions and attention, counted while they run: `CountedFlops`."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountedFlops(TorchDispatchMode):
    """Adds up what torch's own formulas say of each operation, two for each product and sum.

    `torch.utils.flop_counter.FlopCounterMode` has the same numbers, and hooks on all modules of the process besides,
    of which compiled modules warn.

    Attributes:
        total: so far.
    """

    supports_higher_order_operators = True  # which are run as they are

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output
