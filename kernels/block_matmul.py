"""Products with a block-sparse weight: forward, input gradient, weight and block-score gradients.

M rows, N outputs, K inputs; the weight is (N, K) in blocks of bn x bk. A *tile* is what one program
multiplies by at a time: one block, or R x C of them where a mask is so full that wider tiles pay
(their dead blocks are then zeros of a prepared copy).

`plan` lists the live tiles of every row of tiles, the longest row first, so that short programs
come last. `multiply` walks such a list: its loop holds no condition, which would undo the
pipelining. An input gradient is the same product along the columns of the mask. Tiles are fetched
by TMA: what lies outside of a tensor reads as 0. With EARLY (compute capability 9 and up) a kernel
is launched while the one before it still runs: `prepare` works beside `plan`, and the product waits
for both.

`plan_weight` gathers SLOTS blocks of a row of blocks, which share the upstream gradient they read;
`multiply_weight` sums over M. A block-score gradient, sum(W * dW), is taken while dW is in
registers. Few blocks and many rows are split along M, and `combine` adds the parts in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PIECE = 8  # rows of a block that a program of `combine` adds
PREPARED = (32, 128)  # rows and columns of the weight that a program of `prepare` scales


@triton.jit
def _any_live(mask, row, column, rows, columns, row_stride, column_stride, R, C):
    """Return whether any block of the tile at (row, column) is on; both broadcast."""
    found = (row + column) < 0
    for i in tl.static_range(R):
        for j in tl.static_range(C):
            r = row * R + i
            c = column * C + j
            inside = (r < rows) & (c < columns)
            value = tl.load(mask + r * row_stride + c * column_stride, mask=inside, other=0)
            found = found | (value != 0)
    return found


@triton.jit
def plan(
    mask,
    entries,
    counts,
    order,
    rows,
    columns,
    row_stride,
    column_stride,
    tile_rows,
    R: tl.constexpr,
    C: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """List the live tiles of one row of tiles, and find its rank among the rows.

    entries[row, :] begins with the steps along the sum that its live tiles are cut into, PIECES
    for each, in order; counts[row] is how many they are; order[rank] is the row. CAPACITY is a
    power of two, no less than a row has tiles.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, CAPACITY)
    live = _any_live(mask, row, column, rows, columns, row_stride, column_stride, R, C)
    bit = live.to(tl.int32)
    count = tl.sum(bit, 0)
    place = (row * CAPACITY + tl.cumsum(bit, 0) - bit) * PIECES
    for i in tl.static_range(PIECES):
        tl.store(entries + place + i, column * PIECES + i, mask=live)
    tl.store(counts + row, count * PIECES)

    rank = 0
    for first in range(0, tile_rows, CHUNK):
        other = first + tl.arange(0, CHUNK)
        any_live = _any_live(
            mask, other[:, None], column[None, :], rows, columns, row_stride, column_stride, R, C
        )
        theirs = tl.sum(any_live.to(tl.int32), 1)
        before = (theirs > count) | ((theirs == count) & (other < row))
        rank += tl.sum((before & (other < tile_rows)).to(tl.int32), 0)
    tl.store(order + rank, row)


