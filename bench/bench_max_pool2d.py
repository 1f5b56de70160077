"""max_pool2d of a ResNet-50's stem against PyTorch's, eager and compiled; bf16, channels_last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rtk

SHAPE = (128, 64, 112, 112)
LAST = torch.channels_last

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def _plain(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2, 1)


@pytest.mark.parametrize("peer", ["rtk", "eager", "torch.compile"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_max_pool2d(direction, peer, measure, benchmark):
    benchmark.group = f"max_pool2d {direction} {'x'.join(map(str, SHAPE))}"
    torch._dynamo.reset()
    function = {
        "rtk": rtk.ops.max_pool2d,
        "eager": _plain,
        "torch.compile": torch.compile(_plain),
    }[peer]
    x = torch.randn(SHAPE, device="cuda").bfloat16().contiguous(memory_format=LAST)
    x = x.requires_grad_(direction == "backward")
    out = function(x)
    torch.testing.assert_close(out, _plain(x), rtol=0, atol=0)
    # Images, pooled ones, and a byte a maximum.
    work = x.nbytes + out.nbytes + out.numel()
    if direction == "forward":
        measure(lambda: function(x), bytes=work, device="cuda")
        return
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
    wanted = torch.autograd.grad(_plain(x), x, grad)[0]
    torch.testing.assert_close(mine, wanted, rtol=2e-2, atol=2e-2)
    measure(lambda: torch.autograd.grad(out, x, grad, retain_graph=True), bytes=work, device="cuda")
