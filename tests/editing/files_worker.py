"""A script for `test_files.py`: edits of files that are killed or shared by ranks, and the memory that one takes; and
for `test_difference.py`, the memory of a comparison.

    python tests/editing/files_worker.py kills PRETRAINED FINETUNED OUTPUT KILLS
    python tests/editing/files_worker.py ranks PRETRAINED FINETUNED OUTPUT NUM_RANKS [KILL_AFTER]
    python tests/editing/files_worker.py memory PRETRAINED FINETUNED OUTPUT RESULT
    python tests/editing/files_worker.py diff_memory RESULT BASE OTHER...

The processes are forked after the imports, which take the most time, and before the first tensor.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lit_cka.editing.difference import diff_files
from lit_cka.editing.files import edit_files
from lit_cka.editing.settings import EditSettings

SECONDS = 600


def edit(pretrained: str, finetuned: str, output: str) -> None:
    torch.set_num_threads(1)
    edit_files(pretrained, finetuned, output, EditSettings(), progress=False)


def num_finished(output: str) -> int:
    journals = Path(f"{output}.partial").glob("journal-*.jsonl")
    return sum(journal.read_bytes().count(b"\n") for journal in journals)


def kills(pretrained: str, finetuned: str, output: str, number: str) -> None:
    """Kill an edit at random moments, every other time after at least one more tensor; then let it come to its end."""
    fork = multiprocessing.get_context("fork")
    moments, deadline, at = random.Random(0), time.monotonic() + SECONDS, []
    for index in range(int(number)):
        process = fork.Process(target=edit, args=(pretrained, finetuned, output))
        process.start()
        before = num_finished(output)
        while index % 2 and process.is_alive() and num_finished(output) <= before and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, float(os.environ.get("LIT_CKA_PAUSE", "0.01"))))
        process.kill()
        process.join()
        if Path(output).exists():
            break
        at.append(num_finished(output))
    process = fork.Process(target=edit, args=(pretrained, finetuned, output))
    process.start()
    process.join(max(deadline - time.monotonic(), 0))
    process.kill()
    Path(f"{output}-kills.json").write_text(json.dumps(at))


def one_rank(rank: int, size: int, pretrained: str, finetuned: str, output: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        edit(pretrained, finetuned, output)
        text = "no error" if not dist.is_initialized() else "a process group is left"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    Path(f"{output}-{rank}.txt").write_text(text)


def ranks(pretrained: str, finetuned: str, output: str, number: str, kill_after: str = "") -> None:
    """As torchrun starts them; if asked for, all are killed after so many tensors, and then started again."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["LIT_CKA_PORT"])
    fork = multiprocessing.get_context("fork")
    size = int(number)
    deadline = time.monotonic() + 60
    for most in [int(kill_after), None] if kill_after else [None]:
        processes = [
            fork.Process(target=one_rank, args=(rank, size, pretrained, finetuned, output)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        while most is not None and num_finished(output) < most and time.monotonic() < deadline:
            time.sleep(0.0005)
        for process in processes:
            if most is None:
                process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()
        if most is not None:
            Path(f"{output}-killed.txt").write_text(str(num_finished(output) if not Path(output).exists() else "late"))


def memory(pretrained: str, finetuned: str, output: str, result: str) -> None:
    """The most memory that an edit takes above what the process takes before it, in bytes, and the seconds."""
    torch.linalg.eigh(torch.eye(3, dtype=torch.float64))  # loads libraries
    before = _kilobytes("VmRSS")
    start = time.monotonic()
    edit(pretrained, finetuned, output)
    Path(result).write_text(
        json.dumps({"bytes": (_kilobytes("VmHWM") - before) * 1024, "seconds": time.monotonic() - start})
    )


def diff_memory(result: str, *paths: str) -> None:
    """The most memory that a comparison takes above what the process takes before it, in bytes."""
    torch.linalg.eigh(torch.eye(3, dtype=torch.float64))  # loads libraries
    before = _kilobytes("VmRSS")
    found = diff_files(*paths, progress=False)
    nbytes = (_kilobytes("VmHWM") - before) * 1024
    Path(result).write_text(json.dumps({"bytes": nbytes, "names": len(found.spectra[0])}))


def _kilobytes(what: str) -> int:
    """Memory of this process alone; what `getrusage` tells starts with that of the process before `exec`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


if __name__ == "__main__":
    {"kills": kills, "ranks": ranks, "memory": memory, "diff_memory": diff_memory}[sys.argv[1]](*sys.argv[2:])
