"""The Linf step of projected gradient descent, elementwise over four tensors, in Triton.

C channels, P pixels of a channel (H W). A tensor in the other memory order than x_adv's (C, P
against P, C) is read through the transposed index, so that it is not copied first.
"""

import triton
import triton.language as tl

# value / 255, correctly rounded for 0..255: the first product is exact (8 by 9 bits), the second
# tiny. A division would cost ten times as much, and Triton's `/` is not correctly rounded.
_PER_255_HIGH = tl.constexpr(0x101 / 2**16)
_PER_255_LOW = tl.constexpr(0x1010102 / 2**48)


@triton.jit
def to_pixels(values):
    """Return fp32 in [0, 1] scale; uint8 means 0..255."""
    if values.dtype == tl.uint8:
        number = values.to(tl.float32)
        return number * _PER_255_HIGH + number * _PER_255_LOW
    return values.to(tl.float32)


@triton.jit
def clamp(values, low, high):
    """torch.clamp's: NaN stays NaN, and `high` wins where the bounds cross."""
    raised = tl.where(values < low, low, values)
    return tl.where(raised > high, high, raised)


@triton.jit
def transposed(index, rows, columns):
    """Where element `index` of a (rows, columns) matrix lies in its transpose."""
    return index % columns * rows + index // columns


@triton.jit
def pgd_step_linf(
    x_adv_ptr,
    grad_ptr,
    x_ptr,
    out_ptr,
    tiles,  # programs an image
    count,  # of pixels of an image: all of them as one image where nothing is transposed
    rows,  # (C, P), or (P, C) where x_adv is channels_last
    columns,
    step_size,
    eps,
    low,
    high,
    GRAD_TRANSPOSED: tl.constexpr,
    X_TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x + clamp(x_adv + step_size sign(grad) - x, -eps, eps), clipped, in fp32."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    base = image * count
    within = tl.arange(0, BLOCK)
    here = base + start + within
    inside = start + within < count
    grad_at = here
    x_at = here
    if GRAD_TRANSPOSED or X_TRANSPOSED:
        # An image has fewer than 2^31 pixels, and divisions of 64 bits are slow.
        other = base + transposed(start.to(tl.int32) + within, rows, columns)
        if GRAD_TRANSPOSED:
            grad_at = other
        if X_TRANSPOSED:
            x_at = other

    x_adv = tl.load(x_adv_ptr + here, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + grad_at, mask=inside).to(tl.float32)
    x = to_pixels(tl.load(x_ptr + x_at, mask=inside))
    step = tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))  # 0 for NaN
    delta = clamp(x_adv + step - x, -eps, eps)
    out = clamp(x + delta, low, high)
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=inside)
