"""torch.library.opcheck on every operator: schema, autograd registration, fake, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtk.ops import backend as forced
from rtk.ops import pack_positive, sparse_columns
from rtk.ops._registry import ops


def randn(*shape: int, grad: bool = False, last: bool = False, dtype=torch.float32) -> Tensor:
    tensor = torch.randn(*shape).to(dtype)
    if last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_(grad)


def boolean(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.5


CONV = ([2, 1], [1, 2], [1, 1], 2)  # stride, padding, dilation, groups
ONCE = ([1, 1], [1, 1], [1, 1], 1)
OUT = (2, 6, 4, 8)  # of (2, 4, 7, 6) under CONV with a 3x3 filter
LIVE = ([1, 1], [1, 1], [1, 1])
LINF = {"eps": 0.1, "norm": "linf", "clip_min": 0.0, "clip_max": 1.0}
L2 = LINF | {"norm": "l2"}
STEP = {"step_size": 0.05}
NOISE = {"sigma": 0.3, "dtype": torch.float32}
FUSED = {
    "relu": False,
    "stride": 1,
    "padding": 1,
    "upsample": 1,
    "out_size": None,
    "residual_stride": 1,
    "save_positive": False,
}
S3 = {"stride": 1, "padding": 1, "pool": False}
S7 = {"stride": 2, "padding": 3, "pool": True}
BACKWARD = {"input_size": [2, 3, 4, 5], "dtype": torch.float32, "channels_last": False}
HALF = torch.bfloat16
CUDNN = ("cudnn", "cudnn", "cudnn", None, None, None, [0.25] * 3)
WORDS = torch.ones(1, 9, dtype=torch.int64)
OTHERS = ("skip", "sparse", "skip", WORDS, None, WORDS, [0.5, 0.5, 0.1])
DENSE = ("cudnn", None, 0.25)
SKIPS = ("skip", WORDS, 0.5)


def samples() -> dict[str, list[tuple[tuple, dict]]]:
    """Return arguments for every operator of the namespace."""
    x, x_last = randn(2, 4, 7, 6, grad=True), randn(2, 4, 7, 6, grad=True, last=True)
    w, w_last = randn(6, 2, 3, 3, grad=True), randn(6, 2, 3, 3, grad=True, last=True)
    m = boolean(6, 2, 3, 3)
    float_mask, bias = randn(6, 1, 1, 1, grad=True), randn(6, grad=True)
    half = randn(2, 4, 7, 6, dtype=torch.bfloat16)
    empty = randn(0, 4, 7, 6, grad=True)
    up, up_last = randn(*OUT), randn(*OUT, last=True)
    bx, bw = randn(2, 5, 6, grad=True), randn(4, 6, grad=True)
    blocks, float_blocks = boolean(2, 2), randn(2, 2, grad=True)
    image, image_last = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5).to(memory_format=LAST)
    bytes_ = (image * 255).to(torch.uint8)
    scores = [torch.randn(3, 4), torch.randn(5), torch.randn(0)]
    w_full, small = randn(6, 4, 3, 3, grad=True), randn(2, 6, 7, 6)
    w3, w7, b, c = randn(8, 3, 3, 3), randn(8, 3, 7, 7), randn(8), torch.rand(3) + 0.1
    no_index, words = torch.empty(0, dtype=torch.uint8), torch.ones(1, 9, dtype=torch.int64)
    middle = torch.full((2, 8, 1, 2), 4, dtype=torch.uint8)
    bn, small_grad = torch.rand(4) + 0.5, randn(2, 4, 7, 6)
    bits = torch.randint(16, (2, 7, 6, 1), dtype=torch.uint8)
    columns = sparse_columns(w_full.detach().bfloat16())
    return {
        "masked_conv2d": [
            ((x, w, m, bias, *CONV), {}),
            ((x_last, w, float_mask, None, *CONV), {}),
            ((x, w_last, m, bias, *CONV), {}),
            ((half, w, m, bias, *CONV), {}),
            ((empty, w, float_mask, bias, *CONV), {}),
        ],
        "masked_conv2d_bwd_input": [
            ((up, w.detach(), None, [2, 4, 7, 6], *CONV, "cudnn", None, 0.5), {}),
            ((up_last, w_last.detach(), None, [2, 4, 7, 6], *CONV, "cudnn", None, 0.5), {}),
            ((up[:0], w.detach(), None, [0, 4, 7, 6], *CONV, "cudnn", None, 0.5), {}),
            ((small, w_full.detach(), None, [2, 4, 7, 6], *ONCE, "skip", None, 0.5), {}),
        ],
        "masked_conv2d_prepared": [
            ((x, w, m, w.detach(), None, bias, *CONV, *CUDNN), {}),
            ((x_last, w, float_mask, w_last.detach(), None, None, *CONV, *CUDNN), {}),
            ((half, w, m, w.detach().bfloat16(), None, bias, *CONV, *CUDNN), {}),
            ((x, w_full, w_full > 0, w_full.detach(), None, None, *ONCE, *OTHERS), {}),
        ],
        "masked_conv2d_bwd_weight": [
            ((up, x.detach(), w.detach(), m, *CONV, [True, False], *DENSE), {}),
            ((up, x.detach(), w.detach(), float_mask.detach(), *CONV, [False, True], *DENSE), {}),
            (
                (up_last, x_last.detach(), w_last.detach(), m.float(), *CONV, [True, True], *DENSE),
                {},
            ),
            (
                (small, x.detach(), w_full.detach(), w_full > 0, *ONCE, [True, False], *SKIPS),
                {},
            ),
        ],
        "prepare_weight": [
            ((w, m, torch.float32, False), {}),
            ((w_last, m, torch.bfloat16, True), {}),
            ((w, float_mask, torch.float32, True), {}),
            ((bw, m[0, 0, :1, :1], torch.float16, False), {}),
        ],
        "block_matmul": [
            ((bx, bw, blocks, [2, 3]), {}),
            ((bx[0, 0], bw, float_blocks, [2, 3]), {}),
            ((bx.transpose(0, 1), bw, float_blocks, [2, 3]), {}),
        ],
        "block_matmul_bwd_input": [((randn(2, 5, 4), bw.detach(), blocks, [2, 3]), {})],
        "block_matmul_bwd_weight": [
            ((randn(2, 5, 4), bx.detach(), bw.detach(), blocks, [2, 3], [True, False]), {}),
            ((randn(2, 5, 4), bx.detach(), bw.detach(), blocks.float(), [2, 3], [True, True]), {}),
        ],
        "fused_conv2d": [
            ((x, w_full, bias, None, None), FUSED | {"relu": True, "stride": 2}),
            ((half.detach(), w_full.detach().bfloat16(), None, None, None), FUSED),
            (
                (x_last.detach(), w_full.detach(), None, small, randn(2, 6, 14, 12)),
                FUSED | {"upsample": 2, "out_size": [14, 12], "residual_stride": 2},
            ),
            ((empty, w_full, None, None, None), FUSED),
            ((x, w_full, bias, small, None), FUSED | {"relu": True, "save_positive": True}),
            ((x.detach(), w_full.detach(), None, None, pack_positive(small)), FUSED),
            ((x.detach(), w_full.detach(), None, None, None, words), FUSED | {"density": 0.5}),
        ],
        "live_blocks": [((bw, 2), {}), ((randn(6, 4, dtype=HALF).t(), 2), {}), ((m[0, 0], 3), {})],
        "live_tiles": [((w_full,), {}), ((m,), {}), ((half[:, :, :3, :3],), {})],
        "sparse_columns": [(([w_full.bfloat16(), half[:, :, :3, :2].detach()],), {})],
        "sparse_conv2d": [
            ((half.detach(), columns, [6, 4, 3, 3], None, 2, 1, 1, None), {}),
            ((half.detach(), columns, [6, 4, 3, 3], bias, 1, 2, 2, [14, 12]), {}),
            ((half.detach()[:0], columns, [6, 4, 3, 3], None, 1, 1, 1, [5, 5]), {}),
        ],
        "conv2d_bwd_weight_live": [
            ((small, x, words, [6, 4, 3, 3], *LIVE, float_mask, True, 0.5), {}),
            ((small.bfloat16(), half, words, [6, 4, 3, 3], *LIVE, None, False, 0.5), {}),
            ((small[:0], empty, words, [6, 4, 3, 3], *LIVE, m[:, :1], False, 0.5), {}),
        ],
        "batch_norm_stats": [
            ((half.detach(), torch.zeros(4), torch.ones(4), torch.tensor(2), 0.1), {}),
            ((x_last.detach(), None, None, None, 0.1), {}),
        ],
        "batch_norm_act": [
            ((x_last, x, bn, bn, randn(4, grad=True), None, True, 1e-5, True, True), {}),
            ((half, None, bn, bn, bn, bn, False, 1e-5, False, False), {}),
            ((x, x_last, bn, bn, None, randn(4, grad=True), False, 1e-5, True, False), {}),
        ],
        "batch_norm_act_bwd": [
            ((small_grad, x.detach(), bits, bn, bn, bn, True, 1e-5, [True] * 4), {}),
            ((small_grad, None, None, bn, bn, None, False, 1e-5, [True, *[False] * 3]), {}),
        ],
        "stem_conv2d": [
            ((image, w3, b, c, c), S3 | {"save_positive": True}),
            ((image_last.bfloat16(), w7, b, c, c), S7 | {"save_positive": False}),
        ],
        "stem_conv2d_bwd_input": [
            ((randn(2, 8, 4, 5, dtype=HALF), no_index, w3, c), S3 | BACKWARD),
            ((randn(2, 8, 1, 2, dtype=HALF), middle, w7, c), S7 | BACKWARD),
        ],
        "max_pool2d": [((x,), {}), ((x_last.bfloat16(),), {})],
        "max_pool2d_bwd": [
            ((randn(2, 4, 4, 3), torch.full((2, 4, 4, 3), 4, dtype=torch.uint8), [7, 6]), {})
        ],
        "topk_mask": [((scores, [3, 5, 0]), {})],
        "topk_mask_global": [((scores, 9), {})],
        "pgd_step": [
            ((image, randn(2, 3, 4, 5), image), LINF | STEP),
            ((image.clone().requires_grad_(), randn(2, 3, 4, 5), image), LINF | STEP),
            ((image_last, randn(2, 3, 4, 5).bfloat16(), bytes_), L2 | STEP),
        ],
        "pgd_init": [
            ((image.clone().requires_grad_(),), LINF | {"seed": 3}),
            ((bytes_,), LINF | {"seed": 3}),
            ((image_last,), L2 | {"seed": 2**40}),
            ((image, torch.tensor([5])), L2 | {"seed": 0}),
        ],
        "gaussian_noise": [
            ((image.clone().requires_grad_(),), NOISE | {"seed": 3}),
            ((bytes_,), NOISE | {"seed": 3}),
            ((image_last, torch.tensor(5)), NOISE | {"seed": 0, "dtype": torch.bfloat16}),
        ],
    }


LAST = torch.channels_last
SAMPLES = [
    (name, i, backend)
    for name, calls in samples().items()
    for i in range(len(calls))
    for backend in ("reference", "cpu")
    if any(backend == implementation.backend for implementation in ops[name].implementations)
]


def test_every_operator_has_a_sample():
    assert set(samples()) == set(ops)


@pytest.mark.parametrize(("name", "index", "backend_name"), SAMPLES, ids=lambda value: str(value))
def test_opcheck(name, index, backend_name):
    args, kwargs = samples()[name][index]
    with forced(backend_name):
        torch.library.opcheck(ops[name].overload, args, kwargs)
