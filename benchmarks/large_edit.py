"""How long does `lit-cka edit` take for a model of 7 billion parameters, and how much memory?

Blocks of Llama-2-7B and both of its embeddings, in bfloat16 shards as transformers writes them, with random weights and
updates of low rank plus noise. A billion parameters take as long as another, so that a few blocks tell; `--layers 32`
is all of it. Memory is that of the process alone (what it maps of files is the system's to take back), polled while it
runs, above what it holds once it has loaded torch.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import MIB, Result, new_parser, parse, report
from safetensors.torch import save_file

VOCABULARY, WIDTH, INTERMEDIATE = 32000, 4096, 11008
POLLED_EVERY = 0.02


def block(number: int, width: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{number}"
    attention = {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    mlp = {f"{prefix}.mlp.{name}_proj.weight": (intermediate, width) for name in ("gate", "up")}
    norms = {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {**attention, **mlp, f"{prefix}.mlp.down_proj.weight": (width, intermediate), **norms}


def write_pair(folder: Path, layers: int, vocabulary: int, width: int, intermediate: int) -> tuple[int, int]:
    """Write both models, a shard for each block and each embedding; returns the parameters, and the largest tensor's
    bytes.
    """
    ends: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, width)},
        {"lm_head.weight": (vocabulary, width), "model.norm.weight": (width,)},
    ]
    shards = [ends[0], *(block(number, width, intermediate) for number in range(layers)), ends[1]]
    generator, total, largest = torch.Generator().manual_seed(0), 0, 0
    maps: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for model in maps:
        (folder / model).mkdir()
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        base, tuned = {}, {}
        for name, shape in shapes.items():
            W0 = 0.02 * torch.randn(shape, generator=generator)
            update = 3e-4 * torch.randn(shape, generator=generator)
            if len(shape) > 1:
                factors = (torch.randn(size, 8, generator=generator) for size in shape)
                update += 1e-3 * torch.mm(*(f if i == 0 else f.T for i, f in enumerate(factors))) / 8**0.5
            base[name], tuned[name] = W0.to(torch.bfloat16), (W0 + update).to(torch.bfloat16)
            total, largest = total + W0.numel(), max(largest, base[name].nbytes)
        for model, tensors in (("base", base), ("tuned", tuned)):
            save_file(tensors, folder / model / file, {"format": "pt"})
            maps[model].update(dict.fromkeys(tensors, file))
    for model, weight_map in maps.items():
        index_text = json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
        (folder / model / "model.safetensors.index.json").write_text(index_text)
    return total, largest


def own_memory(pid: int) -> int:
    """Bytes of a process that are no file's; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    held = [line for line in lines if line.startswith("RssAnon")]
    return int(held[0].split()[1]) * 1024 if held else 0


def edit(folder: Path, threads: int) -> tuple[float, float, int]:
    """Seconds on the wall and on the CPUs, and the most memory, of the command."""
    command = [sys.executable, "-m", "lit_cka", "edit", "--pretrained", str(folder / "base"), "--finetuned",
               str(folder / "tuned"), "--output", str(folder / "edited")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.Popen(command, env=environment)
    most = 0
    while run.poll() is None:
        most = max(most, own_memory(run.pid))
        time.sleep(POLLED_EVERY)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise RuntimeError(f"The edit ended with status {run.returncode}.")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, most


def with_torch_alone() -> int:
    """The memory of a process that has loaded torch, and no weights."""
    code = "import torch, lit_cka.editing.files; print(open('/proc/self/status').read())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) * 1024


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of the 32")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--folder", default=None, help="where there is room for three models")
    args = parse(parser, {"layers": 1, "vocabulary": 500, "width": 128, "intermediate": 300})
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = args.layers, args.vocabulary, args.width, args.intermediate
        number, largest = write_pair(Path(folder), *size)
        wall, cpu, most = edit(Path(folder), args.threads)
    above, billions = most - with_torch_alone(), number / 1e9
    row = [billions, wall / billions, cpu / billions, largest / MIB, above / MIB, (3 * largest + 10**9) / MIB]
    columns = [
        "parameters, 1e9",
        "seconds per 1e9",
        "CPU seconds per 1e9",
        "largest tensor, MiB",
        "memory, MiB",
        "target",
    ]
    caption = f"{args.layers} of 32 blocks. The target: three times the largest tensor and 1 GB."
    report("large_edit", args, [Result("MonoSoup of a Llama-2-7B in bfloat16 shards", columns, [row], caption)])


if __name__ == "__main__":
    main()
