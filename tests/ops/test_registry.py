"""How an op chooses its backend, what forcing one means, and where checks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rtk
from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import block_matmul
from rtk.ops._registry import Op, ops, require


def _check(x):
    require(x.dim() == 1, "twice: x must be 1-D, got %d-D", x.dim())


@pytest.fixture(scope="module")
def twice():
    """An op whose backends tell who ran: cpu (short tensors only) adds 0.25, the reference 0.5."""
    op = Op("test_twice(Tensor x) -> Tensor", _check, torch.empty_like)
    op.implementation("cpu", lambda x: None if len(x) < 4 else "too long")(lambda x: 2 * x + 0.25)
    op.implementation("reference")(lambda x: 2 * x + 0.5)
    yield op
    del ops["test_twice"]


SHORT, LONG = torch.ones(2), torch.ones(9)


def test_the_first_backend_that_serves_runs(twice):
    assert twice(SHORT).tolist() == [2.25] * 2
    assert twice(LONG).tolist() == [2.5] * 9


def test_a_forced_backend_runs_or_raises_and_is_given_back(twice):
    with forced("reference"):
        assert twice(SHORT).tolist() == [2.5] * 2
        with forced("cpu"):
            assert twice(SHORT).tolist() == [2.25] * 2
            with pytest.raises(
                RtkError, match=r"test_twice: the forced backend 'cpu' .*: too long"
            ):
                twice(LONG)
            with forced(None):
                assert twice(LONG).tolist() == [2.5] * 9
        assert twice(SHORT).tolist() == [2.5] * 2
        with pytest.raises(KeyError), forced("cpu"):
            raise KeyError
        assert twice(SHORT).tolist() == [2.5] * 2
    assert twice(SHORT).tolist() == [2.25] * 2


def test_a_backend_that_the_op_has_not(twice):
    message = "test_twice: there is no backend 'triton', only cpu, reference"
    with forced("triton"), pytest.raises(RtkError, match=message):
        twice(SHORT)


def test_an_unknown_backend():
    message = r"unknown backend 'tritn'.*did you mean 'triton'"
    with pytest.raises(RtkError, match=message), forced("tritn"):
        raise AssertionError("not reached")


def test_the_check_runs_in_eager_and_in_the_fake(twice):
    with pytest.raises(RtkError, match="twice: x must be 1-D, got 2-D"):
        twice(SHORT[None])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(SHORT)
        assert twice(fake).shape == SHORT.shape
        with pytest.raises(RtkError, match="twice: x must be 1-D, got 2-D"):
            twice(fake[None])


def test_forcing_covers_the_backward():
    w = torch.ones(2, 2, requires_grad=True)
    out = block_matmul(torch.ones(1, 2), w, torch.ones(2, 2) > 0, 1)
    with forced("cuda"), pytest.raises(RtkError, match=r"block_matmul_bwd_weight.*'cuda'"):
        out.sum().backward()


@pytest.mark.parametrize("name", sorted(ops))
def test_every_op_ends_in_a_reference(name):
    backends = [implementation.backend for implementation in ops[name].implementations]
    assert backends.index("reference") == len(backends) - 1
    assert set(backends) <= set(rtk.ops.BACKENDS)


PROGRAM = """
import torch, rtk
try:
    print(rtk.ops.topk_mask(torch.tensor([1.0, 2.0]), 1).tolist())
except rtk.RtkError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("triton", r"topk_mask: .*backend 'triton'"),
        ("referense", r"unknown backend \(RTK_BACKEND\) 'referense'"),
    ],
)
def test_the_environment_forces_a_backend(value, words):
    environment = os.environ | {"RTK_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert re.match(words, answer.stdout), answer.stderr
