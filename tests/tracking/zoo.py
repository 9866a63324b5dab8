"""Small trainings of many kinds, for `test_zoo.py`: a class and a line for each.

`@kind(...)` adds a function or class that builds a module to `KINDS`; what it is given says how that is trained.
"""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

WIDTH, NUM_VAL, BATCH_SIZE = 6, 40, 16  # 40: the last batch is ragged


def samples(n: int = NUM_VAL, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def loader(n: int = NUM_VAL, seed: int = 1, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(n, seed), batch_size=BATCH_SIZE, **options)


def train_loader() -> DataLoader[Any]:
    return loader(32, seed=0, shuffle=True)


@dataclass
class Kind:
    """How a module is trained.

    Attributes:
        build: makes the module.
        train: makes the training data.
        val: makes the validation data.
        callbacks: makes the other callbacks, given the learning rate.
        options: of the trainer.
        layers: to track; None for those of `Net`.
        differs: whether the module gives other features for the same batch, so that there is a warning.
        mixes: whether the features of a sample depend on its batch, and batches differ, so that there is a warning.
    """

    build: Callable[[], pl.LightningModule]
    train: Callable[[], Any] = train_loader
    val: Callable[[], Any] = loader
    callbacks: Callable[[float], list[pl.Callback]] = lambda lr: []
    options: dict[str, Any] = field(default_factory=dict)
    layers: Any = ("**.a", "**.b")
    differs: bool = False
    mixes: bool = False


KINDS: dict[str, Kind] = {}


def kind(**how: Any) -> Callable[[Any], Any]:
    """Add what is decorated to `KINDS`, under its name."""

    def add(build: Any) -> Any:
        KINDS[build.__name__] = Kind(build, **how)
        return build

    return add


class Net(nn.Module):
    """Two layers that are tracked, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class Base(pl.LightningModule):
    """Keeps losses, outputs of the validation, and what it has passed to the network."""

    network: Callable[[], nn.Module] = Net

    def __init__(self) -> None:
        super().__init__()
        self.net = type(self).network()
        self.lr = 0.1
        self.losses: list[float] = []
        self.outputs: list[Tensor] = []
        self.passed: list[Any] = []

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        """What the step passes to the network."""
        return (batch[0],)

    def run(self, batch: Any) -> Tensor:
        arguments = self.arguments(batch)
        output = self.net(*arguments)
        self.passed.append(arguments)
        return output

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output.float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.run(batch), batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.outputs.append(self.run(batch).detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


@kind()
class Plain(Base):
    pass


# What the step passes to the network.


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class GraphNet(Net):
    def forward(self, graph: Graph) -> Tensor:
        graph.x = torch.relu(self.a(graph.x))
        graph.x = torch.relu(self.b(graph.x))
        return self.head(graph.x)


@kind()
class ObjectWhoseAttributesChange(Base):
    network = GraphNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (Graph(batch[0]),)


class Cache:
    """Of keys, to which a forward appends."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class CachingNet(Net):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(self.a(x))
        return self.head(torch.relu(self.b(torch.stack(cache.keys).sum(0))))


@kind()
class CacheOfKeys(Base):
    network = CachingNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return batch[0], Cache()


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        self.config = LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes)
        self.model, self.head = LlamaModel(self.config), nn.Linear(8, 3)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        return self.head(self.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1])


@kind(layers="net.model.layers.*")
class CacheOfTransformers(Base):
    network = Llama

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        from transformers import DynamicCache

        return (batch[0] * 4).long().clamp(-9, 9) + 10, DynamicCache(config=self.net.config)


@dataclass(frozen=True)
class Inputs:
    x: Tensor


class Named(dict):  # type: ignore[type-arg]
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x=x, y=y)


class UnpackingNet(Net):
    def forward(self, inputs: Any) -> Tensor:
        return super().forward(inputs.x if isinstance(inputs, Inputs) else inputs["x"])


@kind()
class FrozenDataclass(Base):
    network = UnpackingNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (Inputs(batch[0]),)


@kind()
class DictWithItsOwnConstructor(Base):
    network = UnpackingNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (Named(*batch),)


class IteratingNet(Net):
    def forward(self, tensors: Iterator[Tensor]) -> Tensor:
        return super().forward(next(tensors) + next(tensors))


@kind()
class IteratorAsArgument(Base):
    network = IteratingNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (iter([batch[0], batch[0] * 2, batch[0] * 3]),)


