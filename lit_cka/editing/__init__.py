"""Edits of fine-tuned weights, MonoSoup and others: of state dicts, of files, and a LightningModule to evaluate them;
and what differs between files.

The split of one matrix is `lit_cka.functional.spectral`; reading and writing files is `lit_cka.checkpoints`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lit_cka.editing.diff_results import save_diff
    from lit_cka.editing.difference import diff_files
    from lit_cka.editing.editor import MonoSoupEditor
    from lit_cka.editing.edits import Edit, edit_weights
    from lit_cka.editing.files import edit_files
    from lit_cka.editing.parameter import ParameterRecord
    from lit_cka.editing.settings import EditSettings
    from lit_cka.editing.tensor_diff import Diff, TensorDiff
    from lit_cka.editing.weights import EditedModel, edit_state_dicts

__all__ = [
    "Diff",
    "Edit",
    "EditSettings",
    "EditedModel",
    "MonoSoupEditor",
    "ParameterRecord",
    "TensorDiff",
    "diff_files",
    "edit_files",
    "edit_state_dicts",
    "edit_weights",
    "save_diff",
]  # fmt: skip

# Imported when asked for: one name should not load what another needs.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "diff_results": ["save_diff"],
        "difference": ["diff_files"],
        "editor": ["MonoSoupEditor"],
        "edits": ["Edit", "edit_weights"],
        "files": ["edit_files"],
        "parameter": ["ParameterRecord"],
        "settings": ["EditSettings"],
        "tensor_diff": ["Diff", "TensorDiff"],
        "weights": ["EditedModel", "edit_state_dicts"],
    },
)
