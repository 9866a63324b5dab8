"""A training with frozen blocks that is resumed goes on bit for bit; compiled models; models that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.control.helpers import STEPS, Adam, fit, freezing, weights
from tests.tracking.helpers import hooks_of, loader


def new() -> Adam:
    torch.manual_seed(0)
    return Adam()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("how", ["drop", pytest.param("keep", marks=pytest.mark.slow)])
def test_goes_on_bit_for_bit(tmp_path: Path, how: Any) -> None:
    whole, callback = new(), freezing(0, 1, 3, optimizer_state=how)
    saving = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, whole, callback, saving, max_epochs=5, enable_checkpointing=True)
    for epoch in (0, 1, 3):
        module, again = Adam(), freezing(0, 1, 3, optimizer_state=how)
        checkpoint = tmp_path / f"epoch={epoch}-step={STEPS * (epoch + 1)}.ckpt"
        others = ModelCheckpoint(tmp_path, "again-{epoch}", save_on_train_epoch_end=False)
        fit(tmp_path, module, again, others, max_epochs=5, ckpt_path=checkpoint, enable_checkpointing=True)
        assert again.history == callback.history
        assert again.savings.num_steps == callback.savings.num_steps
        assert all(torch.equal(value, weights(module)[name]) for name, value in weights(whole).items())
        assert hooks_of(module) == 0


def test_a_test_of_the_best_checkpoint_leaves_the_history(tmp_path: Path) -> None:
    module, callback = new(), freezing(1)
    saving = ModelCheckpoint(tmp_path, "first", save_top_k=1)
    run = fit(tmp_path, module, callback, saving, enable_checkpointing=True)
    run.test(module, loader(), ckpt_path=str(tmp_path / "first.ckpt"), verbose=False)
    assert [event["epoch"] for event in callback.history] == [1]
    assert callback.num_frozen == 1


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    callback = freezing(1)
    fit(tmp_path, new(), callback)
    again = new()
    fit(tmp_path, again, callback)
    assert [event["epoch"] for event in callback.history] == [1]
    assert callback.savings.num_steps == {(0, 0): STEPS, (1, 0): 2 * STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(tmp_path: Path, whole: bool) -> None:
    """Compiled code has the frozen blocks' backward left out, too."""
    plain = new()
    fit(tmp_path, plain, freezing(2))
    module = new()
    if whole:
        module.net = torch.compile(module.net, backend="aot_eager")  # type: ignore[assignment]
    else:
        for block in module.net.blocks:
            block.compile(backend="aot_eager")
    graded: list[set[str]] = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, _: Any) -> None:
            graded.append({name for name, value in module.named_parameters() if value.grad is not None})

    callback = freezing(2, cache="memory")
    with pytest.warns(UserWarning, match="compiled code does not notice"):
        fit(tmp_path, module, callback, Spy())
    assert len(graded[0]) == 4 * 4 + 5
    assert len(graded[-1]) == 2 * 4 + 2
    for (_, value), (_, expected) in zip(sorted(weights(module).items()), sorted(weights(plain).items()), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
    torch._dynamo.reset()


class Sharded(Adam):
    def configure_model(self) -> None:
        fully_shard(self.net, mesh=init_device_mesh("cpu", (1,)))


def test_sharded_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their strategy, and where they have sharded themselves: in a process group of one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
        with pytest.raises(ValueError, match="one device or under DDP, but got ModelParallelStrategy"):
            fit(tmp_path, Sharded(), freezing(1), strategy=strategy)
        with pytest.raises(ValueError, match="Sharded is sharded over processes"):
            fit(tmp_path, Sharded(), freezing(1), num_sanity_val_steps=0)
    finally:
        torch.distributed.destroy_process_group()
