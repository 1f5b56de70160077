"""Gaussian noise on images, in Triton. The numbers and their order: philox.py."""

import triton
import triton.language as tl
from rtk.kernels.pgd_step import to_pixels
from rtk.kernels.philox import normal, place, read_seed


@triton.jit(do_not_specialize=["seed"])
def gaussian_noise(
    x_ptr,
    out_ptr,
    seed,
    tiles,
    count,
    rows,
    columns,
    sigma,
    SEED_IN_MEMORY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x + sigma z with standard normal z."""
    _, counter, at, inside = place(tiles, count, rows, columns, TRANSPOSED, BLOCKS)
    x = to_pixels(tl.load(x_ptr + at, mask=inside))
    out = x + normal(counter, read_seed(seed, SEED_IN_MEMORY)) * sigma
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
