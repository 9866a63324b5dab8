"""`CKACallback`, and what it is made of: trackers, samples, statistics, dataloaders, probe, history and report.

What a model in training is compared with is `lit_cka.reference`; comparing trained models is `lit_cka.analysis`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.tracking.callback import CKACallback

__all__ = ["CKACallback"]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "callback": ["CKACallback"],
    },
)
