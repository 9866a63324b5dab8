"""Where the two models' weights come from, and how edited ones go back to that format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import fitting_weights, load_state_dict, strip_wrappers

Source: TypeAlias = Union[nn.Module, str, "os.PathLike[str]"]


def own_weights(module: nn.Module, *, buffers: bool = True) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers, detached, not copied, under names without wrappers."""
    weights = strip_wrappers(module.state_dict(keep_vars=True))
    return {name: value.detach() for name, value in weights.items() if buffers or isinstance(value, nn.Parameter)}


def load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """The LightningModule for a transformers folder: classification of text, or a causal language model.

    Raises:
        ValueError: if the folder's model is of another kind, or damaged.
    """
    with _reading(folder):
        architectures = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or [""]
        if architectures[0].endswith("ForSequenceClassification"):
            from transformers import AutoConfig

            from lit_cka.models.text import TextClassifier

            return TextClassifier(str(folder), AutoConfig.from_pretrained(folder).num_labels)
        if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
            from lit_cka.models.language import CausalLanguageModel

            return CausalLanguageModel(str(folder))
    raise ValueError(
        f"Expected {str(folder)!r} to hold a model for sequence classification or causal language modelling, but its "
        f"config says {architectures[0]!r}. Pass `model=` a module that takes its weights, and a file of them."
    )


def weights_for(module: nn.Module, source: Source, role: str, shared: Sequence[str] = ()) -> dict[str, Tensor]:
    """A source's weights under the module's own names, in its dtypes.

    Args:
        module: whose names and shapes count.
        source: a module, a checkpoint file (see `load_state_dict`), or a folder in `save_pretrained` format.
        role: "pretrained" or "finetuned", for the errors.
        shared: beginnings of names that may be missing; they are left out of the result.

    Raises:
        ValueError: if weights are missing or have another shape, or there are more blocks, with a table of them.
    """
    expected = own_weights(module)
    weights = _read(source, module)
    fitting = _fitting(expected, weights)
    lacking = [
        name
        for name in expected
        if name not in fitting and not name.startswith(tuple(shared)) and not name.endswith("num_batches_tracked")
    ]
    if lacking:
        raise ValueError(_table_of_differences(lacking, expected, weights, role))
    surplus = _further_blocks(expected, weights, fitting)
    if surplus:
        shown = "\n".join(f"  {name}  {tuple(weights[name].shape)}" for name in surplus[:10])
        raise ValueError(
            f"The {role} weights are of a deeper model, with {len(surplus)} tensors that have no counterpart:\n{shown}"
        )
    return {
        name: value.detach().to(expected[name].dtype) if value.is_floating_point() else value.detach()
        for name, value in fitting.items()
        if not name.startswith(tuple(shared))
    }


def _read(source: Source, module: nn.Module) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return own_weights(source)
    if Path(source).is_dir():
        return _read_folder(source, module)
    return load_state_dict(source)


def _read_folder(folder: str | os.PathLike[str], module: nn.Module) -> dict[str, Tensor]:
    from transformers import PreTrainedModel

    network = next((child for child in module.modules() if isinstance(child, PreTrainedModel)), None)
    if network is None:
        raise ValueError(f"Expected `model` to hold a transformers model, since {str(folder)!r} is a folder.")
    with _reading(folder):
        loading: Any = type(network).from_pretrained
        loaded, info = loading(folder, output_loading_info=True)
    return {name: value for name, value in own_weights(loaded).items() if name not in info["missing_keys"]}


@contextmanager
def _reading(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"The model in {str(folder)!r} could not be loaded: {error}") from error


def _prefixes(names: Sequence[str]) -> list[str]:
    """What the names may start with that a file leaves out: "model." of a LightningModule around a network."""
    return list(dict.fromkeys(["", *(f"{name.split('.')[0]}." for name in names if "." in name)]))


