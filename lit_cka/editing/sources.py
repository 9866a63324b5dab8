"""Where the two models' weights come from: modules, checkpoint files, transformers folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, Union

from safetensors import SafetensorError
from torch import Tensor, nn

from lit_cka.checkpoints.model_folders import reading_model
from lit_cka.checkpoints.state_dicts import (
    first_names,
    first_segments,
    fitting_weights,
    load_state_dict,
    read_content,
    require_file,
    require_one_reading,
    tensor_identity,
    with_tied,
)
from lit_cka.checkpoints.weight_sets import find_weights, mapping_at, strip_wrappers
from lit_cka.editing.checks import difference_table
from lit_cka.reference.snapshot import snapshot

Source: TypeAlias = Union[nn.Module, str, "os.PathLike[str]"]


class SourceWeights(NamedTuple):
    """What a source holds for a module."""

    weights: dict[str, Tensor]  # under the module's names, in its dtypes
    unused: dict[str, tuple[int, ...]]  # shapes of what the module has no place for, by the names in a file
    was_named: bool  # whether it had several sets of weights, and these are the ones asked for


def module_weights(module: nn.Module, *, buffers: bool = True) -> dict[str, Tensor]:
    """Returns the module's parameters and persistent buffers, detached, not copied, under names without wrappers."""
    weights = strip_wrappers(module.state_dict(keep_vars=True))
    return {name: value.detach() for name, value in weights.items() if buffers or isinstance(value, nn.Parameter)}


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the weights, of tied ones one copy, so that nobody's later training changes them."""
    first = first_names({name: tensor_identity(value) for name, value in weights.items()})
    copies = {name: weights[name].detach().clone() for name in dict.fromkeys(first.values())}
    return {name: copies[first[name]] for name in weights}


def host_model(finetuned: Source, model: nn.Module | None) -> nn.Module:
    """Returns the module that all variants run in: a frozen copy of `model`, or of what `finetuned` is.

    Raises:
        ValueError: if there is no `model`, and `finetuned` is a file of weights alone.
    """
    if model is not None:
        return snapshot(model)
    if isinstance(finetuned, nn.Module):
        return snapshot(finetuned)
    if os.path.isdir(finetuned):
        return load_folder(finetuned).requires_grad_(False).eval()
    raise ValueError(f"Expected `model=`, a module that takes the weights in {str(finetuned)!r}.")


def load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Returns the LightningModule for a transformers folder: classification of text, or a causal language model.

    Raises:
        ValueError: if the folder's model is of another kind, or damaged.
    """
    with _reading(folder), reading_model(folder):
        architectures = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or [""]
        if architectures[0].endswith("ForSequenceClassification"):
            from transformers import AutoConfig

            from lit_cka.models.text import TextClassifier

            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return TextClassifier(str(folder), config.num_labels)
        if architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
            from lit_cka.models.language import CausalLanguageModel

            return CausalLanguageModel(str(folder))
    raise ValueError(
        f"Expected {str(folder)!r} to hold a model for sequence classification or causal language modelling, but its "
        f"config says {architectures[0]!r}. Pass `model=` a module that takes its weights, and a file of them."
    )


def weights_for(
    module: nn.Module, source: Source, role: str, shared: Sequence[str] = (), which: str | None = None
) -> SourceWeights:
    """Returns a source's weights under the names that the module has for them, in its dtypes, and what is left over.

    Args:
        module: whose names and shapes count.
        source: a module, a checkpoint file (see `load_state_dict`), or a folder in `save_pretrained` format.
        role: "pretrained" or "finetuned", for the errors.
        shared: beginnings of names that may be missing; they are left out of the result.
        which: of several sets of weights in a file, see `lit_cka.checkpoints.weight_sets.find_weights`; a file of one
            set need not be that of the name.

    Raises:
        ValueError: if weights are missing or have another shape, or there are more blocks, with a table of them.
    """
    expected = module_weights(module)
    weights, was_named = _read(source, module, which)
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
    first = first_names({name: tensor_identity(value) for name, value in expected.items()})
    converted = {}  # of a tied weight one tensor
    for name in dict.fromkeys(first[name] for name in fitting):
        value = fitting[name].detach()
        converted[name] = value.to(expected[name].dtype) if value.is_floating_point() else value
    used = {tensor_identity(value) for value in fitting.values()}
    return SourceWeights(
        {name: converted[first[name]] for name in fitting if not name.startswith(tuple(shared))},
        {name: tuple(value.shape) for name, value in weights.items() if tensor_identity(value) not in used},
        was_named,
    )


def _read(source: Source, module: nn.Module, which: str | None) -> tuple[dict[str, Tensor], bool]:
    """Returns a source's weights under its own names, and whether they were asked for by name."""
    if isinstance(source, nn.Module):
        return module_weights(source), False
    path = Path(source)
    if path.is_dir():
        return _read_folder(source, module), False
    if which is None:
        return load_state_dict(source), False
    require_file(path)
    content = read_content(path, weights_only=True)
    found = find_weights(content, path, which, optional=True)
    held = mapping_at(content, found.keys)
    return {name: held[name_in_file] for name, name_in_file in found.names.items()}, found.was_named