@kind()
class GeneratorAsArgument(Base):
    network = IteratingNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return ((batch[0] * i for i in range(1, 4)),)


class LockedNet(Net):
    def forward(self, x: Tensor, lock: Any, then: Callable[[Tensor], Tensor]) -> Tensor:
        with lock:
            return then(super().forward(x))


@kind()
class LockAndClosureAsArguments(Base):
    network = LockedNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return batch[0], threading.Lock(), lambda output: output * 2


class InPlaceNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


@kind()
class InputsChangedInPlace(Base):
    network = InPlaceNet


class PositionsNet(Net):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return super().forward(batch.pop("x"))


@kind()
class InputsTakenOut(Base):
    network = PositionsNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return ({"x": batch[0], "name": "a"},)


# What a forward depends on, or changes, besides its arguments.


@kind()
class HooksThatAppend(Base):
    """The user's own hooks write to lists that only they, or the step too, know."""

    def __init__(self) -> None:
        super().__init__()
        self.features = features = []
        unknown: list[Tensor] = []
        self.net.b.register_forward_hook(lambda module, args, output: features.append(output.detach()))
        self.net.b.register_forward_hook(lambda module, args, output: unknown.append(output.detach()))
        self.num_unknown = lambda: len(unknown)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.outputs.append(torch.tensor([len(self.features), self.num_unknown()]))


class HookedNet(nn.Module):
    """Decodes what a hook on the encoder stored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.stored = stored = {}
        self.a.register_forward_hook(lambda module, args, output: stored.update(a=output))

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.head(self.b(self.stored["a"]))


@kind()
class DecodesWhatAHookStored(Base):
    network = HookedNet


@kind()
class DecodesWhatAHookStoredAfterARun(Base):
    network = HookedNet

    def __init__(self) -> None:
        super().__init__()
        self.net(torch.randn(16, WIDTH))


class TorchDraws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.randn(x.shape, generator=self.generator))


@kind(differs=True)
class TorchGeneratorOfItsOwn(Base):
    network = TorchDraws


class NumpyDraws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rngs = {"noise": np.random.default_rng(3)}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.from_numpy(self.rngs["noise"].standard_normal(x.shape)).float())


@kind(differs=True)
class NumpyGeneratorOfItsOwn(Base):
    network = NumpyDraws


class PythonDraws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.random.random() * x.flip(1))


@kind(differs=True)
class PythonGeneratorOfItsOwn(Base):
    network = PythonDraws


class GlobalDraws(Net):
    def forward(self, x: Tensor) -> Tensor:
        noise = 0.3 * torch.randn_like(x) + float(np.random.randn()) * x.flip(1) + random.random() * x.roll(1, 1)
        return super().forward(x + noise)


@kind(differs=True)
class GlobalGenerators(Base):
    network = GlobalDraws


class DropoutNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, training=True))


@kind(differs=True)
class DropoutLeftOn(Base):
    network = DropoutNet


@kind(differs=True)
class TrainModeInValidation(Base):
    """Monte-Carlo dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net.a = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))

    def on_validation_model_eval(self) -> None:
        self.train()


class BatchNormNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@kind()
class BatchNormInTrainMode(Base):
    """Its running statistics move on in the validation, too."""

    network = BatchNormNet

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net.train()
        super().validation_step(batch, batch_idx)


class CountingNet(Net):
    """Buffers, attributes and lists that count calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.calls, self.tensor, self.sizes = 0, torch.zeros(2), {"sizes": [], "by_size": {}}
        self.array, self.recent, self.seen = np.zeros(2), deque(maxlen=3), set()

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.scratch = self.scratch + 1  # another tensor
        self.calls += 1
        self.tensor += 1
        self.array += 1
        self.recent.append(self.calls)
        self.seen.add(self.calls)
        self.sizes["sizes"].append(len(x))
        self.sizes["by_size"].setdefault(len(x), []).append(self.calls)
        self.last = x.detach().mean()
        return super().forward(x)


@kind()
class CountsItsCalls(Base):
    network = CountingNet


class MovingNet(Net):
    """What a call leaves behind shows in the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += x.detach().abs().mean(0)
        return super().forward(x * self.mean)


@kind(differs=True)
class BufferThatMovesOn(Base):
    network = MovingNet


