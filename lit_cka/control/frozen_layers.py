"""Which layers are frozen with each block: `layers_by_block`."""

from __future__ import annotations

from torch import nn

from lit_cka.control.plan import FreezePlan
from lit_cka.features.layers import named_layers
from lit_cka.features.sharded_modules import plain_name


def layers_by_block(model: nn.Module, plan: FreezePlan) -> tuple[tuple[str, ...], ...]:
    """Returns, by block, the layers that are frozen with it and not before, without those inside of one of them.

    A layer is frozen with the first block by which all of its trained parameters are, so a stem with the first block, a
    stage with its last, and a tied embedding never; a layer that trains none, with the first block by whose end it has
    run.

    Args:
        model: before anything of it is frozen.
        plan: what is frozen with each block.
    """
    frozen_with = {name: number for number, part in enumerate(plan.parts) for name in part.parameters}
    has_run_by = {name: number for number, part in enumerate(plan.parts) for name in part.modules}
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    number_of: dict[str, int] = {}
    for layer, module in named_layers(model).items():
        trained = [names[id(parameter)] for parameter in module.parameters() if parameter.requires_grad]
        numbers = [frozen_with.get(name) for name in trained] if trained else [has_run_by.get(layer)]
        known = [number for number in numbers if number is not None]
        if len(known) == len(numbers):
            number_of[layer] = max(known)
    groups: list[list[str]] = [[] for _ in plan.parts]
    for layer, number in number_of.items():
        parents = (layer.rsplit(".", depth)[0] for depth in range(1, layer.count(".") + 1))
        around = next((number_of[parent] for parent in parents if parent in number_of), None)
        if around != number:
            groups[number].append(layer)
    return tuple(map(tuple, groups))
