"""block_matmul: x @ (weight * blocks)^T, where blocks that are off are not computed.

M rows of x (all its leading dimensions), N outputs, K inputs; blocks of bn x bk weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _compiled
from rtk.ops._fused_conv2d_cuda import DENSITY
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton


def block_matmul(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: int | Sequence[int],
    *,
    density: float = DENSITY,
) -> Tensor:
    """Multiply by a block-sparse weight: x @ (weight * expanded block_mask)^T.

    Args:
        x: (..., K), floating.
        weight: (N, K), x's dtype or an fp32 master beside a bf16 or fp16 x.
        block_mask: (N / bn, K / bk), bool, or floating: it scales the blocks, 0 turns one off,
            and it may require grad.
        block_size: (bn, bk), or one int for square blocks; must divide N and K. Blocks of 32, 64
            or 128 are what the GPU kernel takes; others, and float64, take a dense product there.
        density: the share of blocks that are on, 0 to 1, as far as it is known without asking the
            GPU. It decides only how the work is cut up.

    Returns:
        (..., N) in x's dtype. Gradients (once): x; weight (exactly 0 in blocks that are off);
        block_mask: per block sum(weight * dweight), without the dense dweight in memory. Sums are
        in fp32; fp32 products use TF32 where torch.backends.cuda.matmul.allow_tf32 is set.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit.
    """
    size = [block_size, block_size] if isinstance(block_size, int) else list(block_size)
    return _op(x, weight, block_mask, size, density)


def _check(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> None:
    require(0 <= density <= 1, "block_matmul: density must be 0 to 1, got %s", density)
    require(weight.dim() == 2, "block_matmul: weight must be (N, K), got %s", tuple(weight.shape))
    require(
        len(block_size) == 2 and min(block_size) >= 1,
        "block_matmul: block_size must be one or two positive ints, got %s",
        block_size,
    )
    require(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        "block_matmul: x must be (..., K) with K = %s, got %s",
        weight.shape[1],
        tuple(x.shape),
    )
    require(
        weight.shape[0] % block_size[0] == 0 and weight.shape[1] % block_size[1] == 0,
        "block_matmul: blocks of %s do not divide the weight's %s; choose divisors or pad it",
        tuple(block_size),
        tuple(weight.shape),
    )
    blocks = (weight.shape[0] // block_size[0], weight.shape[1] // block_size[1])
    require(
        tuple(block_mask.shape) == blocks,
        "block_matmul: block_mask must be (N / bn, K / bk) = %s, got %s",
        blocks,
        tuple(block_mask.shape),
    )
    require(
        block_mask.dtype == torch.bool or block_mask.is_floating_point(),
        "block_matmul: block_mask must be bool or floating, got %s",
        block_mask.dtype,
    )
    require(
        x.is_floating_point()
        and (
            x.dtype == weight.dtype
            or (weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16))
        ),
        "block_matmul: x is %s and weight %s; they must be equal and floating, or an fp32 master "
        "beside a bf16 or fp16 x",
        x.dtype,
        weight.dtype,
    )
    require(
        x.device == weight.device == block_mask.device,
        "block_matmul: x is on %s, weight on %s, block_mask on %s; move them with .to()",
        x.device,
        weight.device,
        block_mask.device,
    )


def _scaled(tensor: Tensor, block_mask: Tensor, block_size: Sequence[int]) -> Tensor:
    """Return tensor times the mask of its block, with an exact 0 in blocks that are off."""
    mask = block_mask.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return torch.where(mask != 0, tensor * mask, 0)


def _empty(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _empty_bwd_input(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _empty_bwd_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    needs: Sequence[bool],
    density: float = DENSITY,
) -> list[Tensor]:
    outs = []
    if needs[0]:
        outs.append(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
    if needs[1]:
        outs.append(torch.empty(block_mask.shape, dtype=block_mask.dtype, device=weight.device))
    return outs


def _check_bwd_input(
    grad: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    size: Sequence[int],
    density: float = DENSITY,
) -> None:
    require(
        grad.shape[-1] == weight.shape[0],
        "block_matmul: grad must be (..., N) with N = %s, got %s",
        weight.shape[0],
        tuple(grad.shape),
    )


def _check_bwd_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    needs: Sequence[bool],
    density: float = DENSITY,
) -> None:
    _check(x, weight, block_mask, block_size)


_op = Op(
    "block_matmul(Tensor x, Tensor weight, Tensor block_mask, SymInt[2] block_size, "
    f"float density={DENSITY}) -> Tensor",
    _check,
    _empty,
)
_op.autocast_first_argument()
_op_bwd_input = Op(
    "block_matmul_bwd_input(Tensor grad, Tensor weight, Tensor block_mask, SymInt[2] block_size, "
    f"float density={DENSITY}) -> Tensor",
    _check_bwd_input,
    _empty_bwd_input,
)
_op_bwd_weight = Op(
    "block_matmul_bwd_weight(Tensor grad, Tensor x, Tensor weight, Tensor block_mask, "
    f"SymInt[2] block_size, bool[2] needs, float density={DENSITY}) -> Tensor[]",
    _check_bwd_weight,
    _empty_bwd_weight,
)


def _why_not_cpu(*args: Any) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    others = tensors[:-1]  # the mask comes last; any dtype of it is widened below
    reasons = (_compiled.why_not_dtype(t, "an argument", torch.float32) for t in others)
    return _compiled.why_not_cpu(*tensors) or next((r for r in reasons if r), None)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _multiply_cpu(
    function: str,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    out: Tensor,
) -> Tensor:
    x, weight, blocks = _rows(x), weight.contiguous(), block_mask.float().contiguous()
    getattr(_compiled._C, function)(
        x.data_ptr(),
        weight.data_ptr(),
        blocks.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        *weight.shape,
        *block_size,
        torch.get_num_threads(),
    )
    return out


@_op.implementation("cpu", _why_not_cpu)
def _cpu(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    out = _empty(x, weight)
    return _multiply_cpu("block_matmul_cpu", x, weight, block_mask, block_size, out)


@_op_bwd_input.implementation("cpu", _why_not_cpu)
def _bwd_input_cpu(
    grad: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    out = _empty_bwd_input(grad, weight)
    return _multiply_cpu("block_matmul_bwd_input_cpu", grad, weight, block_mask, block_size, out)


@_op_bwd_weight.implementation("cpu", _why_not_cpu)
def _bwd_weight_cpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    needs: Sequence[bool],
    density: float = DENSITY,
) -> list[Tensor]:
    grad, x, weight = _rows(grad), _rows(x), weight.contiguous()
    blocks = block_mask.float().contiguous()
    grad_weight = torch.empty_like(weight) if needs[0] else None
    grad_blocks = torch.empty_like(blocks) if needs[1] else None
    _compiled._C.block_matmul_bwd_weight_cpu(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        blocks.data_ptr(),
        0 if grad_weight is None else grad_weight.data_ptr(),
        0 if grad_blocks is None else grad_blocks.data_ptr(),
        x.shape[0],
        *weight.shape,
        *block_size,
        torch.get_num_threads(),
    )
    if grad_blocks is not None:
        grad_blocks = grad_blocks.to(block_mask.dtype)
    return [g for g in (grad_weight, grad_blocks) if g is not None]


_SIZES = (32, 64, 128)


def _why_not_triton_kernel(
    x: Tensor, weight: Tensor, block_mask: Tensor, block_size: Sequence[int]
) -> str | None:
    if not set(block_size) <= set(_SIZES):
        return f"its blocks are 32, 64 or 128 wide, got {tuple(block_size)}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # On the CPU, for the tests; its bf16 product is wrong.
        return _compiled.why_not_dtype(x, "x", torch.float32)
    reason = why_not_triton(x) or _compiled.why_not_dtype(
        x, "x", torch.bfloat16, torch.float16, torch.float32
    )
    if reason is None and torch.cuda.get_device_capability(x.device) < (9, 0):
        reason = "it is cut for GPUs of compute capability 9.0 or more"
    return reason


def _why_not_triton(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> str | None:
    return _why_not_triton_kernel(x, weight, block_mask, block_size)


def _why_not_triton_bwd_weight(
    grad: Tensor, x: Tensor, weight: Tensor, block_mask: Tensor, block_size: Sequence[int], *_: Any
) -> str | None:
    return _why_not_triton_kernel(x, weight, block_mask, block_size)


def _multiply_triton(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    out: Tensor,
    **options: Any,
) -> Tensor:
    from rtk.ops import _block_matmul_triton

    rows = x.reshape(-1, x.shape[-1])
    if out.numel() == 0 or rows.numel() == 0:
        return out.zero_()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    flat = out.view(rows.shape[0], -1)
    _block_matmul_triton.multiply(rows, weight, block_mask, block_size, flat, tf32=tf32, **options)
    return out


@_op.implementation("triton", _why_not_triton)
def _triton(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    out = _empty(x, weight)
    return _multiply_triton(x, weight, block_mask, block_size, out, density=density)


@_op_bwd_input.implementation("triton", _why_not_triton)
def _bwd_input_triton(
    grad: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    out = _empty_bwd_input(grad, weight)
    options = {"density": density, "input_gradient": True}
    return _multiply_triton(grad, weight, block_mask, block_size, out, **options)


@_op_bwd_weight.implementation("triton", _why_not_triton_bwd_weight)
def _bwd_weight_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    needs: Sequence[bool],
    density: float = DENSITY,
) -> list[Tensor]:
    from rtk.ops import _block_matmul_triton

    outs = _empty_bwd_weight(grad, x, weight, block_mask, block_size, needs)
    grad, x = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
    if x.numel() == 0 or grad.numel() == 0:
        return [out.zero_() for out in outs]
    scores = _block_matmul_triton.multiply_weight(
        grad,
        x,
        weight,
        block_mask,
        block_size,
        outs[0] if needs[0] else None,
        scores=needs[1],
        density=density,
        tf32=torch.backends.cuda.matmul.allow_tf32,
    )
    if scores is not None:
        outs[-1].copy_(scores)
    return outs


@_op.implementation("reference")
def _reference(
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    return _empty(x, weight).copy_(x @ _scaled(weight, block_mask, block_size).to(x.dtype).t())


@_op_bwd_input.implementation("reference")
def _bwd_input_reference(
    grad: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    product = grad @ _scaled(weight, block_mask, block_size).to(grad.dtype)
    return _empty_bwd_input(grad, weight).copy_(product)


@_op_bwd_weight.implementation("reference")
def _bwd_weight_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    block_mask: Tensor,
    block_size: Sequence[int],
    needs: Sequence[bool],
    density: float = DENSITY,
) -> list[Tensor]:
    dense = (_rows(grad).t() @ _rows(x)).to(weight.dtype)
    gradients = []
    if needs[0]:
        gradients.append(_scaled(dense, block_mask, block_size).to(weight.dtype))
    if needs[1]:
        (bn, bk), (n, k) = block_size, weight.shape
        blocks = (dense * weight).reshape(n // bn, bn, k // bk, bk)
        gradients.append(blocks.sum((1, 3)).to(block_mask.dtype))
    return gradients


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        block_mask: Tensor,
        block_size: Sequence[int],
        density: float = DENSITY,
    ) -> Tensor:
        need_weight = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if need_weight else None, weight, block_mask)
        ctx.block_size, ctx.density = block_size, density
        return _op.below_autograd(x, weight, block_mask, block_size, density)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, block_mask = ctx.saved_tensors
        need_x, need_weight, need_mask = ctx.needs_input_grad[:3]
        cut = (block_mask, ctx.block_size)
        grad_x = _op_bwd_input(grad, weight, *cut, ctx.density) if need_x else None
        gradients: list[Tensor] = []
        if need_weight or need_mask:
            needs = [need_weight, need_mask]
            gradients = _op_bwd_weight(grad, x, weight, *cut, needs, ctx.density)
        grad_weight = gradients.pop(0) if need_weight else None
        grad_mask = gradients.pop(0) if need_mask else None
        return grad_x, grad_weight, grad_mask, None, None


_op.autograd(_Autograd)