class Statistics:
    def __init__(self) -> None:
        self.count, self.history = 0, [0.0]


class ObservedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def forward(self, x: Tensor) -> Tensor:
        self.statistics.count += len(x)
        self.statistics.history.append(float(x.mean()))
        return super().forward(x)


@kind()
class ObjectThatCounts(Base):
    network = ObservedNet


class DomainNet(Net):
    domain = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.domain == 0 else x.roll(1, 1) * 2)


@kind(val=lambda: [loader(), loader(36, seed=2)])
class AttributeSetByTheStep(Base):
    network = DomainNet

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net.domain = dataloader_idx
        super().validation_step(batch, batch_idx)


@kind()
class ExtraState(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 2.0

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0] * torch.tensor([self.gain, *[1.0] * (WIDTH - 1)]),)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.gain)

    def set_extra_state(self, state: Tensor) -> None:
        self.gain = float(state)


class ForceNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_(True)
        energy = super().forward(torch.tanh(x)).sum(1)
        forces = torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0]
        return torch.cat([energy[:, None], forces], dim=1)


@kind(options={"inference_mode": False})
class GradientsInValidation(Base):
    network = ForceNet

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            super().validation_step(batch, batch_idx)


@kind()
class GradientsInValidationAtNoGrad(Base):
    """Leaves inference mode by itself."""

    network = ForceNet

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            super().validation_step([part.clone() for part in batch], batch_idx)


class FlexNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        h = self.a(x)
        if not self.training:
            rows = h[:, None, :, None].expand(-1, 1, -1, 4).contiguous()
            h = flex_attention(rows, rows, rows, score_mod=lambda score, b, n, i, j: score - (i - j).abs())[:, 0, :, 0]
        return self.head(self.b(h))


@kind()
class FlexAttention(Base):
    network = FlexNet


class BranchingNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.training:
            h = torch.cond(h.sum() > 0, lambda t: t * 2.0, lambda t: t + 1.0, (h,))
        return self.head(self.b(h))


@kind()
class Cond(Base):
    network = BranchingNet


class LoopingNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        h = self.a(x)
        if not self.training:
            _, h = while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 0.5), (torch.tensor(0), h))
        return self.head(self.b(h))


@kind()
class WhileLoop(Base):
    network = LoopingNet


class MappedNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        tangents = torch.func.vmap(torch.func.grad(lambda row: row.pow(3).sum()))(x)
        return super().forward(tangents)


@kind()
class FunctionTransforms(Base):
    network = MappedNet


# How the network is built.


@kind()
class HoldsALock(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net.lock = threading.Lock()


class WeightNormNet(Net):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.a = torch.nn.utils.weight_norm(self.a)
            self.b = torch.nn.utils.spectral_norm(self.b)


@kind()
class OldWeightNorm(Base):
    network = WeightNormNet


class ParametrizedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.a)
        torch.nn.utils.parametrizations.orthogonal(self.b)


@kind(layers=("net.a", "net.b"))
class Parametrized(Base):
    network = ParametrizedNet


class LazyNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LazyLinear(WIDTH)  # type: ignore[assignment]


@kind()
class LazyButRunOnce(Base):
    network = LazyNet

    def __init__(self) -> None:
        super().__init__()
        self.net(torch.zeros(2, WIDTH))