def _read_folder(folder: str | os.PathLike[str], module: nn.Module) -> dict[str, Tensor]:
    from transformers import PreTrainedModel

    network = next((child for child in module.modules() if isinstance(child, PreTrainedModel)), None)
    if network is None:
        raise ValueError(f"Expected `model` to hold a transformers model, since {str(folder)!r} is a folder.")
    with _reading(folder), reading_model(folder):
        kind: Any = type(network)
        loaded, info = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    return {name: value for name, value in module_weights(loaded).items() if name not in info["missing_keys"]}


@contextmanager
def _reading(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"The model in {str(folder)!r} could not be loaded: {error}") from error


def _fitting(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = first_names({name: tensor_identity(value) for name, value in expected.items()})
    below: dict[str, dict[str, Tensor]] = {}
    readings = {}
    for prefix in first_segments(expected):
        below[prefix] = {name[len(prefix) :]: value for name, value in expected.items() if name.startswith(prefix)}
        readings[prefix] = fitting_weights(below[prefix], weights)
    best = max(readings, key=lambda prefix: len(readings[prefix]))
    require_one_reading(below[best], weights)
    return with_tied({best + name: value for name, value in readings[best].items()}, first)


def _further_blocks(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], fitting: Mapping[str, Tensor]
) -> list[str]:
    """Returns names like those expected, but with a number that none of these has; other parts (a text tower) don't
    count.
    """
    names = {id(value): name for name, value in weights.items()}
    # How all names begin in the model and in the file: what is left of a pair without the end that both share.
    pair = next(((name, names[id(value)]) for name, value in fitting.items() if id(value) in names), ("", ""))
    ends = zip(*map(reversed, pair), strict=False)
    num_shared = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], ends))
    start, start_in_file = (name[: len(name) - num_shared] for name in pair)
    renamed = {name: start + name[len(start_in_file) :] for name in weights if name.startswith(start_in_file)}
    patterns = {_without_numbers(name) for name in expected}
    return [
        name
        for name, in_model in renamed.items()
        if in_model not in expected and _without_numbers(in_model) in patterns
    ]


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _table_of_differences(
    lacking: Sequence[str], expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], role: str
) -> str:
    def in_file(name: str) -> str:
        # Either may have a prefix that the other hasn't.
        ends = (held for held in weights if f".{held}".endswith(f".{name}") or name.endswith(f".{held}"))
        nearest = max(ends, key=len, default=None)
        return "missing" if nearest is None else str(tuple(weights[nearest].shape))

    rows = [(name, str(tuple(expected[name].shape)), in_file(name)) for name in lacking]
    table = difference_table(("parameter", "expected", "in the file"), rows)
    return (
        f"The {role} weights are of another architecture, or lack a part: {len(lacking)} of {len(expected)} tensors "
        f"differ.\n{table}\nWeights that only the fine-tuned model has, such as a new head, go into `shared`: "
        "both models then have the fine-tuned ones."
    )
