"""block_matmul at several densities, against the dense product on masked weights and torch's BSR.

On a GPU: a square weight, and ResNet-50's 1x1 convolutions at batch 128 as products of their
pixels. "dense" is cuBLAS on ready weights; beside block-score gradients it is the weight gradient
alone. The FLOPs are those of live blocks, for all peers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rtk
from rtk.ops import block_matmul

SIZE = 1024
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw(
    m: int, n: int, k: int, block: int, density: float, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, blocks (exactly the share `density` is on) and the masked weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    weight = torch.randn(n, k, generator=generator).to(device, dtype)
    scores = torch.rand(n // block, k // block, generator=generator).to(device)
    blocks = rtk.ops.topk_mask(scores, round(density * scores.numel()))
    masked = weight * blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return x, weight, blocks, masked


@pytest.mark.parametrize("peer", ["rtk", "dense"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("block", [32, 64, 128])
def bench_block_matmul(block, density, peer, measure, benchmark):
    benchmark.group = f"block_matmul {SIZE}^3, {block}-blocks, density {density}"
    x, weight, blocks, masked = draw(SIZE, SIZE, SIZE, block, density, "cpu", torch.float32)
    run = {
        "rtk": lambda: block_matmul(x, weight, blocks, block),
        "dense": lambda: x @ masked.t(),
    }[peer]
    result = measure(run, flops=round(2 * SIZE**3 * density))
    torch.testing.assert_close(result, x @ masked.t(), atol=1e-3, rtol=1e-4)


# M, N, K
LAYERS = {
    "4096": (4096, 4096, 4096),
    "256to64-56px": (128 * 56**2, 64, 256),
    "64to256-56px": (128 * 56**2, 256, 64),
    "512to128-28px": (128 * 28**2, 128, 512),
    "128to512-28px": (128 * 28**2, 512, 128),
    "1024to256-14px": (128 * 14**2, 256, 1024),
    "256to1024-14px": (128 * 14**2, 1024, 256),
    "2048to512-7px": (128 * 7**2, 512, 2048),
    "512to2048-7px": (128 * 7**2, 2048, 512),
}


def _peers(
    direction: str, m: int, n: int, k: int, block: int, density: float
) -> dict[str, Callable[[], Tensor]]:
    x, weight, blocks, masked = draw(m, n, k, block, density, "cuda", torch.bfloat16)
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    cut = (weight, blocks, [block, block])
    backward = torch.ops.rtk.block_matmul_bwd_weight
    if direction == "fwd":
        bsr = masked.to_sparse_bsr((block, block))
        x_t = x.t()
        return {
            "rtk": lambda: block_matmul(x, *cut, density=density),
            "dense": lambda: x @ masked.t(),
            "bsr": lambda: (bsr @ x_t).t(),
        }
    if direction == "bwd_input":
        return {
            "rtk": lambda: torch.ops.rtk.block_matmul_bwd_input(grad, *cut, density),
            "dense": lambda: grad @ masked,
        }
    if direction == "bwd_weight":
        return {
            "rtk": lambda: backward(grad, x, *cut, [True, False], density)[0],
            "dense": lambda: grad.t() @ x,
        }
    return {
        "rtk": lambda: backward(grad, x, weight, blocks.float(), cut[2], [False, True], density)[0],
        "dense": lambda: grad.t() @ x,
    }


@needs_gpu
@pytest.mark.parametrize("peer", ["rtk", "dense", "bsr"])
@pytest.mark.parametrize("direction", ["fwd", "bwd_input", "bwd_weight", "bwd_score"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", LAYERS)
def bench_block_matmul_gpu(name, block, density, direction, peer, measure, benchmark):
    m, n, k = LAYERS[name]
    if n % block or k % block or round(density * (n // block) * (k // block)) == 0:
        pytest.skip("no block of this size is on")
    if peer == "bsr" and (direction != "fwd" or name != "4096"):
        pytest.skip("torch's BSR is compared with the square product")
    benchmark.group = f"block_matmul {direction} {name}, {block}-blocks, density {density}"
    peers = _peers(direction, m, n, k, block, density)
    share = 1.0 if direction == "bwd_score" else density  # scores are of all blocks
    result = measure(peers[peer], flops=round(2 * m * n * k * share), device="cuda")
    if direction != "bwd_score":
        wanted = peers["dense"]().float()
        if direction == "bwd_weight":
            wanted = wanted * (result != 0)
        error = (result.float() - wanted).norm() / wanted.norm()
        assert error < 1e-2
