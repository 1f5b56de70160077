"""block_matmul at several densities, against the dense product on masked weights."""

from __future__ import annotations

import pytest
import torch

import rtk

SIZE = 1024


@pytest.mark.parametrize("peer", ["rtk", "dense"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("block", [32, 64, 128])
def bench_block_matmul(block, density, peer, measure, benchmark):
    benchmark.group = f"block_matmul {SIZE}^3, {block}-blocks, density {density}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, SIZE, generator=generator)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    scores = torch.rand(SIZE // block, SIZE // block, generator=generator)
    blocks = rtk.ops.topk_mask(scores, round(density * scores.numel()))
    masked = weight * blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    run = {
        "rtk": lambda: rtk.ops.block_matmul(x, weight, blocks, block),
        "dense": lambda: x @ masked.t(),
    }[peer]
    result = measure(run, flops=round(2 * SIZE**3 * density))
    torch.testing.assert_close(result, x @ masked.t(), atol=1e-3, rtol=1e-4)
