"""What every test shares: seeds, threads, devices, backends, the comparison with a formula.

A test that takes `device` runs on the CPU and, marked `gpu`, on a GPU. A test that takes `backend`
runs once for each implementation of its module's `OP`, forced, and on the device that goes with it.
The compiled module is no option: without it the tests of the "cpu" backend fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import rtk
from rtk.ops import _block_paths
from rtk.ops._registry import ops

Compare = Callable[..., None]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where torch sees none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


def _places(op: str) -> list[object]:
    """Return (backend, device) for every implementation of `op`; the reference runs on both."""
    places: list[object] = []
    for backend in dict.fromkeys(i.backend for i in ops[op].implementations):
        if backend in ("reference", "cpu"):
            places.append(pytest.param(backend, "cpu", id=backend))
        if backend != "cpu":
            places.append(
                pytest.param(backend, "cuda", marks=pytest.mark.gpu, id=f"{backend}-on-gpu")
            )
    return places


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "backend" in names:
        places = _places(metafunc.module.OP)
        metafunc.parametrize(("backend", "device"), places, indirect=["backend"])
    elif "device" in names:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with rtk.ops.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small, and OpenMP's threads wait for each other on a machine that is shared."""
    with _threads(1):
        yield


@pytest.fixture(scope="session")
def one_cpu_thread() -> Callable[[], AbstractContextManager[None]]:
    """`with one_cpu_thread():` whole stages run where their bits do not depend on the machine."""

    @contextmanager
    def run() -> Iterator[None]:
        with _threads(1), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            yield

    return run


@pytest.fixture
def one_cpu_thread_unless_gpu(
    one_cpu_thread: Callable[[], AbstractContextManager[None]], request: pytest.FixtureRequest
) -> Iterator[None]:
    """For folders of tests that run whole stages; those marked `gpu` see their GPU."""
    gpu = request.node.get_closest_marker("gpu")
    with nullcontext() if gpu else one_cpu_thread():
        yield


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which operators of block_matmul masked layers run, in their order."""
    ran: list[str] = []
    run = _block_paths._run

    def note(name: str, *args: object) -> Tensor:
        ran.append(name)
        return run(name, *args)

    monkeypatch.setattr(_block_paths, "_run", note)
    return ran


@pytest.fixture
def two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may use TF32 by default, which is no error but hides one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return `tensor` as a leaf that requires grad where it can, with the same strides."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def _close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype] * scale,
        msg=lambda text: f"{name}: {text}",
    )


@pytest.fixture
def assert_like_formula() -> Compare:
    """Compare an op with a formula in float64: the value and the gradient of every float tensor.

    `named` holds the tensors in the order of the arguments of `op` and `formula`; the comparison
    is as exact as the least exact dtype among the result and the tensors allows.
    """

    def compare(
        op: Callable[..., Tensor], formula: Callable[..., Tensor], **named: Tensor | None
    ) -> None:
        mine = {name: _leaf(tensor) for name, tensor in named.items()}
        exact = {name: _leaf(tensor, torch.float64) for name, tensor in named.items()}
        out, expected = op(*mine.values()), formula(*exact.values())
        dtypes = [t.dtype for t in (out, *mine.values()) if t is not None and t.dtype in TOLERANCE]
        loosest = max(dtypes, key=TOLERANCE.__getitem__)
        assert out.shape == expected.shape
        _close("value", out, expected, loosest)

        upstream = torch.randn(expected.shape, device=out.device).to(out.dtype)
        out.backward(upstream)
        expected.backward(upstream.double())
        for name, tensor in mine.items():
            if tensor is None or not tensor.requires_grad:
                continue
            assert tensor.grad is not None, f"no gradient for {name}"
            assert tensor.grad.dtype == tensor.dtype
            _close(f"gradient of {name}", tensor.grad, exact[name].grad, loosest)

    return compare