class HoldingNet(Net):
    """Keeps what it computed, with its history."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.a2 = nn.Linear(WIDTH, WIDTH)
        self.kept = self.a2(torch.ones(1, WIDTH))


@kind(layers="net.b")
class TensorsKeptOnSelf(Base):
    network = HoldingNet


class TiedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight
        self.view = self.a.weight.detach()[:2]
        self.register_buffer("tied", self.a.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.view.sum() + self.tied.sum()


@kind()
class TiedWeights(Base):
    network = TiedNet


class PatchedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        forward, weight = self.a.forward, self.b.weight
        self.a.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
        self.b.forward = lambda x: x @ weight.T  # type: ignore[method-assign]


@kind()
class PatchedForwards(Base):
    network = PatchedNet


@kind()
class TwoEncodersFedFromEachOther(Base):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (self.encoder(batch[0]),)


@kind(layers=["left.a", "right.a", "right.b"])
class DualEncoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(), Net()
        self.scale = nn.Parameter(torch.ones(()))

    def run(self, batch: Any) -> Tensor:
        return self.left(batch[0]) @ self.right(batch[0].flip(1)).T * self.scale

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, torch.arange(len(output)))


class PaddedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.blocks = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h, src_key_padding_mask=key_padding_mask)
        return self.head((h * ~key_padding_mask[..., None]).sum(1))


@kind(layers="net.blocks.*")
class SequencesWithPadding(Base):
    network = PaddedNet

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        ids = (batch[0] * 3).long().clamp(-4, 4).abs() + 1
        lengths = batch[0].abs().sum(1).long().clamp(1, WIDTH)
        mask = torch.arange(WIDTH) >= lengths[:, None]
        return ids.masked_fill(mask, 0), mask


class CompilingNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = torch.compile(self.b, backend="eager")  # type: ignore[assignment]


@kind(layers=["net.a", "net.b"])
class CompiledSubmodule(Base):
    network = CompilingNet


@kind()
def compiled_module() -> pl.LightningModule:
    module = Plain()
    module.compile(backend="eager")
    return module


class CheckpointedNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.b, torch.relu(self.a(x)), use_reentrant=False)
        return self.head(torch.relu(h))


@kind()
class ActivationCheckpointing(Base):
    network = CheckpointedNet


@kind()
class BuiltInConfigureModel(Base):
    network = nn.Identity  # until then

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()


@kind()
class WeightsLoadedInFitStart(Base):
    def on_fit_start(self) -> None:
        torch.manual_seed(5)
        self.net.load_state_dict(Net().state_dict())


@kind()
class WeightsLoadedInTrainStart(Base):
    """After the callback's own hook."""

    def on_train_start(self) -> None:
        torch.manual_seed(5)
        self.net.load_state_dict(Net().state_dict())


@kind()
class WeightsReplacedInTheFirstEpoch(Base):
    def on_train_epoch_start(self) -> None:
        for parameter in self.net.parameters() if self.current_epoch == 0 else ():
            parameter.data = parameter.data + 0.1


