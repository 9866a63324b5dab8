"""A script for `test_weights.py`: ranks under gloo, which share the weights of a model out among them.

    python tests/editing/edit_worker.py FOLDER

writes what each rank has got to `FOLDER/every-<world size>-<rank>.pt`. The processes are forked after the imports,
which take the most time (so nothing comes from `sync_worker.py`, with its metrics), and before the first tensor, so
that no thread pool is forked with them.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.editing.parameter import EDITED
from lit_cka.editing.placement import FileBacked
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.weights import edit_state_dicts

SECONDS = 40
WORLD_SIZES = (2, 3)
SETTINGS = EditSettings(rule="energy", R=0.7, min_rel_update=1e-3)
NAN_IN = "blocks.1.weight"


def models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts with all that an edit meets: the pretrained one, and the fine-tuned one."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def low_rank(rows: int, columns: int) -> Tensor:
        return randn(rows, 3) @ randn(3, columns) / 10 + 0.05 * randn(rows, columns)

    W0 = {
        "stem.weight": randn(8, 3, 4, 4),
        "stem.bias": randn(8),
        "embedding": randn(60, 24),
        "blocks.0.weight": randn(40, 24),
        "blocks.1.weight": randn(24, 40),
        "blocks.2.weight": randn(36, 30).T,
        "blocks.3.weight": randn(6, 5, 3, 3).to(memory_format=torch.channels_last),
        "frozen.weight": randn(12, 12),
        "small.weight": randn(12, 12),
        "norm.running_mean": randn(24),
        "norm.table": randn(6, 6),
        "norm.num_batches_tracked": torch.tensor(3),
        "positions": torch.arange(12).reshape(3, 4),
        "bfloat16": randn(16, 20).bfloat16(),
        "float16": randn(20, 16).half(),
        "float64": randn(16, 16).double(),
        "head.weight": randn(10, 24),
        "none": randn(0, 4),
    }
    changes = {name: low_rank(len(W), W[0].numel()).reshape(W.shape) for name, W in W0.items() if W.ndim > 1 and len(W)}
    W1 = {
        name: W + changes[name].to(W.dtype) if name in changes and W.is_floating_point() else W.clone()
        for name, W in W0.items()
    }
    W1["blocks.3.weight"] = W1["blocks.3.weight"].to(memory_format=torch.channels_last)
    W1["stem.bias"] = W0["stem.bias"] + 1
    W1["frozen.weight"] = W0["frozen.weight"].clone()
    W1["small.weight"] = W0["small.weight"] * (1 + 1e-4)
    W1["positions"] = W0["positions"] + 1
    W1["head.weight"] = randn(5, 24)
    W1["new.weight"] = randn(7, 24)
    W1["tied"] = W1["embedding"]  # the same tensor
    W1["tied view"] = W1["embedding"].view(60, 24)  # another tensor on the same memory
    return W0, W1


def is_parameter(name: str) -> bool:
    return not name.startswith("norm.")


def packed(edited: Any, W1: dict[str, Tensor]) -> dict[str, Any]:
    """What can be saved: variants, records, and which tensors are those of the fine-tuned model, or tied."""
    return {
        "variants": {key: dict(values) for key, values in edited.variants.items()},
        "records": edited.records,
        "untouched": {key: [name for name in W1 if edited.variants[key][name] is W1[name]] for key in EDITED},
        "tied": all(edited.variants[key]["tied"] is edited.variants[key]["embedding"] for key in EDITED),
    }


def plain(rank: int, world_size: int) -> dict[str, Any]:
    W0, W1 = models()
    return packed(edit_state_dicts(W0, W1, SETTINGS, parameters=filter(is_parameter, W1)), W1)


def on_a_device(rank: int, world_size: int) -> dict[str, Any]:
    W0, W1 = models()
    return packed(edit_state_dicts(W0, W1, SETTINGS, parameters=filter(is_parameter, W1), device="cpu"), W1)


def in_files(rank: int, world_size: int) -> dict[str, Any]:
    folder = Path(sys.argv[1]) / f"files-{world_size}-{rank}"
    folder.mkdir()
    W0, W1 = models()
    place = FileBacked(folder).place
    seen = packed(edit_state_dicts(W0, W1, SETTINGS, parameters=filter(is_parameter, W1), place=place), W1)
    return {**seen, "num_files": len(list(folder.iterdir()))}


def failing(rank: int, world_size: int) -> dict[str, Any]:
    """NaN in a weight that one rank edits; what comes next is of use again."""
    W0, W1 = models()
    W1[NAN_IN] = W1[NAN_IN].clone()
    W1[NAN_IN][1, 2] = torch.nan
    seen: dict[str, Any] = {"num_threads": torch.get_num_threads()}
    try:
        edit_state_dicts(W0, W1)
    except ValueError as error:
        seen["error"] = str(error)
    seen["num_threads after"] = torch.get_num_threads()
    edited = edit_state_dicts({"W": torch.zeros(4, 5)}, {"W": torch.ones(4, 5)})
    return {**seen, "after": edited.records[0]["k"]}


def every(rank: int, world_size: int) -> dict[str, Any]:
    return {job.__name__: job(rank, world_size) for job in (plain, on_a_device, in_files, failing)}


def work(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/every-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    torch.save(every(rank, world_size), folder / f"every-{world_size}-{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for world_size in WORLD_SIZES:
        workers = [fork.Process(target=work, args=(rank, world_size, folder)) for rank in range(world_size)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + SECONDS
        for worker in workers:
            worker.join(max(deadline - time.monotonic(), 0))
            worker.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
