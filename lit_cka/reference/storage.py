"""The reference stored beside the checkpoints, and found again by a resumed training or a test: `TrainingStart`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from lit_cka.checkpoints.tensor_files import find_tensors, write_tensors
from lit_cka.features.flat_parameters import why_parts_are_closed
from lit_cka.features.sharded_modules import is_sharded, plain_name
from lit_cka.parallel.warning import warn
from lit_cka.reference.exchange import WeightExchange, Weights, kept_weights, own_shards
from lit_cka.reference.places import Mark, layout_of, marks_of, places_of
from lit_cka.reference.recording import Recording
from lit_cka.samples.counting import data_ranks

_ADVICE = (
    "Put the original file there, or pass the original weights as `reference=`, a module or the path of a checkpoint, "
    "or start the training anew, without a checkpoint."
)
_LOST = (
    "These data have not been recorded, and the weights that the training began with are gone: they are not beside the "
    "checkpoint, or were written by processes that shared the model out in another way. Track the data from the start, "
    "as one of the dataloaders of the validation, or pass the original weights as `reference=`."
)
_MOST_RANKS = 2**20
# Checkpoints that Lightning's searches for a learning rate or batch size write at the start, and load at their end.
_SEARCHES = (".lr_find_", ".scale_batch_size_")


class StoredStart(TypedDict):
    """What a checkpoint says of the files beside it."""

    id: str  # of the training
    world_size: int  # each rank with other samples has written a recording of its own
    has_recording: bool
    num_weight_files: int  # one, or each process's shards


class TrainingStart:
    """The weights that a training began with, and its recording, in files beside its checkpoints.

    Attributes:
        weights: a copy of the initial weights; None before there is one.
        are_live: whether the live model still has them.
        are_lost: whether there can't be a copy of them any more.
        in_checkpoint: what the checkpoint that was loaded says of the files; None if it says nothing.
    """

    def __init__(self) -> None:
        self.weights: Weights | None = None
        self.are_live = False
        self.are_lost = False
        self.in_checkpoint: StoredStart | None = None
        self._marks: dict[str, Mark] = {}  # of the live weights when they were copied
        self._id = ""
        self._written: StoredStart | None = None

    def start_fit(self) -> None:
        """Forget what an earlier checkpoint said: the one to be resumed is loaded after this."""
        self.in_checkpoint, self._written = None, None

    def forget(self) -> None:
        """Forget everything: a training of another module begins."""
        self.weights, self.are_lost, self._id, self._written = None, False, "", None

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint says of the files.

        Raises:
            ValueError: if that is of another kind.
        """
        start = state.get("start")
        if start is not None and not _is_start(start):
            raise ValueError(f"Expected the checkpoint to say where its reference is, but it holds {start!r:.80}.")
        self.in_checkpoint = cast("StoredStart | None", start)

    @property
    def to_exchange(self) -> Weights | None:
        """The initial weights, if the live model has others by now."""
        return None if self.are_live else self.weights

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint is to say of the files; nothing before there are any."""
        stored = self._written or self.in_checkpoint
        return {} if stored is None else {"start": dict(stored)}

    def is_of_another_training(self) -> bool:
        """Whether the loaded checkpoint is of another training than the last of this callback."""
        return self.in_checkpoint is not None and self.in_checkpoint["id"] != self._id

    def begin(self, trainer: pl.Trainer) -> None:
        """Give the training an identity that all ranks know."""
        if not self._id:
            self._id = str(trainer.strategy.broadcast(uuid.uuid4().hex))

    def keep(self, module: nn.Module) -> None:
        """Copy the module's weights as they are now, unless there is a copy, or they are others already."""
        if self.weights is None and not self.are_lost:
            self.are_live, self.are_lost = True, why_parts_are_closed(module) is not None
            self.weights = None if self.are_lost else kept_weights(module)
            self._marks = {} if self.are_lost else marks_of(module)

    def has_moved(self, module: nn.Module) -> bool:
        """Whether the live model's weights have been changed since, though no step was taken: loaded, or drawn anew."""
        return bool(self._moved(module))

    def put_back(self, module: nn.Module) -> None:
        """Give the live model the weights that it had, if it should still have them, after hooks were run for us."""
        moved = self._moved(module)
        if self.weights is not None and moved:
            shapes = {name: place.local.shape for name, place in places_of(module).items()}
            kept = self.weights.tensors
            same = {name: kept[name] for name in moved if name in kept and kept[name].shape == shapes[name]}
            WeightExchange(module, Weights(same, self.weights.layout)).put_in()

    def _moved(self, module: nn.Module) -> list[str]:
        if not self.are_live or self.weights is None:
            return []
        places, weights = places_of(module), self.weights.tensors
        # Batch normalisation does not say that it writes to its running statistics.
        buffers = {plain_name(name) for name, _ in module.named_buffers()}
        written = [name for name, mark in marks_of(module).items() if self._marks.get(name) != mark or name in buffers]
        return [
            name for name in written if name not in weights or not torch.equal(places[name].local.cpu(), weights[name])
        ]

    def keep_again(self, module: nn.Module) -> None:
        """Take the weights as they are now for those that the training begins with."""
        self.weights = None
        self.keep(module)

    def require(self) -> None:
        """Raise if the initial weights are needed and can't be had.

        Raises:
            ValueError: if neither the live model nor a copy has them; the message says what to do.
        """
        if self.are_lost and not self.are_live:
            raise ValueError(_LOST)

    def find(self, trainer: pl.Trainer, module: nn.Module, empty: Recording, *, is_initial: bool) -> None:
        """Find what the loaded checkpoint's training began with: its recording, and its weights if they are needed.

        Args:
            trainer: with the checkpoint.
            module: the live model.
            empty: a recording, to be filled.
            is_initial: whether the training is compared with its initial weights.

        Raises:
            ValueError: if that can't be found, and the initial weights are gone; the message says what to do.
        """
        stored, self.in_checkpoint = self.in_checkpoint, None
        if stored is None:
            self._require_weights(trainer, is_initial)
            return
        self._id, self.weights, self.are_lost, self.are_live = stored["id"], None, False, False
        folders = [str(trainer.default_root_dir), str(getattr(trainer.checkpoint_callback, "dirpath", None) or "")]
        place = str(trainer.ckpt_path), [folder for folder in folders if folder]
        is_recorded = self._find_recording(trainer, stored, empty, place) if stored["has_recording"] else False
        self.weights = self._find_weights(trainer, module, stored["num_weight_files"], place)
        self.are_lost = is_initial and self.weights is None
        if self.are_lost and not is_recorded:
            raise FileNotFoundError(
                "The training that wrote this checkpoint was compared with its initial weights, but beside it there is "
                f"no sound file {self._weights_name()!r}, nor its recording: they are missing, damaged, or of other "
                f"data. {_ADVICE}"
            )

    def _find_recording(
        self, trainer: pl.Trainer, stored: StoredStart, empty: Recording, place: tuple[str, list[str]]
    ) -> bool:
        """Read this rank's share of the recording; whether all ranks found theirs."""
        ranks = data_ranks(trainer)
        mine = range(ranks.rank, stored["world_size"], ranks.size)
        names = [self._recording_name(rank, stored["world_size"]) for rank in mine]
        files = [find_tensors(name, {"id": self._id}, *place) for name in names]
        fitting = [file for file in files if file is not None and empty.fits(file.notes)]
        found = len(fitting) == len(files) and empty.fill(fitting)
        if not trainer.strategy.reduce_boolean_decision(found, all=True):
            empty.dataloaders.clear()
            return False
        # There may be fewer files than ranks: those without one know all the same what the others have.
        empty.expect(trainer.strategy.broadcast(list(empty.dataloaders)))
        return True

    def _find_weights(
        self, trainer: pl.Trainer, module: nn.Module, num_files: int, place: tuple[str, list[str]]
    ) -> Weights | None:
        """Read the initial weights, whole ones or this process's shards; None if some process has not found its own."""
        found, layout = None, layout_of(places_of(module))
        if num_files == 1 or (num_files == trainer.world_size and is_sharded(module)):
            found = find_tensors(self._weights_name(trainer.global_rank, num_files), {"id": self._id}, *place)
        # A model that was sharded in another way may have shards of the same sizes.
        is_mine = found is not None and found.notes.get("layout") in (None, layout)
        if not trainer.strategy.reduce_boolean_decision(is_mine, all=True) or found is None:
            return None
        if num_files > 1:
            return Weights(found.tensors, layout)
        _check_architecture(module, found.tensors)
        return own_shards(module, found.tensors)

    def _require_weights(self, trainer: pl.Trainer, is_initial: bool) -> None:
        is_search = Path(str(trainer.ckpt_path)).name.startswith(_SEARCHES)
        if is_initial and trainer.ckpt_path is not None and not is_search and self.weights is None:
            raise ValueError(
                f"With the weights of {str(trainer.ckpt_path)!r} loaded, those that the training began with are gone. "
                'Pass them as `reference=`, a module or a checkpoint\'s path, instead of "initial".'
            )

    def write(self, trainer: pl.Trainer, recording: Recording) -> None:
        """Put the files next to the first checkpoint, for all of them to refer to; a full disk is one warning."""
        if self._written is not None:
            return
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        ranks = data_ranks(trainer)
        num_files = 0 if self.weights is None else 1 if self.weights.layout is None else trainer.world_size
        try:
            if not recording.is_empty and ranks.leads:
                tensors, notes = recording.tensors()
                name = self._recording_name(ranks.rank, ranks.size)
                write_tensors(folder, name, tensors, {"id": self._id, **notes})
            if self.weights is not None and trainer.global_rank < num_files:
                name = self._weights_name(trainer.global_rank, num_files)
                notes = {"id": self._id}
                if self.weights.layout is not None:
                    notes["layout"] = self.weights.layout
                write_tensors(folder, name, self.weights.tensors, notes)
        except OSError as error:
            warn(f"CKACallback could not store its reference, so a resumed fit will need one: {error}")
            return
        self._written = StoredStart(
            id=self._id, world_size=ranks.size, has_recording=not recording.is_empty, num_weight_files=num_files
        )

    def _weights_name(self, rank: int = 0, num_files: int = 1) -> str:
        part = f"_{rank}_of_{num_files}" if num_files > 1 else ""
        return f"cka_reference_{_plain(self._id)}{part}.safetensors"

    def _recording_name(self, rank: int, world_size: int) -> str:
        return f"cka_recording_{_plain(self._id)}_{rank}_of_{world_size}.safetensors"


def _is_start(value: Any) -> bool:
    kinds = {"id": str, "world_size": int, "has_recording": bool, "num_weight_files": int}
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), kinds[key]) for key in kinds):
        return False
    return value["world_size"] in range(1, _MOST_RANKS) and value["num_weight_files"] in range(_MOST_RANKS)


def _plain(name: str) -> str:
    """What a checkpoint from a stranger may hold is no path."""
    return "".join(letter for letter in os.path.basename(str(name)) if letter.isalnum())[:32]


def _check_architecture(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: place.shape for name, place in places_of(module).items()}
    wrong = [name for name in {**shapes, **tensors} if name not in tensors or tensors[name].shape != shapes.get(name)]
    if wrong:
        raise ValueError(
            f"The initial weights beside the checkpoint are of another architecture than {type(module).__name__}: they "
            f"differ in {wrong[:3]}{' ...' if len(wrong) > 3 else ''}. {_ADVICE}"
        )
