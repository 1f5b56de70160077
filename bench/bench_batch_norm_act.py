"""batch_norm_act in training, forward and backward, against eager PyTorch and torch.compile.

Bytes: the least passes that batch statistics allow. Forward: x twice, the residual, the output.
Backward: the gradient and x twice, their gradients (and a ReLU's bits: a sixteenth of a pass each).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rtk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SMALL = (128, 512, 7, 7)
SHAPES = [(128, 256, 56, 56), (128, 64, 112, 112), (128, 1024, 14, 14), SMALL]
SHAPES = SHAPES if DEVICE == "cuda" else [(8, 64, 14, 14)]


def _eager(x: Tensor, residual: Tensor | None, *rest: Tensor) -> Tensor:
    weight, bias, mean, var = rest
    out = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
    if residual is not None:
        out += residual
    return F.relu_(out)


def _rtk(x: Tensor, residual: Tensor | None, *rest: Tensor) -> Tensor:
    return rtk.ops.batch_norm_act(x, residual, *rest, training=True, relu=True)


def _inputs(shape: tuple[int, ...], add: bool, seed: int) -> list[Tensor | None]:
    torch.manual_seed(seed)
    images = [
        torch.randn(shape, device=DEVICE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        for _ in range(1 + add)
    ]
    vectors = [torch.rand(shape[1], device=DEVICE) + 0.5 for _ in range(4)]
    leaves = [t.requires_grad_() for t in (*images, *vectors[:2])]
    x, *residual = leaves[: len(images)]
    return [x, residual[0] if add else None, *leaves[len(images) :], *vectors[2:]]


CASES = [
    pytest.param(peer, direction, add, shape, id=f"{peer}-{direction}-{kind}-{size}")
    for direction in ("forward", "backward")
    for add, kind in ((False, "relu"), (True, "add-relu"))
    for shape in SHAPES
    for size in ["x".join(map(str, shape))]
    for peer in ("rtk", "eager", "torch.compile")
]


@pytest.mark.parametrize(("peer", "direction", "add", "shape"), CASES)
def bench_batch_norm_act(peer, direction, add, shape, measure, benchmark):
    benchmark.group = f"batch_norm_act {direction} add={add} {'x'.join(map(str, shape))}"
    torch._dynamo.reset()
    function = {"rtk": _rtk, "eager": _eager, "torch.compile": torch.compile(_eager)}[peer]
    calls = []
    for seed in range(3):
        given = _inputs(shape, add, seed)
        wanted = [t for t in given[:4] if t is not None]
        upstream = torch.randn_like(given[0])
        out, expected = function(*given), _eager(*given)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)

        def forward(given=given):
            return function(*given)

        def backward(out=out, wanted=wanted, upstream=upstream):
            return torch.autograd.grad(out, wanted, upstream, retain_graph=True)

        calls.append(forward if direction == "forward" else backward)
    turns = itertools.cycle(calls)
    one_pass = given[0].numel() * given[0].element_size()
    passes = 3 + add if direction == "forward" else 5 + add
    measure(lambda: next(turns)(), bytes=passes * one_pass, device=DEVICE)
