"""`torch.compile` of the module, its network or single blocks: the same scores and training, nothing compiled anew.

Compiled code does not notice hooks that come and go, so tracked steps run as they are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    NUM_VAL,
    Classifier,
    Net,
    first_item,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)

# torch's own look at its tensors while it compiles a block that gets another one's output.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

WAYS: dict[str, Callable[..., Any]] = {}


def way(function: Callable[..., Any]) -> Callable[..., Any]:
    WAYS[function.__name__] = function
    return function


@way
def module(module: Classifier, **options: Any) -> Any:
    return torch.compile(module, **options)


@way
def module_in_place(module: Classifier, **options: Any) -> Any:
    module.compile(**options)
    return module


@way
def net(module: Classifier, **options: Any) -> Any:
    module.net = torch.compile(module.net, **options)
    return module


@way
def net_in_place(module: Classifier, **options: Any) -> Any:
    module.net.compile(**options)
    return module


@way
def blocks(module: Classifier, **options: Any) -> Any:
    for i, block in enumerate(module.net.blocks):
        module.net.blocks[i] = torch.compile(block, **options)
    return module


@way
def blocks_in_place(module: Classifier, **options: Any) -> Any:
    for block in module.net.blocks:
        block.compile(**options)
    return module


FEW = {"module", "blocks_in_place"}  # what all ways have in common is shown by one of each kind
OF_WAYS = [way if way in FEW else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
WAY = pytest.mark.parametrize("way", OF_WAYS)


def stance() -> str:
    return eval_frame._stance.stance


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    """Nothing that was compiled, and no state of the compiler, goes from one test to the next."""
    torch._dynamo.reset()
    yield
    with TorchDispatchMode():  # leaving one ends what a mode that was left out of turn has begun
        pass
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


class Steps(Classifier):
    """Steps without side effects, which can be compiled in one graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)

    test_step = validation_step


