"""Max-pool 3x3 with stride 2 and padding 1 over channels_last images, in Triton.

N images of H x W pixels, OH x OW pooled ones, C channels. Where a maximum lies in its window is one
byte, 3 row + column. A program takes BLOCK_P pixels and BLOCK_C channels; in the backward a pixel
is a square of 2 x 2, whose windows are the four at (a, b), (a, b + 1), (a + 1, b), (a + 1, b + 1).
"""

import triton
import triton.language as tl


@triton.jit
def _split(pixel, height, width):
    """Return (image, row, column) of flat pixels."""
    return (pixel // width // height).to(tl.int64), pixel // width % height, pixel % width


@triton.jit
def max_pool2d_forward(
    x_ptr,  # (N, H, W, C)
    out_ptr,  # (N, OH, OW, C)
    place_ptr,  # like out, uint8
    pixels,  # N OH OW
    height,
    width,
    out_height,
    out_width,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As torch.max_pool2d: the first of equals, and the last NaN of a window."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < pixels)[:, None] & (c < channels)
    n, oh, ow = _split(pixel, out_height, out_width)
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    # What a window of nothing but -inf gives: its first place that exists.
    first = tl.where(oh > 0, 0, 3) + tl.where(ow > 0, 0, 1)
    place = tl.zeros((BLOCK_P, BLOCK_C), tl.int32) + first[:, None]
    for tap in tl.static_range(9):
        h = 2 * oh - 1 + tap // 3
        w = 2 * ow - 1 + tap % 3
        exists = inside & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        at = ((n * height + h) * width + w)[:, None] * channels + c
        value = tl.load(x_ptr + at, mask=exists, other=float("-inf")).to(tl.float32)
        larger = (value > best) | (value != value)
        best = tl.where(larger, value, best)
        place = tl.where(larger, tap, place)
    at = pixel.to(tl.int64)[:, None] * channels + c
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(place_ptr + at, place.to(tl.uint8), mask=inside)


@triton.jit
def _window(grad_ptr, place_ptr, n, oh, ow, c, out_height, out_width, channels, inside):
    """Return the gradient of a pooled pixel, and the place that it goes to."""
    exists = inside & ((oh < out_height) & (ow < out_width))[:, None]
    at = ((n * out_height + oh) * out_width + ow)[:, None] * channels + c
    grad = tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32)
    place = tl.load(place_ptr + at, mask=exists, other=255).to(tl.int32)
    return grad, place


@triton.jit
def _store(dx_ptr, n, h, w, c, height, width, channels, inside, value):
    exists = inside & ((h < height) & (w < width))[:, None]
    at = ((n * height + h) * width + w)[:, None] * channels + c
    tl.store(dx_ptr + at, value.to(dx_ptr.dtype.element_ty), mask=exists)


@triton.jit
def max_pool2d_backward(
    grad_ptr,  # (N, OH, OW, C)
    place_ptr,  # like grad, uint8
    dx_ptr,  # (N, H, W, C)
    squares,  # N OH' OW', with OH' = ceil(H / 2), OW' = ceil(W / 2)
    rows,  # OH'
    columns,  # OW'
    height,
    width,
    out_height,
    out_width,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give every pixel the sum, in fp32, of the gradients whose maximum it is."""
    square = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (square < squares)[:, None] & (c < channels)
    n, a, b = _split(square, rows, columns)
    g00, p00 = _window(grad_ptr, place_ptr, n, a, b, c, out_height, out_width, channels, inside)
    g01, p01 = _window(grad_ptr, place_ptr, n, a, b + 1, c, out_height, out_width, channels, inside)
    g10, p10 = _window(grad_ptr, place_ptr, n, a + 1, b, c, out_height, out_width, channels, inside)
    g11, p11 = _window(
        grad_ptr, place_ptr, n, a + 1, b + 1, c, out_height, out_width, channels, inside
    )
    middle = tl.where(p00 == 4, g00, 0.0)
    right = tl.where(p00 == 5, g00, 0.0) + tl.where(p01 == 3, g01, 0.0)
    below = tl.where(p00 == 7, g00, 0.0) + tl.where(p10 == 1, g10, 0.0)
    corner = tl.where(p00 == 8, g00, 0.0) + tl.where(p01 == 6, g01, 0.0)
    corner += tl.where(p10 == 2, g10, 0.0) + tl.where(p11 == 0, g11, 0.0)
    h, w = 2 * a, 2 * b
    _store(dx_ptr, n, h, w, c, height, width, channels, inside, middle)
    _store(dx_ptr, n, h, w + 1, c, height, width, channels, inside, right)
    _store(dx_ptr, n, h + 1, w, c, height, width, channels, inside, below)
    _store(dx_ptr, n, h + 1, w + 1, c, height, width, channels, inside, corner)
