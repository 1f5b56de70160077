"""The product with live blocks only, as a path that masked layers can take.

N outputs, K inputs, M rows. Weight and mask are (N, K); `blocks` are `live_blocks` of either. The
operators run without autograd and autocast: what calls them has both behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.ops._registry import ops
from rtk.ops.live_blocks import live_blocks
from rtk.ops.prepare_weight import prepare_now

# By path, the outputs and inputs of a block; the largest first.
BLOCK_PATHS = {"blocks128": 128, "blocks64": 64, "blocks32": 32}


def why_not_blocks(path: str, outputs: int, inputs: int) -> str | None:
    """Return why a weight of these sizes cannot take `path`, or None where it can."""
    size = BLOCK_PATHS[path]
    if outputs % size or inputs % size or not outputs or not inputs:
        return f"its {outputs} outputs and {inputs} inputs are no multiples of {size}"
    return None


def blocks_of(path: str, weight: Tensor) -> Tensor:
    """Return the blocks of a weight or a mask, (N, K) or a 1x1 filter's (N, K, 1, 1)."""
    return live_blocks(weight.flatten(1), BLOCK_PATHS[path])


def multiply(path: str, blocks: Tensor, x: Tensor, weight: Tensor, density: float) -> Tensor:
    """Return x (..., K) times the weight, (..., N)."""
    return _run("block_matmul", x, weight, blocks, [BLOCK_PATHS[path]] * 2, density)


def bwd_input(path: str, blocks: Tensor, grad: Tensor, weight: Tensor, density: float) -> Tensor:
    """Return the gradient of x, (..., K), of that of the result, (..., N)."""
    return _run("block_matmul_bwd_input", grad, weight, blocks, [BLOCK_PATHS[path]] * 2, density)


def bwd_weight(
    path: str,
    blocks: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    density: float,
) -> Tensor:
    """Return the gradient of the weight in its dtype, (N, K): exactly 0 where `mask` (bool) is.

    Beside grad and x stands the master, which only says the dtype. `blocks` are the mask's: a
    weight that is zero but kept has a gradient.
    """
    size = [BLOCK_PATHS[path]] * 2
    given = grad, x, weight, blocks, size, [True, False], density
    [dense] = _run("block_matmul_bwd_weight", *given)
    return prepare_now(dense, mask, weight.dtype, False)


def why_not_fast(x: Tensor, weight: Tensor, path: str) -> str | None:
    """Return why no kernel would multiply x by the weight, both in one dtype, or None."""
    blocks = torch.ones([n // BLOCK_PATHS[path] for n in weight.shape], device=weight.device) > 0
    given = x, weight, blocks, [BLOCK_PATHS[path]] * 2, 1.0
    backend = ops["block_matmul"].choose(*given).backend
    return f"the backend would be {backend}" if backend == "reference" else None


def _run(name: str, *args: object) -> Tensor:  # or a list of them
    op = ops[name]
    op.check(*args)
    result: Tensor = op.choose(*args).run(*args)
    return result
