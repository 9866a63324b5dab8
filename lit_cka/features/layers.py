"""Which layers of a network to look at: its repeated blocks, or those that names, globs or a callable choose."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, Union

from torch import nn

from lit_cka.features.flat_parameters import flat_parts, shape_of
from lit_cka.features.sharded_modules import original_class, outermost, plain_name, unwrapped

# Sequences before callables: jsonargparse would write a list into a config as a callable that it can't name.
Layers: TypeAlias = Union[
    str, "re.Pattern[str]", Sequence[Union[str, "re.Pattern[str]"]], Callable[[str, nn.Module], bool]
]

_NORM = re.compile("norm", re.IGNORECASE)
_NORM_OR_ATTENTION = re.compile("norm|attention|attn", re.IGNORECASE)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns all submodules by name, without the root, and without what wrappers put in names (see `plain_name`).

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> list(named_layers(net))
        ['0', '1', '2']
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = plain_name(name)
        if plain:
            layers.setdefault(plain, module)  # of a wrapper and the module inside it, the outer
    return layers


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the model itself under the name "", and all its layers under those of `named_layers`."""
    return {"": model, **named_layers(model)}


def select_layers(model: nn.Module, layers: Layers | None = None) -> list[str]:
    """Returns the names of the layers to track, as in `model.named_modules()` and in its order.

    Args:
        model: the network.
        layers: None for the repeated blocks (see `repeated_blocks`); a name; a glob, where `*` stays within one dotted
            segment and `**` crosses segments; a compiled regular expression that has to match the whole name; a
            sequence of these; or a callable `(name, module) -> bool`.

    Raises:
        ValueError: if a name is unknown (the nearest names are suggested) or a pattern matches nothing.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> select_layers(net, lambda name, module: isinstance(module, nn.Linear))
        ['0', '2']
    """
    modules = named_layers(model)
    if layers is None:
        return repeated_blocks(model)
    if isinstance(layers, (str, re.Pattern)):
        layers = [layers]
    if callable(layers):
        chosen = {name for name, module in modules.items() if layers(name, module)}
        if not chosen:
            raise ValueError(f"Expected `layers` to accept at least one of {_some(modules)}, but it accepted none.")
    else:
        if not layers:
            raise ValueError("Expected `layers` to name at least one layer, but got an empty sequence.")
        chosen = set().union(*(_match(pattern, modules) for pattern in layers))
    return [name for name in modules if name in chosen]


