"""The gradients of masked_conv2d: exact zeros, gradcheck, autocast, and only what is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtk.errors import RtkError
from rtk.ops import _conv_paths, live_tiles, masked_conv2d, prepare_weight, turn_filter
from rtk.ops._conv_paths import CUDNN, NO_LISTS
from rtk.ops.masked_conv2d import masked_conv2d_prepared, transposed_convolution

OP = "masked_conv2d"


def tensors(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "input": torch.randn(2, 5, 7, 9).to(device, dtype),
        "weight": torch.randn(6, 5, 3, 3).to(device, dtype),
        "mask": (torch.rand(6, 5, 3, 3) < 0.4).to(device),
        "bias": torch.randn(6).to(device, dtype),
    }


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_pruned_weight_may_hold_anything_and_gets_no_gradient(poison, backend, device):
    given = tensors(device)
    clean = masked_conv2d(**given)
    given["weight"] = given["weight"].masked_fill(~given["mask"], poison).requires_grad_()
    given["input"].requires_grad_()
    out = masked_conv2d(**given)
    assert torch.equal(out, clean)
    out.square().sum().backward()
    assert given["input"].grad.isfinite().all()
    assert torch.equal(
        given["weight"].grad[~given["mask"]],
        torch.zeros(int((~given["mask"]).sum()), device=device),
    )
    assert (given["weight"].grad[given["mask"]] != 0).all()


def test_a_pruned_weight_gets_no_gradient_even_where_the_dense_one_overflows(backend, device):
    given = tensors(device)
    given["weight"].requires_grad_()
    masked_conv2d(**given).backward(torch.full((2, 6, 5, 7), torch.inf, device=device))
    assert not given["weight"].grad[~given["mask"]].any()
    assert not given["weight"].grad[given["mask"]].isfinite().any()


def test_the_gradient_of_an_fp32_bias_is_summed_in_fp32(backend, device):
    given = tensors(device) | {"input": torch.randn(1, 5, 35, 33, device=device).bfloat16()}
    given["bias"].requires_grad_()
    masked_conv2d(**given).sum().backward()
    assert given["bias"].grad.tolist() == [33.0 * 31.0] * 6, "1023 is no bfloat16"


def test_a_second_derivative_is_refused():
    given = tensors("cpu")
    weight = given["weight"].requires_grad_()
    loss = masked_conv2d(**given).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "mask",
    [(3, 2, 2, 3), (3, 2, 2, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 2, 3), (1, 2, 1, 3), (3,), ()],
    ids=str,
)
def test_gradcheck(mask):
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    def op(*args: Tensor) -> Tensor:
        return masked_conv2d(*args, stride=(1, 2), padding=1)

    given = (leaf(2, 2, 4, 3), leaf(3, 2, 2, 3), leaf(*mask), leaf(3))
    assert torch.autograd.gradcheck(op, given)


class Calls(TorchDispatchMode):
    """Records the names of the rtk ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rtk":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("needed", "input_saved", "backward_ops"),
    [
        ("input", False, {"masked_conv2d_bwd_input"}),
        ("bias", False, set()),
        ("weight", True, {"masked_conv2d_bwd_weight"}),
        ("mask", True, {"masked_conv2d_bwd_weight"}),
    ],
)
def test_only_what_is_needed_is_saved_and_computed(needed, input_saved, backward_ops):
    given = tensors("cpu")
    given["mask"] = given["mask"].float()
    given[needed].requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t
    ):
        out = masked_conv2d(**given)
    assert (given["input"].data_ptr() in saved) is input_saved
    with Calls() as calls:
        out.sum().backward()
    assert {name for name in calls.names if "bwd" in name} == backward_ops
    assert given[needed].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in given.items() if name != needed)


def test_the_weight_is_prepared_once_for_both_passes():
    given = tensors("cpu")
    given["input"].requires_grad_(), given["weight"].requires_grad_()
    with Calls() as calls:
        masked_conv2d(**given).sum().backward()
    assert calls.names.count("prepare_weight") == 1