class Loading(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.manual_seed(5)
        module.net.load_state_dict(Net().state_dict())
        module.log("at the start", 3.0)


@kind(callbacks=lambda lr: [Loading()])
class WeightsLoadedByACallbackThatLogs(Base):
    pass


class Child(pl.LightningModule):
    """A module of its own, which looks at the trainer that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.step = Net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.trainer.global_step
        return self.net(x)


@kind()
class LightningModuleInside(Base):
    network = Child


@kind()
class SomeWeightsFrozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net.a.requires_grad_(False)


# How it is trained.


@kind(callbacks=lambda lr: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=lr or 1e-30)])
class BackboneFrozenAtFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (self.backbone(batch[0]),)


@kind(layers=["net.a", "net.b", "other.a"])
class TwoOptimizersByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = Net()
        self.automatic_optimization = False

    def run(self, batch: Any) -> Tensor:
        return super().run(batch) + self.other(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(self.run(batch), batch)
        self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), self.lr), torch.optim.Adam(self.other.parameters(), self.lr)]


@kind(layers=["generator.a", "net.a", "net.b"])
class GAN(TwoOptimizersByHand):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential()
        self.generator.a, self.generator.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def run(self, batch: Any) -> Tensor:
        real, fake = batch[0], self.generator(batch[0].flip(1))
        return self.net(torch.cat([real, fake]))

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, torch.arange(len(output)) // (len(output) // 2))


@kind(callbacks=lambda lr: [EMAWeightAveraging(decay=0.5)])
class MovingAverageOfWeights(Base):
    pass


@kind(callbacks=lambda lr: [StochasticWeightAveraging(swa_lrs=lr or 1e-30, swa_epoch_start=1)])
class StochasticAverageOfWeights(Base):
    pass


class AveragingByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        for own, other in zip(self.average.parameters(), self.net.parameters(), strict=True):
            own.lerp_(other.detach(), 0.5)


@kind(layers=["net.a", "net.b"])
class AverageSwappedInByHand(AveragingByHand):
    def on_validation_start(self) -> None:
        for own, other in zip(self.average.parameters(), self.net.parameters(), strict=True):
            own.data, other.data = other.data, own.data

    on_validation_end = on_validation_start


@kind()
class WeightsThatAdaptInTheStep(Base):
    """Test-time training: they are changed in the step, and put back."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        kept = copy.deepcopy(self.net.state_dict())
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.net(batch[0].clone()).pow(2).mean()
            gradients = torch.autograd.grad(loss, list(self.net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        self.outputs.append(torch.cat([parameter.flatten() for parameter in self.net.parameters()]))
        self.net.load_state_dict(kept)


@kind(options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1})
class AccumulatedGradients(Base):
    pass


@kind(options={"precision": "bf16-mixed"})
class HalfPrecision(Base):
    pass


@kind(options={"precision": "64-true"})
class DoublePrecision(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch[0].dtype == torch.float64
        super().validation_step(batch, batch_idx)


@kind(options={"precision": "bf16-true"})
class TrueHalfPrecision(Base):
    pass


@kind()
class MomentumEncoderAndQueue(Base):
    """As MoCo has: a second network without gradients, and a queue that training fills."""

    def __init__(self) -> None:
        super().__init__()
        self.momentum = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", torch.randn(3, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.momentum.parameters(), self.net.parameters(), strict=True):
                own.lerp_(other, 0.1)
            key = self.momentum(batch[0]).mean(0)
            self.queue = torch.cat([self.queue[:, 1:], key[:, None]], dim=1)
        loss = nn.functional.cross_entropy(self.run(batch) @ self.queue, batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.outputs.append(self.momentum(batch[0]))


# What a step and its hooks do besides running the network.


@kind()
class MetricsThatAreLogged(Base):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.values = torchmetrics.CatMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self.outputs[-1], batch[1])
        self.log("accuracy", self.accuracy)
        self.log("loss", self.loss(self.outputs[-1], batch), prog_bar=True)
        self.values.update(self.outputs[-1])


@kind()
class MetricsByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(3)])
        self.never_reset = torchmetrics.SumMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.metrics.update(self.outputs[-1], batch[1])
        self.never_reset.update(self.outputs[-1])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        self.metrics.reset()
        self.log("ever", self.never_reset.compute())


@kind()
class MetricsTrackedByEpoch(Base):
    """By a list of metrics that grows in each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = torchmetrics.MetricTracker(torchmetrics.classification.MulticlassAccuracy(3))

    def on_validation_epoch_start(self) -> None:
        self.metrics.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.metrics.update(self.outputs[-1], batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("best", self.metrics.best_metric())


@kind()
class WeightsRoundedByAHook(Base):
    def on_validation_start(self) -> None:
        self.net.half().float()


@kind()
class OutputsGatheredByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.gathered.append(self.outputs[-1])

    def on_validation_epoch_end(self) -> None:
        self.log("mean", torch.cat(self.gathered).mean())  # of nothing, it would raise
        self.gathered.clear()


@kind(
    callbacks=lambda lr: [EarlyStopping("loss", patience=0), ModelCheckpoint(monitor="loss", save_last=True)],
    options={"enable_checkpointing": True, "max_epochs": 3},
)
class StoppedEarly(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("loss", self.loss(self.outputs[-1], batch))


@kind(callbacks=lambda lr: [ModelCheckpoint(monitor="loss")], options={"enable_checkpointing": True})
class LooksAtItsTrainer(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        loss = self.loss(self.outputs[-1], batch)
        self.log("loss", loss)
        self.logger.log_metrics({"batch_loss": float(loss)}, step=batch_idx)
        self.logger.experiment.log_metrics({"again": float(loss)})
        assert self.trainer.checkpoint_callback.monitor == "loss"
        assert len(self.trainer.callbacks) > 1
        assert len(self.trainer.val_dataloaders) == 3

    def on_validation_epoch_end(self) -> None:
        self.log("best", self.trainer.checkpoint_callback.best_model_score or 0.0)


@kind()
class SchedulerByValidation(Base):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("loss", self.loss(self.outputs[-1], batch))


class Normalising(pl.Callback):
    """Changes the batches before the step gets them."""

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        batch[0].mul_(2).add_(1)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(2).add_(1)


@kind(callbacks=lambda lr: [Normalising()])
class BatchesChangedByACallback(Base):
    pass


@kind()
class BatchesChangedByAHook(Base):
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        batch[0].mul_(2).add_(1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 0.5, batch[1]]


@kind()
class StepByOtherMeans(Base):
    """By `self(x)`, with the loss computed by the training step."""

    def run(self, batch: Any) -> Tensor:
        return self(batch[0])


# Data.


@kind(val=lambda: [loader(), loader(36, seed=2)])
class SeveralDataloaders(Base):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.outputs.append(torch.tensor(dataloader_idx))


@kind(val=lambda: {"a": [loader(), loader(36, seed=2)], "b": loader(38, seed=3)})
class NestedDataloaders(SeveralDataloaders):
    pass


class SideBySide(Base):
    def arguments(self, batch: Any) -> tuple[Any, ...]:
        if isinstance(batch, dict):
            return (torch.cat([part[0] for part in batch.values() if part is not None]),)
        return super().arguments(batch)


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader({"a": loader(48), "b": loader(32, seed=2)}, mode)


for mode in ("min_size", "max_size_cycle", "max_size"):
    KINDS[f"CombinedLoader {mode}"] = Kind(SideBySide, val=combined(mode))
KINDS["CombinedLoader sequential"] = Kind(SeveralDataloaders, val=combined("sequential"))


@kind(val=lambda: loader(shuffle=True))
class Shuffled(Base):
    pass


def shuffled_by_a_generator() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    return DataLoader(samples(), BATCH_SIZE, sampler=RandomSampler(samples(), generator=generator))


@kind(val=lambda: loader(shuffle=True), mixes=True)
class ShuffledWithStatisticsOfTheBatch(Base):
    """Which is found out by another run of a step, that nobody notices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return (self.norm(batch[0]),)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self.outputs[-1], batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", self.loss(self.outputs[-1], batch), on_step=True, on_epoch=True)
        self.logger.log_metrics({"batch": float(batch_idx)})
        torch.rand(3)


@kind(val=shuffled_by_a_generator)
class ShuffledByAGenerator(Base):
    pass


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.num_passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_passes += 1
        return iter(samples())


@kind(val=lambda: DataLoader(Stream(), BATCH_SIZE))
class IterableData(Base):
    pass


@kind(val=lambda: loader(num_workers=1))
class OneWorker(Base):
    pass


@kind(val=lambda: loader(num_workers=1, persistent_workers=True))
class OnePersistentWorker(Base):
    pass


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter(loader())

    def __len__(self) -> int:
        return len(loader())


@kind(val=Batches)
class NoDataLoader(Base):
    """But another iterable of batches."""


class Counting(Dataset):  # type: ignore[type-arg]
    """Knows how often it was read, and keeps what it has loaded."""

    def __init__(self) -> None:
        self.samples, self.num_reads, self.kept = samples(), 0, {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.num_reads += 1
        self.kept[index] = self.samples[index]
        return self.kept[index]


@kind(val=lambda: DataLoader(Counting(), BATCH_SIZE))
class DatasetThatCounts(Base):
    pass


class Crops(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return NUM_VAL

    def __getitem__(self, index: int) -> Any:
        x, y = samples()[index]
        return torch.stack([x, x.flip(0), -x]), y


class Bag:
    """A batch of a class of its own, whose constructor collates it."""

    def __init__(self, samples: list[Any]) -> None:
        self.parts = [torch.stack(part) for part in zip(*samples, strict=True)]

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index]


@kind(val=lambda: loader(collate_fn=Bag))
class BatchesOfAClass(Base):
    pass


@kind(val=lambda: DataLoader(Crops(), BATCH_SIZE))
class SeveralCrops(Base):
    """Items of several rows."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append(self.run([batch[0].flatten(0, 1)]).unflatten(0, (-1, 3)).mean(1))


@kind(val=lambda: DataLoader([{"x": x, "y": y, "name": f"image {i}"} for i, (x, y) in enumerate(samples())], 16))
class Dictionaries(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([batch["x"]], batch_idx)


class Images(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.num_transfers = self.num_loaders = 0

    def val_dataloader(self) -> Any:
        self.num_loaders += 1
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_transfers += 1
        return [batch[0] * 2, batch[1]]

    def train_dataloader(self) -> Any:
        return train_loader()


@kind(train=Images, val=lambda: None)
class DataModuleWithHooks(Base):
    pass


@kind(train=Images, val=lambda: None, options={"reload_dataloaders_every_n_epochs": 1})
class DataLoadedAnew(Base):
    pass


@kind(options={"barebones": True, "logger": None, "num_sanity_val_steps": None})
class Barebones(Base):
    pass


@kind(options={"limit_val_batches": 2, "val_check_interval": 1})
class SomeBatchesOften(Base):
    pass
