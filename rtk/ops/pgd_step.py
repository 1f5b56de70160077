"""pgd_step: one ascent step of projected gradient descent, projected and clipped, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.errors import check_choice
from rtk.ops import _compiled
from rtk.ops._layout import memory_format
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton

NORMS = ("linf", "l2")
_DIVISION_EPS = 1e-10  # keeps a zero gradient a zero step, as robustness and torchattacks do


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str = "linf",
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Take one PGD step from `x_adv` and project it to the ball around `x`.

    Linf: x + clamp(x_adv + step_size sign(grad) - x, -eps, eps). L2, image by image: the same with
    grad / (|grad|_2 + 1e-10) for the sign and a rescaling to at most eps for the clamp. Both are
    then clipped to `clip` (Madry et al. 2018, arXiv 1706.06083).

    Args:
        x_adv: (N, ...) current adversarial images, fp32, fp64, bf16 or fp16.
        grad: the loss's gradient in `x_adv`, same shape, floating (it may be narrower).
        x: the original images, same shape, floating or uint8 (0..255 for 0..1).
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        step_size: length of the step, same scale.
        norm: "linf" or "l2".
        clip: the range of valid pixels.

    Returns:
        A new tensor like `x_adv`, channels_last where it is; computed in fp32 (fp64 for fp64).
        It does not require grad.

    Raises:
        RtkError: if shapes, devices or dtypes do not fit, or eps or step_size is negative.
    """
    return _op(
        x_adv, grad, x, eps=eps, step_size=step_size, norm=norm, clip_min=clip[0], clip_max=clip[1]
    )


def check_ball(op: str, eps: float, norm: str, clip_min: float, clip_max: float) -> None:
    """Raise an RtkError unless the numbers describe a ball and a range of pixels."""
    check_choice(f"norm for {op}", norm, NORMS)
    require(eps >= 0, "%s: eps must be >= 0 in [0, 1] pixel scale, got %s", op, eps)
    require(clip_min <= clip_max, "%s: clip must be (low, high), got %s", op, (clip_min, clip_max))


