"""Every reader of files, on files that are sound but for some damage: what `test_fuzzing.py` draws its cases from.

    python tests/checkpoints/readers.py [NUMBER]

runs so many cases (20,000), and prints by reader how many were read, refused, and raised anything else than one
ValueError or FileNotFoundError that names the file.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save, save_file
from torch import Tensor

from lit_cka.analysis.features import Features
from lit_cka.analysis.texts import read_texts
from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.checkpoints.tensor_files import find_tensors, write_tensors
from lit_cka.commands import edit as edit_command
from lit_cka.commands.given import GivenConfigs
from lit_cka.data.language import read_language_rows
from lit_cka.data.text import read_labelled_text
from lit_cka.editing.files import edit_files
from lit_cka.editing.partial import PartialOutput
from lit_cka.reference.recording import Dataloader, Recording
from lit_cka.reference.storage import TrainingStart
from lit_cka.samples.samples import samples_of_content
from lit_cka.tracking.history import checked_history

# Values that stand where others are expected.
STRANGE: list[Any] = [
    None, True, 0, -1, 3, 2**40, 1e308, float("nan"), "", "a", "../x", "http://127.0.0.1/x", "s3://b/x", "a\0b",
    "\ud800", "9" * 400, [], [1], ["a"], [[]], {}, {"a": 1}, {"": {}},
]  # fmt: skip


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 4, generator=generator), "b.bias": torch.randn(3, generator=generator)}


def damaged_value(value: Any, draw: random.Random) -> Any:
    """Returns a nested value with something else in one place of it, or something missing, or twice."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(STRANGE)
    if isinstance(value, list):
        copied: Any = list(value)
        key: Any = draw.randrange(len(copied))
    else:
        copied, key = dict(value), draw.choice(list(value))
    what = draw.random()
    if what < 0.2:
        del copied[key]
    elif what < 0.3 and isinstance(copied, dict):
        copied[draw.choice(["x", "", "a.weight", "format"])] = copied.pop(key)
    else:
        copied[key] = damaged_value(copied[key], draw)
    return copied


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Returns the content cut off, with bytes changed, put in, taken out, or others altogether."""
    what = draw.randrange(8)
    if what == 0:
        return content[: draw.randrange(len(content) + 1)]
    if what == 1:
        return draw.randbytes(draw.randrange(40))
    if what == 2:
        return b"[" * draw.choice([10, 5000, 100_000])
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        if not changed:
            break
        # Most of what can be told is at the beginning and the end.
        place = draw.randrange(len(changed)) if draw.random() < 0.5 else draw.randrange(min(len(changed), 120))
        if what in (3, 4):
            changed[place] = draw.randrange(256)
        elif what == 5:
            changed[place] ^= 1 << draw.randrange(8)
        elif what == 6:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            del changed[place : place + draw.randrange(1, 9)]
    return bytes(changed)


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


class Case:
    """A file to be damaged, and what reads it."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def either(self, value: Any) -> bytes:
        """JSON with another value in it, or with other bytes."""
        if self.draw.random() < 0.6:
            return text(damaged_value(value, self.draw))
        return damaged_bytes(text(value), self.draw)


def state_dicts(case: Case) -> Path:
    path = case.folder / "a.pt"
    content: Any = {"state_dict": weights(), "epoch": 3, "hyper_parameters": {"lr": 0.1}, "loops": [1, {"a": None}]}
    if case.draw.random() < 0.5:
        content = damaged_value(content, case.draw)
    torch.save(content, path, _use_new_zipfile_serialization=case.draw.random() < 0.7)
    if case.draw.random() < 0.6:
        case.write("a.pt", damaged_bytes(path.read_bytes(), case.draw))
    load_state_dict(path)
    return path