def _match(pattern: str | re.Pattern[str], modules: dict[str, nn.Module]) -> set[str]:
    if isinstance(pattern, str) and pattern in modules:
        return {pattern}
    if isinstance(pattern, str) and not set(pattern) & set("*?["):
        raise ValueError(f"Unknown layer {pattern!r}. {_nearest(pattern, list(modules))}")
    regex = pattern if isinstance(pattern, re.Pattern) else glob_regex(pattern)
    found = {name for name in modules if regex.fullmatch(name)}
    if not found:
        shown = pattern if isinstance(pattern, str) else pattern.pattern
        nearest = _nearest(shown, list(modules), is_glob=isinstance(pattern, str))
        raise ValueError(f"No layer matches {shown!r}. {nearest}")
    return found


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Returns the pattern as a regular expression: `*` and `?` stay within a dotted segment, `**` crosses (`**.` may
    stand for nothing), `[...]` as in fnmatch.
    """
    translation = {"**.": r"(?:.+\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    tokens = re.findall(r"\*\*\.|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    return re.compile(
        "".join(
            translation.get(token) or (token.replace("[!", "[^") if len(token) > 1 else re.escape(token))
            for token in tokens
        )
    )


def _nearest(pattern: str, names: list[str], *, is_glob: bool = False) -> str:
    """Returns a sentence that suggests existing names: the same ending first ("blocks.3" for "model.blocks.3").

    For a pattern it suggests patterns: the same one further inside, or those of names that differ in numbers alone.
    """
    if is_glob:
        inside = re.compile(f"((?:.+\\.)?){glob_regex(pattern.removeprefix('**.')).pattern}")
        prefixes = [match[1] for match in map(inside.fullmatch, names) if match]
        near = [f"{prefix}{pattern}" for prefix in dict.fromkeys(prefixes)]
        names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
        bare = pattern
    else:
        near = [name for name in names if pattern and name.endswith("." + pattern)]
        bare = pattern
    near += [name for name in difflib.get_close_matches(bare, names, n=5, cutoff=0.5) if name not in near]
    if near:
        return f"Did you mean {', '.join(map(repr, near[:5]))}?"
    return f"The model has {_some(names)}."


def _some(names: Sequence[str] | dict[str, nn.Module]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def repeated_blocks(model: nn.Module) -> list[str]:
    """Returns the names of the network's repeated blocks, found from its structure alone.

    Blocks are what containers (`ModuleList`, `Sequential`, `ModuleDict`) hold of a class that occurs at least twice:
    transformer blocks, residual blocks, ConvNeXt blocks. Stages (Swin, ConvNeXt, ResNet, EfficientNet) and whole
    networks in a container are looked into; blocks, which may hold experts or branches, are not. Losses and metrics are
    none of the network's layers, whatever networks they hold, and what a detector runs on regions has rows of regions.
    A network without any, such as an MLP, gets its layers with weights, normalisation and embeddings left out.

    Raises:
        ValueError: if there is no layer with weights at all.
    """
    structure = _Structure(model)
    found: set[str] = set()
    blocks = list(structure.blocks(unwrapped(model), ""))
    while blocks:
        count = Counter(original_class(block) for _, block in blocks)
        found |= {name for name, block in blocks if count[original_class(block)] > 1}
        # What occurs once is no block, but may hold some: a whole network in a container.
        once = [(name, block) for name, block in blocks if count[original_class(block)] == 1]
        blocks = [inner for name, block in once for inner in structure.blocks(block, f"{name}.")]
    modules = named_layers(model)
    left_out = tuple(f"{name}." for name, module in modules.items() if _is_measure(module) or _is_of_regions(module))
    if not found:
        plain = (name for name, module in modules.items() if structure.is_plain_layer(module))
        found = {name for name in plain if not f"{name}.".startswith(left_out)}
    if not found:
        raise ValueError(f"Expected {type(model).__name__} to have layers with weights to track, but found none.")
    return [name for name in modules if name in found]


class _Structure:
    """What a network is made of, whatever wraps its modules, and however its parameters are sharded."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = flat_parts(outermost(model))

    def is_plain_layer(self, module: nn.Module) -> bool:
        has_weights = any(len(shape_of(parameter, self._parts)) > 1 for parameter in module.parameters(recurse=False))
        return has_weights and not isinstance(module, nn.Embedding) and not _NORM.search(type(module).__name__)

    def _num_parameters(self, module: nn.Module) -> int:
        return sum(shape_of(parameter, self._parts).numel() for parameter in module.parameters())

    def blocks(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        """Yields the outermost blocks below `module`, whatever their class, with their names."""
        in_container = self._is_container(module)
        for name, child in _children(module).items():
            path = f"{prefix}{name}"
            if in_container and not self._is_stage(child):
                yield path, child
            else:
                yield from self.blocks(child, f"{path}.")

    def _is_container(self, module: nn.Module) -> bool:
        """Returns whether `module` is a list of composite modules (not of convolutions and activations, say)."""
        children = [child for child in _children(module).values() if self._num_parameters(child)]
        return (
            isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
            and bool(children)
            and all(any(True for _ in child.children()) for child in children)
        )

    def _is_stage(self, module: nn.Module) -> bool:
        """Returns whether `module` is no block but a list of blocks, or holds one: a stage, or a whole network."""
        if self._is_container(module):
            return True
        lists = [child for child in module.modules() if self._is_container(child) and _are_alike(child)]
        repeated = (list(found.children()) for found in lists)
        if any(len(blocks) > 1 and _has_norm_or_attention(blocks) for blocks in repeated):
            return True
        children = _children(module).values()
        inner = [child for child in children if any(child is found for found in lists)]
        outer = [child for child in children if all(child is not found for found in lists)]
        if 2 * sum(map(self._num_parameters, inner)) <= self._num_parameters(module):
            return False
        # Experts and branches have neither norm nor attention: those are in the block around them.
        return _has_norm_or_attention(inner) or not _has_norm_or_attention(outer)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    children = ((name, unwrapped(child)) for name, child in module.named_children())
    return {name: child for name, child in children if not (_is_measure(child) or _is_of_regions(child))}


def _is_measure(module: nn.Module) -> bool:
    """Returns whether a module is a loss or a metric."""
    bases = type(module).__mro__
    is_metric = any(base.__module__.startswith("torchmetrics") for base in bases)
    is_loss = any(base.__module__ == "torch.nn.modules.loss" for base in bases)
    return is_metric or is_loss or type(module).__name__.endswith(("Loss", "Criterion"))


def _is_of_regions(module: nn.Module) -> bool:
    """Returns whether a module is the part of a detector that runs on regions of the images, as many as it found."""
    return type(module).__name__.lower().endswith("roiheads")


def _are_alike(container: nn.Module) -> bool:
    return len(set(map(original_class, _children(container).values()))) == 1


def _has_norm_or_attention(modules: Sequence[nn.Module]) -> bool:
    return any(_NORM_OR_ATTENTION.search(type(child).__name__) for module in modules for child in module.modules())