def check_images(op: str, name: str, images: Tensor) -> None:
    """Raise an RtkError unless `images` is (N, ...) and floating or uint8."""
    require(images.dim() >= 2, "%s: %s must be (N, ...), got %s", op, name, tuple(images.shape))
    require(
        images.is_floating_point() or images.dtype == torch.uint8,
        "%s: %s must be floating or uint8, got %s",
        op,
        name,
        images.dtype,
    )


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images in [0, 1] as `dtype`; uint8 means 0..255."""
    if images.dtype != torch.uint8:
        return images.to(dtype)
    # By a tensor: on a GPU torch divides by a number as it multiplies by its inverse, rounded.
    return images.to(dtype) / torch.full((), 255, dtype=dtype, device=images.device)


def per_image_norm(images: Tensor) -> Tensor:
    """Return the L2 norm of each image, shaped to broadcast over it."""
    norms = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.view(-1, *[1] * (images.dim() - 1))


def _check(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str,
    clip_min: float,
    clip_max: float,
) -> None:
    check_ball("pgd_step", eps, norm, clip_min, clip_max)
    require(step_size >= 0, "pgd_step: step_size must be >= 0, got %s", step_size)
    check_images("pgd_step", "x", x)
    for name, tensor in (("x_adv", x_adv), ("grad", grad)):
        require(
            tensor.is_floating_point(),
            "pgd_step: %s must be floating, got %s",
            name,
            tensor.dtype,
        )
        require(
            tensor.shape == x.shape,
            "pgd_step: %s and x must have one shape, got %s and %s",
            name,
            tuple(tensor.shape),
            tuple(x.shape),
        )
        require(
            tensor.device == x.device,
            "pgd_step: %s is on %s and x on %s; move one with .to()",
            name,
            tensor.device,
            x.device,
        )


def _empty(x_adv: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x_adv, memory_format=memory_format(x_adv))


_op = Op(
    "pgd_step(Tensor x_adv, Tensor grad, Tensor x, *, float eps, float step_size, str norm, "
    "float clip_min, float clip_max) -> Tensor",
    _check,
    _empty,
)
_op.no_gradient()


def _why_not_cpu(x_adv: Tensor, grad: Tensor, x: Tensor, **_: object) -> str | None:
    return (
        _compiled.why_not_cpu(x_adv, grad, x)
        or _compiled.why_not_dtype(x_adv, "x_adv", torch.float32, torch.bfloat16)
        or _compiled.why_not_dtype(grad, "grad", torch.float32, torch.bfloat16, torch.float16)
        or _compiled.why_not_dtype(x, "x", torch.float32, torch.uint8)
    )


@_op.implementation("cpu", _why_not_cpu)
def _cpu(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str,
    clip_min: float,
    clip_max: float,
) -> Tensor:
    # C++ walks all four in memory order, so they are brought into x_adv's.
    format = memory_format(x_adv)
    x_adv, grad, x = (t.contiguous(memory_format=format) for t in (x_adv, grad, x))
    out = _empty(x_adv)
    if out.numel():
        numbers = (eps, step_size, norm == "l2", clip_min, clip_max)
        arguments = _compiled_arguments(x_adv, grad, x, out)
        _compiled._C.pgd_step_cpu(*arguments, *numbers, torch.get_num_threads())
    return out


def _compiled_arguments(x_adv: Tensor, grad: Tensor, x: Tensor, out: Tensor) -> tuple[int, ...]:
    """Describe four dense tensors to C++."""
    typed = [(t.data_ptr(), _compiled.DTYPES[t.dtype]) for t in (x_adv, grad, x)]
    n = x.shape[0]
    return (*typed[0], *typed[1], *typed[2], out.data_ptr(), n, x.numel() // n)


def _why_not_gpu_dtype(x_adv: Tensor, grad: Tensor, x: Tensor) -> str | None:
    return (
        _compiled.why_not_dtype(x_adv, "x_adv", torch.float32, torch.bfloat16)
        or _compiled.why_not_dtype(grad, "grad", torch.float32, torch.bfloat16, torch.float16)
        or _compiled.why_not_dtype(x, "x", torch.float32, torch.bfloat16, torch.uint8)
    )


def _why_not_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, *, norm: str, **_: object
) -> str | None:
    if norm != "linf":
        return f"it takes the linf norm, not {norm}"
    return why_not_triton(x_adv, grad, x) or _why_not_gpu_dtype(x_adv, grad, x)


def _dense(tensor: Tensor, format: torch.memory_format) -> tuple[Tensor, bool]:
    """Return `tensor` dense, copied only if it must be, and whether in the order not asked for."""
    if tensor.is_contiguous(memory_format=format):
        return tensor, False
    if tensor.dim() == 4 and tensor[0].numel() < 2**31:
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            return tensor, True
    return tensor.contiguous(memory_format=format), False


@_op.implementation("triton", _why_not_triton)
def _triton(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str,
    clip_min: float,
    clip_max: float,
) -> Tensor:
    from rtk.kernels.pgd_step import pgd_step_linf

    format = memory_format(x_adv)
    x_adv = x_adv.contiguous(memory_format=format)
    out = _empty(x_adv)
    if out.numel() == 0:
        return out
    grad, grad_transposed = _dense(grad, format)
    x, x_transposed = _dense(x, format)
    # One access of 16 bytes a thread to the widest tensor; the narrower ones take fewer bytes.
    warps = 8
    block = warps * 32 * 16 // max(t.element_size() for t in (x_adv, grad, x))
    n, count, rows, columns = 1, out.numel(), 1, 1
    if grad_transposed or x_transposed:
        n, channels, height, width = out.shape
        count, rows, columns = channels * height * width, channels, height * width
        if format == torch.channels_last:
            rows, columns = columns, rows
    tiles = -(-count // block)
    with torch.cuda.device_of(x_adv):
        pgd_step_linf[(n * tiles,)](
            x_adv,
            grad,
            x,
            out,
            tiles,
            count,
            rows,
            columns,
            step_size,
            eps,
            clip_min,
            clip_max,
            GRAD_TRANSPOSED=grad_transposed,
            X_TRANSPOSED=x_transposed,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,  # the bits are PyTorch's
        )
    return out


def _why_not_cuda(x_adv: Tensor, grad: Tensor, x: Tensor, *, norm: str, **_: object) -> str | None:
    if norm != "l2":
        return f"it takes the l2 norm, not {norm}"
    return _compiled.why_not_cuda(x_adv, grad, x) or _why_not_gpu_dtype(x_adv, grad, x)


@_op.implementation("cuda", _why_not_cuda)
def _cuda(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str,
    clip_min: float,
    clip_max: float,
) -> Tensor:
    format = memory_format(x_adv)
    x_adv, grad, x = (t.contiguous(memory_format=format) for t in (x_adv, grad, x))
    out = _empty(x_adv)
    if out.numel():
        numbers = (eps, step_size, True, clip_min, clip_max)
        arguments, device = _compiled_arguments(x_adv, grad, x, out), x.device.index
        workspace_bytes = _compiled._C.pgd_step_workspace(*arguments, device)
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _compiled._C.pgd_step_cuda(*arguments, *numbers, workspace.data_ptr(), device, stream)
    return out


@_op.implementation("reference")
def _reference(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    norm: str,
    clip_min: float,
    clip_max: float,
) -> Tensor:
    exact = torch.promote_types(x_adv.dtype, torch.float32)
    grad, origin = grad.to(exact), to_pixels(x, exact)
    if norm == "linf":
        delta = x_adv.to(exact) + step_size * grad.sign() - origin
        delta = delta.clamp(-eps, eps)
    else:
        direction = grad / (per_image_norm(grad) + _DIVISION_EPS)
        delta = x_adv.to(exact) + step_size * direction - origin
        # eps / 0 is inf (or NaN for eps = 0): minimum with 1 must not see the NaN.
        factor = (eps / per_image_norm(delta).clamp_min(torch.finfo(exact).tiny)).clamp_max(1)
        delta = delta * factor
    result = (origin + delta).clamp(clip_min, clip_max)
    return _empty(x_adv).copy_(result)
