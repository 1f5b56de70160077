"""Batch norm, residual addition and ReLU over channels_last tensors, in Triton.

M rows: the pixels of all images (N H W). C channels, contiguous, in groups of 8: what a thread
reads at once, and what has one byte of ReLU bits (bit i for channel 8 g + i). A tile is
(R, U, BLOCK_C): R BLOCK_C / 8 threads cover R rows, and each thread holds U of them, so that U
accesses are on their way together and sums over U stay inside a thread (Triton hands threads to
the last dimension first, then to the first).

Sums are split over many programs and joined by one small kernel, in a fixed order and without
atomics: the same bits every time. Tiles are applied from the last to the first, because the last
ones are what the pass before has left in the L2 cache.
"""

import triton
import triton.language as tl

_GROUP = tl.constexpr(8)
# A size of 1 would be a constant, and one that 16 divides another kernel: nothing is gained by it.
_SIZES = ("rows", "groups", "channels", "parts", "rows_a_part", "tiles_a_part")


@triton.jit
def _tile(start, column, rows, channels, U: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the offset of the tile's corner, offsets in the tile, and which of them exist."""
    row = (tl.arange(0, U) * R)[None, :, None] + tl.arange(0, R)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    left = tl.minimum(rows - start, U * R).to(tl.int32)
    inside = (row < left) & (column + c < channels)
    return start * channels + column, row * channels + c, inside


@triton.jit
def _bits_tile(
    start, column, rows, channels, U: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The same for the bytes of a tile's ReLU bits."""
    return _tile(start, column // _GROUP, rows, channels // _GROUP, U, R, BLOCK_C // _GROUP)


@triton.jit
def _through_relu(grad, bits, U: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return `grad` where the output was positive, else 0."""
    shift = tl.arange(0, _GROUP)[None, None, None, :]
    positive = ((bits.to(tl.int32)[:, :, :, None] >> shift) & 1) != 0
    return tl.where(tl.reshape(positive, (R, U, BLOCK_C)), grad, 0.0)


@triton.jit
def _per_channel(ptr, column, channels, default: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load a channel's number, in fp32, shaped to broadcast over a tile."""
    c = column + tl.arange(0, BLOCK_C)[None, None, :]
    if ptr is None:
        value = tl.full((1, 1, BLOCK_C), default, tl.float32)
    else:
        value = tl.load(ptr + c, mask=c < channels, other=default).to(tl.float32)
    return value


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_sums(
    x_ptr,  # (M, C)
    partial_ptr,  # (parts, 2, C) fp32: mean, and sum of squares around it, of a part's rows
    rows,
    groups,  # C / 8
    tiles_a_part,
    U: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum around the mean of the part's first tile: nothing cancels where |mean| >> deviation."""
    channels = groups * _GROUP
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_C
    first = part.to(tl.int64) * tiles_a_part * (U * R)
    last = tl.minimum(first + tiles_a_part.to(tl.int64) * (U * R), rows)

    base, offsets, inside = _tile(first, column, last, channels, U, R, BLOCK_C)
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    in_tile = tl.minimum(last - first, U * R).to(tl.float32)
    shift = (tl.sum(tl.sum(x, 1), 0) / in_tile)[None, None, :]
    centred = tl.where(inside, x - shift, 0.0)
    total = tl.sum(centred, 1)
    squares = tl.sum(centred * centred, 1)
    start = first + U * R
    while start < last:
        base, offsets, inside = _tile(start, column, last, channels, U, R, BLOCK_C)
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - shift, 0.0)
        total += tl.sum(centred, 1)
        squares += tl.sum(centred * centred, 1)
        start += U * R

    total = tl.sum(total, 0)[None, None, :]
    squares = tl.sum(squares, 0)[None, None, :]
    offset = total / (last - first).to(tl.float32)
    c = column + tl.arange(0, BLOCK_C)[None, None, :]
    at = partial_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(at, shift + offset, mask=c < channels)
    tl.store(at + channels, tl.maximum(squares - total * offset, 0.0), mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_statistics(
    partial_ptr,  # (parts, 2, C) fp32, of batch_norm_sums
    mean_ptr,  # (C,) fp32
    var_ptr,  # (C,) fp32, biased
    running_mean_ptr,  # (C,) fp32 or None
    running_var_ptr,
    batches_ptr,  # () int64 or None, counts the calls
    parts,
    rows_a_part,
    rows,
    channels,
    momentum,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Join the parts (Chan et al. 1979), around the first part's mean, and update the buffers."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    shift = tl.load(partial_ptr + c, mask=exists, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start = 0
    while start < parts:
        part = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (part < parts)[:, None] & exists[None, :]
        at = partial_ptr + part[:, None] * 2 * channels + c[None, :]
        count = tl.minimum(rows - part * rows_a_part, rows_a_part).to(tl.float32)[:, None]
        mean = tl.load(at, mask=inside, other=0.0)
        around_mean = tl.load(at + channels, mask=inside, other=0.0)
        away = tl.where(inside, mean - shift[None, :], 0.0)
        total += away * count
        squares += around_mean + away * away * count
        start += BLOCK_P

    number = rows.to(tl.float32)
    total = tl.sum(total, 0)
    squares = tl.maximum(tl.sum(squares, 0) - total * (total / number), 0.0)
    mean = shift + total / number
    tl.store(mean_ptr + c, mean, mask=exists)
    tl.store(var_ptr + c, squares / number, mask=exists)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c, mask=exists, other=0.0)
        tl.store(running_mean_ptr + c, momentum * mean + (1 - momentum) * old, mask=exists)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + c, mask=exists, other=0.0)
        unbiased = squares / (rows - 1).to(tl.float32)
        tl.store(running_var_ptr + c, momentum * unbiased + (1 - momentum) * old, mask=exists)
    if batches_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_apply(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C) or None
    mean_ptr,  # (C,) fp32, as all that follow
    var_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    out_ptr,  # (M, C)
    bits_ptr,  # (M, C / 8) uint8 or None
    rows,
    groups,
    eps,
    RELU: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(x - mean) / sqrt(var + eps) * weight + bias [+ residual], [ReLU], and where it is > 0."""
    channels = groups * _GROUP
    blocks = tl.cdiv(channels, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) // blocks
    start = start.to(tl.int64) * (U * R)
    base, offsets, inside = _tile(start, column, rows, channels, U, R, BLOCK_C)
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + base + offsets, mask=inside, other=0.0)
    mean = _per_channel(mean_ptr, column, channels, 0.0, BLOCK_C)
    var = _per_channel(var_ptr, column, channels, 1.0, BLOCK_C)
    weight = _per_channel(weight_ptr, column, channels, 1.0, BLOCK_C)
    bias = _per_channel(bias_ptr, column, channels, 0.0, BLOCK_C)
    scale = weight / tl.sqrt_rn(var + eps)
    out = (x.to(tl.float32) - mean) * scale + bias
    if residual_ptr is not None:
        out += residual.to(tl.float32)
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # NaN stays NaN
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + offsets, rounded, mask=inside)
    if bits_ptr is not None:
        positive = tl.reshape(rounded > 0, (R, U, BLOCK_C // _GROUP, _GROUP)).to(tl.int32)
        bits = tl.sum(positive << tl.arange(0, _GROUP)[None, None, None, :], 3)
        base, offsets, inside = _bits_tile(start, column, rows, channels, U, R, BLOCK_C)
        tl.store(bits_ptr + base + offsets, bits.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_bwd_sums(
    grad_ptr,  # (M, C)
    x_ptr,  # (M, C)
    bits_ptr,  # (M, C / 8) uint8 or None
    mean_ptr,  # (C,) fp32
    partial_ptr,  # (parts, 2, C) fp32: sums of grad, and of grad (x - mean)
    rows,
    groups,
    tiles_a_part,
    U: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the gradient behind the ReLU, and its product with what batch norm centres."""
    channels = groups * _GROUP
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_C
    start = part.to(tl.int64) * tiles_a_part * (U * R)
    last = tl.minimum(start + tiles_a_part.to(tl.int64) * (U * R), rows)
    mean = _per_channel(mean_ptr, column, channels, 0.0, BLOCK_C)
    total = tl.zeros((R, BLOCK_C), tl.float32)
    products = tl.zeros((R, BLOCK_C), tl.float32)
    while start < last:
        base, offsets, inside = _tile(start, column, last, channels, U, R, BLOCK_C)
        grad = tl.load(grad_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        if bits_ptr is not None:
            base, offsets, exists = _bits_tile(start, column, last, channels, U, R, BLOCK_C)
            bits = tl.load(bits_ptr + base + offsets, mask=exists, other=0)
            grad = _through_relu(grad, bits, U, R, BLOCK_C)
        total += tl.sum(grad, 1)
        products += tl.sum(tl.where(inside, grad * (x - mean), 0.0), 1)
        start += U * R
    c = column + tl.arange(0, BLOCK_C)
    at = partial_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(total, 0), mask=c < channels)
    tl.store(at + channels, tl.sum(products, 0), mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_bwd_weights(
    partial_ptr,  # (parts, 2, C) fp32, of batch_norm_bwd_sums
    var_ptr,  # (C,) fp32
    weight_grad_ptr,  # (C,) fp32
    bias_grad_ptr,  # (C,) fp32
    parts,
    channels,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Join the parts: the gradients of weight and bias, which dx is made of, too."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start = 0
    while start < parts:
        part = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (part < parts)[:, None] & exists[None, :]
        at = partial_ptr + part[:, None] * 2 * channels + c[None, :]
        total += tl.load(at, mask=inside, other=0.0)
        products += tl.load(at + channels, mask=inside, other=0.0)
        start += BLOCK_P
    var = tl.load(var_ptr + c, mask=exists, other=1.0)
    tl.store(weight_grad_ptr + c, tl.sum(products, 0) / tl.sqrt_rn(var + eps), mask=exists)
    tl.store(bias_grad_ptr + c, tl.sum(total, 0), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_bwd_apply(
    grad_ptr,  # (M, C)
    x_ptr,  # (M, C); read where TRAINING
    bits_ptr,  # (M, C / 8) uint8 or None
    mean_ptr,  # (C,) fp32, as all that follow
    var_ptr,
    weight_ptr,  # or None
    weight_grad_ptr,  # read where TRAINING
    bias_grad_ptr,
    x_grad_ptr,  # (M, C) or None
    residual_grad_ptr,  # (M, C) or None
    rows,
    groups,
    eps,
    TRAINING: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scale (grad - mean(grad) - xhat mean(grad xhat)), grad behind the ReLU; in eval scale grad"""
    channels = groups * _GROUP
    blocks = tl.cdiv(channels, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) // blocks
    start = start.to(tl.int64) * (U * R)
    base, offsets, inside = _tile(start, column, rows, channels, U, R, BLOCK_C)
    grad = tl.load(grad_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    if TRAINING:
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    if bits_ptr is not None:
        bits_base, bits_offsets, exists = _bits_tile(start, column, rows, channels, U, R, BLOCK_C)
        bits = tl.load(bits_ptr + bits_base + bits_offsets, mask=exists, other=0)
        grad = _through_relu(grad, bits, U, R, BLOCK_C)
    if residual_grad_ptr is not None:
        residual_grad = grad.to(residual_grad_ptr.dtype.element_ty)
        tl.store(residual_grad_ptr + base + offsets, residual_grad, mask=inside)
    if x_grad_ptr is not None:
        weight = _per_channel(weight_ptr, column, channels, 1.0, BLOCK_C)
        inverse = 1 / tl.sqrt_rn(_per_channel(var_ptr, column, channels, 1.0, BLOCK_C) + eps)
        x_grad = grad
        if TRAINING:
            number = rows.to(tl.float32)
            mean = _per_channel(mean_ptr, column, channels, 0.0, BLOCK_C)
            of_bias = _per_channel(bias_grad_ptr, column, channels, 0.0, BLOCK_C) / number
            of_weight = _per_channel(weight_grad_ptr, column, channels, 0.0, BLOCK_C) / number
            x_grad = grad - of_bias - (x - mean) * (inverse * of_weight)
        x_grad = x_grad * (weight * inverse)
        tl.store(x_grad_ptr + base + offsets, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
