"""Callbacks that act on what CKA says in training: `FreezeConverged` and `DriftBudget`, and what they are made of.

What they read is measured by `lit_cka.tracking`; edits of finished models are `lit_cka.editing`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.control.drift_budget import DriftBudget
    from lit_cka.control.freeze_converged import FreezeConverged

__all__ = ["DriftBudget", "FreezeConverged"]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "drift_budget": ["DriftBudget"],
        "freeze_converged": ["FreezeConverged"],
    },
)
