"""How soon does a command answer, next to `import torch`, or to `import lightning.pytorch` where it needs that?

Each is a process of its own. Before every command its import is timed, and the ratio is that of these two neighbours,
so that a machine that others use is the same for both. One round only writes the bytecode. `--before DIR` times an
older checkout in the same rounds, by its `analyze.py` and `train.py`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Result, new_parser, parse, ratios, report, spread
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
TORCH, LIGHTNING = "import torch", "import lightning.pytorch"


class Command(NamedTuple):
    """Something to time, and the most that it may take, as a multiple of an import."""

    name: str
    arguments: list[str]
    root: Path = ROOT
    unit: str = TORCH
    target: float | None = None


def commands(folder: Path, before: Path | None) -> list[Command]:
    """The commands, and those of the older checkout."""
    edit = ["edit", f"--pretrained={folder / 'W0.safetensors'}", f"--finetuned={folder / 'W1.safetensors'}"]
    edit.append(f"--output={folder / 'edited.safetensors'}")
    found = [Command(LIGHTNING, ["-c", LIGHTNING])]
    for option in ("--help", "--version"):
        found.append(Command(f"lit-cka {option}", ["-m", "lit_cka", option], target=0.3))
    for name in ("edit", "compare", "probe", "project"):
        found.append(Command(f"lit-cka {name} --help", ["-m", "lit_cka", name, "--help"], target=1.6))
    found.append(Command("lit-cka edit, 1 MB", ["-m", "lit_cka", *edit], target=2.0))
    for name in ("monosoup", "fit"):
        line = ["-m", "lit_cka", name, "--help"]
        found.append(Command(f"lit-cka {name} --help", line, unit=LIGHTNING, target=1.25))
    if before is not None:
        for name in ("edit", "compare", "probe", "project", "monosoup"):
            unit = LIGHTNING if name == "monosoup" else TORCH
            line = [str(before / "analyze.py"), name, "--help"]
            found.append(Command(f"before: analyze.py {name} --help", line, before, unit))
        found.append(Command("before: edit, 1 MB", [str(before / "analyze.py"), *edit], before))
        line = [str(before / "train.py"), "fit", "--help"]
        found.append(Command("before: train.py fit --help", line, before, LIGHTNING))
    return found


class Times(NamedTuple):
    """Seconds of a process."""

    wall: float
    cpu: float


def timed(command: Command, folder: Path) -> Times:
    """A process from its start to its end, with bytecode of its own place."""
    for edited in folder.glob("*edited*"):
        edited.unlink()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(command.root), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *command.arguments], env=environment, cwd=folder, check=True, capture_output=True, timeout=300
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Times(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def write_checkpoints(folder: Path) -> None:
    """Two files of 1 MB: four weights, and the same with an update."""
    torch.manual_seed(0)
    W0 = {f"layers.{index}.weight": torch.randn(256, 256) for index in range(4)}
    save_file(W0, folder / "W0.safetensors")
    save_file({name: value + 0.01 * torch.randn_like(value) for name, value in W0.items()}, folder / "W1.safetensors")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="rounds")
    parser.add_argument("--before", type=Path, default=None, help="an older checkout of the repository")
    args = parse(parser, {"repetitions": 1})

    found: dict[str, list[tuple[Times, Times]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoints(folder)
        listed = commands(folder, args.before and args.before.resolve())
        for turn in range(args.repetitions + 1):
            for command in listed:
                pair = timed(Command("", ["-c", command.unit]), folder), timed(command, folder)
                if turn:  # the first only writes the bytecode
                    found.setdefault(command.name, []).append(pair)
    rows: list[list[Any]] = []
    for command in listed:
        units, own = zip(*found[command.name], strict=True)
        wall, cpu = (
            ratios([getattr(each, kind) for each in own], [getattr(each, kind) for each in units])
            for kind in Times._fields
        )
        target = "" if command.target is None else f"<= {command.target}"
        rows.append([command.name, command.unit, wall, cpu, target, spread([each.wall for each in own])])
    args.before = args.before and args.before.name
    table = Result(
        "Time of a process, from its start to its end",
        ["process", "relative to", "wall time", "CPU time", "target", "seconds"],
        rows,
        "Median (min - max; repetitions) of the ratios of neighbours.",
    )
    report("startup", args, [table])


if __name__ == "__main__":
    main()
