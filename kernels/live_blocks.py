"""Which blocks of a weight (N outputs, K inputs) are not all zero."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 32  # of a block, that a program looks at together


@triton.jit
def live_blocks(
    weight_NK,
    out,
    columns,
    weight_n,
    weight_k,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Look at one block: out[its number] becomes whether any weight of it is not 0."""
    number = tl.program_id(0)
    n = (number // columns * BLOCK + tl.arange(0, ROWS)).to(tl.int64)
    k = (number % columns * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at = weight_NK + n[:, None] * weight_n + k[None, :] * weight_k
    found = tl.zeros((ROWS, BLOCK), tl.int32)
    for _ in tl.static_range(BLOCK // ROWS):
        found = found | (tl.load(at) != 0).to(tl.int32)
        at += ROWS * weight_n
    tl.store(out + number, tl.max(tl.max(found, 1), 0))