class Watcher(pl.Callback):
    """Keeps losses and weights; `backend` compiles nothing, but counts the graphs by the step they belong to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.graphs: list[str] = []
        self.stances: list[str] = []
        self._step = ""

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(self._step)
        return graph.forward

    def on_train_batch_start(self, *args: Any) -> None:
        self._step = "train"
        self.stances.append(stance())

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_batch_start(self, *args: Any) -> None:
        self._step = "validate"

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            weights = {name.replace("_orig_mod.", ""): value.clone() for name, value in module.state_dict().items()}
            self.weights.append(weights)


def build(num_blocks: int = 3) -> Steps:
    pl.seed_everything(5, verbose=False)
    return Steps(Net(num_blocks))


def with_weights(weights: dict[str, Tensor]) -> Steps:
    module = Steps(Net(num_blocks=len({name.split(".")[2] for name in weights if "blocks" in name})))
    module.load_state_dict(weights)
    return module.eval()


def fit(
    folder: Path, module: Any, *callbacks: pl.Callback, watcher: Watcher | None = None, data: Any = None, **options: Any
) -> Watcher:
    watcher = watcher or Watcher()
    trainer(folder, *callbacks, watcher, **options).fit(module, train_loader(), data or loader())
    return watcher


def assert_by_hand(callback: CKACallback, before: nn.Module, weights: list[dict[str, Tensor]], **how: Any) -> None:
    assert len(callback.history) == len(weights) > 0
    for record, after in zip(callback.history, weights, strict=True):
        by_hand = hand_cka(before, with_weights(after), list(record["scores"]), loader(), **how)
        assert record["scores"] == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(
    ("way", "fullgraph", "num_sanity_val_steps", "backend"),
    [
        *((way, "in_place" in way, 0 if "net" in way else 2, None) for way in WAYS),
        pytest.param("module", True, 0, None, marks=pytest.mark.slow),
        pytest.param("net", True, 2, None, marks=pytest.mark.slow),
        pytest.param("module", True, 2, "aot_eager", marks=pytest.mark.slow),
        pytest.param("net_in_place", False, 0, "aot_eager", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_as_uncompiled(
    tmp_path: Path, way: str, fullgraph: bool, num_sanity_val_steps: int, backend: str | None
) -> None:
    options = {"num_sanity_val_steps": num_sanity_val_steps}
    plain, callback = CKACallback(), CKACallback()
    uncompiled = fit(tmp_path, build(), plain, **options)
    seen = []
    for callbacks in ([], [callback]):
        torch._dynamo.reset()
        module, watcher = build(), Watcher()
        compiled = WAYS[way](module, fullgraph=fullgraph, backend=backend or watcher.backend)
        seen.append(fit(tmp_path, compiled, *callbacks, watcher=watcher, **options))
        assert stance() == "default"
        assert hooks_of(module) == 0
    untracked, tracked = seen
    assert len(tracked.losses) == 8
    assert tracked.losses == untracked.losses
    for one, other in zip(tracked.weights, untracked.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert tracked.losses == pytest.approx(uncompiled.losses, abs=0 if backend is None else 1e-6)
    tolerance = 1e-9 if backend is None else 1e-5
    for record, expected in zip(callback.history, plain.history, strict=True):
        assert record == {**expected, "scores": pytest.approx(expected["scores"], abs=tolerance)}
    assert list(callback.scores) == BLOCKS
    assert min(callback.scores.values()) < 0.95
    assert_by_hand(callback, build(), tracked.weights)
    if backend is None:  # what is counted
        assert untracked.graphs.count("train") == tracked.graphs.count("train") > 0
        assert untracked.graphs.count("validate") > 0
        assert tracked.graphs.count("validate") == min(num_sanity_val_steps, 1)  # the sanity check is not tracked


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.slow
def test_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # in this process
    plain, callback = CKACallback(), CKACallback()
    # Without a sanity check, since its dataloader draws a random number before the training's does.
    options: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0}
    uncompiled = fit(tmp_path, build(1), plain, **options)
    untracked = fit(tmp_path, net(build(1)), limit_val_batches=0, **options)
    torch._dynamo.reset()
    tracked = fit(tmp_path, net(build(1)), callback, **options)
    assert tracked.losses == untracked.losses
    assert tracked.losses == pytest.approx(uncompiled.losses, abs=1e-5)
    for record, expected in zip(callback.history, plain.history, strict=True):
        assert record == {**expected, "scores": pytest.approx(expected["scores"], abs=1e-5)}
    assert_by_hand(callback, build(1), tracked.weights)


def test_in_low_precision(tmp_path: Path) -> None:
    callback = CKACallback()
    seen = fit(tmp_path, net(build(), backend="eager"), callback, precision="bf16-mixed")

    def run(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return first_item(model, batch)

    assert_by_hand(callback, build(), seen.weights, run=run)


@pytest.mark.parametrize(
    ("way", "again"), [*((way, "fit") for way in WAYS), ("module", "validate"), ("module", "test"), ("net", "test")]
)
def test_compiled_after_a_fit(tmp_path: Path, way: str, again: str) -> None:
    module, callback = build(), CKACallback()
    seen = fit(tmp_path, module, callback, max_epochs=1)
    compiled = WAYS[way](module, backend="eager")
    if again == "fit":
        fit(tmp_path, compiled, callback, watcher=seen)
        assert len(callback.history) == 3
    else:
        getattr(trainer(tmp_path, callback), again)(compiled, loader(), verbose=False)
        seen.weights *= 2
    assert_by_hand(callback, build(), seen.weights)
    assert hooks_of(module) == 0


@WAY
def test_compiled_between_two_validations(tmp_path: Path, way: str) -> None:
    module, callback = build(), CKACallback(reference=Net())
    reference = Steps(callback.options.reference)
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    trainer(tmp_path, callback).validate(WAYS[way](module, backend="eager"), loader(), verbose=False)
    first, second = callback.history
    assert second == {**first, "change_low": dict.fromkeys(BLOCKS, 0.0), "change_high": dict.fromkeys(BLOCKS, 0.0)}
    assert callback.scores == pytest.approx(hand_cka(reference, build(), BLOCKS, loader()), abs=1e-9)


def test_compiled_once_all_has_run_compiled_before(tmp_path: Path) -> None:
    """Blocks that compiled code was made of before there was any hook."""
    module, callback, watcher = build(), CKACallback(), Watcher()
    compiled = net_in_place(module, backend=watcher.backend, fullgraph=True)
    fit(tmp_path, compiled, watcher=watcher, max_epochs=1)
    before = with_weights(watcher.weights.pop())
    graphs = watcher.graphs.count("train")
    fit(tmp_path, compiled, callback, watcher=watcher)
    assert_by_hand(callback, before, watcher.weights)
    assert watcher.graphs.count("train") == graphs > 0


# Steps that are not tracked, among those that are.


@pytest.mark.parametrize(
    ("way", "options"),
    [
        *(pytest.param(way, {"max_batches": 1}, marks=[pytest.mark.slow] * (way not in FEW)) for way in WAYS),
        ("module", {"dataloaders": [1]}),
    ],
    ids=str,
)
def test_other_steps_of_a_tracked_validation_stay_compiled(tmp_path: Path, way: str, options: dict[str, Any]) -> None:
    """Each with hooks of its own would be compiled anew in every validation, until torch gives up or raises."""
    data = [loader(), loader(37, seed=2)] if "dataloaders" in options else loader()
    watcher, callback = Watcher(), CKACallback(debiased=True, log_figures=False, **options)
    compiled = WAYS[way](build(), backend=watcher.backend, fullgraph=True)
    fit(tmp_path, compiled, callback, watcher=watcher, data=data, max_epochs=9)
    assert len(callback.history) == 9
    assert 0 < watcher.graphs.count("train") <= 2
    assert 0 < watcher.graphs.count("validate") <= 2  # as many as without the callback
    batches = data[1] if "dataloaders" in options else list(data)[:1]
    by_hand = hand_cka(build(), with_weights(watcher.weights[-1]), BLOCKS, batches, debiased=True)
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


@WAY
def test_skipped_validations_stay_compiled(tmp_path: Path, way: str) -> None:
    module, watcher, callback = build(), Watcher(), CKACallback(every_n_validations=2, log_figures=False)
    compiled = WAYS[way](module, backend=watcher.backend, fullgraph=True)
    fit(tmp_path, compiled, callback, watcher=watcher, max_epochs=5)
    assert [record["epoch"] for record in callback.history] == [0, 2, 4]
    assert 0 < watcher.graphs.count("validate") <= 2
    assert_by_hand(callback, build(), watcher.weights[::2])


# The stance of the compiler.


@pytest.mark.parametrize(
    "way", ["module", *(pytest.param(way, marks=pytest.mark.slow) for way in ("net_in_place", "blocks"))]
)
def test_two_callbacks_leave_the_training_compiled(tmp_path: Path, way: str) -> None:
    callbacks = [CKACallback(), CKACallback(prefix="other", estimator="minibatch"), CKACallback(prefix="third")]
    alone, watcher = Watcher(), Watcher()
    fit(tmp_path, WAYS[way](build(), backend=alone.backend), watcher=alone)
    torch._dynamo.reset()
    fit(tmp_path, WAYS[way](build(), backend=watcher.backend), *callbacks, watcher=watcher)
    assert stance() == "default"
    assert watcher.stances == ["default"] * 8
    assert watcher.graphs.count("train") == alone.graphs.count("train") > 0
    assert watcher.losses == alone.losses
    for callback in callbacks[::2]:
        assert_by_hand(callback, build(), watcher.weights)
    assert_by_hand(callbacks[1], build(), watcher.weights, estimator="minibatch")


@pytest.mark.parametrize("own", ["default", "eager_on_recompile", "force_eager"])
def test_a_stance_of_one_s_own_is_kept(tmp_path: Path, own: str) -> None:
    callback, watcher = CKACallback(), Watcher()
    with torch.compiler.set_stance(own):
        fit(tmp_path, net(build(), backend=watcher.backend), callback, watcher=watcher)
        assert stance() == own
    assert watcher.stances == [own] * 8
    assert bool(watcher.graphs) == (own == "default")
    assert_by_hand(callback, build(), watcher.weights)


class Failing(Steps):
    """Its validation fails, inside of the network or behind it, in the given epoch (-1: in the sanity check)."""

    def __init__(self, epoch: int, inside: bool, error: type[BaseException]) -> None:
        super().__init__()
        self.epoch, self.error = epoch, error
        if inside:
            head = self.net.head  # and not that of a copy
            head.register_forward_hook(lambda module, args, output: self._fail(output) if module is head else None)
        else:
            self.loss = lambda batch: self._fail(Steps.loss(self, batch))  # type: ignore[method-assign]

    def _fail(self, output: Tensor) -> Tensor:
        if not self.training and (self.trainer.sanity_checking or self.trainer.current_epoch == self.epoch):
            raise self.error("The step has failed.")
        return output


@pytest.mark.parametrize("way", ["net", "net_in_place", "blocks"])
@pytest.mark.parametrize(("epoch", "sanity"), [(0, 0), (1, 0), (-1, 2)], ids=["first", "second", "sanity"])
@pytest.mark.parametrize("inside", [False, True], ids=["behind", "inside"])
def test_a_step_that_fails(tmp_path: Path, way: str, epoch: int, sanity: int, inside: bool) -> None:
    callback, module = CKACallback(), Failing(epoch, inside, ArithmeticError)
    own_hooks = hooks_of(module)
    compiled = WAYS[way](module, backend="eager")
    with pytest.raises(ArithmeticError, match="The step has failed"):
        fit(tmp_path, compiled, callback, num_sanity_val_steps=sanity)
    assert stance() == "default"
    assert hooks_of(module) == own_hooks
    assert (torch.ones(2) + 1).tolist() == [2, 2]  # no mode of torch stays behind


def test_an_interrupted_step(tmp_path: Path) -> None:
    module = Failing(1, False, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        fit(tmp_path, net(module, backend="eager"), CKACallback(), num_sanity_val_steps=0)
    assert stance() == "default"
    assert hooks_of(module) == 0
    # And the next training is tracked as if there had been none.
    module, callback = build(), CKACallback()
    assert_by_hand(callback, build(), fit(tmp_path, net(module, backend="eager"), callback).weights)


class Refusing(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("It takes no such inputs.")


@WAY
def test_a_reference_that_fails(tmp_path: Path, way: str) -> None:
    compiled = WAYS[way](build(), backend="eager")
    with pytest.raises(RuntimeError, match=r"The reference failed on the inputs of .* It takes no such inputs"):
        fit(tmp_path, compiled, CKACallback(reference=Steps(Refusing())))
    assert stance() == "default"
    assert (torch.ones(2) + 1).tolist() == [2, 2]  # no mode of torch stays behind


# References.


@WAY
def test_a_compiled_reference_of_a_model_that_is_not(tmp_path: Path, way: str) -> None:
    pl.seed_everything(6, verbose=False)
    reference = Steps()
    before = with_weights(reference.state_dict())
    callback = CKACallback(reference=WAYS[way](reference, backend="eager"))
    seen = fit(tmp_path, build(), callback)
    assert_by_hand(callback, before, seen.weights)
    assert hooks_of(reference) == 0


@pytest.mark.parametrize("way", ["module", "net", "blocks_in_place"])
def test_a_compiled_model_and_its_weights_in_a_file(tmp_path: Path, way: str) -> None:
    pl.seed_everything(6, verbose=False)
    before = Steps()
    torch.save(before.state_dict(), tmp_path / "weights.pt")
    callback = CKACallback(reference=tmp_path / "weights.pt")
    assert_by_hand(callback, before, fit(tmp_path, WAYS[way](build(), backend="eager"), callback).weights)


@pytest.mark.parametrize("way", ["module", "module_in_place", "net_in_place"])
@pytest.mark.parametrize("compiled_first", [False, True], ids=["then", "first"])
def test_resumed_compiled_or_no_longer(tmp_path: Path, way: str, compiled_first: bool) -> None:
    """Where compiling changes no name in the checkpoint."""
    compiling = [lambda module: WAYS[way](module, backend="eager"), lambda module: module]
    first, then = compiling if compiled_first else reversed(compiling)
    watcher = Watcher()
    run = trainer(tmp_path, CKACallback(), watcher, max_epochs=1)
    run.fit(first(build()), train_loader(), loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    callback = CKACallback()
    run = trainer(tmp_path, callback, watcher, max_epochs=2)
    pl.seed_everything(8, verbose=False)
    run.fit(then(Steps()), train_loader(), loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert [record["n"] for record in callback.history] == [NUM_VAL] * 2
    assert_by_hand(callback, build(), watcher.weights)


def test_a_forward_that_was_compiled_by_itself(tmp_path: Path) -> None:
    """It stays bound to the module that is trained, so that a copy would run with the weights in training."""
    module, callback = build(), CKACallback()
    module.net.forward = torch.compile(module.net.forward, backend="eager")
    seen = fit(tmp_path, module, callback)
    assert_by_hand(callback, build(), seen.weights)
    assert hooks_of(module) == 0
    assert stance() == "default"
