"""FreezeConverged in real trainings: what is frozen costs nothing, and all the rest is trained as by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_cka import FreezeConverged
from lit_cka.control.savings import step_flops
from tests.control.helpers import STEPS, Adam, Chain, by_hand, fit, freezing, weights
from tests.tracking.helpers import Classifier, Net, PlainLogger, hooks_of

STEM = {"net.shift", "net.stem.0.weight", "net.stem.0.bias"}


def new(net: nn.Module | None = None) -> Adam:
    torch.manual_seed(0)
    return Adam(net or Chain())


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


class Spy(pl.Callback):
    """Counts the FLOPs of steps, and notes which parameters have gradients and which blocks a backward reaches."""

    def __init__(self) -> None:
        self.flops: list[int] = []
        self.graded: list[set[str]] = []
        self.reached: list[set[str]] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.handles = [
            block.register_full_backward_pre_hook(lambda *_, name=name: self.reached[-1].add(name))
            for name, block in module.net.blocks.named_children()
        ]

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()
        self.reached.append(set())

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.flops.append(self.counter.get_total_flops())
        self.graded.append({name for name, value in module.named_parameters() if value.grad is not None})

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for handle in self.handles:
            handle.remove()


def test_frozen_blocks_have_no_gradients_and_take_no_backward(tmp_path: Path) -> None:
    module, callback, spy = new(), freezing(0, 2), Spy()
    names = {name for name, _ in module.named_parameters()}
    fit(tmp_path, module, callback, spy)
    frozen = STEM | {name for name in names if name.startswith(("net.blocks.0.", "net.blocks.1."))}
    assert spy.graded == [names] * 2 * STEPS + [names - frozen] * STEPS
    assert [sorted(each) for each in spy.reached] == [list("0123")] * 2 * STEPS + [list("23")] * STEPS
    linear = 2 * 8 * 6 * 6  # FLOPs of a layer
    head = linear // 2
    assert spy.flops[:STEPS] == [(5 * linear + head) * 3 - linear] * STEPS  # the inputs have no gradient
    assert spy.flops[-STEPS:] == [5 * linear + head + 2 * (2 * linear + head)] * STEPS
    plan = callback._plan
    assert plan is not None
    assert step_flops(plan, 0, 0) == (5 * linear + head) * 3
    assert step_flops(plan, 2, 0) == 5 * linear + head + 2 * (2 * linear + head)
    assert callback.savings.num_steps == {(0, 0): 2 * STEPS, (2, 0): STEPS}
    assert callback.history == [
        {"step": 8, "logged_step": 8, "epoch": 2, "num_frozen": 2, "blocks": ["net.blocks.0", "net.blocks.1"],
         "why": "converged"}
    ]  # fmt: skip
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert hooks_of(module) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_those_of_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    module, expected = new(), new()
    fit(tmp_path, module, freezing(1, 3), accumulate_grad_batches=accumulate)
    by_hand(expected, [0, 1, 3], accumulate)
    assert_same(weights(module), weights(expected))


def test_freezes_between_steps_where_gradients_are_accumulated(tmp_path: Path) -> None:
    module, callback = new(), freezing(0, 2)
    fit(tmp_path, module, callback, accumulate_grad_batches=2, val_check_interval=1, max_epochs=2)
    assert callback.history[0]["step"] == 1
    whole, late = new(), freezing(2)
    fit(tmp_path, whole, late, accumulate_grad_batches=2, val_check_interval=2, max_epochs=2)
    assert late.history[0]["step"] == 1
    assert_same(weights(module), weights(whole))


class Tied(Chain):
    """Uses a weight of the stem behind the blocks, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x @ self.stem[0].weight)


def test_no_backward_goes_through_frozen_blocks_to_a_weight_that_is_used_behind_them(tmp_path: Path) -> None:
    spy = Spy()
    fit(tmp_path, new(Tied()), freezing(2), spy, max_epochs=2)
    assert [sorted(each) for each in spy.reached] == [list("0123")] * STEPS + [list("23")] * STEPS
    tied = "net.stem.0.weight"
    assert spy.graded[-1] & STEM == {tied}


