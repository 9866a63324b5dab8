"""What the scripts share: options, the machine's description, medians with their spread, memory, tables and JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
_PACKAGES = ("torch", "lightning", "torchmetrics", "timm", "numpy", "lit-cka", "pytorch-cka", "torch-cka", "ckatorch")


class Spread(NamedTuple):
    """The median of repeated measurements, their range and their number."""

    median: float
    min: float
    max: float
    repetitions: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """The spread of the ratios of neighbours: measurements of the same round."""
    return spread([a / b for a, b in zip(ours, others, strict=True)])


class Result(NamedTuple):
    """One table: a cell is text, a number, a `Spread` or None for nothing."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every script takes: `--quick` and `--threads`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check in seconds that the script works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads for torch")
    return parser


def parse(parser: argparse.ArgumentParser, quick: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line; `quick` has the values that `--quick` puts in place of the defaults."""
    args, _ = parser.parse_known_args()
    if args.quick:
        parser.set_defaults(**quick)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def report(script: str, args: argparse.Namespace, results: list[Result]) -> None:
    """Print the tables and write them, with the machine and the options, to `results/` (`--quick`: below it)."""
    console = Console(width=None if Console().is_terminal else 170)
    for result in results:
        table = Table(title=result.title, caption=result.caption)
        for index, column in enumerate(result.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in result.rows:
            table.add_row(*(_text(cell) for cell in row))
        console.print(table)
    content = {
        "script": script,
        "machine": machine(),
        "arguments": {name: value for name, value in vars(args).items() if name != "child"},
        "tables": [{**result._asdict(), "rows": [[_plain(cell) for cell in row] for row in result.rows]}
                   for result in results],
    }  # fmt: skip
    path = RESULTS / ("quick" if args.quick else "") / f"{script}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
    console.print(f"Written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _text(cell: Any) -> str:
    if isinstance(cell, Spread):
        return f"{cell.median:.4g} ({cell.min:.3g} - {cell.max:.3g}; {cell.repetitions})"
    return "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _plain(cell: Any) -> Any:
    if isinstance(cell, float) and cell != cell:
        return None  # NaN is no JSON
    return cell._asdict() if isinstance(cell, Spread) else cell


def machine() -> dict[str, Any]:
    """CPU, GPU, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Memory: Linux with glibc.


def return_freed_memory() -> None:
    """Have malloc give every freed block above 64 KiB back to the system, so that memory in use and RSS agree."""
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 65536)
    mallopt(m_trim_threshold, 65536)


def peak_memory(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of resident memory: before `function` runs, and the highest while it does."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    function()
    return before, _resident("VmHWM")


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
