"""Every op is captured in a CUDA graph, and a replay follows what its inputs hold by then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rtk import ops

pytestmark = pytest.mark.gpu


def convolution(x: Tensor, w: Tensor) -> list[Tensor]:
    """The output and all gradients; the float mask is the first column of the weight."""
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    out = ops.masked_conv2d(*leaves, w[:, :1, :1, :1] > 0, padding=1)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def bytes_by_the_reference(x: Tensor) -> list[Tensor]:
    with ops.backend("reference"):
        return [
            ops.pgd_step(x / 255, x - 127.5, x, eps=0.1, step_size=0.2),
            ops.pgd_init(x, eps=0.1, seed=3),
            ops.gaussian_noise(x, sigma=0.1, seed=3),
        ]


def batch_norm(x: Tensor, w: Tensor) -> list[Tensor]:
    """Activations, gradients and running statistics, which start anew in every call."""
    x = w.transpose(0, 1).contiguous(memory_format=torch.channels_last)
    leaves = [x.detach().requires_grad_(), w[:, 0, 0, 0].clone().requires_grad_()]
    buffers = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    out = ops.batch_norm_act(leaves[0], x, leaves[1], None, *buffers, training=True, relu=True)
    return [out.detach(), *buffers, *torch.autograd.grad(out.square().sum(), leaves)]


CALLS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "masked_conv2d": convolution,
    "batch_norm_act": batch_norm,
    "max_pool2d": lambda x, w: [ops.max_pool2d(x)],
    "prepare_weight": lambda x, w: [ops.prepare_weight(w, w > 0, dtype=torch.bfloat16)],
    "block_matmul": lambda x, w: [ops.block_matmul(x, w[0, 0].tile(2, 2), x[0, 0, :2, :2] > 0, 3)],
    "topk_mask": lambda x, w: ops.topk_mask([x, w], [100, 50]),
    "topk_mask_global": lambda x, w: ops.topk_mask_global([x, w], 150),
    "pgd_step-linf": lambda x, w: [ops.pgd_step(x, x - 0.5, x, eps=0.1, step_size=0.2)],
    "pgd_step-l2": lambda x, w: [ops.pgd_step(x, x - 0.5, x, eps=0.1, step_size=0.2, norm="l2")],
    "pgd_step-compact": lambda x, w: [
        ops.pgd_step(x, (x - 0.5).bfloat16(), (x * 255).byte(), eps=0.1, step_size=0.2, norm=norm)
        for norm in ("linf", "l2")
    ],
    "uint8-reference": lambda x, w: bytes_by_the_reference((x * 255).byte()),
    "pgd_init": lambda x, w: [ops.pgd_init(x, eps=0.1, seed=3)],
    "pgd_init-seed": lambda x, w: [
        ops.pgd_init(x, eps=0.1, norm=norm, seed=w[0, 0, 0, :1].view(torch.int32).long())
        for norm in ("linf", "l2")
    ],
    "gaussian_noise": lambda x, w: [ops.gaussian_noise(x, sigma=0.1, seed=3)],
    "gaussian_noise-seed": lambda x, w: [
        ops.gaussian_noise(x, sigma=0.1, seed=w[0, 0, 0, :1].view(torch.int32).long())
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_replay_follows_the_inputs(name):
    call = CALLS[name]
    x, w = torch.rand(2, 4, 6, 6, device="cuda"), torch.randn(8, 4, 3, 3, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(x, w)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x, w)
    for _ in range(2):
        x.copy_(torch.rand_like(x))
        w.copy_(torch.randn_like(w))
        graph.replay()
        torch.testing.assert_close(captured, call(x, w))
