"""The forward of frozen blocks, left out for samples of which it is known what comes out: `PrefixCache`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_cka.control.activation_store import ActivationStore
from lit_cka.control.frozen_prefix import FrozenPrefix
from lit_cka.control.step_graph import tensors_in
from lit_cka.parallel.warning import warn
from lit_cka.samples.hashing import row_hashes

# Of the largest activation: other batches sum in another order, by more in types of fewer bits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Returned(NamedTuple):
    """The shape of a block's output for one sample, its type, and whether it is the first entry of a longer tuple."""

    shape: torch.Size
    dtype: torch.dtype
    length: int | None

    def filled(self, tensor: Tensor) -> Any:
        return tensor if self.length is None else (tensor, *[None] * (self.length - 1))


class PrefixCache:
    """In training steps, has the frozen blocks run once for each sample, and afterwards not at all.

    A sample is known by all that the first block is called with for it, its row of each tensor, so that data that
    change are not mistaken for those that were there before, wherever they are changed: they are just not found. What
    the last frozen block returns is kept; where it is known for all samples of a batch, it takes the place of the
    blocks' forward, of which those before the last return zeros of the same shape. The first time, the blocks run all
    the same, to see whether they return what is kept.

    Args:
        prefix: whose forward is left out.
        new_store: makes an empty store.

    Attributes:
        num_skipped: how many blocks the last step has left out.
        why_off: why no activations are kept any more; empty while they are.
    """

    def __init__(self, prefix: FrozenPrefix, new_store: Callable[[], ActivationStore]) -> None:
        self._prefix, self._new_store = prefix, new_store
        self._stores: dict[int, ActivationStore] = {}  # by the number of blocks whose output it holds
        self._returned: dict[tuple[int, int, torch.Size], _Returned] = {}
        self._checked: set[int] = set()
        self._said: set[int] = set()
        self._patched: list[tuple[Any, Any]] = []
        self._keys: list[bytes] | None = None
        self._known: Tensor | None = None
        self._weights: dict[int, list[tuple[int, int]]] = {}  # of each frozen block, which it has now
        self._had_rows, self._num_known = False, 0  # at the start of the epoch; of all its samples
        self._is_checking = False
        self._outputs: list[_Returned] = []
        self._boundary = 0
        self.num_skipped, self.why_off = 0, ""

    @property
    def num_samples(self) -> int:
        """How many samples are known at the end of the last frozen block."""
        store = self._stores.get(self._prefix.num_frozen)
        return 0 if store is None else len(store)

    def forget(self) -> None:
        """Forget what blocks returned that have been trained since."""
        self._stores, self._returned, self._checked, self._had_rows, self._weights = {}, {}, set(), False, {}

    def switch_off(self, why: str) -> None:
        """Keep no activations any more, and say why."""
        if not self.why_off:
            warn(f"FreezeConverged goes on without cached activations: {why}.")
        self.why_off = why
        self.end_step()
        self.forget()

    def begin_step(self) -> None:
        """Have the frozen blocks look first whether they have to run."""
        self.end_step()
        self.num_skipped = 0
        num_frozen = self._prefix.num_frozen
        if self.why_off or not num_frozen:
            return
        if not self._prefix.plan.parts[num_frozen - 1].can_skip:
            if num_frozen not in self._said:
                warn(
                    f"FreezeConverged runs the {num_frozen} frozen blocks in all steps, without cached activations: "
                    "what is behind them needs more than what the last of them returns. With another number it may not."
                )
            self._said.add(num_frozen)
            return
        self._forget_if_changed(num_frozen)
        for number in range(num_frozen):
            block = self._prefix.block(number)
            self._patched.append((block, vars(block).get("forward")))
            block.forward = partial(self._run, number, block.forward)

    def _forget_if_changed(self, num_frozen: int) -> None:
        """Forget all if others have written to what frozen blocks hold, such as weights that are rolled back."""
        weights = {}
        for number in range(num_frozen):
            block = self._prefix.block(number)
            held = [*block.parameters(), *block.buffers()]
            weights[number] = [(tensor.data_ptr(), tensor._version) for tensor in held]
        if any(weights.get(number) != before for number, before in self._weights.items()):
            self.forget()
        self._weights = weights

    def end_step(self) -> None:
        """Leave the blocks as they were."""
        for block, before in self._patched:
            del block.forward
            if before is not None:
                block.forward = before
        self._patched, self._keys, self._known, self._outputs = [], None, None, []
        self._is_checking = False

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the place of a frozen block's forward."""
        if not torch.is_grad_enabled() or self.why_off:
            return forward(*args, **kwargs)
        if number == 0:
            self._look_up(args, kwargs)
        if number < self.num_skipped:
            return self._instead(number)
        output = forward(*args, **kwargs)
        if self._keys is not None:
            self._take(number, output)
        return output

    def _look_up(self, args: Any, kwargs: Any) -> None:
        """Find out which samples there are, and behind how many blocks what they return is known of all."""
        tensors = tensors_in([args, kwargs])
        self._outputs, self._known, self.num_skipped, self._is_checking = [], None, 0, False
        self._keys = row_hashes([args, kwargs], len(tensors[0])) if tensors and tensors[0].ndim else None
        if self._keys is None:
            self.switch_off("it can't be told what the first block is called with")
            return
        for boundary in sorted(self._stores, reverse=True):
            known = self._stores[boundary].rows(self._keys, tensors[0].device)
            if known is not None:
                self._known, self._is_checking = known, boundary not in self._checked
                self._boundary = boundary
                self.num_skipped = 0 if self._is_checking else boundary
                break
        self._num_known += max((store.num_known(self._keys) for store in self._stores.values()), default=0)

    def begin_epoch(self) -> None:
        """Begin to count the samples that come again."""
        self._had_rows, self._num_known = bool(self._stores), 0

    def end_epoch(self) -> None:
        """Give up if the epoch has brought none of the samples again that were there before."""
        if self._had_rows and not self._num_known:
            self.switch_off(
                "no sample has come again with the same content in a whole epoch, as with random augmentation, so that "
                "nothing would ever be left out"
            )

    def _instead(self, number: int) -> Any:
        """Return what stands for a block's output."""
        known = self._known
        assert known is not None
        returned = self._returned[self._boundary, number, known.shape[1:]]
        if number == self._boundary - 1:
            return returned.filled(known)
        zero = torch.zeros((), dtype=returned.dtype, device=known.device)
        return returned.filled(zero.expand(len(known), *returned.shape))

    def _take(self, number: int, output: Any) -> None:
        """Keep what a block has returned, or compare it with what was kept."""
        assert self._keys is not None
        returned = _returned(output, len(self._keys))
        if returned is None:
            self.switch_off(
                "a frozen block returns something else than one tensor with a row for each sample, which can't be kept"
            )
            return
        tensor = output if isinstance(output, Tensor) else output[0]
        self._outputs.append(returned)
        if self._is_checking and number == self._boundary - 1:
            self._check(tensor)
        if not self.why_off and number == self._prefix.num_frozen - 1 and self._keys is not None:
            self._keep(number + 1, tensor)

    def _check(self, tensor: Tensor) -> None:
        known = self._known
        assert known is not None
        scale = float(tensor.detach().abs().amax())
        error = float((tensor.detach() - known).abs().amax()) if known.shape == tensor.shape else float("inf")
        if error <= _TOLERANCE.get(tensor.dtype, 0.0) * scale:
            self._checked.add(self._boundary)
            return
        self.switch_off(
            f"the frozen blocks return something else for the same samples, by {error:.2g} where the largest value "
            f"is {scale:.2g}: they draw random numbers, or depend on the other samples of a batch"
        )

    def _keep(self, boundary: int, tensor: Tensor) -> None:
        """Keep the rows that the last frozen block returned, and forget earlier blocks' once they are no use."""
        assert self._keys is not None
        store = self._stores.get(boundary)
        if store is None:
            store = self._stores[boundary] = self._new_store()
        store.add(self._keys, tensor)
        if store.is_full:
            warn(
                f"FreezeConverged keeps the activations of {len(store)} samples, which is all that `cache_memory` has "
                "room for: the frozen blocks run for batches with others. Raise it, or pass cache='disk'."
            )
        skipped = self.num_skipped
        for number in range(skipped, boundary):
            self._returned[boundary, number, tensor.shape[1:]] = self._outputs[number - skipped]
        for number in range(skipped):
            assert self._known is not None
            known = self._returned[skipped, number, self._known.shape[1:]]
            self._returned[boundary, number, tensor.shape[1:]] = known
        for earlier in [each for each in self._stores if each != boundary]:
            if len(self._stores[earlier]) <= len(store):
                del self._stores[earlier]


def _returned(output: Any, num_samples: int) -> _Returned | None:
    """Returns what a block returned; None if it is more than one tensor with a row for each sample."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or not first.ndim or len(first) != num_samples:
        return None
    if isinstance(output, Tensor):
        return _Returned(first.shape[1:], first.dtype, None)
    is_plain = type(output) is tuple and all(item is None for item in output[1:])
    return _Returned(first.shape[1:], first.dtype, len(output)) if is_plain else None
