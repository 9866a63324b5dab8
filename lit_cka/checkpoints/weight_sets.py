"""Which weights of a file are meant: its only set of them, or one of several that has to be named: `find_weights`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from lit_cka.checkpoints.shards import TensorInfo

_WRAPPERS = ("module.", "_orig_mod.")  # put before names by DataParallel / DDP and by torch.compile
_COUNTER = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`, beside the names that it puts "module." before
_KEYS = ("state_dict", "model_state_dict", "model")  # where Lightning, open_clip, timm and others keep weights
_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")  # the first of these is what timm loads
# Modules that are copies of others, a step or an average behind.
_COPY = re.compile(r"(^|_)(ema|swa|avg|averaged?|shadow|teacher|momentum|target)(_|$)|^encoder_k$")
_ORIGINAL_OF_TARGET = re.compile(r"(^|_)(online|context|student)(_|$)")
MOST_KEYS = 4  # levels of mappings that are looked into
EVERYTHING, THE_REST = "*", "."

Value = TypeVar("Value")


class FoundWeights(NamedTuple):
    """A set of weights in what a file holds.

    Attributes:
        keys: those of the mappings around it.
        names: names in the innermost mapping, by the plain ones, without wrappers and what tells the set from others.
        was_named: whether the set is the one that was asked for by name.
    """

    keys: tuple[str, ...]
    names: dict[str, str]
    was_named: bool = False


def find_weights(
    content: Any, source: Path, wanted: str | None = None, *, by_names: bool = False, optional: bool = False
) -> FoundWeights:
    """Returns the set of weights that a file's content holds, or the one of several that is `wanted`.

    A set is a mapping of tensors: the content itself, or one in it. Others are rivals of the one that is usually meant
    ("state_dict", "model") if they hold tensors of the same names and shapes, as an average of the weights does.

    Args:
        content: of the file.
        source: its path, for messages.
        wanted: which set: the keys to it with dots between ("state_dict_ema", "ema.shadow"), what its names begin with
            ("teacher"), `EVERYTHING` for all names of the usual one as they are, or `THE_REST` for those that are in
            no set of another name.
        by_names: tell apart what are copies by their names as well ("student.*" and "teacher.*"), for who knows no
            model that either belongs to.
        optional: a file of a single set need not be that of the name.

    Raises:
        ValueError: if there is no set, several and none named, or none of this name; it lists those that there are.
    """
    sets = dict(_sets(content))
    keys, main = _usual(content)
    plain = plain_names(main)
    rivals = {other: held for other, held in sets.items() if other != keys and _are_alike(_shapes(main), _shapes(held))}
    copies = _copies(_shapes(main)) if plain else {}
    if wanted not in (None, EVERYTHING):
        found = _named(wanted, sets, keys, plain, copies)
        if found is not None:
            return found
    told = [(".".join(other), len(plain_names(held))) for other, held in ({keys: main, **rivals}).items()]
    if not plain:
        told = [(".".join(other), len(plain_names(held))) for other, held in sets.items()]
    elif not rivals:
        told = [(name, len(names)) for name, names in copies.items()]
    listed = _listed(told, next((key for key in _TIMM if isinstance(content, Mapping) and key in content), None))
    if not plain:
        raise ValueError(
            f"Expected {str(source)!r} to hold a state dict of tensors, but it holds {_kind(main)}"
            + (f", and tensors in {listed}" if told else ".")
        )
    if rivals or (by_names and copies and wanted != EVERYTHING):
        raise ValueError(f"Expected {str(source)!r} to hold one set of weights, but it holds {len(told)}: {listed}")
    if wanted not in (None, EVERYTHING) and not optional:
        held = f": there are {listed}" if told else "."
        raise ValueError(f"Expected {str(source)!r} to hold a set of weights called {wanted!r}, but it does not{held}")
    return FoundWeights(keys, plain, wanted == EVERYTHING)


def strip_wrappers(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the weights under the names that they have without DDP and `torch.compile` around the model."""
    names = [name for name in weights if name != _COUNTER]
    prefix = ""
    while names and (
        stripped := next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
    ):
        prefix += stripped
    return {name.removeprefix(prefix).replace("_orig_mod.", ""): value for name, value in weights.items()}


def mapping_at(content: Any, keys: tuple[str, ...]) -> Any:
    """Returns what stands under the keys; of a module its state dict."""
    for key in keys:
        content = content[key]
    return content.state_dict() if isinstance(content, nn.Module) else content


