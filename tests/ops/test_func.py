"""torch.func over the ops: vmap equals a loop, and gradients equal those of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rtk import ops
from rtk.errors import RtkError

G = torch.Generator().manual_seed(0)
X, W = torch.rand(3, 2, 4, 6, 5, generator=G), torch.randn(3, 6, 4, 3, 3, generator=G)
M = torch.rand(3, 6, 4, 3, 3, generator=G) < 0.5
LINEAR, ROWS = torch.randn(3, 4, 6, generator=G), torch.randn(5, 3, 6, generator=G)
BLOCKS = torch.rand(3, 2, 2, generator=G) < 0.5

VMAPS = {
    "masked_conv2d": (lambda x, w, m: ops.masked_conv2d(x, w, m, padding=1), (0, 0, 0), (X, W, M)),
    "masked_conv2d-masks": (
        lambda x, w, m: ops.masked_conv2d(x, w, m, padding=1),
        (None, None, 0),
        (X[0], W[0], M),
    ),
    "prepare_weight": (ops.prepare_weight, (None, 0), (W[0], M)),
    "block_matmul": (
        lambda x, w, b: ops.block_matmul(x, w, b, (2, 3)),
        (1, 0, 0),
        (ROWS, LINEAR, BLOCKS),
    ),
    "topk_mask": (lambda s: ops.topk_mask(s, 7), (0,), (LINEAR,)),
    "topk_mask_global": (
        lambda s, t: tuple(ops.topk_mask_global([s, t], 9)),
        (0, 1),
        (LINEAR, ROWS),
    ),
    "pgd_step": (
        lambda x, g: ops.pgd_step(x, g, x, eps=0.1, step_size=0.2, norm="l2"),
        (0, 0),
        (X, X - 0.5),
    ),
    "pgd_init": (lambda x: ops.pgd_init(x, eps=0.1, seed=2), (0,), (X,)),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_is_a_loop(name):
    function, dims, given = VMAPS[name]
    slices = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(given, dims, strict=True)]
        for i in range(3)
    ]
    looped = [function(*piece) for piece in slices]
    out = torch.func.vmap(function, in_dims=dims)(*given)
    if isinstance(out, tuple):
        assert torch.equal(out[0], torch.stack([piece[0] for piece in looped]))
        assert torch.equal(out[1], torch.stack([piece[1] for piece in looped]))
    else:
        assert torch.equal(out, torch.stack(looped))


def masked(x, w, m):
    return ops.masked_conv2d(x, w, m, padding=1).square().sum()


def plain(x, w, m):
    return F.conv2d(x, w * m, padding=1).square().sum()


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["input", "weight", "mask"])
def test_grad(argument):
    given = X[0], W[0], M[0].float()
    torch.testing.assert_close(
        torch.func.grad(masked, argument)(*given), torch.func.grad(plain, argument)(*given)
    )


def test_gradients_of_each_sample():
    def each(loss):
        return torch.func.vmap(torch.func.grad(loss, 1), in_dims=(0, None, None))

    given = X, W[0], M[0]
    torch.testing.assert_close(each(masked)(*given), each(plain)(*given), rtol=1e-5, atol=1e-4)


def test_grad_through_vmap():
    def ensemble(loss):
        return lambda x: torch.func.vmap(loss, in_dims=(None, 0, 0))(x, W, M).sum()

    torch.testing.assert_close(
        torch.func.grad(ensemble(masked))(X[0]),
        torch.func.grad(ensemble(plain))(X[0]),
        rtol=1e-5,
        atol=1e-4,
    )


def test_grad_of_a_block_product_and_of_a_prepared_weight():
    mask = BLOCKS[0].repeat_interleave(2, 0).repeat_interleave(3, 1)

    def blocks(w):
        return ops.block_matmul(ROWS, w, BLOCKS[0], (2, 3)).square().sum()

    def prepared(w):
        return (ROWS @ ops.prepare_weight(w, mask).t()).square().sum()

    wanted = torch.func.grad(lambda w: (ROWS @ (w * mask).t()).square().sum())(LINEAR[0])
    torch.testing.assert_close(torch.func.grad(blocks)(LINEAR[0]), wanted)
    torch.testing.assert_close(torch.func.grad(prepared)(LINEAR[0]), wanted)


def test_forward_mode_is_refused_rather_than_wrong():
    x, w = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1)
    with pytest.raises(RtkError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.masked_conv2d(x, w, w > 0), (x,), (x,))