class ZeroGradients(Adam):
    """Sets gradients to zero between steps, where a weight decay would go on, and keeps them over validations."""

    def on_validation_model_zero_grad(self) -> None:
        pass

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def test_weight_decay_leaves_frozen_weights_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, expected = ZeroGradients(), new()
    expected.load_state_dict(module.state_dict())
    fit(tmp_path, module, freezing(2))
    by_hand(expected, [0, 2, 2])
    assert_same(weights(module), weights(expected))


def test_optimizer_state_is_dropped_or_kept(tmp_path: Path) -> None:
    for how, num_left in {"drop": 2 * 4 + 2, "keep": 4 * 4 + 2 + 3}.items():
        module, callback = new(), freezing(2, optimizer_state=how)
        run = fit(tmp_path, module, callback, max_epochs=2)
        (optimizer,) = run.optimizers
        assert len(optimizer.state) == num_left
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


class TrainMode(pl.Callback):
    """A user who puts everything in training mode whenever there is an occasion; and notes modes."""

    def __init__(self) -> None:
        self.modes: list[dict[str, bool]] = []

    def _train(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.train()

    on_validation_end = on_train_epoch_start = _train

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self.modes.append({name: each.training for name, each in module.named_modules()})


@pytest.mark.parametrize(("norm", "dropout"), [(True, True), (True, False), (False, True)])
def test_modes_of_frozen_blocks(tmp_path: Path, norm: bool, dropout: bool) -> None:
    torch.manual_seed(0)
    module, spy = Classifier(Net(dropout=0.5)), TrainMode()
    before: list[dict[str, Tensor]] = []

    class Keep(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            before.append(weights(module))

    fit(tmp_path, module, freezing(1, norm_in_eval=norm, dropout_in_eval=dropout), spy, Keep(), num_sanity_val_steps=0)
    for modes in spy.modes[STEPS:]:
        assert modes["net.blocks.0.norm"] is not norm
        assert modes["net.blocks.0.dropout"] is not dropout
        assert modes["net.blocks.1.norm"]
        assert modes["net.blocks.1.dropout"]
    mean = "net.blocks.0.norm.running_mean"
    assert torch.equal(before[0][mean], before[-1][mean]) is norm
    assert all(each.training for each in module.modules())


def test_trains_again_when_the_loss_turns(tmp_path: Path) -> None:
    class Turning(Adam):
        values = iter([3.0, 2.0, 2.05, 2.4, 2.5, 2.6, 1.0, 1.0, 1.0])

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.log("val_metric", next(self.values))

    torch.manual_seed(0)
    module = Turning()
    callback = freezing(2, monitor="val_metric", patience=2, min_delta=0.1)
    fit(tmp_path, module, callback, max_epochs=9)
    events = [(event["epoch"], event["num_frozen"], event["why"]) for event in callback.history]
    assert events == [(1, 2, "converged"), (5, 0, "the loss turned"), (7, 2, "converged")]
    assert callback.history[1]["blocks"] == ["net.blocks.0", "net.blocks.1"]


def test_a_monitor_that_nobody_logs_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"does not find 'val_los'.*'val_loss'"):
        fit(tmp_path, new(), freezing(1, monitor="val_los"))


class Schedules(Adam):
    """With a group for each half of the network, and a scheduler with a state for each group."""

    def configure_optimizers(self) -> Any:
        half = [p for name, p in self.named_parameters() if "blocks.0" in name]
        rest = [p for name, p in self.named_parameters() if "blocks.0" not in name]
        optimizer = torch.optim.AdamW([{"params": half, "lr": 1e-3}, {"params": rest}], lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.slow
def test_schedulers_with_a_state_for_each_group_go_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, plain = Schedules(), Schedules()
    run, bare = fit(tmp_path, module, freezing(1)), fit(tmp_path, plain, freezing(0))
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [
        group["lr"] for group in bare.optimizers[0].param_groups
    ]


class HeadOnly(Adam):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net.head.parameters(), *self.net.blocks[3].parameters()], lr=0.1)


@pytest.mark.slow
def test_an_optimizer_that_does_not_hold_the_frozen_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, plain = HeadOnly(), HeadOnly()
    plain.load_state_dict(module.state_dict())
    fit(tmp_path, module, freezing(2))
    fit(tmp_path, plain, freezing(0))
    assert_same(weights(module), weights(plain))


