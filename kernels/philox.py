"""Philox4x32-10 and what is made of its words, for pgd_init and gaussian_noise.

Word i % 4 of the block with counter i // 4 belongs to pixel i of the batch in N, C, H, W order, so
a program takes whole blocks and uses their four words for four neighbouring pixels.
"""

import triton
import triton.language as tl

GRID = tl.constexpr(2.0**-24)  # uniform numbers are multiples of it
_RADIANS = tl.constexpr(6.283185307179586 / 2**24)


@triton.jit
def read_seed(seed, IN_MEMORY: tl.constexpr):
    """Return the seed; a captured graph reads it from memory, so that a replay draws anew."""
    if IN_MEMORY:
        return tl.load(seed)
    else:
        return seed


@triton.jit
def words(counter, stream: tl.constexpr, seed):
    """Return the words (4 B,) of the blocks with these counters (B,), in the order of pixels."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    none = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, none + stream, none)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform(words):
    """Map words to [0, 1) on a grid of 2**-24."""
    return (words >> 8).to(tl.float32) * GRID


@triton.jit
def _cos_turn(words):
    """Return cos(2 pi uniform(words)); quarter turns are taken off exactly, in integers."""
    k = (words >> 8).to(tl.int32)
    quarter = (k + (1 << 21)) >> 22
    a = (k - (quarter << 22)).to(tl.float32) * _RADIANS  # in [-pi / 4, pi / 4]
    z = a * a
    sine = ((z * (1 / 362880) - 1 / 5040) * z + 1 / 120) * z - 1 / 6
    sine = a + a * z * sine
    cosine = (((z * (-1 / 3628800) + 1 / 40320) * z - 1 / 720) * z + 1 / 24) * z - 0.5
    cosine = 1.0 + z * cosine
    magnitude = tl.where((quarter & 1) != 0, sine, cosine)
    return tl.where(((quarter + 1) & 2) != 0, -magnitude, magnitude)


@triton.jit
def normal(counter, seed):
    """Return standard normals (4 B,) by Box-Muller from streams 0 (radius) and 1 (angle)."""
    u = uniform(words(counter, 0, seed)) + GRID  # in (0, 1], for the logarithm
    return tl.sqrt_rn(-2.0 * tl.log(u)) * _cos_turn(words(counter, 1, seed))


@triton.jit
def place(tiles, count, rows, columns, TRANSPOSED: tl.constexpr, BLOCKS: tl.constexpr):
    """Return which pixels this program takes, of images of `count` pixels in a row.

    `tiles` programs take an image. Its first and its last block of Philox may hold pixels of its
    neighbours: those are masked.

    Returns:
        image: whose pixels they are.
        counter: (BLOCKS,) of the blocks of Philox.
        at: (4 BLOCKS,) where the pixels lie in memory: (rows, columns) an image, or transposed.
        inside: (4 BLOCKS,) whether they belong to the image.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    base = image * count
    first = base // 4 + (tl.program_id(0) % tiles).to(tl.int64) * BLOCKS
    pixel = first * 4 + tl.arange(0, 4 * BLOCKS)
    inside = (pixel >= base) & (pixel < base + count)
    at = pixel
    if TRANSPOSED:
        # An image has fewer than 2^31 pixels, and divisions of 64 bits are slow.
        index = tl.where(inside, pixel - base, 0).to(tl.int32)
        at = base + index % columns * rows + index // columns
    return image, first + tl.arange(0, BLOCKS), at, inside
