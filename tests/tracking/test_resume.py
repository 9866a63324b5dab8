"""A resumed fit goes on where it was: the same history, against the same reference, whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lit_cka
from lit_cka import CKACallback
from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.tracking.history import BOUNDS
from tests.tracking import kill_worker
from tests.tracking.helpers import BLOCKS, WIDTH, Classifier, frozen, hand_cka, loader, trainer


def fit(
    folder: Path, max_epochs: int, resume: str | None = None, callback: CKACallback | None = None, seed: int = 0
) -> tuple[Classifier, CKACallback]:
    """Train with checkpoints at every epoch, in a process that has just started as far as the callback knows."""
    torch.manual_seed(seed)
    module, callback = Classifier(), callback or CKACallback(log_figures=False)
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    run = trainer(folder, callback, checkpoint, max_epochs=max_epochs, enable_checkpointing=True)
    run.fit(module, loader(32, seed=0, batch_size=8), loader(), ckpt_path=resume, weights_only=True)
    return module, callback


def checkpoint(folder: Path, epoch: int) -> str:
    return str(folder / "checkpoints" / f"epoch={epoch}.ckpt")


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("cka_reference_*"))


def recorded(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("cka_recording_*"))


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{of_lightning}")
    for of_lightning in (
        "Checkpoint directory .* exists and is not empty",
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        "The dirpath has changed from",
    )
]


@pytest.mark.parametrize("options", [{}, {"every_n_validations": 2}, {"estimator": "minibatch"}], ids=str)
def test_a_resumed_fit_has_the_history_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    _, whole = fit(tmp_path / "whole", 5, callback=CKACallback(log_figures=False, **options))
    fit(tmp_path, 3, callback=CKACallback(log_figures=False, **options))
    # Another seed: the weights that the new process happens to begin with must not matter.
    resumed = CKACallback(log_figures=False, **options)
    fit(tmp_path, 5, checkpoint(tmp_path, 1), resumed, seed=7)
    assert resumed.history == whole.history
    assert len(whole.history) == (3 if "every_n_validations" in options else 5)


def test_the_reference_is_the_first_training_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = frozen(Classifier())
    fit(tmp_path, 2)
    after, callback = fit(tmp_path, 3, checkpoint(tmp_path, 1), seed=7)
    expected = hand_cka(before, after, BLOCKS, loader())
    assert callback.scores == pytest.approx(expected, abs=1e-9)
    assert min(expected.values()) < 0.99


def test_it_is_stored_once_and_not_in_the_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    fit(tmp_path, 5, checkpoint(tmp_path, 2))
    assert len(stored(tmp_path)) == len(recorded(tmp_path)) == 1
    content = torch.load(checkpoint(tmp_path, 2), weights_only=True)
    (state,) = [state for key, state in content["callbacks"].items() if key.startswith("CKACallback")]
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    assert set(state["start"]) == {"id", "world_size", "has_recording", "num_weight_files"}
    assert not list(tmp_path.rglob("*partial*"))
    torch.manual_seed(0)
    weights = load_state_dict(stored(tmp_path)[0])  # a plain state dict, of use to others too
    assert all(torch.equal(weights[name], value) for name, value in Classifier().named_parameters())


class Saving(pl.Callback):
    """Writes a checkpoint in the second epoch, in the middle of something."""

    def __init__(self, file: Path, moment: str) -> None:
        self.file, self.moment = file, moment

    def _save(self, trainer: pl.Trainer, moment: str) -> None:
        if moment == self.moment and trainer.current_epoch == 1 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.file)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, f"validation batch {args[3]}")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer, "validation")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, f"batch {args[3]}")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("moment", ["batch 1", "batch 3", "validation batch 1", "validation"])
def test_the_reference_is_recorded_anew_in_the_middle_of_anything(tmp_path: Path, moment: str) -> None:
    """On all samples, though the loop that goes on has only some to do; which it then does."""
    file, ends = tmp_path / "checkpoints" / "middle.ckpt", []
    for how in ("whole", "resumed", "without the recording"):
        torch.manual_seed(0)
        module, callback = Classifier(), CKACallback(log_figures=False)
        saving = [Saving(file, moment)] if how == "whole" else []
        if how == "without the recording":
            for each in tmp_path.rglob("cka_recording_*"):
                each.unlink()
        run = trainer(tmp_path, callback, *saving, max_epochs=3, val_check_interval=2)
        ckpt_path = None if how == "whole" else file
        run.fit(module, loader(32, seed=0, batch_size=8), loader(), ckpt_path=ckpt_path, weights_only=True)
        ends.append((callback.history, module.state_dict()))
    assert [record["n"] for record in ends[1][0]] == [44] * len(ends[1][0])
    assert len(ends[1][0]) in (5, 6)  # of which Lightning leaves out one that was due when the checkpoint was written
    for record, expected in zip(ends[2][0], ends[1][0], strict=True):
        assert record["n"] == expected["n"]
        assert record["scores"] == pytest.approx(expected["scores"], abs=1e-12)
    assert all(torch.equal(value, ends[2][1][name]) for name, value in ends[1][1].items())


def test_twice_resumed(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path, 1)
    fit(tmp_path, 2, checkpoint(tmp_path, 0), seed=3)
    _, callback = fit(tmp_path, 4, checkpoint(tmp_path, 1), seed=4)
    assert callback.history == whole.history


def test_resumed_in_the_same_process(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    module, callback = fit(tmp_path, 2)
    run = trainer(tmp_path, callback, max_epochs=4)
    run.fit(module, loader(32, seed=0, batch_size=8), loader(), ckpt_path=checkpoint(tmp_path, 0), weights_only=True)
    assert callback.history == whole.history


def test_a_callback_of_another_training_takes_the_checkpoint_s_reference(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 3)
    fit(tmp_path, 2)
    module, callback = fit(tmp_path / "other", 1, seed=5)
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(module, loader(32, seed=0, batch_size=8), loader(), ckpt_path=checkpoint(tmp_path, 1), weights_only=True)
    assert callback.history == whole.history


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_a_checkpoint_alone_compares_with_its_training_s_reference(tmp_path: Path, stage: str) -> None:
    _, trained = fit(tmp_path, 3)
    torch.manual_seed(9)
    callback = CKACallback(log_figures=False)
    run = trainer(tmp_path, callback)
    getattr(run, stage)(Classifier(), loader(), ckpt_path=checkpoint(tmp_path, 2), weights_only=True)
    assert callback.scores == trained.scores


def test_a_training_that_was_moved(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "old", 2)
    shutil.move(tmp_path / "old", tmp_path / "new")
    _, callback = fit(tmp_path / "new", 4, checkpoint(tmp_path / "new", 1), seed=3)
    assert callback.history == whole.history


def test_a_training_that_goes_on_elsewhere(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "old", 2)
    fit(tmp_path / "new", 3, checkpoint(tmp_path / "old", 1), seed=3)
    shutil.rmtree(tmp_path / "old")
    _, callback = fit(tmp_path / "new", 4, checkpoint(tmp_path / "new", 2), seed=4)
    assert callback.history == whole.history


def test_missing_files_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    for file in (*stored(tmp_path), *recorded(tmp_path)):
        file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"beside it there is no sound file 'cka_ref.*pass the original weights"
    ) as raised:
        fit(tmp_path, 3, checkpoint(tmp_path, 1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [stored, recorded])
def test_one_of_the_two_files_is_enough(tmp_path: Path, kept: Any) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path, 2)
    for file in {*stored(tmp_path), *recorded(tmp_path)} - {*kept(tmp_path)}:
        file.write_bytes(file.read_bytes()[:-1])
    _, callback = fit(tmp_path, 4, checkpoint(tmp_path, 1), seed=7)
    assert callback.history == whole.history


def test_a_sound_copy_above_the_checkpoint_is_taken(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path, 2)
    for file in (*stored(tmp_path), *recorded(tmp_path)):
        shutil.copy(file, tmp_path)
        file.write_bytes(b"damaged")
    _, callback = fit(tmp_path, 4, checkpoint(tmp_path, 1), seed=7)
    assert callback.history == whole.history


@pytest.mark.parametrize("above", [False, True])
def test_files_of_another_training_are_not_taken_for_this_one_s(tmp_path: Path, above: bool) -> None:
    """Whatever their names are; a sound copy elsewhere is."""
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path, 2)
    fit(tmp_path / "other", 2, seed=5)
    for files in (stored, recorded):
        (mine,), (others,) = files(tmp_path), files(tmp_path / "other")
        if above:
            shutil.copy(mine, tmp_path)
        shutil.copy(others, mine)
    if above:
        _, callback = fit(tmp_path, 4, checkpoint(tmp_path, 1), seed=7)
        assert callback.history == whole.history
    else:
        with pytest.raises(FileNotFoundError, match="missing, damaged, or of other data"):
            fit(tmp_path, 4, checkpoint(tmp_path, 1), seed=7)


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/x", "../../x", "/etc/passwd", "s3://bucket/x", ""])
def test_an_address_in_a_checkpoint_is_never_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, 2)
    content = torch.load(checkpoint(tmp_path, 1), weights_only=True)
    (state,) = [state for key, state in content["callbacks"].items() if key.startswith("CKACallback")]
    state["start"]["id"] = name
    torch.save(content, tmp_path / "checkpoints" / "evil.ckpt")
    opened: list[str] = []

    def watched(event: str, args: Any) -> None:
        if event in ("open", "socket.connect"):
            opened.append(str(args[0]) + str(args[1:]))

    sys.addaudithook(watched)
    with pytest.raises(FileNotFoundError, match="no sound file"):
        fit(tmp_path, 3, str(tmp_path / "checkpoints" / "evil.ckpt"))
    assert not [each for each in opened if "127.0.0.1" in each or "passwd" in each or "bucket" in each]


def test_with_the_reference_given_no_file_is_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = Classifier()
    _, whole = fit(tmp_path / "whole", 3)
    fit(tmp_path, 2)
    for file in (*stored(tmp_path), *recorded(tmp_path)):
        file.unlink()
    callback = CKACallback(reference=before, log_figures=False)
    fit(tmp_path, 3, checkpoint(tmp_path, 1), callback)
    assert callback.scores == pytest.approx(whole.scores, abs=1e-12)
    assert not stored(tmp_path)  # it is with whoever has given it


@pytest.mark.parametrize("damage", ["other weights", "cut off", "empty", "something else", "one bit"])
def test_altered_files_are_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    fit(tmp_path, 2)
    for file in (*stored(tmp_path), *recorded(tmp_path)):
        content = file.read_bytes()
        if damage == "other weights":
            save_file({name: value.detach() for name, value in Classifier().named_parameters()}, file)
        elif damage == "something else":
            torch.save([1, 2], file)
        elif damage == "one bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            file.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"")
    with pytest.raises(FileNotFoundError, match=r"missing, damaged, or of other data.*Put the original file there, or"):
        fit(tmp_path, 3, checkpoint(tmp_path, 1))
    _, again = fit(tmp_path, 2)  # a new training has files of its own
    assert len(again.history) == 2


def test_another_architecture_is_an_error(tmp_path: Path) -> None:
    class Wider(Classifier):
        """With a layer that the stored training did not have, and that its checkpoint is not asked for."""

        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)
            self.strict_loading = False

    fit(tmp_path, 2)
    with pytest.raises(ValueError, match=r"another architecture than Wider: they differ in \['more\.weight'"):
        trainer(tmp_path, CKACallback(log_figures=False)).validate(
            Wider(), loader(), ckpt_path=checkpoint(tmp_path, 1), weights_only=True
        )


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_cka.reference.storage.write_tensors", full)
    with pytest.warns(UserWarning, match="could not store its reference.*No space left"):
        _, callback = fit(tmp_path, 2)
    assert len(callback.history) == 2


def test_data_that_differ_at_every_pass_are_compared_with_a_model_again(tmp_path: Path) -> None:
    """And not with what one of the passes has recorded."""

    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.randn(WIDTH), y

    data = DataLoader(Augmented(*loader().dataset.tensors), batch_size=16)
    resumed = None
    for max_epochs in (2, 4):
        module, callback = Classifier(lr=0.0), CKACallback(log_figures=False)
        for block in module.net.blocks:
            block.norm = nn.Identity()  # whose running statistics would move on
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, callback, checkpoints, max_epochs=max_epochs, enable_checkpointing=True)
        with pytest.warns(UserWarning, match="The data differ at every pass"):
            run.fit(module, loader(32, seed=0, batch_size=8), data, ckpt_path=resumed, weights_only=True)
        resumed = checkpoint(tmp_path, 1)
    assert recorded(tmp_path) == []
    assert [record["n"] for record in callback.history] == [44] * 4
    for record in callback.history:
        assert record["scores"] == pytest.approx(dict.fromkeys(BLOCKS, 1.0), abs=1e-9)


def test_no_checkpoints_no_file(tmp_path: Path) -> None:
    trainer(tmp_path, CKACallback(log_figures=False)).fit(Classifier(), loader(32), loader())
    assert not list(tmp_path.rglob("cka_re*"))


def killed(folder: Path, num_chains: int, sizes: list[int]) -> list[list[Any]]:
    """The histories of a fit that was not killed, and of those that were, on each of the ranks that they ended on."""
    process = subprocess.Popen(
        [sys.executable, kill_worker.__file__, str(folder), str(num_chains), *map(str, sizes)],
        env={**os.environ, "PYTHONPATH": str(Path(lit_cka.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=60 * (num_chains + 1)) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    chains = ["stopped", "damaged", *range(num_chains)]
    names = ["whole-0", *(f"{chain}-{rank}" for chain in chains for rank in range(sizes[-1]))]
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
@pytest.mark.timeout(900)
def test_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    whole, *histories = killed(tmp_path, kills, [1, 1])
    assert len(whole) == 6
    assert len(histories) == 2 + kills
    assert all(history == whole for history in histories)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_chains", "sizes"),
    [
        (1, [1, 2, 1]),
        *(pytest.param(10, sizes, marks=pytest.mark.slow) for sizes in ([1, 2, 1], [2, 1, 2], [3, 2, 3])),
    ],
    ids=str,
)
@pytest.mark.timeout(900)
def test_killed_and_resumed_on_another_number_of_ranks(tmp_path: Path, num_chains: int, sizes: list[int]) -> None:
    """With the validation data in another order, and in batches of another size, after each kill."""
    whole, *histories = killed(tmp_path, num_chains, sizes)
    assert len(whole) == 6
    assert min(whole[-1]["scores"].values()) < 0.99
    assert len(histories) == (2 + num_chains) * sizes[-1]
    for history in histories:
        assert [without_scores(record) for record in history] == [without_scores(record) for record in whole]
        for record, expected in zip(history, whole, strict=True):
            assert record["scores"] == pytest.approx(expected["scores"], abs=1e-10)
            for key in BOUNDS:  # also of changes, whose last evaluation the checkpoint knows
                assert record[key] == pytest.approx(expected[key], abs=1e-7)


def without_scores(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("scores", *BOUNDS)}
