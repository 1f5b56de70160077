"""fused_conv2d as an implicit GEMM: pixels times output channels, summed over filter taps.

N C H W input, K output channels, R S filter, OH OW output; all activations N H W C in memory, the
weight K R S C. M counts output pixels in the order n, oh, ow.

Under upsample=2 an output pixel sees only the taps whose zeros-between row and column carry an
input pixel. Which ones depends on the parities of oh and ow, so the pixels are split into four
classes (the grid's second axis); inside a class it is an ordinary convolution with stride 1 over
every second tap, and no multiplication by a put-in zero is ever done.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes that change from layer to layer and say nothing about alignment: one compilation for all.
SIZES = ["batch", "height", "width", "out_height", "out_width", "c_units", "k_units", "chunks"]


@triton.jit
def _finish(
    sums,
    n_first,
    k_size,
    at_M,
    ok_M,
    residual_at_M,
    residual_ok_M,
    bits_at_M,
    bias_K,
    residual_NHWK,
    gate_NHWK,
    out_NHWK,
    positive_NHW,
    RELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add, clip, gate and store the sums, 64 channels (128 bytes) at a time to save registers."""
    if BLOCK_N > 64:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = sums.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _finish(
                left if half == 0 else right,
                n_first + half * HALF,
                k_size,
                at_M,
                ok_M,
                residual_at_M,
                residual_ok_M,
                bits_at_M,
                bias_K,
                residual_NHWK,
                gate_NHWK,
                out_NHWK,
                positive_NHW,
                RELU,
                EVEN_K,
                BLOCK_M,
                HALF,
            )
    else:
        n = n_first + tl.arange(0, BLOCK_N)
        if bias_K is not None:
            sums += tl.load(bias_K + n, mask=n < k_size, other=0.0).to(tl.float32)[None, :]
        if residual_NHWK is not None:
            residual = residual_NHWK + residual_at_M[:, None] + n[None, :]
            inside = (
                residual_ok_M[:, None] if EVEN_K else residual_ok_M[:, None] & (n < k_size)[None, :]
            )
            sums += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            sums = tl.where(sums < 0, 0.0, sums)  # and not a maximum, which would lose a NaN
        at = at_M[:, None] + n[None, :]
        inside = ok_M[:, None] if EVEN_K else ok_M[:, None] & (n < k_size)[None, :]
        # The bits of 64 channels of a pixel are one number; `pack_positive` tells their order.
        lane = n % 64
        shift = (lane % 8 // 2 * 16 + lane % 2 * 8 + lane // 8).to(tl.int64)
        bits_at = bits_at_M + n_first // 64
        bits_ok = ok_M & (n_first < k_size)
        if gate_NHWK is not None:
            if gate_NHWK.dtype.element_ty == tl.int64:
                word = tl.load(gate_NHWK + bits_at, mask=bits_ok, other=0)
                is_open = ((word[:, None] >> shift[None, :]) & 1) != 0
            else:
                is_open = tl.load(gate_NHWK + at, mask=inside, other=0.0) > 0
            sums = tl.where(is_open, sums, 0.0)
        out = sums.to(out_NHWK.dtype.element_ty)
        tl.store(out_NHWK + at, out, mask=inside)
        if positive_NHW is not None:
            bit = tl.full((BLOCK_N,), 1, tl.int64) << shift
            positive = (out > 0) & (n < k_size)[None, :]
            word = tl.sum(tl.where(positive, bit[None, :], 0), 1)
            tl.store(positive_NHW + bits_at, word, mask=bits_ok)


@triton.jit(do_not_specialize=SIZES)
def fused_conv2d_kernel(
    x_NHWC,
    w_KRSC,
    bias_K,
    residual_NHWK,
    gate_NHWK,
    out_NHWK,
    positive_NHW,
    batch,
    height,
    width,
    out_height,
    out_width,
    c_units,
    k_units,
    chunks,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of the output; RESIDUAL_STRIDE is 0 without a residual.

    C is c_units * C_UNIT, which tells the compiler how rows are aligned; K likewise. `chunks` is
    ceil(C / BLOCK_C). A gate of int64 and `positive_NHW` hold a bit for each of 64 channels.
    """
    c_size = c_units * C_UNIT
    k_size = k_units * K_UNIT
    POINTWISE: tl.constexpr = R == 1 and S == 1 and PADDING == 0
    # The most taps of a class along each side; bit i * MAX_S + j of `seen` is tap (i, j).
    MAX_R: tl.constexpr = (R + UPSAMPLE - 1) // UPSAMPLE
    MAX_S: tl.constexpr = (S + UPSAMPLE - 1) // UPSAMPLE
    BITS: tl.constexpr = MAX_R * MAX_S <= 32

    # The class: its first tap, its first output pixel, and the input pixel that these two meet.
    if UPSAMPLE == 2:
        r_first = tl.program_id(1) // 2
        s_first = tl.program_id(1) % 2
        oh_first = (r_first + PADDING) % 2
        ow_first = (s_first + PADDING) % 2
        h_first = (oh_first + r_first - PADDING) // 2  # even, so this is exact where negative
        w_first = (ow_first + s_first - PADDING) // 2
        rows = (out_height - oh_first + 1) // 2
        columns = (out_width - ow_first + 1) // 2
        taps_s = (S - s_first + 1) // 2
        steps = ((R - r_first + 1) // 2) * taps_s * chunks
    else:
        r_first = 0
        s_first = 0
        oh_first = 0
        ow_first = 0
        h_first = -PADDING
        w_first = -PADDING
        rows = out_height
        columns = out_width
        taps_s = S
        steps = R * S * chunks

    pixels = batch * rows * columns
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    tiles_n = tl.cdiv(k_size, BLOCK_N)
    tile = tl.program_id(0)
    if UPSAMPLE == 2:
        # The grid is as long as the largest class.
        if tile >= tiles_m * tiles_n:
            return
    # GROUP rows of tiles at a time, so that blocks that run together share their inputs in L2.
    group = tile // (GROUP * tiles_n)
    group_rows = min(tiles_m - group * GROUP, GROUP)
    in_group = tile % (GROUP * tiles_n)
    m = (group * GROUP + in_group % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_first = (in_group // group_rows) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)

    # Rows past the end repeat the last pixel and channels past the end the first: no mask is
    # needed to load them, and they are not stored.
    m_in = tl.minimum(m, pixels - 1)
    n_in = n if EVEN_K else tl.where(n < k_size, n, 0)
    c = tl.arange(0, BLOCK_C)

    PLAIN: tl.constexpr = POINTWISE and STRIDE == 1 and UPSAMPLE == 1
    if PLAIN:
        x_rows = x_NHWC + m_in.to(tl.int64) * c_size
    else:
        column = m_in % columns
        row = (m_in // columns) % rows
        image = m_in // (columns * rows)
        h = row * STRIDE + h_first
        w = column * STRIDE + w_first
        x_rows = x_NHWC + ((image.to(tl.int64) * height + h) * width + w) * c_size
    x_tile = x_rows[:, None] + c[None, :]
    w_tile = w_KRSC + (n_in * (R * S * c_size))[None, :] + c[:, None]

    if not POINTWISE and BITS:
        seen = tl.zeros((BLOCK_M,), tl.int32)
        for i in tl.static_range(MAX_R):
            for j in tl.static_range(MAX_S):
                there = (h + i >= 0) & (h + i < height) & (w + j >= 0) & (w + j < width)
                seen |= there.to(tl.int32) << (i * MAX_S + j)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i = 0
    j = 0
    c_start = 0
    for _ in tl.range(0, steps, num_stages=STAGES):
        if POINTWISE:
            x_at = c_start
            w_at = c_start
        else:
            x_at = (i * width + j) * c_size + c_start
            w_at = ((r_first + i * UPSAMPLE) * S + s_first + j * UPSAMPLE) * c_size + c_start
        if POINTWISE and EVEN_C:
            x = tl.load(x_tile + x_at)
        elif POINTWISE:
            x = tl.load(x_tile + x_at, mask=c[None, :] < c_size - c_start, other=0.0)
        else:
            if BITS:
                there = (seen & (1 << (i * MAX_S + j))) != 0
            else:
                there = (h + i >= 0) & (h + i < height) & (w + j >= 0) & (w + j < width)
            if EVEN_C:
                x = tl.load(x_tile + x_at, mask=there[:, None], other=0.0)
            else:
                inside = there[:, None] & (c[None, :] < c_size - c_start)
                x = tl.load(x_tile + x_at, mask=inside, other=0.0)
        if EVEN_C:
            weight = tl.load(w_tile + w_at)
        else:
            weight = tl.load(w_tile + w_at, mask=c[:, None] < c_size - c_start, other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")

        # The next chunk of channels, else the next tap; counted, as a division costs more.
        c_start += BLOCK_C
        if not POINTWISE:
            over = (c_start >= c_size).to(tl.int32)
            c_start = tl.where(over != 0, 0, c_start)
            j += over
            over = (j >= taps_s).to(tl.int32)
            j = tl.where(over != 0, 0, j)
            i += over

    # Offsets of the pixels, and of the residual's pixel where it has its own grid.
    if UPSAMPLE == 2 or RESIDUAL_STRIDE == 2:
        ow = (m_in % columns) * UPSAMPLE + ow_first
        oh = ((m_in // columns) % rows) * UPSAMPLE + oh_first
        picture = m_in // (columns * rows)
        pixel = (picture * out_height + oh) * out_width + ow
    else:
        pixel = m_in
    m_ok = m < pixels
    at = pixel.to(tl.int64) * k_size
    residual_at = at
    residual_ok = m_ok
    if RESIDUAL_STRIDE == 2:
        small_height = (out_height + 1) // 2
        small_width = (out_width + 1) // 2
        small = (picture * small_height + oh // 2) * small_width + ow // 2
        residual_at = small.to(tl.int64) * k_size
        residual_ok = m_ok & (oh % 2 == 0) & (ow % 2 == 0)
    _finish(
        sums,
        n_first,
        k_size,
        at,
        m_ok,
        residual_at,
        residual_ok,
        pixel.to(tl.int64) * ((k_size + 63) // 64),
        bias_K,
        residual_NHWK,
        gate_NHWK,
        out_NHWK,
        positive_NHW,
        RELU,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
    )


@dataclass(frozen=True)
class Config:
    """How a shape is cut: the tile of the output, the depth of a step, and what runs it."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Gpu:
    """What the choice of a Config needs to know of a GPU; the defaults are an H100's and H200's."""

    multiprocessors: int = 132
    shared: int = 227 * 1024


@cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":  # Triton's interpreter
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin)


# (block_m, block_n, warps, stages); 64 channels a step. The first two suit deep sums, the small
# ones small outputs, and two stages with several blocks a multiprocessor suit 1x1 filters.
_TILES = (
    (128, 256, 8, 3),
    (256, 128, 8, 3),
    (128, 128, 4, 3),
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (64, 256, 8, 3),
    (64, 256, 8, 2),
    (256, 64, 8, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (64, 128, 4, 4),
    (64, 128, 4, 2),
    (64, 64, 4, 4),
    (64, 64, 4, 2),
    (128, 32, 4, 4),
    (128, 16, 4, 4),
)


def candidates(channels: int, k: int, gpu: Gpu | None = None) -> list[Config]:
    """Return the Configs worth timing for C and K channels: those that are not mostly padding."""
    block_c = 64 if channels > 32 else 32 if channels > 16 else 16
    widest = max(16, triton.next_power_of_2(k))
    shared = (gpu or Gpu()).shared
    found = [
        Config(m, n, block_c, warps, stages)
        for m, n, warps, stages in _TILES
        if n <= widest and stages * (m + n) * block_c * 2 <= shared
    ]
    # A tile of fewer than 64 channels holds them all, because their bits share a number.
    return [config for config in found if config.block_n >= min(widest, 64)]


def cost(
    config: Config, pixels: int, channels: int, k: int, taps: float, reads: int, gpu: Gpu
) -> float:
    """Estimate the cycles that a convolution takes under `config`.

    A step takes as long as its product (2048 multiply-adds a cycle at best, less where the tile is
    narrow) or its loads (some 40 bytes a cycle from L2); the epilogue moves some 20 bytes a cycle.
    The multiprocessor with the most tiles is the last to finish. What is not hidden behind another
    block on the same multiprocessor: the latency of the first loads, and in the epilogue one for
    each 64 channels that it reads. The constants are an H200's, rounded.

    Args:
        pixels: N * OH * OW.
        taps: filter taps that an output pixel sees, on average.
        reads: how many tensors of the output's size the epilogue reads.
    """
    m, n, depth = config.block_m, config.block_n, config.block_c
    steps = taps * -(-channels // depth)
    efficiency = {256: 1.0, 128: 0.95, 64: 0.75, 32: 0.4, 16: 0.2}[n]
    step = max(m * n * depth / 2048 / efficiency, (m + n) * depth * 2 / 40)
    work = steps * step + m * n * 2 * (1 + reads) / 20
    latency = 1500 + 1000 * reads * max(1, n // 64)

    registers = m * n / (32 * config.warps) * 1.25 + 48
    blocks = max(
        1,
        min(
            gpu.shared // (config.stages * (m + n) * depth * 2),
            int(65536 / (32 * config.warps * registers)),
        ),
    )
    tiles = -(-pixels // m) * -(-k // n)
    rounds = -(-tiles // gpu.multiprocessors)
    return rounds * work + -(-tiles // (gpu.multiprocessors * blocks)) * latency


@cache
def choose(pixels: int, channels: int, k: int, taps: float, reads: int, gpu: Gpu) -> Config:
    """Return the candidate with the lowest `cost`; the arguments are explained there."""
    return min(
        candidates(channels, k, gpu),
        key=lambda config: cost(config, pixels, channels, k, taps, reads, gpu),
    )


def _unit(size: int) -> int:
    """Return the largest of 8, 4, 2, 1 that divides `size`: 16 bytes of bf16 are 8 channels."""
    return next(unit for unit in (8, 4, 2, 1) if size % unit == 0)


def constants(
    channels: int,
    k: int,
    r: int,
    s: int,
    stride: int,
    padding: int,
    upsample: int,
    residual_stride: int,
    relu: bool,
    config: Config,
) -> dict[str, int | bool]:
    """Return what the kernel is compiled for."""
    return {
        "C_UNIT": _unit(channels),
        "K_UNIT": _unit(k),
        "R": r,
        "S": s,
        "STRIDE": stride,
        "PADDING": padding,
        "UPSAMPLE": upsample,
        "RESIDUAL_STRIDE": residual_stride,
        "RELU": relu,
        "EVEN_C": channels % config.block_c == 0,
        "EVEN_K": k % config.block_n == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "GROUP": config.group,
        "STAGES": config.stages,
    }


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    positive: Tensor | None = None,
    *,
    relu: bool,
    stride: int,
    padding: int,
    upsample: int,
    residual_stride: int,
    config: Config | None = None,
) -> None:
    """Fill `out`, and `positive` with its signs if it is given.

    All tensors are dense, in channels_last, and fit as `rtk.ops.fused_conv2d` checks.

    `config` is one of `candidates`; None lets `choose` pick, which measures nothing: autotuning
    cannot run while a CUDA graph is captured.
    """
    (batch, channels, height, width), (k, _, r, s) = x.shape, weight.shape
    out_height, out_width = out.shape[2:]
    pixels = batch * -(-out_height // upsample) * -(-out_width // upsample)
    if config is None:
        config = choose(
            batch * out_height * out_width,
            channels,
            k,
            r * s / upsample**2,
            (residual is not None) + (gate is not None),
            _gpu(x.device),
        )
    grid = (
        triton.cdiv(pixels, config.block_m) * triton.cdiv(k, config.block_n),
        upsample * upsample,
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        fused_conv2d_kernel[grid](
            x,
            weight,
            bias,
            residual,
            gate if gate is None or gate.dtype != torch.int16 else gate.view(torch.int64),
            out,
            None if positive is None else positive.view(torch.int64),
            batch,
            height,
            width,
            out_height,
            out_width,
            channels // _unit(channels),
            k // _unit(k),
            triton.cdiv(channels, config.block_c),
            **constants(
                channels,
                k,
                r,
                s,
                stride,
                padding,
                upsample,
                0 if residual is None else residual_stride,
                relu,
                config,
            ),
            num_warps=config.warps,
            num_stages=config.stages,
        )
