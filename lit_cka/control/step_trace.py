"""One training step, watched to see what runs before, in and behind each block: `StepTrace`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_cka.control.counted_flops import CountedFlops
from lit_cka.control.plan import BlockParts, FreezePlan
from lit_cka.control.step_graph import BEHIND, StepGraph, nodes_of
from lit_cka.features.compiled import Uncompiled
from lit_cka.features.layers import named_layers
from lit_cka.features.sharded_modules import plain_name


class _Call(NamedTuple):
    """The end of a module's call: which one, what it returned comes from, and the FLOPs of the step by then."""

    name: str
    nodes: list[Any]
    flops: int


class StepTrace:
    """Watches the modules of a model from the start of a training step to its loss; nothing that is computed changes.

    Compiled code runs as it is written meanwhile, since it hides its modules.

    Args:
        model: the LightningModule.
        blocks: names of the blocks, in the order in which they should run.
    """

    def __init__(self, model: pl.LightningModule, blocks: list[str]) -> None:
        self._model, self._blocks = model, blocks
        self._calls: list[_Call] = []
        self._undo = ExitStack()

    def start(self) -> None:
        """Begin to watch."""
        self.stop()
        self._calls = []
        eager = Uncompiled()
        eager.start()
        self._undo.callback(eager.stop)
        self._flops = CountedFlops()
        self._undo.callback(self._count_flops())
        layers = named_layers(self._model)
        self._flops_stem: int | None = None
        self._undo.callback(layers[self._blocks[0]].register_forward_pre_hook(self._note_stem).remove)
        for name, module in layers.items():
            handle = module.register_forward_hook(partial(self._note, name))
            self._undo.callback(handle.remove)

    def _count_flops(self) -> Callable[[], None]:
        """Have FLOPs counted, within the training step alone, since such modes end in the order of a stack."""
        counter, step = self._flops, self._model.training_step
        before = vars(self._model).get("training_step")

        @wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with counter:
                return step(*args, **kwargs)

        def undo() -> None:
            del self._model.training_step
            if before is not None:
                self._model.training_step = before  # type: ignore[method-assign]

        self._model.training_step = counted  # type: ignore[method-assign]
        return undo

    def stop(self) -> None:
        """Leave no hook behind."""
        self._undo.close()

    def _note_stem(self, module: nn.Module, args: Any) -> None:
        if self._flops_stem is None:
            self._flops_stem = self._flops.total

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.append(_Call(name, nodes_of(output), self._flops.total))

    @property
    def has_run(self) -> bool:
        """Whether the blocks have run."""
        return bool({call.name for call in self._calls} & set(self._blocks))

    def plan(self, loss: Tensor, num_samples: int) -> FreezePlan:
        """Stop, and return what is frozen with each block.

        Args:
            loss: of the step.
            num_samples: of its batch.

        Raises:
            ValueError: if the blocks did not run one after the other, each on what the one before it returned, or are
                checkpointed in the reentrant way.
        """
        flops = self._flops.total
        self.stop()
        self._check_order()
        graph = StepGraph()
        ends = [self._last_call(block) for block in self._blocks]
        for block in self._blocks:
            graph.add_block(node for call in self._calls if call.name == block for node in call.nodes)
        self._check_links(graph)
        graph.add_rest([] if loss.grad_fn is None else [loss.grad_fn])
        if graph.recomputes:
            raise ValueError(
                "Expected blocks that are not checkpointed in the reentrant way, which gives no gradients to a block "
                "behind frozen ones, but found some: pass `use_reentrant=False` to `checkpoint` (in transformers, "
                "gradient_checkpointing_enable({'use_reentrant': False}))."
            )
        parameters, num_behind = self._parameters(graph)
        modules = self._modules(graph, ends)
        runs_once = len(self._sequence()) == len(self._blocks)
        stem = self._flops_stem or 0
        totals = [stem, *(self._calls[end].flops for end in ends)]
        parts = [
            BlockParts(
                block,
                tuple(parameters[number]),
                tuple(modules[number]),
                totals[number + 1] - totals[number],
                runs_once and bool(self._calls[ends[number]].nodes) and number not in graph.shortcuts,
            )
            for number, block in enumerate(self._blocks)
        ]
        return FreezePlan(tuple(parts), stem, flops - totals[-1], num_samples, num_behind)

    def _sequence(self) -> list[str]:
        chosen = set(self._blocks)
        return [call.name for call in self._calls if call.name in chosen]

    def _last_call(self, name: str) -> int:
        return max(index for index, call in enumerate(self._calls) if call.name == name)

    def _check_order(self) -> None:
        """Raise unless the step ran all blocks in order, once or several times."""
        ran = self._sequence()
        if ran and ran == self._blocks * (len(ran) // len(self._blocks)):
            return
        missing = [block for block in self._blocks if block not in ran]
        what = f"{missing[0]!r} did not run" if missing else f"they ran in the order {', '.join(ran[:12])}"
        raise ValueError(
            f"Expected every training step to run the {len(self._blocks)} blocks {self._blocks[0]!r} to "
            f"{self._blocks[-1]!r} in this order, but {what}: pass `blocks=` with the names of blocks that run one "
            "after the other."
        )

    def _check_links(self, graph: StepGraph) -> None:
        for number in graph.unlinked:
            raise ValueError(
                f"Expected each block to run on what the one before it returns, but {self._blocks[number]!r} does not "
                f"depend on {self._blocks[number - 1]!r}: pass `blocks=` with the names of the blocks of one branch."
            )

    def _parameters(self, graph: StepGraph) -> tuple[list[list[str]], int]:
        """Returns names of the parameters by the block with which they are frozen, and the number of all others."""
        parameters: list[list[str]] = [[] for _ in self._blocks]
        num_behind = 0
        layers = named_layers(self._model)
        inside = {
            id(parameter): number
            for number, block in enumerate(self._blocks)
            for parameter in layers[block].parameters()
        }
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            # Of a block, this step may not have used all, such as experts.
            number = graph.last_use.get(id(parameter), inside.get(id(parameter), BEHIND))
            if number == BEHIND:
                num_behind += 1
            else:
                parameters[number].append(plain_name(name))
        return parameters, num_behind

    def _modules(self, graph: StepGraph, ends: list[int]) -> list[list[str]]:
        """Returns names of the modules by the first block with whose end they have all run."""
        layers = named_layers(self._model)
        modules: list[list[str]] = [[] for _ in self._blocks]
        joined: dict[str, int] = {}
        last: dict[str, int] = {call.name: index for index, call in enumerate(self._calls)}
        for name, index in last.items():
            sections = {graph.section_of.get(node, BEHIND) for node in self._calls[index].nodes}
            number = next((number for number, end in enumerate(ends) if index <= end), None)
            if number is not None and BEHIND not in sections:
                joined[name] = max([number, *sections])
        for name in layers:
            # What is called in another way than as a module comes with the module that it is in.
            around = (name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1))
            number = next((joined[outer] for outer in around if outer in joined), None)
            if number is not None:
                modules[number].append(name)
        return modules
