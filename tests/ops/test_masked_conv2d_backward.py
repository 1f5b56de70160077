"""The gradients of masked_conv2d: exact zeros, gradcheck, autocast, and only what is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtk.errors import RtkError
from rtk.ops import masked_conv2d, prepare_weight, turn_filter
from rtk.ops.masked_conv2d import masked_conv2d_prepared

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
def test_another_path_changes_nothing(path, stride, turned, device):
    x = torch.randn(2, 128, 6, 5).to(device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 128, 3, 3).to(device)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 64:, 1] = True
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, ready = x.to(dtype), prepare_weight(weight, mask, dtype=dtype, channels_last=True)
    results = []
    for paths in (["cudnn", "cudnn"], [path, path]):
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
            stride=1, padding=1, dilation=2, groups=1, paths=("skip", "cudnn"),
        )  # fmt: skip