def _fitting(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    readings = []
    for prefix in _prefixes(list(expected)):
        below = {name[len(prefix) :]: value for name, value in expected.items() if name.startswith(prefix)}
        readings.append({prefix + name: value for name, value in fitting_weights(below, weights).items()})
    return max(readings, key=len)


def _further_blocks(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], fitting: Mapping[str, Tensor]
) -> list[str]:
    """Names like those expected, but with a number that none of these has; other parts (a text tower) don't count."""
    names = {id(value): name for name, value in weights.items()}
    own, held = next(((own, names[id(value)]) for own, value in fitting.items() if id(value) in names), ("", ""))
    while own and held and own[-1] == held[-1]:
        own, held = own[:-1], held[:-1]  # what is left: how all names begin here and there
    known = {_without_numbers(name) for name in expected}
    return [
        name
        for name in weights
        if name.startswith(held)
        and own + name[len(held) :] not in expected
        and _without_numbers(own + name[len(held) :]) in known
    ]


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _table_of_differences(
    lacking: Sequence[str], expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], role: str
) -> str:
    # Either may have a prefix that the other hasn't.
    ends = {
        name: max(
            (own for own in weights if f".{own}".endswith(f".{name}") or name.endswith(f".{own}")),
            key=len,
            default=None,
        )
        for name in lacking
    }
    rows = [("parameter", "expected", "in the file")]
    for name in lacking[:10]:
        end = ends[name]
        rows.append(
            (name, str(tuple(expected[name].shape)), "missing" if end is None else str(tuple(weights[end].shape)))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
    more = f"\n  ... and {len(lacking) - 10} more" if len(lacking) > 10 else ""
    return (
        f"The {role} weights are of another architecture, or lack a part: {len(lacking)} of {len(expected)} tensors "
        f"differ.\n{table}{more}\nWeights that only the fine-tuned model has, such as a new head, go into `shared`: "
        "both models then have the fine-tuned ones."
    )


def write_weights(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    module: nn.Module,
) -> None:
    """Write a variant's weights in the format, and under the names, of the source.

    A folder is written by `save_pretrained`, with the source's tokenizer; a Lightning or other checkpoint with
    everything else that it holds; weights of a module (a source of None) as a state dict. A file that is named so is
    safetensors, whatever the source.

    Raises:
        ValueError: if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"Expected a path to write to, but {str(path)!r} exists already.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        if source is not None and Path(source).is_dir():
            _write_folder(weights, partial, Path(source), module)
        elif path.suffix == ".safetensors":
            _write_safetensors(weights, partial, source)
        else:
            torch.save(dict(weights) if source is None else _replaced(source, weights), partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


def _write_folder(weights: Mapping[str, Tensor], partial: Path, source: Path, module: nn.Module) -> None:
    from transformers import PreTrainedModel

    prefix, network = next(
        (name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)
    )
    prefix += "." if prefix else ""
    shutil.rmtree(partial, ignore_errors=True)
    own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    network.save_pretrained(partial, state_dict=own)
    for file in source.iterdir():
        if (
            file.is_file()
            and not (partial / file.name).exists()
            and file.suffix in (".json", ".txt", ".model", ".jinja")
            and not file.name.endswith(".index.json")
        ):
            shutil.copy2(file, partial / file.name)


def _write_safetensors(weights: Mapping[str, Tensor], partial: Path, source: str | os.PathLike[str] | None) -> None:
    metadata, named = {"format": "pt"}, dict(weights)
    if source is not None and Path(source).suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            named = _renamed({name: file.get_tensor(name) for name in file.keys()}, weights)  # noqa: SIM118
    elif source is not None:
        named = _renamed(load_state_dict(source), weights)
    # Copies, since safetensors holds no tied tensors; a source in that format has each once.
    save_file({name: value.clone().contiguous() for name, value in named.items()}, partial, metadata)


def _replaced(source: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> Any:
    """What the source's file holds, with the weights in it replaced."""
    if Path(source).suffix == ".safetensors":
        return _renamed(load_file(source), weights)
    content = torch.load(source, map_location="cpu", weights_only=True)
    held, key, around = content, None, None  # type: Any, Any, Any
    while isinstance(held, Mapping) and (
        found := next(
            (k for k in ("state_dict", "model_state_dict", "model") if isinstance(held.get(k), Mapping)), None
        )
    ):
        around, key, held = held, found, held[found]
    replaced = _renamed(held, weights)
    if around is None:
        return replaced
    around[key] = replaced
    return content


def _renamed(held: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `held` holds, with every tensor that has a counterpart in `weights` replaced by it."""
    plain = strip_wrappers({name: value for name, value in held.items() if isinstance(value, Tensor)})
    origin = dict(zip(plain, [name for name, value in held.items() if isinstance(value, Tensor)], strict=True))
    replaced = dict(held)
    for file_start in _prefixes(list(plain)):
        for own_start in _prefixes(list(weights)):
            pairs = {name: own_start + name[len(file_start) :] for name in plain if name.startswith(file_start)}
            hits = {
                name: own for name, own in pairs.items() if own in weights and weights[own].shape == plain[name].shape
            }
            if len(hits) > sum(replaced[name] is not held[name] for name in held):
                replaced = dict(held)
                replaced.update({origin[name]: weights[own].to(plain[name].dtype) for name, own in hits.items()})
    return replaced
