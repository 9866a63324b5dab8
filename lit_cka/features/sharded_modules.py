"""Modules of which each process holds a part: FSDP, FSDP2, tensor parallel, ZeRO-3; and the wrappers around modules."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import nn

from lit_cka.features.flat_parameters import free_gathered, is_flat_fsdp, is_in_partitions
from lit_cka.features.lightning_private import attached_trainer
from lit_cka.features.sharded_outputs import is_dtensor

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.distributed.fsdp import FSDPModule

# Modules that wrappers put between another one and its name.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Returns the name that a module or tensor has without wrappers: of `torch.compile`, FSDP or checkpointing."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module within wrappers of the same kinds; itself where there are none."""
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((getattr(module, name) for name in _WRAPPED if name in module._modules), None)
    return module


def named_without_wrappers(module: nn.Module) -> dict[str, nn.Module]:
    """Returns a module and all within by their plain names, but for the wrappers."""
    return {plain_name(name): child for name, child in module.named_modules() if unwrapped(child) is child}


def _is_fsdp2(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether `fully_shard` was called on a module, without importing what takes long to import where it was not."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before `fully_shard` gave it one of its own."""
    return type(module).__bases__[1] if _is_fsdp2(module) else type(module)


def is_of_sharding(value: object) -> bool:
    """Returns whether a hook, or what else a module holds, is what shards or gathers it, and not the user's."""
    return callable(value) and str(getattr(value, "__module__", "")).startswith(("torch.distributed", "deepspeed."))


def is_sharded(module: nn.Module) -> bool:
    """Returns whether a module is spread over processes, which have to run it together."""
    modules = outermost(module).modules()
    return (
        any(_is_fsdp2(child) or is_flat_fsdp(child) for child in modules)
        or any(map(is_dtensor, module.parameters()))
        or is_in_partitions(module)
    )


def outermost(module: nn.Module) -> nn.Module:
    """Returns what FSDP has wrapped around a LightningModule; the module itself where there is no such thing."""
    around = _of_strategy(module)
    return around if around is not None and is_flat_fsdp(around) else module


def _of_strategy(module: nn.Module) -> nn.Module | None:
    """Returns what the strategy of a LightningModule's trainer runs: the module, or what it has wrapped around it."""
    is_in_lightning = hasattr(type(module), "configure_optimizers")
    trainer = attached_trainer(cast("pl.LightningModule", module)) if is_in_lightning else None
    return None if trainer is None else trainer.strategy.model


def free_gathered_weights(module: nn.Module) -> None:
    """Have every process hold its shards alone, as what is gathered for a forward is kept after some.

    What is then written into the shards is what the next forward uses. Every process has to call it.
    """
    for child in filter(_is_fsdp2, module.modules()):
        child.reshard()
    around = _of_strategy(module)
    free_gathered(outermost(module), around if is_of_deepspeed(around) else None)


def is_of_deepspeed(module: nn.Module | None) -> bool:
    """Returns whether a module is the engine that DeepSpeed runs another one in."""
    return type(module).__module__.partition(".")[0] == "deepspeed"
