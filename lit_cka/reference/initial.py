"""Where the weights that a training began with are kept, over resumed trainings and tests alone: `InitialWeights`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_cka.reference.storage import StoredReference, load_reference, store_reference

# Checkpoints that Lightning's searches for a learning rate or batch size write at the start, and load at their end.
_SEARCHES = (".lr_find_", ".scale_batch_size_")


class InitialWeights:
    """The file of a training's initial weights: written once, named in every checkpoint, found again from there.

    Attributes:
        in_checkpoint: what the checkpoint that was loaded says of the file; None if it says nothing.
        written: the file that the training that runs has written, or would have; None before its first checkpoint.
    """

    def __init__(self) -> None:
        self.in_checkpoint: StoredReference | None = None
        self.written: StoredReference | None = None

    def start_fit(self) -> None:
        """Forget what an earlier checkpoint said: the one to be resumed is loaded after this."""
        self.in_checkpoint = None

    def forget(self) -> None:
        """Forget the file: a training of another module begins."""
        self.written = None

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint says of the file."""
        self.in_checkpoint = cast(StoredReference | None, state.get("reference"))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint is to say of the file; nothing before there is one."""
        stored = self.written or self.in_checkpoint
        return {} if stored is None else {"reference": dict(stored)}

    def are_of_another_training(self) -> bool:
        """Whether the loaded checkpoint is of another training than the last of this callback."""
        if self.in_checkpoint is None:
            return False
        return self.written is None or self.in_checkpoint["sha256"] != self.written["sha256"]

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module:
        """Return a copy of the module with the weights that the loaded checkpoint's training began with."""
        assert self.in_checkpoint is not None
        near = Path(str(trainer.ckpt_path)).parent
        module = load_reference(pl_module, self.in_checkpoint, [near, near.parent])
        self.in_checkpoint = None
        return module

    def require_in_module(self, trainer: pl.Trainer) -> None:
        """Raise a ValueError if a checkpoint has replaced the initial weights without saying where they are."""
        is_search = Path(str(trainer.ckpt_path)).name.startswith(_SEARCHES)
        if trainer.ckpt_path is not None and not is_search:
            raise ValueError(
                f"With the weights of {str(trainer.ckpt_path)!r} loaded, those that the training began with are gone. "
                'Pass them as `reference=`, a module or a checkpoint\'s path, instead of "initial".'
            )

    def write(self, trainer: pl.Trainer, reference: nn.Module) -> None:
        """Put the weights next to the first checkpoint, for all of them to refer to; a full disk is one warning."""
        if self.written is None:
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            try:
                self.written = store_reference(reference, folder, write=trainer.is_global_zero)
            except OSError as error:
                rank_zero_warn(f"CKACallback could not store its reference, so a resumed fit will need one: {error}")
