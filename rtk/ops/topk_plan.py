"""TopkPlan: topk_mask of the same tensors again and again, each call guided by the last one.

A class and not a `torch.library` operator, as `FoldPlan` is: the masks, and what the plan
remembers, live in memory that every call overwrites, so that a captured CUDA graph uses both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled, _registry
from rtk.ops._registry import require
from rtk.ops.topk_mask import (
    check_k,
    check_scores,
    launch_cuda,
    topk_mask,
    topk_mask_global,
    why_not_cuda,
    workspace_bytes,
)


class TopkPlan:
    """Mark the k largest scores of many tensors at every call, into the same memory.

    The masks are those of `topk_mask` and `topk_mask_global`, whatever the scores did in between.
    On a GPU a call is one launch without synchronisation. It reads the scores once if each
    threshold lies near the one of the call before, as it does from one training step to the next,
    and up to three more times where it does not. What the plan remembers takes an eighth of a byte
    a score and 56 KB a tensor.

    Args:
        scores: at least one floating tensor of any shape, all of one dtype on one device. The plan
            keeps these tensors; what they hold is read anew by every call.
        k: how many to keep: one number a tensor, or an int for all of the list together.
        packed: write the masks as bits, which is an eighth of the memory traffic.

    Attributes:
        masks: one a tensor: bool of its shape, or, packed, int32 (ceil(n / 32),) as `pack_mask`
            returns it. All 0 before the first call.
        k: the numbers in use, a list; change them by `set_k`.

    Raises:
        RtkError: as for `topk_mask`; at a call, if a tensor changed its number of elements.

    A call may be captured in a CUDA graph, the first one too. `set_k` reaches a captured graph.
    """

    def __init__(
        self, scores: Sequence[Tensor], k: int | Sequence[int], *, packed: bool = False
    ) -> None:
        self.scores = list(scores)
        check_scores("TopkPlan", self.scores)
        self.whole = isinstance(k, int)
        self.packed = packed
        self._sizes = [tensor.numel() for tensor in self.scores]
        self.k = self._checked(k)
        self.masks = [_allocate(tensor, packed) for tensor in self.scores]
        self._parts: list[_Part] = []
        if why_not_cuda(self.scores, whole=self.whole) is None:
            most = len(self.scores) if self.whole else _compiled._C.topk_mask_tensors
            for begin in range(0, len(self.scores), most):
                part = slice(begin, begin + most)
                masks = self.masks[part]
                self._parts.append(
                    _Part(self.scores[part], self.k[part], masks, self.whole, packed)
                )

    def set_k(self, k: int | Sequence[int]) -> None:
        """Change how many to keep from the next call on.

        Args:
            k: as at the beginning: one number a tensor, or an int if there was one.

        Raises:
            RtkError: for another kind of k, or one out of range.
        """
        require(
            isinstance(k, int) == self.whole,
            "TopkPlan: k was %s and must stay so",
            "one number for the list" if self.whole else "one number a tensor",
        )
        self.k = self._checked(k)
        begin = 0
        for part in self._parts:
            part.set_k(self.k[begin : begin + part.segments])
            begin += part.segments

    def __call__(self) -> list[Tensor]:
        """Mark again; return `masks`, the same tensors every time."""
        sizes = [tensor.numel() for tensor in self.scores]
        require(
            sizes == self._sizes,
            "TopkPlan: the scores had %s elements and have %s; make a new plan",
            self._sizes,
            sizes,
        )
        with torch.no_grad():
            if self._parts and _registry._forced in (None, "cuda"):
                for part in self._parts:
                    part.run()
            else:
                for mine, mask in zip(self.masks, self._functional(), strict=True):
                    mine.copy_(pack_mask(mask) if self.packed else mask)
        return self.masks

    def _checked(self, k: int | Sequence[int]) -> list[int]:
        if isinstance(k, int):
            check_k("TopkPlan", k, sum(self._sizes))
            return [k]
        require(
            len(k) == len(self._sizes),
            "TopkPlan: got %s tensors and %s values of k",
            len(self._sizes),
            len(k),
        )
        for kept, size in zip(k, self._sizes, strict=True):
            check_k("TopkPlan", kept, size)
        return list(k)

    def _functional(self) -> list[Tensor]:
        if self.whole:
            return topk_mask_global(self.scores, self.k[0])
        return topk_mask(self.scores, self.k)


class _Part:
    """What one launch takes, and what it remembers, on the device."""

    def __init__(
        self,
        scores: Sequence[Tensor],
        k: Sequence[int],
        masks: Sequence[Tensor],
        whole: bool,
        packed: bool,
    ) -> None:
        device = scores[0].device
        self.scores = scores
        self.out = {"bits" if packed else "masks": masks}
        self.whole = whole
        self.segments = len(k)
        self.k = torch.tensor(k, dtype=torch.int32, device=device)
        size = workspace_bytes(scores, whole=whole)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)

    def set_k(self, k: Sequence[int]) -> None:
        self.k.copy_(torch.tensor(k, dtype=torch.int32))

    def run(self) -> None:
        launch_cuda(
            self.scores,
            [0] * self.segments,  # the kernel reads the numbers on the device
            whole=self.whole,
            workspace=self.workspace,
            fresh=False,
            device_k=self.k,
            **self.out,
        )


def _allocate(scores: Tensor, packed: bool) -> Tensor:
    if packed:
        return torch.zeros(-(-scores.numel() // 32), dtype=torch.int32, device=scores.device)
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)


def pack_mask(mask: Tensor) -> Tensor:
    """Return a mask as bits.

    Args:
        mask: bool, any shape, n elements.

    Returns:
        (ceil(n / 32),) int32: bit b of word a is flat element 32 a + b; bits from n on are 0.
    """
    bits = F.pad(mask.flatten(), (0, -mask.numel() % 32)).view(-1, 32).long()
    words = (bits << torch.arange(32, device=mask.device)).sum(1)
    return words.to(torch.int32)  # the upper half of 0 to 2^32 - 1 becomes negative
