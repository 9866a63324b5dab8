"""Hidden states of a transformers model as outputs of modules, for hooks: `TextNetwork`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_cka.features.layers import named_layers
from lit_cka.features.nested import tensors_in


class TextNetwork(nn.Module):
    """A body of transformers whose hidden states pass by as the outputs of modules with plain names: for hooks.

    Args:
        body: a model without a head, in eval mode.

    Raises:
        ValueError: if its blocks cannot be found, or do not return hidden states (n, tokens, d).
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        blocks = _find_blocks(body)
        final_norm = _find_final_norm(body, blocks)
        self.embeddings = nn.Identity()
        self.layers = nn.ModuleList(nn.Identity() for _ in blocks)
        if final_norm is not None:
            self.final_norm = nn.Identity()
        self.hidden_states = [name for name in named_layers(self) if name != "layers"]
        self.model = body
        # In a tuple, so that they have no second name here.
        self._first = (blocks[0],)
        self._watched = tuple(zip(blocks, self.layers, strict=True))
        if final_norm is not None:
            self._watched += ((final_norm, self.final_norm),)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Returns what the body returns."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.embeddings(_block_input(args, kwargs))

        with ExitStack() as hooks:
            hooks.callback(self._first[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module, stand_in in self._watched:
                hooks.callback(module.register_forward_hook(partial(_show, stand_in)).remove)
            return self.model(input_ids=input_ids, attention_mask=attention_mask)


def _show(stand_in: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
    stand_in(output)


def _block_input(args: Any, kwargs: Any) -> Tensor:
    return next(tensor for tensor in tensors_in((kwargs.get("hidden_states"), args)) if tensor.is_floating_point())


def _find_blocks(body: Any) -> list[nn.Module]:
    """Returns the blocks: what the only list of as many modules as the configuration says holds."""
    num = body.config.get_text_config().num_hidden_layers
    found = {
        name: list(module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num
        and all(any(True for _ in block.children()) for block in module)
    }
    outer = [blocks for name, blocks in found.items() if not any(name.startswith(f"{around}.") for around in found)]
    if len(outer) != 1:
        raise ValueError(
            f"Expected {type(body).__name__} to hold its {num} blocks in one list, but there are {len(outer)} such "
            "lists. Use `lit_cka.analysis.extraction.extract` with `layers` that you name."
        )
    return outer[0]


def _find_final_norm(body: Any, blocks: list[nn.Module]) -> nn.Module | None:
    """Returns the normalisation that runs behind the last block, by a run on two tokens; None if there is none."""
    shapes: list[torch.Size] = []
    behind: list[nn.Module] = []

    def after_block(module: nn.Module, args: Any, output: Any) -> None:
        shapes.extend(tensor.shape[:-1] for tensor in list(tensors_in(output))[:1])

    def after_norm(module: nn.Module, args: Any, output: Any) -> None:
        if len(shapes) == len(blocks):
            behind.append(module)

    inside = {id(module) for block in blocks for module in block.modules()}
    tokens = torch.arange(2, device=body.device)[None]
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            hooks.callback(block.register_forward_hook(after_block).remove)
        for module in body.modules():
            if "norm" in type(module).__name__.lower() and id(module) not in inside:
                hooks.callback(module.register_forward_hook(after_norm).remove)
        body(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if shapes != [tokens.shape] * len(blocks):
        raise ValueError(
            f"Expected every block of {type(body).__name__} to run once and to return hidden states (1, 2, d) for two "
            f"tokens, but got {[(*shape, 'd') for shape in shapes]}."
        )
    return behind[0] if behind else None
