"""Many fine-tuned models, each edited in many ways and evaluated on many test sets: what is more than chance, and more
than shrinkage.

The edits themselves are `lit_cka.editing` and `lit_cka.functional.edits`; options and messages are
`lit_cka.commands.study`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.study.report import describe_study, save_study
    from lit_cka.study.statistics import paired_effect
    from lit_cka.study.study import Study, StudyResults
    from lit_cka.study.summary import summarise

__all__ = ["Study", "StudyResults", "describe_study", "paired_effect", "save_study", "summarise"]

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "report": ["describe_study", "save_study"],
        "statistics": ["paired_effect"],
        "study": ["Study", "StudyResults"],
        "summary": ["summarise"],
    },
)
