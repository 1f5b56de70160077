"""A fused program against autograd, before it is trusted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.attacks.fused.program import FusedProgram

Loss = Callable[[Tensor, Tensor], Tensor]
Plain = Callable[[nn.Module, Tensor, Tensor, Loss], tuple[Tensor, Tensor]]

_IMAGES = 8


class Mismatch(Exception):
    """What differs, and by how much."""


def verify(program: FusedProgram, model: nn.Module, x: Tensor, y: Tensor, plain: Plain) -> None:
    """Compare a program, which must be folded, with autograd; synchronises.

    In fp32, without autocast, the program's logic has to be right; as it is, and under the caller's
    autocast, it may differ by what bf16 does to a network's gradients (a cosine of some .9).

    Args:
        program: of `model`.
        model: in eval mode.
        x: (N, 3, H, W) images, the first of which are taken.
        y: (N,) labels.
        plain: (model, x, y, loss) -> (gradient, logits), by autograd.

    Raises:
        Mismatch: if they differ too much.
    """
    x, y = x[:_IMAGES].detach(), y[:_IMAGES]
    with (
        torch.autocast(x.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
        ops.backend("reference"),
    ):
        exact = FusedProgram(model, torch.float32, structure=program.structure)
        exact.refold()
        _compare(
            "in fp32",
            exact.gradient(x.float(), y, _probe),
            plain(model, x.float(), y, _probe),
            distance=1e-3,
            cosine=0.999,
        )
    _compare(
        "in bf16",
        program.gradient(x, y, _probe),
        plain(model, x.float(), y, _probe),  # its weights are fp32; a cast in front may be gone
        distance=0.05,
        cosine=0.6,
    )


def _probe(logits: Tensor, y: Tensor) -> Tensor:
    """Return a loss with a gradient in every logit; a sure network's cross-entropy has none."""
    return (logits.float() * torch.arange(logits.shape[1], device=logits.device).cos()).sum()


def _compare(
    where: str,
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    *,
    distance: float,
    cosine: float,
) -> None:
    (grad, logits), (grad_plain, logits_plain) = (
        [tensor.double() for tensor in pair] for pair in (got, expected)
    )
    far = ((logits - logits_plain).norm() / logits_plain.norm().clamp_min(1e-30)).item()
    if not far <= distance:
        raise Mismatch(f"{where} its logits differ by {far:.2g} of their length")
    lengths = (grad.norm() * grad_plain.norm()).item()
    alike = ((grad * grad_plain).sum().item() / lengths) if lengths else 1.0
    if not alike >= cosine or bool(grad.any()) != bool(grad_plain.any()):
        raise Mismatch(f"{where} its gradients have a cosine of {alike:.3f}")
