"""Which batches of a probe a process takes: its own, or in step with those that run the model together with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lit_cka.parallel.ranks import is_distributed
from lit_cka.samples.counting import DataRanks


class ProbeBatch(NamedTuple):
    """A batch to run.

    Attributes:
        number: among the probe's batches.
        batch: as the probe gives it.
        counts: whether its samples count here; otherwise another process has it, and it is run for the others' sake.
        is_last: whether it is the last one here.
    """

    number: int
    batch: Any
    counts: bool
    is_last: bool


def batches_of_rank(batches: Iterable[Any], ranks: DataRanks, *, in_step: bool) -> Iterator[ProbeBatch]:
    """Yields every W-th batch, of W ranks.

    Args:
        batches: of the probe, the same on all ranks.
        ranks: the processes that hold different samples.
        in_step: whether all processes, whatever samples they hold, have to take as many batches, since each has a part
            of the model. Then those that have fewer take others' in addition, and every process has to call this.

    Raises:
        ValueError: in step, on all processes, if the probe is empty on some and not on others.
    """
    mine = _in_step(batches, ranks) if in_step else _own(batches, ranks)
    following = next(mine, None)
    while following is not None:
        current, following = following, next(mine, None)
        yield ProbeBatch(*current, is_last=following is None)


def _own(batches: Iterable[Any], ranks: DataRanks) -> Iterator[tuple[int, Any, bool]]:
    for index, batch in enumerate(batches):
        if index % ranks.size == ranks.rank:
            yield index, batch, True


def _in_step(batches: Iterable[Any], ranks: DataRanks) -> Iterator[tuple[int, Any, bool]]:
    numbered, spare = iter(enumerate(batches)), None
    while True:
        mine = None
        for index, batch in islice(numbered, ranks.size):
            spare = index, batch
            mine = spare if index % ranks.size == ranks.rank else mine
        some_have_one, some_never_had = _on_any(mine is not None, spare is None, ranks)
        if not some_have_one:
            return
        if some_never_had:
            raise ValueError(
                "Expected `probe` to have the same batches on all processes, as each holds a part of the model, but it "
                "is empty on some of them."
            )
        index, batch = spare if mine is None else mine  # type: ignore[misc]  # none is without a spare one
        yield index, batch, mine is not None


def _on_any(one: bool, other: bool, ranks: DataRanks) -> tuple[bool, bool]:
    """Whether the one, and the other, is so on any process of all."""
    if not is_distributed():
        return one, other
    found = torch.tensor([one, other], dtype=torch.int64, device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    first, second = found.tolist()
    return bool(first), bool(second)
