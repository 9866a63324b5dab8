"""Cached activations: the blocks are left out for samples that come again, and only where that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_cka import DriftBudget
from tests.control.helpers import STEPS, Adam, Chain, NormedBlock, fit, freezing, train_data, weights
from tests.tracking.helpers import WIDTH, dataset, hooks_of


def new(net: nn.Module | None = None) -> Adam:
    torch.manual_seed(0)
    return Adam(net or Chain())


def trained(folder: Path, cache: str | None, *numbers: int, net: Any = Chain, **options: Any) -> tuple[Adam, Any]:
    torch.manual_seed(0)
    module, callback = Adam(net()), freezing(*numbers, cache=cache)
    pl.seed_everything(1, verbose=False)
    fit(folder, module, callback, **options)
    assert hooks_of(module) == 0
    assert not any("forward" in vars(each) for each in module.modules())
    return module, callback


@pytest.mark.parametrize("cache", ["disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_weights_are_those_without_a_cache(tmp_path: Path, cache: str) -> None:
    data = train_data(shuffle=True)
    module, callback = trained(tmp_path, cache, 1, 1, 3, data=data, max_epochs=6)
    plain, _ = trained(tmp_path, None, 1, 1, 3, data=data, max_epochs=6)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=0, atol=1e-12, msg=name)
    # Of two epochs with one block frozen the first fills the cache, and one step of the second checks it. With three,
    # what was kept behind the first block goes on to be used.
    assert callback.savings.num_steps == {
        (0, 0): STEPS, (1, 0): STEPS + 1, (1, 1): STEPS - 1, (3, 1): STEPS, (3, 0): 1, (3, 3): 2 * STEPS - 1
    }  # fmt: skip


def test_frozen_blocks_do_not_run_at_all(tmp_path: Path) -> None:
    class Counting(NormedBlock):
        num_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.num_calls += self.training or torch.is_grad_enabled()
            return super().forward(x)

    class Net(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Counting(), NormedBlock(), NormedBlock()])

    class Found(Adam):
        pass

    torch.manual_seed(0)
    module = Found(Net())
    fit(tmp_path, module, freezing(2, cache="memory", blocks="net.blocks.*"), max_epochs=4)
    assert Counting.num_calls == 2 * STEPS + 1


class Noisy(Chain):
    """Augments its inputs in every training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Dropping(NormedBlock):
    """Draws random numbers whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=torch.is_grad_enabled())


class NoisyBlock(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping() for _ in range(3))


class Skips(Chain):
    """With a connection around blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.blocks[0](self.stem(x) + self.shift)
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x + first)


class Pairs(NormedBlock):
    def forward(self, x: Any) -> Any:
        x = super().forward(x[0] if isinstance(x, tuple) else x)
        return x, x.mean()


class TwoOutputs(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pairs() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x[0])


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Noisy, "no sample has come again with the same content in a whole epoch, as with random augmentation"),
        (NoisyBlock, "the frozen blocks return something else for the same samples"),
        (Skips, "what is behind them needs more"),
        (TwoOutputs, "a frozen block returns something else than one tensor with a row for each sample"),
    ],
)
def test_goes_on_without_where_it_would_be_wrong(tmp_path: Path, net: type[Chain], message: str) -> None:
    with pytest.warns(UserWarning, match=f"without cached activations: {message}"):
        module, callback = trained(tmp_path, "memory", 2, net=net, max_epochs=4)
    plain, _ = trained(tmp_path, None, 2, net=net, max_epochs=4)
    assert all(torch.equal(value, weights(module)[name]) for name, value in weights(plain).items())
    assert {skipped for _, skipped in callback.savings.num_steps} == {0}


def test_a_connection_around_blocks_counts_where_it_passes_by() -> None:
    """Frozen with the first block alone, nothing is passed by."""
    from lit_cka.control.step_trace import StepTrace

    module = new(Skips())
    module.training_step = lambda *_: None  # type: ignore[assignment,method-assign]
    trace = StepTrace(module, [f"net.blocks.{i}" for i in range(4)])
    trace.start()
    loss = module.loss(dataset(8)[:8])
    assert [part.can_skip for part in trace.plan(loss, 8).parts] == [True, False, False, False]


@pytest.mark.slow
def test_what_memory_does_not_hold_is_not_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Adam(), freezing(2, cache="memory", cache_memory=20 * WIDTH * 8 / 2**30)
    with pytest.warns(UserWarning, match="keeps the activations of 16 samples.*cache='disk'"):
        fit(tmp_path, module, callback, max_epochs=4)
    assert callback.savings.num_steps == {(0, 0): STEPS, (2, 0): STEPS + 2 + 1 + 2, (2, 2): 1 + 2}


def test_blocks_that_are_trained_again_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    class Turning(Adam):
        values = iter([1.0, 2.0, 2.0, 0.5, 0.4, 0.3, 0.2])

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.log("turning", next(self.values))

    runs = []
    for cache in ("memory", None):
        torch.manual_seed(0)
        runs.append(Turning())
        callback = freezing(1, cache=cache, monitor="turning", patience=2)
        Turning.values = iter([1.0, 2.0, 2.0, 0.5, 0.4, 0.3, 0.2])
        fit(tmp_path, runs[-1], callback, max_epochs=7)
        assert [event["num_frozen"] for event in callback.history] == [1, 0, 1]
    for name, value in weights(runs[1]).items():
        torch.testing.assert_close(weights(runs[0])[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.slow
def test_other_batch_sizes_find_their_samples(tmp_path: Path) -> None:
    """The last batch is ragged, and another one in each epoch."""
    data = DataLoader(dataset(30), batch_size=8, shuffle=True)
    _, callback = trained(tmp_path, "memory", 2, data=data, max_epochs=4)
    assert callback.savings.num_steps[2, 2] == 2 * 4 - 1


def test_weights_that_others_change_are_not_mistaken_for_those_that_were_kept(tmp_path: Path) -> None:
    """As `DriftBudget` does, which rolls frozen blocks back, too: the training is that without a cache."""
    weights_of = []
    for cache in (None, "memory"):
        torch.manual_seed(0)
        module = Adam(lr=0.1)
        probe = [dataset(60, 7)[:][0].double()]
        fit(tmp_path, module, freezing(2, cache=cache), DriftBudget(0.3, "roll_back", probe=probe), max_epochs=4)
        weights_of.append(weights(module))
    for name, value in weights_of[0].items():
        torch.testing.assert_close(weights_of[1][name], value, rtol=0, atol=1e-9, msg=name)
