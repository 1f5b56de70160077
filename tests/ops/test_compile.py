"""Every public op under torch.compile(fullgraph=True), forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache

from rtk import ops

G = torch.Generator().manual_seed(0)
X, W = torch.rand(2, 4, 7, 6, generator=G), torch.randn(6, 2, 3, 3, generator=G)
M = torch.rand(6, 2, 3, 3, generator=G) < 0.5
ROWS, LINEAR = torch.randn(2, 5, 6, generator=G), torch.randn(4, 6, generator=G)

# a function of floating leaves, and the leaves
CALLS = {
    "masked_conv2d": (
        lambda x, w: ops.masked_conv2d(x * 2, w, M, padding="same", groups=2).relu(),
        (X, W),
    ),
    "masked_conv2d-float-mask": (
        lambda x, w, m, b: ops.masked_conv2d(x, w, m.sigmoid(), b, (2, 1), 1, 1, 2),
        (X.to(memory_format=torch.channels_last), W, M[:, :, :1, :1].float(), W[:, 0, 0, 0]),
    ),
    "prepare_weight": (
        lambda w, m: ops.prepare_weight(w * 2, m, dtype=torch.float64, channels_last=True),
        (W, M.float()),
    ),
    "block_matmul": (
        lambda x, w, b: ops.block_matmul(x, w, b, (2, 3)).relu(),
        (ROWS, LINEAR, torch.eye(2)),
    ),
    "topk_mask": (lambda s: s * ops.topk_mask(s.abs(), 20), (W,)),
    "topk_mask_global": (
        lambda s, t: sum((u * m).sum() for u, m in zip((s, t), topk(s, t), strict=True)),
        (W, X),
    ),
    "pgd_step": (
        lambda x, g: x * ops.pgd_step(x.detach(), g.detach(), X, eps=0.1, step_size=0.1) * g,
        (X, X - 0.5),
    ),
    "pgd_init": (lambda x: ops.pgd_init(x.detach(), eps=0.1, norm="l2", seed=7) * x, (X,)),
    "pgd_init-seed": (
        lambda x, s: ops.pgd_init(x.detach(), eps=0.1, seed=s.detach().long()) * x * s,
        (X, torch.tensor([7.0])),
    ),
    "gaussian_noise": (
        lambda x: ops.gaussian_noise(x.detach(), sigma=0.1, seed=7, dtype=torch.float64) * x,
        (X,),
    ),
}


def topk(*scores):
    return ops.topk_mask_global(list(scores), 50)


def assert_same_compiled(function, given, **options) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    results = []
    for run in (function, compiled):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        out = run(*leaves)
        out.square().sum().backward()
        results.append((out.detach(), [leaf.grad for leaf in leaves]))
    (out, gradients), (compiled_out, compiled_gradients) = results
    assert compiled_out.stride() == out.stride()
    torch.testing.assert_close((compiled_out, compiled_gradients), (out, gradients))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    assert_same_compiled(*CALLS[name], backend="aot_eager")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_inductor_calls_the_op(last):
    """The op alone: what inductor itself compiles around it, in C++, would take half a minute."""
    format = torch.channels_last if last else torch.contiguous_format
    given = X.contiguous(memory_format=format), W, W[:, :1, :1, :1]
    with fresh_cache():  # its key does not hold the ops' schemas, which change during development
        assert_same_compiled(lambda *args: ops.masked_conv2d(*args, None, 1, 1, 1, 2), given)


def test_one_dynamic_graph_serves_every_batch_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x, w):
        x = ops.pgd_step(x, x - 0.5, x, eps=0.1, step_size=0.1)
        return ops.masked_conv2d(x, w, M, padding=1, groups=2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for n, size in [(5, 11), (7, 13), (9, 8)]:  # no size is another's too, nor a multiple
        x = torch.rand(n, 4, size, 10)
        gradients = []
        for run in (loss, compiled):
            w = W.clone().requires_grad_()
            run(x, w).backward()
            gradients.append(w.grad)
        torch.testing.assert_close(*gradients)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3


def test_compiled_autocast_matches_eager():
    torch._dynamo.reset()

    def forward(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.masked_conv2d(x, w, M, padding=1, groups=2)

    results = []
    for run in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        w = W.clone().requires_grad_()
        out = run(X, w)
        out.float().square().sum().backward()
        results.append((out.detach(), w.grad))
    torch.testing.assert_close(results[1], results[0])
    assert [tensor.dtype for tensor in results[1]] == [torch.bfloat16, torch.float32]
