"""Random starts in the Linf and L2 ball, in Triton. The numbers and their order: philox.py."""

import triton
import triton.language as tl
from rtk.kernels.pgd_step import clamp, to_pixels
from rtk.kernels.philox import GRID, normal, place, read_seed, uniform, words


@triton.jit(do_not_specialize=["seed"])
def pgd_init_linf(
    x_ptr,
    out_ptr,
    seed,
    tiles,
    count,
    rows,
    columns,
    eps,
    low,
    high,
    SEED_IN_MEMORY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x + eps U[-1, 1), clipped."""
    _, counter, at, inside = place(tiles, count, rows, columns, TRANSPOSED, BLOCKS)
    x = to_pixels(tl.load(x_ptr + at, mask=inside))
    u = uniform(words(counter, 0, read_seed(seed, SEED_IN_MEMORY)))
    out = clamp(x + (u * 2.0 - 1.0) * eps, low, high)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def pgd_init_l2_sums(
    sums_ptr,  # of every program
    seed,
    tiles,
    count,
    SEED_IN_MEMORY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums of squared normals, some of an image each; the next kernel draws the normals again."""
    _, counter, _, inside = place(tiles, count, 1, count, False, BLOCKS)
    z = tl.where(inside, normal(counter, read_seed(seed, SEED_IN_MEMORY)), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(z * z))


@triton.jit(do_not_specialize=["seed"])
def pgd_init_l2(
    x_ptr,
    out_ptr,
    squares_ptr,  # (N,): the squared length of each image's normals
    seed,
    tiles,
    count,
    rows,
    columns,
    eps,
    low,
    high,
    SEED_IN_MEMORY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x + eps U^(1 / count) z / |z| with standard normal z, clipped."""
    image, counter, at, inside = place(tiles, count, rows, columns, TRANSPOSED, BLOCKS)
    x = to_pixels(tl.load(x_ptr + at, mask=inside))
    value = read_seed(seed, SEED_IN_MEMORY)
    length = tl.sqrt_rn(tl.load(squares_ptr + image))
    # The radius: the first word of the image's own block, in a stream of its own.
    drawn, _, _, _ = tl.philox(value, image.to(tl.uint32), (image >> 32).to(tl.uint32), 2, 0)
    radius = eps * tl.exp(tl.log(uniform(drawn) + GRID) / count)
    scale = tl.where(length > 0, radius / length, 0.0)
    out = clamp(x + normal(counter, value) * scale, low, high)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