def _sets(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    content = mapping_at(content, ())
    if not isinstance(content, Mapping) or len(keys) >= MOST_KEYS:
        return
    if plain_names(content):
        yield keys, content
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, (Mapping, nn.Module)):
            yield from _sets(value, (*keys, key))


def _usual(content: Any) -> tuple[tuple[str, ...], Any]:
    keys: tuple[str, ...] = ()
    content = mapping_at(content, ())
    while isinstance(content, Mapping):
        key = next((key for key in _KEYS if isinstance(content.get(key), (Mapping, nn.Module))), None)
        if key is None or len(keys) >= MOST_KEYS:
            break
        content, keys = mapping_at(content[key], ()), (*keys, key)
    return keys, content


def plain_names(content: Any) -> dict[str, str]:
    """Returns the names of the tensors in a mapping by the plain ones, without wrappers; none of anything else."""
    if not isinstance(content, Mapping):
        return {}
    names = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, (Tensor, TensorInfo))]
    stripped = strip_wrappers(dict(zip(names, names, strict=True)))
    return stripped if len(stripped) == len(names) else dict(zip(names, names, strict=True))


def _shapes(content: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(content[in_file].shape) for name, in_file in plain_names(content).items()}


def _are_alike(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Returns whether half of the smaller one's names, or more, are in both, with the same shapes."""
    shared = sum(name in two and two[name] == shape for name, shape in one.items())
    return bool(0 < min(len(one), len(two)) <= 2 * shared)


def _named(
    wanted: str | None, sets: Mapping[tuple[str, ...], Any], usual: tuple[str, ...], plain: Mapping[str, str],
    copies: Mapping[str, list[str]],
) -> FoundWeights | None:  # fmt: skip
    if wanted == THE_REST:
        names = {name: plain[name] for name in copies.get(THE_REST, [] if usual else plain)}
        return FoundWeights(usual, names, was_named=True) if names else None
    for keys, held in sets.items():
        around, names = ".".join(keys), plain_names(held)
        if wanted == around:
            return FoundWeights(keys, names, was_named=True)
        starts = {f"{wanted}."} if keys == usual or not keys else set()
        starts |= (
            {f"{wanted}.".removeprefix(f"{around}.")} if around and f"{wanted}.".startswith(f"{around}.") else set()
        )
        for start in starts:
            below = {name[len(start) :]: in_file for name, in_file in names.items() if name.startswith(start)}
            if below:
                return FoundWeights(keys, strip_wrappers(below), was_named=True)
    return None


def _copies(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Returns the names of sets that stand beside each other in one mapping, by what these begin with; {} for one."""
    below: dict[str, dict[str, tuple[int, ...]]] = {}  # by module, the shapes below its name
    for name, shape in shapes.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            below.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = shape
    copies = [module for module in below if _COPY.search(module.rpartition(".")[2])]
    copies = [module for module in copies if not any(module.startswith(f"{other}.") for other in copies)]
    found: dict[str, list[str]] = {}
    for copy in copies:
        around, _, last = copy.rpartition(".")
        inner = strip_wrappers(below[copy])
        siblings = [module for module in below if module.rpartition(".")[0] == around and module not in copies]
        for module in siblings:
            if _may_be_original(module.rpartition(".")[2], last) and _are_alike(inner, strip_wrappers(below[module])):
                found |= {each: [f"{each}.{name}" for name in below[each]] for each in (module, copy)}
        rest = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(f"{c}." for c in copies))}
        if not around and copy not in found and _are_alike(inner, rest):
            found |= {THE_REST: list(rest), copy: [f"{copy}.{name}" for name in below[copy]]}
    return found


def _may_be_original(module: str, copy: str) -> bool:
    without = copy.replace("target", "").strip("_")
    return "target" not in copy or bool(_ORIGINAL_OF_TARGET.search(module)) or module == without


def _listed(told: list[tuple[str, int]], of_timm: str | None) -> str:
    def sized(name: str, number: int) -> str:
        mark = "; timm would load this one" if name == of_timm else ""
        what = {THE_REST: f"{THE_REST!r}, what is in none of these", "": f"{THE_REST!r}, what is beside these"}.get(
            name, repr(name)
        )
        return f"{what} ({number} tensor{'s' if number > 1 else ''}{mark})"

    return (
        f"{', '.join(sized(*each) for each in told[:8])}. Name one by `weights=` (`--weights`); where a path alone is "
        "taken, pass `lit_cka.checkpoints.load_state_dict(path, weights=...)` in its place."
    )


def _kind(content: Any) -> str:
    return f"keys {list(content)[:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