@triton.jit
def prepare(
    weight,
    mask,
    out,
    k_size,
    row_stride,
    column_stride,
    weight_n,
    weight_k,
    out_n,
    out_k,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FILL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Scale and cast ROWS x COLUMNS weights; ROWS divides BN. Blocks that are off are not read: 0
    with FILL, else left alone.
    """
    if EARLY:
        gdc_launch_dependents()
    n_first = tl.program_id(0) * ROWS
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < k_size
    scale_at = mask + n_first // BN * row_stride + k // BK * column_stride
    scale = tl.load(scale_at, mask=inside, other=0)
    live = scale != 0
    n = (n_first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at_k = k.to(tl.int64)[None, :]
    values = tl.load(weight + n * weight_n + at_k * weight_k, mask=live[None, :], other=0.0)
    values = values.to(tl.float32)
    if mask.dtype.element_ty != tl.int8:
        values *= scale.to(tl.float32)[None, :]
    if FILL:
        live = inside
    tl.store(out + n * out_n + at_k * out_k, values, mask=live[None, :])
    if EARLY:
        gdc_wait()  # so that who waits for this kernel has waited for the one before, too


@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "together"])
def multiply(
    x_desc,
    w_desc,
    out_desc,
    entries,
    counts,
    order,
    tiles_m,
    tiles_n,
    together,
    CAPACITY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of x @ w^T (or, unless TRANSPOSED, of x @ w).

    CAPACITY is how many steps a row of `entries` has room for. `together` tiles along M run side by
    side, so that the programs of a wave share what they read.
    """
    tile = tl.program_id(0)
    first_m = tile // (together * tiles_n) * together
    height = tl.minimum(tiles_m - first_m, together)
    within = tile % (together * tiles_n)
    m = (first_m + within % height) * BLOCK_M
    if EARLY:
        gdc_wait()
    row = tl.load(order + within // height)
    steps = tl.load(counts + row)
    mine = entries + row * CAPACITY

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The entry is loaded an iteration ahead: as an address that another load waits for, it would
    # be pipelined too and take half of the stages.
    entry = tl.load(mine)
    for step in tl.range(0, steps, num_stages=STAGES):
        depth = entry * STEP
        entry = tl.load(mine + tl.minimum(step + 1, steps - 1))
        x = x_desc.load([m, depth])
        if TRANSPOSED:
            w = w_desc.load([row * BLOCK_N, depth]).T
        else:
            w = w_desc.load([depth, row * BLOCK_N])
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    out_desc.store([m, row * BLOCK_N], sums.to(out_desc.dtype))


@triton.jit
def plan_weight(
    mask,
    block_at,
    group_counts,
    rows,
    columns,
    row_stride,
    column_stride,
    ALL: tl.constexpr,
    SLOTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Number the blocks of one row of blocks: the groups to compute first, then the dead ones.

    block_at[group * SLOTS + slot] is row * columns + column, or -1 where a row has no more.
    group_counts are how many groups are to be computed (with ALL: all), and how many there are.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, CAPACITY)
    live_before = 0
    live_total = 0
    dead_before = 0
    dead_total = 0
    for first in range(0, rows, CHUNK):
        other = first + tl.arange(0, CHUNK)
        live = _any_live(
            mask, other[:, None], column[None, :], rows, columns, row_stride, column_stride, 1, 1
        )
        if ALL:
            live = (other < rows)[:, None] & (column < columns)[None, :]
        count = tl.sum(live.to(tl.int32), 1)
        alive = (count + SLOTS - 1) // SLOTS
        dead = tl.where(other < rows, (columns - count + SLOTS - 1) // SLOTS, 0)
        live_total += tl.sum(alive, 0)
        dead_total += tl.sum(dead, 0)
        live_before += tl.sum(tl.where(other < row, alive, 0), 0)
        dead_before += tl.sum(tl.where(other < row, dead, 0), 0)

    inside = column < columns
    on = _any_live(mask, row, column, rows, columns, row_stride, column_stride, 1, 1)
    if ALL:
        on = inside
    for kind in tl.static_range(2):
        chosen = on if kind == 0 else inside & ~on
        first_group = live_before if kind == 0 else live_total + dead_before
        bit = chosen.to(tl.int32)
        count = tl.sum(bit, 0)
        mine = block_at + first_group * SLOTS
        tl.store(mine + tl.cumsum(bit, 0) - bit, row * columns + column, mask=chosen)
        empty = count + tl.arange(0, SLOTS)
        last = (count + SLOTS - 1) // SLOTS * SLOTS
        tl.store(mine + empty, empty * 0 - 1, mask=empty < last)
    if row == 0:
        tl.store(group_counts, live_total)
        tl.store(group_counts + 1, live_total + dead_total)


@triton.jit
def _finish(
    sums,
    k,
    n,
    inside_K,
    scale_K,
    weight,
    out,
    k_size,
    weight_n,
    weight_k,
    SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the sums, scaled, and return what each column of the weight adds to its score.

    At most 32 outputs at a time: the weight that they meet needs registers, too.
    """
    if WIDTH > 32:
        HALF: tl.constexpr = WIDTH // 2
        left, right = sums.reshape(sums.shape[0], 2, HALF).permute(0, 2, 1).split()
        first = _finish(
            left, k, n, inside_K, scale_K, weight, out, k_size, weight_n, weight_k,
            SCORES, WEIGHT, HALF,
        )  # fmt: skip
        second = _finish(
            right, k, n + HALF, inside_K, scale_K, weight, out, k_size, weight_n, weight_k,
            SCORES, WEIGHT, HALF,
        )  # fmt: skip
        return first + second
    else:
        n_tile = (n + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
        inside = inside_K[:, None] & (n_tile >= 0)
        score_K = k * 0.0
        if SCORES:
            at = n_tile * weight_n + k[:, None] * weight_k
            values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            score_K = tl.sum(sums * values, 1)
        if WEIGHT:
            scaled = tl.where((scale_K != 0)[:, None], sums * scale_K[:, None], 0.0)
            tl.store(out + n_tile * k_size + k[:, None], scaled, mask=inside)
        return score_K


@triton.jit
def _finish_slots(
    sums,
    block_K,
    n,
    mask,
    weight,
    out,
    scores,
    columns,
    k_size,
    weight_n,
    weight_k,
    row_stride,
    column_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLOTS: tl.constexpr,
    SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store SLOTS blocks, one after the other along the rows of `sums`; block_K is -1 for none."""
    inside_K = block_K >= 0
    block_K = tl.where(inside_K, block_K, 0)
    column_K = block_K % columns
    if SPLIT:
        scale_K = tl.full((BK * SLOTS,), 1.0, tl.float32)
    else:
        scale_at = block_K // columns * row_stride + column_K * column_stride
        scale_K = tl.load(mask + scale_at, mask=inside_K, other=0).to(tl.float32)
    lane = tl.arange(0, BK * SLOTS) % BK
    score_K = _finish(
        sums, column_K * BK + lane, n, inside_K, scale_K, weight, out, k_size, weight_n, weight_k,
        SCORES, WEIGHT, BN,
    )  # fmt: skip
    if SCORES:
        score = tl.sum(score_K.reshape(SLOTS, BK), 1)
        block = tl.max(tl.where(inside_K, block_K, -1).reshape(SLOTS, BK), 1)
        tl.store(scores + block, score, mask=block >= 0)


@triton.jit(do_not_specialize=["m_size", "span", "out_part", "score_part"])
def multiply_weight(
    grad_MN,
    x_MK,
    weight,
    mask,
    block_at,
    group_counts,
    out,
    scores,
    m_size,
    span,
    out_part,
    score_part,
    columns,
    k_size,
    grad_m,
    grad_n,
    x_m,
    x_k,
    weight_n,
    weight_k,
    row_stride,
    column_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sum SLOTS blocks of grad^T @ x over `span` rows, the second axis of the grid.

    With SPLIT `out` and `scores` hold one part after the other, out_part and score_part elements
    each, unscaled; without, what is stored is final, and dead blocks get their zeros. The product
    is x^T @ grad: a warpgroup needs 64 rows. With GATHER these are the columns of several slots,
    fetched through pointers, else grad_MN and x_MK are TMA descriptors and each slot (at most two)
    is a product of its own. EVEN: STEP divides m_size, and with it every span.
    """
    WIDTH: tl.constexpr = BK * SLOTS
    group = tl.program_id(0)
    if EARLY:
        gdc_wait()
    if group >= tl.load(group_counts + 1):
        return
    slots = block_at + group * SLOTS
    first_block = tl.load(slots)  # a group has at least one
    n = first_block // columns * BN
    column = tl.arange(0, WIDTH)
    block_K = tl.load(slots + column // BK)
    k = tl.where(block_K >= 0, block_K, first_block) % columns * BK + column % BK
    k = tl.max_contiguous(tl.multiple_of(k, ALIGNED), ALIGNED)
    if group >= tl.load(group_counts):
        if WEIGHT and not SPLIT:
            n_tile = (n + tl.arange(0, BN)).to(tl.int64)[None, :]
            zeros = tl.zeros((WIDTH, BN), tl.float32)
            tl.store(out + n_tile * k_size + k[:, None], zeros, mask=(block_K >= 0)[:, None])
        return

    low = tl.multiple_of(tl.program_id(1) * span, STEP)
    high = tl.minimum(low + span, m_size)
    part = tl.program_id(1).to(tl.int64)
    out += part * out_part
    scores += part * score_part
    if GATHER:
        m = tl.arange(0, STEP)
        m_first = (low + m).to(tl.int64)
        grad_tile = grad_MN + m_first[:, None] * grad_m + (n + tl.arange(0, BN))[None, :] * grad_n
        x_tile = x_MK + m_first[None, :] * x_m + k[:, None] * x_k
        sums = tl.zeros((WIDTH, BN), tl.float32)
        for first in tl.range(low, high, STEP, num_stages=STAGES):
            if EVEN:
                x = tl.load(x_tile)
                grad = tl.load(grad_tile)
            else:
                there = m < high - first
                x = tl.load(x_tile, mask=there[None, :], other=0.0)
                grad = tl.load(grad_tile, mask=there[:, None], other=0.0)
            sums = tl.dot(x, grad, sums, input_precision=PRECISION)
            x_tile += STEP * x_m
            grad_tile += STEP * grad_m
        _finish_slots(
            sums, block_K, n, mask, weight, out, scores, columns, k_size, weight_n, weight_k,
            row_stride, column_stride, BN, BK, SLOTS, SCORES, WEIGHT, SPLIT,
        )  # fmt: skip
    else:
        second_block = tl.load(slots + SLOTS - 1)
        k_first = first_block % columns * BK
        k_second = tl.where(second_block >= 0, second_block, first_block) % columns * BK
        sums = tl.zeros((BK, BN), tl.float32)
        others = tl.zeros((BK, BN), tl.float32)
        for first in tl.range(low, high, STEP, num_stages=STAGES):
            grad = grad_MN.load([first, n])
            sums = tl.dot(x_MK.load([first, k_first]).T, grad, sums, input_precision=PRECISION)
            if SLOTS == 2:
                x = x_MK.load([first, k_second])
                others = tl.dot(x.T, grad, others, input_precision=PRECISION)
        none = tl.zeros((BK,), tl.int32)
        _finish_slots(
            sums, none + first_block, n, mask, weight, out, scores, columns, k_size, weight_n,
            weight_k, row_stride, column_stride, BN, BK, 1, SCORES, WEIGHT, SPLIT,
        )  # fmt: skip
        if SLOTS == 2:
            _finish_slots(
                others, none + second_block, n, mask, weight, out, scores, columns, k_size,
                weight_n, weight_k, row_stride, column_stride, BN, BK, 1, SCORES, WEIGHT, SPLIT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def combine(
    parts,
    mask,
    out,
    count,
    part,
    columns,
    k_size,
    row_stride,
    column_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add the `count` parts of PIECE rows of a block in their order, scale and store them."""
    row = tl.program_id(0) // columns
    column = tl.program_id(0) % columns
    scale = tl.load(mask + row * row_stride + column * column_stride).to(tl.float32)
    n = (row * BN + tl.program_id(1) * PIECE + tl.arange(0, PIECE)).to(tl.int64)
    at = n[:, None] * k_size + (column * BK + tl.arange(0, BK))[None, :]
    sums = tl.zeros((PIECE, BK), tl.float32)
    parts += at
    for _ in tl.range(0, tl.where(scale != 0, count, 0), num_stages=4):
        sums += tl.load(parts)
        parts += part
    tl.store(out + at, tl.where(scale != 0, sums * scale, 0.0))
