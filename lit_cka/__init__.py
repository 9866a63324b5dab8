"""See what fine-tuning does to a model's representations: per-layer CKA for PyTorch Lightning, and edits of weights.

A package each for one idea, from `functional` (mathematics) up to `commands` (what `lit-cka` runs): see
docs/how_it_works.md.
"""

from typing import TYPE_CHECKING, Any

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.control.drift_budget import DriftBudget
    from lit_cka.control.freeze_converged import FreezeConverged
    from lit_cka.editing.editor import MonoSoupEditor
    from lit_cka.metrics import LinearCKA, MinibatchCKA
    from lit_cka.tracking.callback import CKACallback

__version__: str
__all__ = ["CKACallback", "DriftBudget", "FreezeConverged", "LinearCKA", "MinibatchCKA", "MonoSoupEditor"]

# Imported when asked for: one name should not load what another needs.
_public, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "control.drift_budget": ["DriftBudget"],
        "control.freeze_converged": ["FreezeConverged"],
        "editing.editor": ["MonoSoupEditor"],
        "metrics": ["LinearCKA", "MinibatchCKA"],
        "tracking.callback": ["CKACallback"],
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lit-cka")
    return _public(name)
