"""PEFT models with their adapters off: the pretrained model, without a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def adapter_modules(model: nn.Module) -> list[Any]:
    """The modules of PEFT that can be switched off: layers with adapters, and modules that are trained as a copy."""
    # By what they can do, so that PEFT need not be there. PEFT's models have a method of the same name.
    return [
        module for module in model.modules() if isinstance(getattr(type(module), "disable_adapters", None), property)
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters; then all of them, and every `requires_grad`, are as they were."""
    active = [module for module in adapter_modules(model) if not module.disable_adapters]
    # Switching adapters on again would unfreeze those that were frozen (peft issue 3447).
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module in active:
            module.enable_adapters(False)
        yield
    finally:
        for module in active:
            module.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def switch_off_adapters(model: nn.Module) -> None:
    """Run a copy of a model without its adapters from now on."""
    for module in adapter_modules(model):
        module.enable_adapters(False)


# PEFT's `init_lora_weights` that change the weights below the adapters, or may do so.
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")


def _initialisations(model: nn.Module) -> list[str]:
    """Return how the adapters' weights were set at first, as PEFT's configurations name it."""
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    held = [config for each in configs if isinstance(each, dict) for config in each.values()]
    starts = [getattr(config, "init_lora_weights", None) for config in held]
    return [start for start in starts if isinstance(start, str)]


def check_adapters(model: nn.Module, layer_names: list[str]) -> None:
    """Raise unless switching the adapters off gives back the pretrained model, up to its last layer of these.

    Raises:
        ValueError: if there are no adapters, if they are merged into the weights, or if weights below them are trained.
    """
    modules = adapter_modules(model)
    if not modules:
        raise ValueError(
            'Expected a PEFT model for reference="adapter-off", but found no adapters in it. Take "initial" instead.'
        )
    if any(getattr(module, "merged", False) for module in modules):
        raise ValueError(
            'The adapters are merged into the weights: unmerge them, or take reference="initial" in place of '
            '"adapter-off".'
        )
    for start in _initialisations(model):
        if start.lower().startswith(_CHANGE_BASE):
            raise ValueError(
                f"Adapters that start by {start!r} take values out of the base weights: without them the model is "
                'not the pretrained one. Take reference="initial" in place of "adapter-off": with its adapters, it is.'
            )
    names = [name for name, _ in model.named_parameters()]
    in_layers = [
        index for index, name in enumerate(names) if name.startswith(tuple(f"{layer}." for layer in layer_names))
    ]
    with adapters_off(model):
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    below = [name for name in trained if names.index(name) <= max(in_layers, default=-1)]
    if below:
        raise ValueError(
            f"The weight {below[0]!r} is trained and is no adapter's, so without its adapters the model is not what it "
            'was before. Take reference="initial" instead of "adapter-off".'
        )
