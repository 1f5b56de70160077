"""Where the scores of a learned mask start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from rtk.config import SCORE_INITS
from rtk.draw.granularity import group_scores
from rtk.errors import check_choice
from rtk.ops.topk_mask import descending_order


def initial_scores(
    weights: Sequence[Tensor], granularity: str, scope: str, start: str, seed: int
) -> list[Tensor]:
    """Return the scores that learning begins with, one a group.

    Both starts draw from the uniform distribution in +-1 / sqrt(C R S), Kaiming's with a = sqrt(5).
    "weight_rank" hands the values out in the order of the groups' mean |weight|, the largest to
    the largest (S3-Router), among the groups of a layer or of all as `scope` says: the first mask
    is that of magnitude pruning. "kaiming" leaves them in the order in which they came
    (hidden-networks, RST).

    Args:
        weights: (K, C, R, S) each.
        granularity: as `rtk.granularity` reads it; not N:M.
        scope: layer or global.
        start: weight_rank or kaiming.
        seed: of the values, which are drawn on the CPU: they are the same on every device.

    Returns:
        In the shapes of `group_scores`, fp32 (fp64 beside fp64 weights), on the weights' device.

    Raises:
        RtkError: for another start.
    """
    check_choice("score_init", start, SCORE_INITS)
    generator = Generator().manual_seed(seed)
    ranks = [group_scores(weight, granularity) for weight in weights]
    values = [
        _uniform(rank.shape, weight, generator) for rank, weight in zip(ranks, weights, strict=True)
    ]
    if start == "kaiming":
        return values
    if scope == "layer":
        return [_ordered(v, r) for v, r in zip(values, ranks, strict=True)]
    flat = _ordered(*(torch.cat([each.reshape(-1) for each in part]) for part in (values, ranks)))
    parts = flat.split([each.numel() for each in values])
    return [part.reshape(each.shape) for part, each in zip(parts, values, strict=True)]


def _uniform(shape: torch.Size, weight: Tensor, generator: Generator) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bound = 1 / math.sqrt(max(1, weight[0].numel()))
    values = torch.rand(shape, generator=generator, dtype=dtype) * (2 * bound) - bound
    return values.to(weight.device)


def _ordered(values: Tensor, ranks: Tensor) -> Tensor:
    """Hand `values` out again, the largest where `ranks` is largest."""
    scores = torch.empty_like(values).reshape(-1)
    scores[descending_order(ranks.reshape(-1))] = values.reshape(-1).sort(descending=True).values
    return scores.reshape(values.shape)