class Manual(Adam):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, expected = Manual(), new()
    expected.load_state_dict(module.state_dict())
    fit(tmp_path, module, freezing(1, 3))
    by_hand(expected, [0, 1, 3])
    assert_same(weights(module), weights(expected))


def test_a_step_without_a_loss_waits_for_one_with(tmp_path: Path) -> None:
    class Skipping(Adam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    torch.manual_seed(0)
    module, callback = Skipping(), freezing(1)
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(tmp_path, module, callback)
    assert callback.num_frozen == 1
    assert hooks_of(module) == 0


def test_scalars_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = PlainLogger()
    fit(tmp_path, new(), freezing(1, 2), logger=logger, log_every_n_steps=1)
    frozen = [values["freeze/num_frozen"] for _, values in logger.seen if "freeze/num_frozen" in values]
    saved = [values["freeze/flops_saved"] for _, values in logger.seen if "freeze/flops_saved" in values]
    assert frozen == [0, 1, 2]
    assert saved[0] == 0
    assert 0 < saved[1] < saved[2] < 1
    printed = capsys.readouterr().out
    assert "Frozen blocks, of 4" in printed
    assert f"{100 * saved[-1]:.1f} % saved" in printed


def test_a_training_with_nothing_frozen_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    module, plain = new(), new()
    fit(tmp_path, module, freezing(0))
    fit(tmp_path, plain, pl.Callback())
    assert_same(weights(module), weights(plain), atol=0)
    assert module.losses == plain.losses


def test_an_exception_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Failing(Adam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 2:
                raise RuntimeError("as it must")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="as it must"):
        fit(tmp_path, module, freezing(2))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(each.training for each in module.modules())
    assert hooks_of(module) == 0


# What is wrong is said before the first step.


class Unordered(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


class Branches(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        return self.head(sum(block(x) for block in self.blocks))


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_networks_without_an_order_of_blocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in this order, but they ran in the order net.blocks.3, net.blocks.2"):
        fit(tmp_path, new(Unordered()), freezing(1))
    with pytest.raises(ValueError, match=r"'net.blocks.1' does not depend on 'net.blocks.0'"):
        fit(tmp_path, new(Branches()), freezing(1))
    with pytest.raises(ValueError, match=r"found 'net.body' alone"):
        fit(tmp_path, new(Once()), freezing(1))


def test_everything_frozen(tmp_path: Path) -> None:
    net = Chain()
    for part in (net.head, *net.blocks[1:]):
        part.requires_grad_(False)
    with pytest.raises(ValueError, match=r"everything would be frozen"):
        fit(tmp_path, new(net), freezing(1))
    net.blocks[2].requires_grad_(True)
    callback = freezing(3)
    fit(tmp_path, new(net), callback)
    assert callback.num_frozen == 2


@pytest.mark.slow
def test_max_frozen(tmp_path: Path) -> None:
    callback = freezing(9, max_frozen=2)
    fit(tmp_path, new(), callback)
    assert callback.num_frozen == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "`share`, where 1 is an equal share, to be above 0"),
        ({"num_evaluations": 0}, "`num_evaluations` to be at least 1"),
        ({"num_evaluations": 1.5}, "`num_evaluations` to be a whole number, but got 1.5"),
        ({"max_frozen": "all"}, "`max_frozen` to be a whole number, but got 'all'"),
        ({"patience": 0}, "`patience` to be at least 1"),
        ({"max_frozen": 0}, "`max_frozen`"),
        ({"min_delta": -1.0}, "`min_delta`"),
        ({"mode": "least"}, "`mode` to be one of 'min', 'max', but got 'least'"),
        ({"optimizer_state": "forget"}, "`optimizer_state`"),
        ({"cache": "tape"}, "`cache` to be one of None, 'memory', 'disk'"),
        ({"cache": "disk", "dropout_in_eval": False}, "`norm_in_eval` and `dropout_in_eval` with `cache`"),
    ],
)
def test_options_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezeConverged(**options)


@pytest.mark.parametrize("answer", [None, "two", 1.5], ids=str)
def test_a_policy_that_returns_no_number(tmp_path: Path, answer: Any) -> None:
    callback = FreezeConverged(policy=lambda records, blocks: answer, monitor=None)
    with pytest.raises(ValueError, match=f"Expected `policy` to return how many .*, but got {answer!r}"):
        fit(tmp_path, new(), callback, max_epochs=1)
