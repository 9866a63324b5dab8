"""Layers that return a shard of their output as a plain tensor, as tensor parallelism has them do: `OutputShards`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_cka.functional.precision import float64_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_MOST_AXES = 8
_TOLERANCE = 1e-3  # of the largest root mean square of a sample, by which replicas may differ


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Returns whether a tensor is a `DTensor`, without importing what takes long to import where there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class OutputShards:
    """Makes DTensors of the shards that layers return as plain tensors.

    A column-parallel layer is known by its weight. Any other, such as an activation behind it or a block between whose
    parts the tokens are shared out, is known by its output: processes that hold the same samples have another one each.
    Then the widths of the layers in and around it tell, or the numbers of tokens in the model's inputs, whether these
    are shards of the features or of the tokens.
    """

    def __init__(self) -> None:
        self._mesh: DeviceMesh | None = None
        self._axes: dict[str, int] = {}  # that the shards are of, by layer
        self._whole: set[str] = set()  # layers that were compared in this pass

    def watch(self, mesh: DeviceMesh | None) -> None:
        """Compare the outputs of these processes from now on, each layer's once.

        Args:
            mesh: the processes that hold the same samples and run the model together; None if there are none. All of
                them have to run it, with the same layers. Of more than one dimension, they are not compared.
        """
        self._mesh = mesh if mesh is not None and mesh.ndim == 1 else None
        self._whole.clear()

    def distributed(
        self,
        name: str,
        module: nn.Module,
        parent: nn.Module,
        output: Tensor,
        find_layout: Callable[[Tensor], str],
        input_sizes: Set[int],
    ) -> Tensor:
        """Returns the output as a DTensor, if it is a shard; otherwise as it is.

        Args:
            name: of the layer.
            module: the layer.
            parent: the module that holds the layer.
            output: of the layer.
            find_layout: given an output, returns one letter for each of its axes.
            input_sizes: sizes of the axes of the model's inputs, besides the first.

        Raises:
            ValueError: if it can't be told what the output is a shard of.
        """
        if is_dtensor(output) or output.is_nested:
            return output
        of_columns = _of_columns(module, output, self._mesh)
        if of_columns is not None:
            return of_columns
        if self._mesh is None or name in self._whole:
            return output
        axis = self._axes.get(name)
        if axis is None:
            axis = self._compared(name, module, parent, output, find_layout, input_sizes)
        if axis is None:
            self._whole.add(name)
            return output
        self._axes[name] = axis
        sizes = [shape[axis] for shape in self._shapes(output)]
        return _as_dtensor(output, self._mesh, axis, sizes, name)

    def _compared(
        self,
        name: str,
        module: nn.Module,
        parent: nn.Module,
        output: Tensor,
        find_layout: Callable[[Tensor], str],
        input_sizes: Set[int],
    ) -> int | None:
        """Returns the axis that the processes have shards of; None if all have the same output."""
        assert self._mesh is not None
        shapes = self._shapes(output)
        if any(shape != shapes[0] for shape in shapes):
            differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
            if len(differing) == 1:
                return differing[0]
            raise ValueError(_UNKNOWN.format(name))
        if not output.numel() or self._are_alike(output):
            return None
        layout = find_layout(output)
        positions = [axis for axis, letter in enumerate(layout) if letter not in "NC"]
        channels = layout.index("C")
        if not positions:
            return channels
        has_weights = any(True for _ in module.parameters())
        whole, shards = _widths(module if has_weights else parent, self._mesh)
        width, length = output.shape[channels], output.shape[positions[0]]
        if len(positions) == 1 and width in whole - shards:
            return positions[0]
        if width in shards - whole:
            return channels
        is_part, is_all = length * self._mesh.size() in input_sizes, length in input_sizes
        if len(positions) == 1 and is_part != is_all:
            return positions[0] if is_part else channels
        raise ValueError(_UNKNOWN.format(name))

    def _shapes(self, output: Tensor) -> list[tuple[int, ...]]:
        """Returns the shapes that all processes have; of other numbers of axes, the sizes stand for nothing."""
        sizes = torch.zeros(_MOST_AXES, dtype=torch.int64, device=output.device)
        sizes[: output.ndim] = torch.tensor(output.shape)
        return [tuple(each[: output.ndim].tolist()) for each in self._gathered(sizes)]

    def _are_alike(self, output: Tensor) -> bool:
        """Whether all processes have the same values, up to rounding, as far as means of rows and squares tell."""
        rows = output.reshape(len(output), -1).to(float64_device(output.device), torch.float64)
        moments = torch.stack([rows.mean(dim=1), rows.square().mean(dim=1).sqrt()])
        first, *others = self._gathered(moments)
        tolerance = _TOLERANCE * float(first[1].nan_to_num(0.0, 0.0, 0.0).max())
        return all(torch.allclose(each, first, rtol=0.0, atol=tolerance, equal_nan=True) for each in others)

    def _gathered(self, value: Tensor) -> list[Tensor]:
        assert self._mesh is not None
        values = [torch.empty_like(value) for _ in range(self._mesh.size())]
        dist.all_gather(values, value.contiguous(), group=self._mesh.get_group())
        return values


_UNKNOWN = (
    "Layer {!r} returns another tensor on each of the processes that run the model together on the same samples, and "
    "it can't be told whether these are shards of its features or of its tokens. Take the block around it or the "
    "row-parallel layer behind it, or have it return a DTensor (`use_local_output=False`)."
)


def _of_columns(module: nn.Module, output: Tensor, mesh: DeviceMesh | None) -> DTensor | None:
    """Returns the output of a column-parallel layer that is a shard, as a DTensor."""
    axis = {nn.Linear: 0, nn.Embedding: 1}.get(type(module))
    if axis is None or not is_dtensor(weight := getattr(module, "weight", None)):
        return None
    mesh = mesh or (weight.device_mesh if weight.device_mesh.ndim == 1 else None)
    if mesh is None or _sharded_axis(weight, mesh) != axis:
        return None
    sizes = _sizes_of_shards(weight.shape[axis], mesh.size())
    if output.shape[-1] != sizes[mesh.get_local_rank()] or output.shape[-1] == weight.shape[axis]:
        return None
    return _as_dtensor(output, mesh, output.ndim - 1, sizes, "")


def _sharded_axis(weight: DTensor, mesh: DeviceMesh) -> int | None:
    """Returns the axis that a weight is sharded along, by the processes of the mesh; None if by none."""
    around = weight.device_mesh
    if around.ndim == 1 and torch.equal(around.mesh, mesh.mesh):
        placement = weight.placements[0]
    elif around.mesh_dim_names and mesh.mesh_dim_names and mesh.mesh_dim_names[0] in around.mesh_dim_names:
        placement = weight.placements[around.mesh_dim_names.index(mesh.mesh_dim_names[0])]
    else:
        return None
    return getattr(placement, "dim", None) if placement.is_shard() else None


def _widths(module: nn.Module, mesh: DeviceMesh) -> tuple[set[int], set[int]]:
    """Returns the numbers of features that layers within a module have as a whole, and in shards on this process."""
    whole: set[int] = set()
    shards: set[int] = set()
    for weight in (parameter for parameter in module.parameters() if parameter.ndim in (1, 2)):
        sharded = _sharded_axis(weight, mesh) if is_dtensor(weight) else None
        for axis, size in enumerate(weight.shape):
            if axis == sharded:
                shards.add(_sizes_of_shards(size, mesh.size())[mesh.get_local_rank()])
            else:
                whole.add(size)
    return whole, shards


def _sizes_of_shards(size: int, num_shards: int) -> list[int]:
    """Returns how torch shares out an axis: as `chunk` does, with nothing for those that are left over."""
    step = -(-size // num_shards)
    return [max(min(size - shard * step, step), 0) for shard in range(num_shards)]


def _as_dtensor(shard: Tensor, mesh: DeviceMesh, axis: int, sizes: Sequence[int], name: str) -> DTensor:
    from torch.distributed.tensor import DTensor, Shard

    if list(sizes) != _sizes_of_shards(sum(sizes), len(sizes)):
        raise ValueError(
            f"Expected the shards of layer {name!r} to be as large as those that torch makes, but got {list(sizes)}."
        )
    shape = torch.Size([*shard.shape[:axis], sum(sizes), *shard.shape[axis + 1 :]])
    stride = tuple(_contiguous_strides(shape))
    return DTensor.from_local(shard, mesh, [Shard(axis)], shape=shape, stride=stride)


def _contiguous_strides(shape: Sequence[int]) -> Iterator[int]:
    for axis in range(len(shape)):
        yield torch.Size(shape[axis + 1 :]).numel()