def test_a_weight_prepared_before_gives_the_same():
    results = []
    for before in (False, True):
        torch.manual_seed(0)
        given = tensors("cpu")
        leaves = [given[name].requires_grad_() for name in ("input", "weight", "bias")]
        if before:
            ready = prepare_weight(given["weight"].detach(), given["mask"])
            options = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
            out = masked_conv2d_prepared(prepared=ready, turned=None, **given, **options)
        else:
            out = masked_conv2d(**given, padding=1)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_prepared_weight_that_does_not_fit_is_refused():
    given = tensors("cpu")
    for wrong in (given["weight"][1:], given["weight"].bfloat16()):
        with pytest.raises(RtkError, match="prepared must be"):
            masked_conv2d_prepared(
                prepared=wrong, turned=None, **given, stride=1, padding=0, dilation=1, groups=1
            )


AUTOCAST = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("place", "dtype"), AUTOCAST)
def test_autocast_computes_low_and_returns_fp32_gradients(place, dtype, assert_like_formula):
    given = tensors(place)

    def op(*args: Tensor) -> Tensor:
        with torch.autocast(place, dtype):
            out = masked_conv2d(*args, padding=1)
        assert out.dtype == dtype
        return out

    assert_like_formula(op, lambda x, w, m, b: F.conv2d(x, w * m, b, padding=1), **given)


def test_autocast_leaves_float64_alone():
    given = tensors("cpu", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_conv2d(**given)
    assert torch.equal(out, masked_conv2d(**given))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("path", ["skip", "sparse"])
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_another_path_changes_nothing(path, format, stride, turned, device):
    x = torch.randn(2, 128, 6, 5).to(device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 128, 3, 3).to(device).contiguous(memory_format=format)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 64:, 1] = True
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, ready = x.to(dtype), prepare_weight(weight, mask, dtype=dtype, channels_last=True)
    results = []
    for paths in (CUDNN, [path, path, "skip"]):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        given = *leaves, mask, ready, turn_filter(ready) if turned else None, None
        out = masked_conv2d_prepared(*given, stride, 1, 1, 1, paths)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append([t.float() for t in (out.detach(), *grads)])
    tolerance = 2e-2 if device == "cuda" else 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_a_path_that_cannot_be_is_refused():
    given = tensors("cpu")
    bias = given.pop("bias")
    with pytest.raises(RtkError, match=r"path 'skip' cannot be.*groups or dilation"):
        masked_conv2d_prepared(
            **given, prepared=given["weight"], turned=None, bias=bias,
            stride=1, padding=1, dilation=2, groups=1, paths=("skip", "cudnn", "cudnn"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "paths", "density", "words"),
    [
        (2, ("cudnn", "cudnn", "skip"), 0.5, r"'skip' of the weight gradient cannot be: it has gr"),
        (1, ("cudnn", "cudnn", "sparse"), 0.5, r"path of the weight gradient.*sparse"),
        (1, ("cudnn", "cudnn", "blocks64"), 0.5, r"'blocks64' of the weight gr.*1x1 filters of st"),
        (1, ("cudnn", "cudnn", "skip"), 1.5, r"density must be 0 to 1, got 1\.5"),
        (1, ("cudnn", "cudnn"), 0.5, r"of the forward, of the input's and of the weight's.*2, 3"),
    ],
)
def test_a_path_of_the_weight_gradient_that_cannot_be_is_refused(groups, paths, density, words):
    weight = torch.randn(4, 4 // groups, 3, 3)
    given = torch.randn(2, 4, 5, 5), weight, weight > 0, weight, None, None
    with pytest.raises(RtkError, match=words):
        masked_conv2d_prepared(*given, 1, 1, 1, groups, paths, NO_LISTS, [0.5, 0.5, density])


@pytest.fixture
def skipped():
    """A layer of 2 x 2 blocks a tap whose mask keeps some of the first, and what it was given."""
    weight = torch.randn(128, 72, 3, 3).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:64, :64, 1] = torch.rand(64, 64, 3) < 0.5
    x, grad = torch.randn(3, 72, 6, 5), torch.randn(3, 128, 6, 5)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, x)]
    return *last, weight, mask