def safetensors(case: Case) -> Path:
    content = save(weights())
    length = int.from_bytes(content[:8], "little")
    if case.draw.random() < 0.5:
        header = text(damaged_value(json.loads(content[8 : 8 + length]), case.draw))
        path = case.write("a.safetensors", len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        path = case.write("a.safetensors", damaged_bytes(content, case.draw))
    load_state_dict(path)
    return path


def edits(case: Case) -> Path:
    """A state dict or a safetensors file as either input of an edit."""
    suffix = case.draw.choice([".pt", ".safetensors"])
    paths = [case.folder / f"{name}{suffix}" for name in ("before", "after", "out")]
    for seed, path in enumerate(paths[:2]):
        torch.save(weights(seed), path) if suffix == ".pt" else save_file(weights(seed), path)
    path = case.draw.choice(paths[:2])
    path.write_bytes(damaged_bytes(path.read_bytes(), case.draw))
    edit_files(*paths, progress=False, allow_differences=True)
    return path


def indices(case: Case) -> Path:
    folder = case.folder / "model"
    folder.mkdir(exist_ok=True)
    for name, value in weights().items():
        save_file({name: value}, folder / f"{name}.safetensors")
    index = {"metadata": {"total_size": 3}, "weight_map": {name: f"{name}.safetensors" for name in weights()}}
    path = case.write("model/model.safetensors.index.json", case.either(index))
    if case.draw.random() < 0.2:  # one shard in the place of the other
        os.replace(folder / "a.weight.safetensors", folder / "b.bias.safetensors")
    edit_files(folder, folder, case.folder / "out", progress=False, allow_differences=True)
    return path


def features(case: Case) -> Path:
    path = Features({"0": torch.randn(3, 2)}, ["a", "b", "c"], labels=[0, 1, 0]).save(case.folder / "f.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if case.draw.random() < 0.6:
        header = json.loads(content[8 : 8 + length])
        about, key = header["__metadata__"], case.draw.choice(["layer_names", "ids", "labels", "inputs", "format"])
        if case.draw.random() < 0.3:
            about.pop(key)
        elif key != "format":
            about[key] = json.dumps(damaged_value(json.loads(about[key]), case.draw))
        changed = text(header)
        path = case.write("f.safetensors", len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    else:
        path = case.write("f.safetensors", damaged_bytes(content, case.draw))
    Features.load(path)
    return path


def recordings(case: Case) -> Path:
    recording = Recording(["a"], 1e9, "auto", case.folder)
    recording.start(Dataloader("validate", 0))
    samples = samples_of_content(torch.arange(6.0).view(3, 2))
    recording.add(Dataloader("validate", 0), samples, {"a": torch.randn(3, 2)})
    tensors, notes = recording.tensors()
    path = case.folder / "r.safetensors"
    if case.draw.random() < 0.7:
        about = damaged_value({"id": "x", **notes}, case.draw)
        if not isinstance(about, dict):
            return path
        if case.draw.random() < 0.3:
            tensors.pop(case.draw.choice(list(tensors)))
        write_tensors(case.folder, path.name, tensors, about)
    else:
        write_tensors(case.folder, path.name, tensors, {"id": "x", **notes})
        case.write(path.name, damaged_bytes(path.read_bytes(), case.draw))
    found = find_tensors(path.name, {"id": "x"}, case.folder / "checkpoints" / "a.ckpt", [str(case.folder)])
    empty = Recording(["a"], 1e9, "auto", case.folder)
    if found is not None and empty.fits(found.notes):
        empty.fill([found])
    return path


def histories(case: Case) -> Path:
    record = {"step": 1, "epoch": 0, "stage": "validate", "dataloader": 0, "n": 5, "scores": {"a": 0.5}}
    start = {"id": "x", "world_size": 2, "has_recording": True, "num_weight_files": 1}
    state = damaged_value({"history": [record, record], "start": start}, case.draw)
    if isinstance(state, dict):
        TrainingStart().load(state)
        checked_history(state.get("history"))
    return case.folder / "checkpoint"


def results(case: Case) -> Path:
    """What an edit has noted of its work."""
    output = case.folder / "out"
    partial = PartialOutput(output, {"a": 1})
    partial.start()
    case.write("out.partial/output", b"x")
    record: Any = {"name": "a", "shape": [1], "reason": None}
    partial.add(record, 0)
    partial.note_whole([record])
    for name in ("job.json", "journal-0.jsonl"):
        path = case.folder / "out.partial" / name
        path.write_bytes(case.either(json.loads(path.read_bytes())))
    partial.require_own()
    partial.whole_records(), partial.is_being_made(), partial.records()
    return case.folder / "out.partial"


def configs(case: Case) -> Path:
    config = {"pretrained": "a.pt", "finetuned": "b.pt", "output": "c.pt", "R": 0.5, "rule": "energy", "trusted": False}
    if case.draw.random() < 0.6:
        content = yaml.safe_dump(damaged_value(config, case.draw), allow_unicode=True).encode(errors="surrogatepass")
    else:
        content = damaged_bytes(yaml.safe_dump(config).encode(), case.draw)
    path = case.write("c.yaml", content)
    GivenConfigs().add(str(path), list(config))
    if case.draw.random() < 0.2:
        try:
            edit_command.parser().parse_args(["--config", str(path)])
        except SystemExit as error:
            raise ValueError(str(path)) from error
    return path


def rows(case: Case) -> Path:
    held = [{"text": "a b", "label": 1, "question": "x", "answer": "y"}, {"text": "c", "label": 0}]
    suffix = case.draw.choice([".csv", ".json", ".jsonl", ".txt"])
    if suffix == ".csv":
        content = damaged_bytes(b'text,label\na b,1\n"c\nd",0\n', case.draw)
    elif suffix == ".json":
        content = case.either(held)
    else:
        content = b"\n".join(case.either(row) for row in held)
    path = case.write(f"rows{suffix}", content)
    if suffix == ".jsonl" and case.draw.random() < 0.5:
        read_language_rows(path)
    elif suffix == ".txt" or case.draw.random() < 0.5:
        read_texts(path)
    else:
        read_labelled_text(path, "text", "label")
    return path


READERS: dict[str, Callable[[Case], Path]] = {
    each.__name__: each
    for each in (
        state_dicts, safetensors, edits, indices, features, recordings, histories, results, configs, rows,
    )
}  # fmt: skip


def outcome(reader: str, seed: int) -> tuple[str, str]:
    """Returns whether a case was "read", "refused" by one error that names the file, or "raw", with the traceback."""
    with tempfile.TemporaryDirectory(prefix="named-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            READERS[reader](Case(Path(name), random.Random(f"{reader} {seed}")))
        except (ValueError, FileNotFoundError) as error:
            plain = type(error) in (ValueError, FileNotFoundError, FileExistsError)
            names_it = Path(name).name in str(error) or reader == "histories"
            is_of_model = any(word in str(error) for word in ("of the fine-tuned model", "of the pretrained model"))
            is_of_two = "Expected two models" in str(error)
            if plain and (names_it or is_of_model or is_of_two):
                return "refused", ""
            return "raw", traceback.format_exc()
        except Exception:
            return "raw", traceback.format_exc()
    return "read", ""


def main(number: int) -> None:
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()  # what commands say
    total: Counter[str] = Counter()
    for reader in READERS:
        counts: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for seed in range(number // len(READERS)):
            found, said = outcome(reader, seed)
            counts[found] += 1
            if said:
                kinds[said.strip().splitlines()[-1][:150]] += 1
                if kinds[said.strip().splitlines()[-1][:150]] == 1:
                    print(reader, seed, said, flush=True)
        total += counts
        print(reader, dict(counts), dict(kinds), flush=True)
    print("all", dict(total))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
