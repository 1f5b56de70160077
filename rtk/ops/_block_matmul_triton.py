"""How block_matmul's Triton kernels are launched, and the tiles that they take.

Which tiles, is read from a table and never measured: a measurement cannot run while a CUDA graph
is captured. As everywhere here M counts rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rtk.kernels import block_matmul as kernels

_TOGETHER = 16  # tiles along M whose programs run side by side
_PLAN_WARPS = 8
_MOST_PARTS = 2**27  # bytes of the parts of a weight gradient, if there is more than one


@dataclass(frozen=True)
class Product:
    """How x @ w^T is cut: R x C blocks (along outputs, along inputs) are one tile."""

    block_m: int
    r: int
    c: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Sum:
    """How a weight gradient is cut: `slots` blocks for a program, `step` rows at a time."""

    slots: int
    step: int
    warps: int
    stages: int
    gather: bool


def choose_product(
    outputs: int, inputs: int, dtype: torch.dtype, density: float, tf32: bool
) -> Product:
    """Return the tiles for blocks of outputs x inputs.

    A product 32 or 64 outputs wide waits for shared memory and L2, as it reads x once for every
    block: 64 wide it reaches 65 % of the tensor cores, 32 wide 35 %. Where a mask is fuller than
    that, tiles of 128 that take dead blocks along as zeros are faster. They are as deep as one
    128-byte line of shared memory, 64 values of 2 bytes. Short sums want two programs a
    multiprocessor, which hide each other's beginnings and ends; long ones the largest tile, which
    reads L2 least.
    """
    if dtype == torch.float32 and not tf32:
        return Product(64, 1, 1, 16, 8, 3)  # no tensor cores: registers bound it
    line = 32 if dtype == torch.float32 else 64
    # Four warps: with eight and 128 outputs ptxas (of CUDA 13.0) makes each product wait for the
    # one before (C7515).
    if density < {32: 0.3, 64: 0.6, 128: 1.0}[outputs]:
        stages = {32: 4, 64: 3, 128: 3}[outputs]
        return Product(128, 1, 1, min(inputs, line), 4, stages)
    return Product(128, 128 // outputs, max(1, line // inputs), line, 4, 3)


def choose_sum(
    bn: int, bk: int, dtype: torch.dtype, needs: Sequence[bool], density: float, tf32: bool
) -> Sum:
    """Return the cut for a weight gradient whose share `density` of blocks is computed.

    As measured on an H200 at 4096 cubed. Blocks of a row share the upstream gradient: of 128 inputs
    two, unless scores beside gradients take the registers; narrower ones more, where a row has
    many live ones. Blocks of 32 inputs need at least two, as a product has 64 rows or more.
    fp32 goes through pointers: the tensor cores want its operands
    transposed, and TMA an aligned number of rows.
    """
    if dtype == torch.float32:
        if not tf32:
            return Sum(max(1, 64 // bk), 16, 8, 3, True)
        return Sum(128 // bk, 32, 8 if max(bn, bk) == 128 else 4, 4, True)
    full = density > 0.5
    if bk == 32:
        return Sum(8, 64, 8, 3, True) if full and bn < 128 else Sum(4, 64, 8, 4, True)
    if bk == 64:
        return Sum(4, 64, 8, 4, True) if full else Sum(1, 64, 4, 4, False)
    return Sum(1 if all(needs) else 2, 64, 8, 3 if full else 4, False)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel there can be launched before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _chunk(rows: int, capacity: int) -> int:
    """Return how many rows of a mask a plan counts at a time: few turns, all of it in registers."""
    return max(8, min(4096 // capacity, 64, triton.next_power_of_2(rows)))


def _mask(block_mask: Tensor) -> Tensor:
    if block_mask.dtype == torch.bool:
        return block_mask.view(torch.int8)
    return block_mask.float() if block_mask.dtype == torch.float64 else block_mask


def _for_tma(tensor: Tensor) -> Tensor:
    """Return it dense and at an address that TMA takes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def product_constants(
    config: Product, outputs: int, inputs: int, tiles: int, transposed: bool, precision: str
) -> dict[str, int | bool | str]:
    """Return what `multiply` is compiled for; `tiles` are those of a row."""
    return {
        "CAPACITY": triton.next_power_of_2(tiles) * (config.c * inputs // config.step),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.r * outputs,
        "STEP": config.step,
        "TRANSPOSED": transposed,
        "STAGES": config.stages,
        "PRECISION": precision,
    }


def multiply(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    out: Tensor,
    *,
    density: float,
    tf32: bool,
    input_gradient: bool = False,
    config: Product | None = None,
) -> None:
    """Fill `out`, dense, (M, N): x (M, K) times the masked weight (N, K), transposed.

    With `input_gradient` x is (M, N), out (M, K) and the weight is not transposed. None of the
    sizes is 0. `config` instead of the table's is for timing it.
    """
    mask, (bn, bk) = _mask(block_mask), block_size
    (rows, columns), (row_stride, column_stride) = mask.shape, mask.stride()
    outputs, inputs = bn, bk
    if input_gradient:
        rows, columns, row_stride, column_stride = columns, rows, column_stride, row_stride
        outputs, inputs = bk, bn
    config = config or choose_product(outputs, inputs, x.dtype, density, tf32)
    transposed = not input_gradient or x.dtype == torch.float32  # which must lie along the sum
    tile_rows, tiles = triton.cdiv(rows, config.r), triton.cdiv(columns, config.c)
    precision = _precision(x.dtype, tf32)
    constants = product_constants(config, outputs, inputs, tiles, transposed, precision)
    block_m, block_n, step = (int(constants[n]) for n in ("BLOCK_M", "BLOCK_N", "STEP"))
    capacity = int(constants["CAPACITY"])

    entries = torch.empty(tile_rows, capacity, dtype=torch.int32, device=x.device)
    counts = torch.empty(tile_rows, dtype=torch.int32, device=x.device)
    order = torch.empty_like(counts)
    fill = config.r * config.c > 1
    turned = input_gradient and transposed
    early = _starts_early(x.device)
    ready = weight.dtype == x.dtype and mask.dtype == torch.int8 and not fill and not turned
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.plan[(tile_rows,)](
            mask,
            entries,
            counts,
            order,
            rows,
            columns,
            row_stride,
            column_stride,
            tile_rows,
            R=config.r,
            C=config.c,
            CAPACITY=triton.next_power_of_2(tiles),
            CHUNK=_chunk(tile_rows, triton.next_power_of_2(tiles)),
            PIECES=config.c * inputs // config.step,
            EARLY=early,
            num_warps=_PLAN_WARPS,
        )
        if ready:
            prepared = _for_tma(weight)
        else:
            shape = weight.shape[::-1] if turned else weight.shape
            prepared = torch.empty(shape, dtype=x.dtype, device=x.device)
            strides = prepared.stride()[::-1] if turned else prepared.stride()
            rows_at_once, columns_at_once = kernels.PREPARED
            pieces = (
                weight.shape[0] // rows_at_once,
                triton.cdiv(weight.shape[1], columns_at_once),
            )
            kernels.prepare[pieces](
                weight,
                mask,
                prepared,
                weight.shape[1],
                *mask.stride(),
                *weight.stride(),
                *strides,
                BN=bn,
                BK=bk,
                ROWS=rows_at_once,
                COLUMNS=columns_at_once,
                FILL=fill,
                EARLY=early,
                **({"launch_pdl": True} if early else {}),
            )
        tiles_m = triton.cdiv(x.shape[0], block_m)
        kernels.multiply[(tiles_m * tile_rows,)](
            _descriptor(_for_tma(x), block_m, step),
            _descriptor(prepared, *((block_n, step) if transposed else (step, block_n))),
            _descriptor(out, block_m, block_n),
            entries,
            counts,
            order,
            tiles_m,
            tile_rows,
            min(_TOGETHER, tiles_m),
            **constants,
            EARLY=early,
            num_warps=config.warps,
            num_stages=config.stages,
            **({"launch_pdl": True} if early else {}),
        )


def sum_constants(
    config: Sum,
    bn: int,
    bk: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    even: bool,
    split: bool,
    precision: str,
) -> dict[str, int | bool | str]:
    """Return what `multiply_weight` is compiled for."""
    return {
        "BN": bn,
        "BK": bk,
        "SLOTS": config.slots,
        "STEP": config.step,
        "STAGES": config.stages,
        "ALIGNED": 16 // dtype.itemsize,
        "GATHER": config.gather,
        "EVEN": even,
        "SCORES": needs[1],
        "WEIGHT": needs[0],
        "SPLIT": split,
        "PRECISION": precision,
    }


def multiply_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    out: Tensor | None,
    *,
    scores: bool,
    density: float,
    tf32: bool,
    config: Sum | None = None,
    count: int | None = None,
) -> Tensor | None:
    """Fill `out`, dense, (N, K), unless it is None; with `scores` return fp32 (N / bn, K / bk).

    None of the sizes is 0. `config` and `count`, the number of parts along M, instead of the
    table's are for timing them.
    """
    mask, (bn, bk), m_size = _mask(block_mask), block_size, x.shape[0]
    rows, columns = mask.shape
    n_size, k_size = weight.shape
    if scores:
        density = 1.0
    config = config or choose_sum(bn, bk, x.dtype, (out is not None, scores), density, tf32)
    groups = rows * (triton.cdiv(columns, config.slots) + (0 if scores else 1))
    if count is None:
        expected = max(1, round(rows * columns * density / config.slots))
        count = triton.cdiv(2 * _multiprocessors(x.device), expected)
        count = min(count, m_size // (8 * config.step))
        if out is not None and count > 1:
            count = min(count, _MOST_PARTS // (4 * weight.numel()))
        count = max(count, 1)
    span = triton.cdiv(triton.cdiv(m_size, count), config.step) * config.step
    count = triton.cdiv(m_size, span)
    split = count > 1

    block_at = torch.empty(groups * config.slots, dtype=torch.int32, device=x.device)
    group_counts = torch.empty(2, dtype=torch.int32, device=x.device)
    placeholder = torch.empty(1, device=x.device)
    scored = torch.empty(count, rows, columns, device=x.device) if scores else placeholder
    target = placeholder
    if out is not None:
        target = out.new_empty((count, n_size, k_size), dtype=torch.float32) if split else out
    grad, x = grad.contiguous(), x.contiguous()
    if config.gather and x.dtype == torch.float32 and tf32:
        grad, x = (t.t().contiguous().t() for t in (grad, x))  # tensor cores want M along the rows
    given: tuple[object, object] = (grad, x)
    if not config.gather:
        given = (
            _descriptor(_for_tma(grad), config.step, bn),
            _descriptor(_for_tma(x), config.step, bk),
        )
    needs, early = (out is not None, scores), _starts_early(x.device)
    constants = sum_constants(
        config, bn, bk, x.dtype, needs, m_size % config.step == 0, split, _precision(x.dtype, tf32)
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.plan_weight[(rows,)](
            mask,
            block_at,
            group_counts,
            rows,
            columns,
            *mask.stride(),
            ALL=scores,
            SLOTS=config.slots,
            CAPACITY=triton.next_power_of_2(columns),
            CHUNK=_chunk(rows, triton.next_power_of_2(columns)),
            EARLY=early,
            num_warps=_PLAN_WARPS,
        )
        kernels.multiply_weight[(groups, count)](
            *given,
            weight,
            mask,
            block_at,
            group_counts,
            target,
            scored,
            m_size,
            span,
            weight.numel(),
            mask.numel(),
            columns,
            k_size,
            *grad.stride(),
            *x.stride(),
            *weight.stride(),
            *mask.stride(),
            **constants,
            EARLY=early,
            num_warps=config.warps,
            num_stages=config.stages,
            **({"launch_pdl": True} if early else {}),
        )
        if out is not None and split:
            kernels.combine[(rows * columns, bn // kernels.PIECE)](
                target,
                mask,
                out,
                count,
                weight.numel(),
                columns,
                k_size,
                *mask.stride(),
                BN=bn,
                BK=bk,
                PIECE=kernels.PIECE,
            )
    if not scores:
        return None
    return scored.sum(0) if split else scored[0]