def dense_gradient(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    leaf = weight.double().requires_grad_()
    out = F.conv2d(x.double(), leaf, padding=1)
    return torch.autograd.grad(out, leaf, grad.double())[0] * mask


@pytest.mark.parametrize("made_before", [True, False])
def test_a_kept_weight_that_is_zero_gets_a_gradient(made_before, skipped):
    grad, x, weight, mask = skipped
    wanted = dense_gradient(*skipped)
    weight.zero_()
    words = live_tiles(mask) if made_before else None
    conv = [1, 1], [1, 1], [1, 1]
    found = _conv_paths.bwd_weight("skip", words, grad, x, weight, mask, *conv, 0.25)
    assert found.dtype == torch.float32 and found.stride() == weight.stride()
    torch.testing.assert_close(found, wanted.float())
    assert not found[~mask].any() and (found[mask] != 0).all()


@pytest.mark.parametrize("shape", [(128, 1, 1, 1), (128, 72, 1, 1)], ids=str)
def test_a_mask_that_is_broadcast_may_skip(shape, skipped):
    grad, x, weight, _ = skipped
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[3:60] = True
    found = _conv_paths.bwd_weight("skip", None, grad, x, weight, mask, [1, 1], [1, 1], [1, 1])
    torch.testing.assert_close(found, dense_gradient(grad, x, weight, mask).float())


def test_which_weight_gradients_may_skip(skipped):
    grad, x, weight, mask = skipped
    grad, x = grad.bfloat16(), x.bfloat16()
    assert _conv_paths.takes_bwd_weight("skip", grad, x, weight, mask, False)
    for refused in (
        ("cudnn", grad, x, weight, mask, False),
        ("skip", grad.float(), x, weight, mask, False),
        ("skip", grad, x.contiguous(), weight, mask, False),
        ("skip", grad, x, weight.bfloat16(), mask, False),
        ("skip", grad, x, weight.contiguous(), mask, False),
        ("skip", grad, x, weight, mask.float(), False),
        ("skip", grad, x, weight, mask, True),
    ):
        assert not _conv_paths.takes_bwd_weight(*refused)


@pytest.mark.gpu
@pytest.mark.parametrize("made_before", [True, False])
def test_a_weight_gradient_skips_on_a_gpu(made_before, skipped):
    grad, x, weight, mask = (
        t.cuda().contiguous(memory_format=torch.channels_last) for t in skipped
    )
    grad, x = grad.bfloat16(), x.bfloat16()
    wanted = dense_gradient(grad, x, weight, mask).float()
    ready = prepare_weight(weight, mask, dtype=torch.bfloat16, channels_last=True)
    words = live_tiles(mask) if made_before else None
    leaf = weight.requires_grad_()
    how = 1, 1, 1, 1, ("cudnn", "cudnn", "skip"), (None, None, words)
    out = masked_conv2d_prepared(x, leaf, mask, ready, None, None, *how)
    (found,) = torch.autograd.grad(out, leaf, grad)
    assert found.dtype == torch.float32 and found.stride() == weight.stride()
    # Nothing was rounded to bf16, as cuDNN's dense gradient is.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not found[~mask].any()


@pytest.mark.parametrize("size", [(9, 9), (8, 11)], ids=str)
@pytest.mark.parametrize("filter", [(1, 1), (3, 3), (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)], ids=str)
def test_an_input_gradient_is_a_transposed_convolution(size, filter, stride, dilation):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, *filter, dtype=torch.float64)
    for padding in ([0, 0], [1, 1], [3, 0]):
        out = F.conv2d(x, weight, None, stride, padding, dilation)
        grad = torch.randn_like(out)
        [expected] = torch.autograd.grad(out, x, grad)
        actual = transposed_convolution(grad, weight, x.shape, stride, padding, dilation)
        torch.testing.assert_close(actual, expected)
