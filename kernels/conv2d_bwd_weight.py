"""The weight gradient of a convolution, of live blocks only, as an implicit GEMM.

N C H W input, K output channels, R S filter, OH OW output; activations N H W C in memory. A block
is one tap of 64 output and 64 input channels, as in `live_tiles`; the sum runs over the pixels of
the output in the order n, oh, ow, STEP of them at a time.

`plan` gathers the live blocks of 64 output channels in groups of SLOTS, which share the upstream
gradient that they read: a product of 64 rows and 64 SLOTS columns, each slot with its own tap and
input channels. `multiply` deals the steps of all groups out to the programs in equal runs
(stream-K, Osama et al., PPoPP 2023): a program ends one group and begins the next, so the work is
even however many groups are alive, which the host never knows. The sums lie in `parts`, one or more
for a group, and `combine` adds them, always in the same order. Program p writes its part of group g
at p + g, a place of its own: in the order of the work, p or g or both grow from part to part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # channels of a block, both ways
FEWEST = 8  # steps that a program takes: a part costs as much to write as three
PIECE = 4  # rows of a block that a program of `combine` adds
TOGETHER = 16  # parts that it loads at a time

# Sizes that change from layer to layer and say nothing about alignment: one compilation for all.
SIZES = ["batch", "height", "width", "out_height", "out_width", "c_units", "k_units"]


@triton.jit
def _ones(word):
    """Count the bits of unsigned 64-bit words."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return ((word + (word >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def plan(
    live,
    block_at,
    place_of,
    group_count,
    TAPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    MOST_TAPS: tl.constexpr,
    MOST_BLOCKS: tl.constexpr,
):
    """Number the live blocks; one program for each row, the blocks of 64 output channels.

    Block (row, tap, chunk of input channels) has the number (row * TAPS + tap) * CHUNKS + chunk.
    block_at[place] is the block at place = group * SLOTS + slot, or -1 where the last group of a
    row has no more; place_of[block] the other way, -1 where the block is dead. MOST_ are the sizes
    rounded up to powers of two.
    """
    row = tl.program_id(0)
    rows = tl.arange(0, MOST_ROWS)
    taps = tl.arange(0, MOST_TAPS)
    before = (rows < row)[:, None] & (taps < TAPS)[None, :]
    words = tl.load(live + (rows * TAPS)[:, None] + taps[None, :], mask=before, other=0)
    words = words.to(tl.uint64, bitcast=True)
    if CHUNKS < 64:
        words &= (1 << CHUNKS) - 1
    groups = (tl.sum(_ones(words), 1) + SLOTS - 1) // SLOTS
    first = tl.sum(groups, 0)

    block = tl.arange(0, MOST_BLOCKS)
    inside = block < TAPS * CHUNKS
    word = tl.load(live + row * TAPS + block // CHUNKS, mask=inside, other=0)
    bit = ((word >> (block % CHUNKS).to(tl.int64)) & 1).to(tl.int32)
    place = first * SLOTS + tl.cumsum(bit, 0) - bit
    tl.store(place_of + row * TAPS * CHUNKS + block, tl.where(bit != 0, place, -1), mask=inside)
    tl.store(block_at + place, row * TAPS * CHUNKS + block, mask=bit != 0)

    count = tl.sum(bit, 0)
    used = first + (count + SLOTS - 1) // SLOTS
    empty = first * SLOTS + count + tl.arange(0, SLOTS)
    tl.store(block_at + empty, empty * 0 - 1, mask=empty < used * SLOTS)
    if row == ROWS - 1:
        tl.store(group_count, used)


@triton.jit
def _run(group_count, steps, programs, FEWEST: tl.constexpr):
    """Return how many steps there are, and how many of them each program takes."""
    total = tl.load(group_count).to(tl.int64) * steps
    return total, tl.maximum((total + programs - 1) // programs, FEWEST)


@triton.jit(do_not_specialize=SIZES)
def multiply(
    grad_NHWK,
    x_NHWC,
    block_at,
    group_count,
    parts,
    batch,
    height,
    width,
    out_height,
    out_width,
    c_units,
    k_units,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAPS: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    FEWEST: tl.constexpr,
):
    """Sum the program's run of steps; C is c_units * C_UNIT, which tells how rows are aligned."""
    BLOCK: tl.constexpr = 64
    COLUMNS: tl.constexpr = BLOCK * SLOTS
    FAR: tl.constexpr = -(1 << 24)  # a tap that is outside for every pixel: it reads zeros
    c_size = c_units * C_UNIT
    k_size = k_units * K_UNIT
    pixels = batch * out_height * out_width
    steps = (pixels + STEP - 1) // STEP
    program = tl.program_id(0)
    total, run = _run(group_count, steps, tl.num_programs(0), FEWEST)
    begin = program * run
    end = tl.minimum(begin + run, total)
    if begin >= end:
        return
    first_group = begin // steps
    last_group = (end - 1) // steps

    m = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    slot = column // BLOCK
    lane = column % BLOCK
    # How far one step moves a pixel, before it is carried over the ends of rows and images.
    move_w = STEP % out_width * STRIDE_W
    move_h = STEP // out_width % out_height * STRIDE_H
    move_n = STEP // (out_width * out_height)
    span_w = out_width * STRIDE_W
    span_h = out_height * STRIDE_H
    move_x = ((move_n * height + move_h) * width + move_w) * c_size
    carry_w = (STRIDE_H * width - span_w) * c_size
    carry_h = (height - span_h) * width * c_size

    for group in tl.range(first_group, last_group + 1, num_stages=1):
        # The columns' taps and input channels.
        r = tl.full((COLUMNS,), FAR, tl.int32)
        s = tl.zeros((COLUMNS,), tl.int32)
        c_first = tl.zeros((COLUMNS,), tl.int32)
        row = tl.load(block_at + group * SLOTS) // (TAPS * CHUNKS)
        for i in tl.static_range(SLOTS):
            block = tl.load(block_at + group * SLOTS + i)
            tap = block // CHUNKS % TAPS
            here = (slot == i) & (block >= 0)
            r = tl.where(here, tap // S * DILATION_H, r)
            s = tl.where(here, tap % S * DILATION_W, s)
            c_first = tl.where(here, block % CHUNKS * BLOCK, c_first)
        x_column = ((r * (r >= 0).to(tl.int32)) * width + s) * c_size + c_first + lane
        x_column = tl.max_contiguous(tl.multiple_of(x_column, 8), 8)
        k = row * BLOCK + m
        k_in = k < k_size
        c_in = c_first + lane < c_size

        group_begin = group * steps
        low = tl.maximum(begin - group_begin, 0).to(tl.int32)
        high = tl.minimum(end - group_begin, steps).to(tl.int32)
        pixel = low * STEP + tl.arange(0, STEP)
        w = pixel % out_width * STRIDE_W - PADDING_W
        h = pixel // out_width % out_height * STRIDE_H - PADDING_H
        image = pixel // (out_width * out_height)
        x_row = ((image * height + h) * width + w) * c_size
        grad_tile = grad_NHWK + (pixel * k_size)[None, :] + k[:, None]

        sums = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for step in tl.range(low, high, num_stages=STAGES):
            there = tl.arange(0, STEP) < pixels - step * STEP
            if EVEN_K:
                grad = tl.load(grad_tile, mask=there[None, :], other=0.0)
            else:
                grad = tl.load(grad_tile, mask=there[None, :] & k_in[:, None], other=0.0)
            # As unsigned numbers, those before the first pixel lie behind the last.
            h_tap = (h[:, None] + r[None, :]).to(tl.uint32, bitcast=True)
            w_tap = (w[:, None] + s[None, :]).to(tl.uint32, bitcast=True)
            inside = (h_tap < height.to(tl.uint32)) & (w_tap < width.to(tl.uint32))
            inside &= there[:, None]
            if not EVEN_C:
                inside &= c_in[None, :]
            x = tl.load(x_NHWC + (x_row[:, None] + x_column[None, :]), mask=inside, other=0.0)
            sums = tl.dot(grad, x, sums, input_precision="ieee")

            # The next STEP pixels; counted, as divisions cost more.
            grad_tile += STEP * k_size
            w += move_w
            over = (w >= span_w - PADDING_W).to(tl.int32)
            w -= over * span_w
            x_row += move_x + over * carry_w
            h += move_h + over * STRIDE_H
            over = (h >= span_h - PADDING_H).to(tl.int32)
            h -= over * span_h
            x_row += over * carry_h

        part = parts + (program + group) * (BLOCK * COLUMNS)
        tl.store(part + (m * COLUMNS)[:, None] + column[None, :], sums)


@triton.jit(do_not_specialize=["steps", "programs", "k_size", "c_size"])
def combine(
    parts,
    place_of,
    group_count,
    mask_KCRS,
    out_KCRS,
    steps,
    programs,
    k_size,
    c_size,
    mask_k,
    mask_c,
    mask_r,
    mask_s,
    out_k,
    out_c,
    out_r,
    out_s,
    CHUNKS: tl.constexpr,
    TAPS: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    TOGETHER: tl.constexpr,
    FEWEST: tl.constexpr,
):
    """Add the parts of PIECE rows of one block, mask, and store; dead blocks become 0.

    TOGETHER parts are on their way at a time. mask_k ... out_s are strides in elements.
    """
    BLOCK: tl.constexpr = 64
    COLUMNS: tl.constexpr = BLOCK * SLOTS
    block = tl.program_id(0)
    place = tl.load(place_of + block)
    _, run = _run(group_count, steps, programs, FEWEST)
    group = place // SLOTS
    begin = group.to(tl.int64) * steps
    first = (begin // run).to(tl.int32)
    last = tl.where(place < 0, first - 1, ((begin + steps - 1) // run).to(tl.int32))

    element = tl.arange(0, PIECE * BLOCK)
    m = tl.program_id(1) * PIECE + element // BLOCK
    lane = element % BLOCK
    at = m * COLUMNS + place % SLOTS * BLOCK + lane
    sums = tl.zeros((PIECE * BLOCK,), tl.float32)
    for start in range(first, last + 1, TOGETHER):
        program = start + tl.arange(0, TOGETHER)
        part = parts + ((program + group).to(tl.int64) * (BLOCK * COLUMNS))[:, None]
        values = tl.load(part + at[None, :], mask=(program <= last)[:, None], other=0.0)
        sums += tl.sum(values, 0)

    tap = block // CHUNKS % TAPS
    k = (block // (CHUNKS * TAPS) * BLOCK + m).to(tl.int64)
    c = (block % CHUNKS * BLOCK + lane).to(tl.int64)
    inside = (k < k_size) & (c < c_size)
    if mask_KCRS is not None:
        mask_at = k * mask_k + c * mask_c + tap // S * mask_r + tap % S * mask_s
        mask = tl.load(mask_KCRS + mask_at, mask=inside, other=0)
        if mask_KCRS.dtype.element_ty == tl.int8:
            sums = tl.where(mask != 0, sums, 0.0)
        else:
            sums = tl.where(place >= 0, sums * mask.to(tl.float32), 0.0)
    out_at = k * out_k + c * out_c + tap // S * out_r + tap % S * out_s
    tl.store(out_KCRS + out_at, sums, mask=inside)


@dataclass(frozen=True)
class Config:
    """How the product is cut: blocks of a group, pixels of a step, and what runs it."""

    slots: int
    step: int
    warps: int
    stages: int
    programs: int  # on one multiprocessor at a time


# By how many blocks of a row are expected to live. All are bound by L2: more slots read the
# gradient less often, fewer are better filled. Several programs hide each other's first loads.
CONFIGS = (
    Config(1, 64, 4, 6, 2),
    Config(2, 64, 4, 4, 2),
    Config(4, 64, 8, 5, 1),
)


def choose(blocks: int, density: float) -> Config:
    """Return the Config for rows of so many blocks, of which the share `density` lives."""
    expected = blocks * density
    return CONFIGS[0 if min(blocks, expected) < 1.5 else 1 if expected < 6 else 2]


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _unit(size: int) -> int:
    """Return the largest of 8, 4, 2, 1 that divides `size`: 16 bytes of bf16 are 8 channels."""
    return next(unit for unit in (8, 4, 2, 1) if size % unit == 0)


def constants(
    channels: int,
    k: int,
    r: int,
    s: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: Config,
) -> dict[str, int | bool]:
    """Return what `multiply` is compiled for."""
    return {
        "C_UNIT": _unit(channels),
        "K_UNIT": _unit(k),
        "CHUNKS": triton.cdiv(channels, BLOCK),
        "TAPS": r * s,
        "S": s,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "EVEN_C": channels % BLOCK == 0,
        "EVEN_K": k % BLOCK == 0,
        "SLOTS": config.slots,
        "STEP": config.step,
        "STAGES": config.stages,
        "FEWEST": FEWEST,
    }


def plan_constants(k: int, channels: int, taps: int, slots: int) -> dict[str, int]:
    """Return what `plan` is compiled for."""
    rows, chunks = triton.cdiv(k, BLOCK), triton.cdiv(channels, BLOCK)
    return {
        "TAPS": taps,
        "CHUNKS": chunks,
        "SLOTS": slots,
        "ROWS": rows,
        "MOST_ROWS": triton.next_power_of_2(rows),
        "MOST_TAPS": triton.next_power_of_2(taps),
        "MOST_BLOCKS": triton.next_power_of_2(taps * chunks),
    }


def launch(
    grad: Tensor,
    x: Tensor,
    live: Tensor,
    mask: Tensor | None,
    out: Tensor,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    density: float,
    config: Config | None = None,
) -> None:
    """Fill `out`, (K, C, R, S) of any strides, in fp32.

    `grad` and `x` are dense, in channels_last, and not empty; `live` is dense; `mask` has the
    shape of `out`, broadcast dimensions with stride 0, or is None. None as `config` lets `choose`
    pick, which measures nothing: autotuning cannot run while a CUDA graph is captured.
    """
    (batch, channels, height, width), (k, _, r, s) = x.shape, out.shape
    out_height, out_width = grad.shape[2:]
    rows, blocks = triton.cdiv(k, BLOCK), r * s * triton.cdiv(channels, BLOCK)
    config = config or choose(blocks, density)
    most_groups = rows * triton.cdiv(blocks, config.slots)
    programs = _multiprocessors(x.device) * config.programs
    steps = triton.cdiv(batch * out_height * out_width, config.step)

    block_at = live.new_empty(most_groups * config.slots, dtype=torch.int32)
    place_of = live.new_empty(rows * blocks, dtype=torch.int32)
    group_count = live.new_empty(1, dtype=torch.int32)
    parts = out.new_empty(programs + most_groups, BLOCK * BLOCK * config.slots)
    compiled_for = constants(channels, k, r, s, stride, padding, dilation, config)
    shared = {name: compiled_for[name] for name in ("CHUNKS", "TAPS", "S", "SLOTS", "FEWEST")}
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.int8)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        plan[(rows,)](
            live,
            block_at,
            place_of,
            group_count,
            **plan_constants(k, channels, r * s, config.slots),
        )
        multiply[(programs,)](
            grad,
            x,
            block_at,
            group_count,
            parts,
            batch,
            height,
            width,
            out_height,
            out_width,
            channels // _unit(channels),
            k // _unit(k),
            **compiled_for,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        combine[(rows * blocks, BLOCK // PIECE)](
            parts,
            place_of,
            group_count,
            mask,
            out,
            steps,
            programs,
            k,
            channels,
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *out.stride(),
            **shared,
            PIECE=PIECE,
            TOGETHER=TOGETHER,
        )
