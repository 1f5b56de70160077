"""pgd_step on a batch of CIFAR-sized images, against eager PyTorch and torch.compile."""

from __future__ import annotations

import pytest
import torch

import rtk

SHAPE = (512, 3, 32, 32)
EPS, STEP = 8 / 255, 2 / 255


def _linf(x_adv: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    delta = (x_adv + STEP * grad.sign() - x).clamp(-EPS, EPS)
    return (x + delta).clamp(0, 1)


def _l2(x_adv: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10
    delta = x_adv + STEP * grad / norm - x
    size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + delta * (EPS / size).clamp(max=1)).clamp(0, 1)


@pytest.mark.parametrize("peer", ["rtk", "eager", "torch.compile"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def bench_pgd_step(norm, peer, measure, benchmark):
    benchmark.group = f"pgd_step {norm}"
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SHAPE, generator=generator)
    x_adv = (x + 0.01 * torch.randn(SHAPE, generator=generator)).clamp(0, 1)
    grad = torch.randn(SHAPE, generator=generator)
    eager = {"linf": _linf, "l2": _l2}[norm]

    def ours(x_adv: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return rtk.ops.pgd_step(x_adv, grad, x, eps=EPS, step_size=STEP, norm=norm)

    function = {"rtk": ours, "eager": eager, "torch.compile": torch.compile(eager)}[peer]
    result = measure(lambda: function(x_adv, grad, x), bytes=16 * x.numel())
    torch.testing.assert_close(result, eager(x_adv, grad, x), atol=1e-6, rtol=0)
